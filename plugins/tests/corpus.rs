//! Components that do not come from here as they are now: without the SDK, and for WASI. They were built when the interface was new.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use vm_plugin::{
    CallError, Finding, Granted, Hook, Input, Outcome, Plugin, PluginError, Query, Resolved, Resolver,
    call::{Change, Job, LogLevel},
    plan::{Condition, Content, GuestPart, HostEffect, MachinePart, RefName},
    ports::{
        Blob, Difference, Directory, FileMode, GuestCommand, GuestOutput, MemoryBlob, RepoFacts, Repository,
        Sandbox, StateScope,
    },
};

use crate::host::{Source, corpus, granted, input, load, state};

async fn kept(name: &str, config: Value) -> Plugin {
    load(Source::Corpus, name, config).await
}

#[test]
fn all_of_it_is_here_and_small() {
    let mut size = 0;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(corpus()).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            names.push(entry.file_name().into_string().unwrap());
            let files = std::fs::read_dir(entry.path()).unwrap();
            size += files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>();
        }
    }
    names.sort();
    let known = ["ambient", "bring", "full", "limits", "names", "nat", "provision", "work-disk", "zone"];
    assert_eq!(names, known, "each of these is tested by its name");
    assert!(size < 1 << 20, "{size} bytes");
}

#[tokio::test]
async fn every_kind_of_effect_is_planned() {
    let (plugin, state) = (kept("full", json!({})).await, state());
    assert!(Hook::CAPABILITY.into_iter().all(|hook| plugin.has(hook)));
    let plan = async |hook| plugin.call(hook, input(), &state).await.unwrap().plan;

    let guest = plan(Hook::ContributeGuest).await.guest;
    assert!(
        matches!(&guest[..], [
            GuestPart::File { path, content: Content::Bytes(motd), mode: 0o644, uid: 0, gid: 0 },
            GuestPart::Environment { name, value },
            GuestPart::HostsEntry { .. },
            GuestPart::MountDrive { serial, target, filesystem, .. },
            GuestPart::Mount { .. },
            GuestPart::KernelModule { name: module },
            GuestPart::Unit { .. },
            GuestPart::BootCommand { command },
        ] if path == "/etc/motd" && motd == b"Welcome to dev\n" && name == "VM_NAME" && value == "dev"
            && serial == "work" && target == "/work" && filesystem == "ext4" && module == "overlay"
            && command == &["/bin/true"]),
        "{guest:?}"
    );

    let machine = plan(Hook::ContributeMachine).await.machine;
    let source = RefName("work".to_owned());
    assert_eq!(machine[0], MachinePart::Drive { serial: "work".to_owned(), source, read_only: false });
    assert_eq!(machine.len(), 6, "{machine:?}");

    let host = plan(Hook::PrepareHost).await.host;
    assert!(
        matches!(&host[..], [
            HostEffect::Disk { size_bytes: 0x4000_0000, .. },
            HostEffect::Forwarding,
            HostEffect::FirewallRule(rule),
            HostEffect::PublishPort { .. },
            HostEffect::DnsRecord { .. },
            HostEffect::BridgeSysctl { .. },
            HostEffect::Tool { .. },
            HostEffect::File { .. },
        ] if matches!(&rule.conditions[..], [Condition::Source(_), Condition::ToDevice(_)])),
        "{host:?}"
    );
}

/// A guest in which every command is `cat`.
#[derive(Default)]
struct Echo(Mutex<BTreeMap<String, Vec<u8>>>);

#[async_trait]
impl Sandbox for Echo {
    async fn run(&self, command: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        let input = command.input.ok_or_else(|| PluginError::new("guest.no-input", "cat of nothing"))?;
        let stdout = input.read(0, usize::MAX).await?;
        Ok(GuestOutput { code: Some(0), stdout, ..GuestOutput::default() })
    }

    async fn write_file(&self, path: &str, content: Arc<dyn Blob>, _: FileMode) -> Result<(), PluginError> {
        let content = content.read(0, usize::MAX).await?;
        self.0.lock().unwrap().insert(path.to_owned(), content);
        Ok(())
    }

    async fn read_file(&self, path: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        let files = self.0.lock().unwrap();
        files.get(path).cloned().ok_or_else(|| PluginError::new("guest.no-file", path))
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(MemoryBlob(self.read_file(path, usize::MAX).await?.into())))
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        _: u32,
        _: u32,
    ) -> Result<(), PluginError> {
        let content = archive.read(0, usize::MAX).await?;
        self.0.lock().unwrap().insert(directory.to_owned(), content);
        Ok(())
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        Ok(!self.0.lock().unwrap().contains_key(directory))
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        self.remove(directory).await
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.0.lock().unwrap().remove(path);
        Ok(())
    }
}

#[tokio::test]
async fn guest_state_and_references_are_reached() {
    let (plugin, state, guest) = (kept("full", json!({})).await, state(), Arc::new(Echo::default()));
    let live = Input {
        sandbox: Some(guest.clone()),
        references: [(RefName("web".to_owned()), "127.0.0.1:49152".to_owned())].into(),
        ..input()
    };
    plugin.call(Hook::PostStart, live.clone(), &state).await.unwrap();
    assert_eq!(guest.0.lock().unwrap()["/tmp/out"], b"through the guest");
    let get = async |key| state.get("full", &StateScope::Plugin, key).await.unwrap();
    assert_eq!(get("port").await.as_deref(), Some(b"127.0.0.1:49152".as_slice()));
    let deleted = Input { reason: "deleted".to_owned(), ..input() };
    plugin.call(Hook::Cleanup, deleted, &state).await.unwrap();
    assert_eq!(get("last-end").await.as_deref(), Some(b"deleted".as_slice()));

    let change = |from: u32, to: u32| Input {
        former_config: Some(json!({ "most_cpus": from })),
        config: Some(json!({ "most_cpus": to })),
        ..live.clone()
    };
    let change =
        async |from, to| plugin.call(Hook::ConfigChange, change(from, to), &state).await.unwrap().change;
    assert_eq!(change(4, 8).await, Some(Change::Applied));
    assert!(matches!(change(8, 4).await, Some(Change::Refused(error)) if error.code == "cpus.fewer"));

    let doctor = plugin.call(Hook::Doctor, Input { vm: None, ..input() }, &state).await.unwrap();
    assert_eq!(doctor.findings[0].message, "bridge.subnet");
    let small = kept("full", json!({ "most_cpus": 1 })).await;
    let refused = small.call(Hook::Preflight, input(), &state).await.unwrap();
    assert_eq!(refused.refusals().next().unwrap().message, "dev wants more than 1");
}

struct OneVm;

impl Directory for OneVm {
    fn names(&self) -> Vec<String> {
        vec!["dev".to_owned()]
    }

    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        if name == "dev" { vec![IpAddr::from([192, 0, 2, 7])] } else { Vec::new() }
    }

    fn name_of(&self, _: IpAddr) -> Option<String> {
        None
    }
}

#[tokio::test]
async fn every_kind_of_answer_is_given() {
    let plugin = Arc::new(kept("names", json!({})).await);
    let resolver = Resolver::start(plugin, input(), state(), Arc::new(OneVm)).await.unwrap();
    assert_eq!(resolver.zones(), ["vm"]);
    let ask = async |name: &str, query_type| {
        resolver
            .resolve(Query { name: name.to_owned(), query_type, query_class: 1, asker: None })
            .await
            .unwrap()
    };
    let Resolved::Records(records) = ask("dev.vm", 1).await else { panic!("no records") };
    assert_eq!((records.len(), records[0].data.as_str(), records[0].ttl_seconds), (1, "192.0.2.7", 5));
    assert_eq!(ask("dev.vm", 28).await, Resolved::NoData);
    assert_eq!(ask("new.vm", 1).await, Resolved::NxDomain);
    assert_eq!(ask("example.org", 1).await, Resolved::Pass);
}

struct Project;

#[async_trait]
impl Repository for Project {
    fn facts(&self) -> RepoFacts {
        RepoFacts { name: "project".to_owned(), is_git: true, ..RepoFacts::default() }
    }
    async fn paths(&self, _: &str) -> Result<Vec<String>, PluginError> {
        Ok(vec!["README.md".to_owned()])
    }
    async fn submodules(&self) -> Result<Vec<String>, PluginError> {
        Ok(Vec::new())
    }
    async fn read_file(&self, _: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        Ok(Vec::new())
    }
    async fn archive(&self, _: &[String]) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(MemoryBlob(b"tar".as_slice().into())))
    }
    async fn bundle(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("git.no-history", "no history"))
    }
    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("git.no-history", "no history"))
    }
    async fn history(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("git.no-history", "no history"))
    }
    async fn compare(&self, _: &str) -> Result<Arc<dyn Difference>, PluginError> {
        Err(PluginError::new("repository.not-compared", "nobody compares it"))
    }
}

#[tokio::test]
async fn a_repository_is_brought() {
    let (plugin, guest) = (kept("bring", json!({})).await, Arc::new(Echo::default()));
    let probe = Input { repository: Some(Arc::new(Project)), ..input() };
    let offers = plugin.call(Hook::Probe, probe.clone(), &state()).await.unwrap().offers;
    assert_eq!((offers[0].strategy.as_str(), offers[0].score), ("archive", 10));
    let job = Job {
        strategy: "archive".to_owned(),
        destination: "/work".to_owned(),
        user: "root".to_owned(),
        uid: 0,
        gid: 0,
        replace: false,
    };
    let import = Input { sandbox: Some(guest.clone()), job: Some(job), ..probe };
    plugin.call(Hook::Import, import, &state()).await.unwrap();
    assert_eq!(guest.0.lock().unwrap()["/work"], b"tar");
}

async fn looked(plugin: &Plugin, input: Input) -> Outcome {
    plugin
        .call(Hook::Preflight, input, &state())
        .await
        .unwrap_or_else(|error| panic!("{error}: {}", vm_plugin::error::chain(&error)))
}

fn said<'a>(findings: &'a [Finding], subject: &str) -> Vec<&'a str> {
    let about = findings.iter().filter(|finding| finding.subject == subject);
    about.map(|finding| finding.message.as_str()).collect()
}

#[tokio::test]
async fn of_a_system_there_is_an_empty_shell() {
    let nothing = Granted::These(Vec::new());
    let plugin = granted(Source::Corpus, "ambient", json!({}), nothing).await;
    let call = Input { now_unix_ms: 1_700_000_000_123, seed: [7; 32], ..input() };
    let outcome = looked(&plugin, call.clone()).await;
    let found = &outcome.findings;
    assert_eq!((said(found, "environment"), said(found, "arguments")), (vec!["[]"], vec!["[]"]));
    assert_eq!(said(found, "input"), ["Ok(0)"], "there is something to read");
    assert_eq!(said(found, "time"), ["0"], "it can tell the time without the grant");
    assert_eq!(said(found, "slept"), ["3600"], "an hour did not pass at once");
    for subject in ["files", "network"] {
        let said = said(found, subject);
        assert!(!said.is_empty() && said.iter().all(|message| message.starts_with("no: ")), "{said:?}");
    }
    let log: Vec<_> = outcome.log.iter().map(|line| (line.level, line.message.as_str())).collect();
    assert_eq!(
        log,
        [(LogLevel::Debug, "looks around for dev"), (LogLevel::Info, "without an end of line")],
        "what it writes is in its log, line by line"
    );

    // Time and chance of the call are kept from it, so the same input has the same outcome.
    let other = Input { now_unix_ms: 1_800_000_000_000, seed: [8; 32], ..call.clone() };
    assert_eq!(looked(&plugin, other.clone()).await.findings, *found);
    let mut another_vm = call.clone();
    another_vm.vm.as_mut().unwrap().cpus += 1;
    let another = looked(&plugin, another_vm).await.findings;
    assert_ne!(said(&another, "chance"), said(found, "chance"), "every input has the same chance");

    let plugin = kept("ambient", json!({})).await;
    let with = looked(&plugin, call.clone()).await.findings;
    assert_eq!(said(&with, "time"), ["1700000000123"]);
    assert_eq!(looked(&plugin, call).await.findings, with);
    assert_ne!(said(&looked(&plugin, other).await.findings, "chance"), said(&with, "chance"));
}

#[tokio::test]
async fn leaving_early_is_a_fault_and_a_flood_of_output_is_cut() {
    let plugin = kept("ambient", json!({ "exits": true })).await;
    let error = plugin.call(Hook::Preflight, input(), &state()).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Trapped { reason, .. } if reason.contains("wasi:cli/exit")),
        "{error}"
    );
    let log = plugin.log().lines();
    assert!(log.iter().any(|logged| logged.line.message == "looks around for dev"), "{log:?}");

    let flooding = brief("ambient", json!({ "floods": true })).await;
    let error = flooding.call(Hook::Preflight, input(), &state()).await.unwrap_err();
    assert!(matches!(&error, CallError::Excess { .. }), "{error}");
    let kept: usize = flooding.log().lines().iter().map(|logged| logged.line.message.len()).sum();
    assert!(kept <= 64 << 10, "{kept} bytes are kept");
}

/// One of the corpus that is stopped soon.
async fn brief(name: &str, config: Value) -> Plugin {
    crate::host::brief(&Source::Corpus.directory(name), config).await
}
