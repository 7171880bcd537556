//! What every plugin must hold to, tried on a component that is not installed: its hooks end, always the same way, and plan nothing that
//! its manifest does not ask for. No VM is there and nothing on the host is changed.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jsonrpsee::core::async_trait;
use serde_json::{Value, json};
use vm_api::PluginCheck;
use vm_plugin::{
    CallError, Granted, Hook, Input, Outcome, Plugin, PluginError, Query, Resolver, VmFacts, World,
    call::Job,
    ports::{
        Blob, Difference, DifferenceSummary, Directory, FileMode, GuestCommand, GuestOutput, MemoryBlob,
        MemoryState, RepoFacts, Repository, Sandbox, StateStore,
    },
};

use super::{PluginsError, calls, manager::Manager};

fn check(check: impl Into<String>, ok: bool, detail: impl Into<String>) -> PluginCheck {
    PluginCheck { check: check.into(), ok, detail: detail.into() }
}

impl Manager {
    /// Tries a plugin; the first check that keeps all others from being made is the last one.
    pub(crate) async fn test(&self, source: &str) -> Result<Vec<PluginCheck>, PluginsError> {
        let package = self.package(source).await?;
        let manifest = package.manifest.clone();
        let mut checks = vec![check(
            "manifest",
            true,
            format!("{} {}, world {}", manifest.name, manifest.version, manifest.world),
        )];
        let world = manifest.world;
        let config = match manifest.config.fill(json!({})) {
            Ok(config) => config,
            Err(reason) => {
                let detail =
                    format!("it cannot be tried without one: {reason}; give every property a default");
                checks.push(check("configuration", false, detail));
                return Ok(checks);
            }
        };
        checks.push(check("configuration", true, "the defaults are one"));
        let loaded =
            Plugin::new(&self.runtime, manifest, package.component(), Granted::All, config.clone()).await;
        let plugin = match loaded {
            Ok(plugin) => Arc::new(plugin),
            Err(error) => {
                let detail = format!("{}; {}", vm_types::report::chain(&error), error.hint());
                checks.push(check("loads", false, detail));
                return Ok(checks);
            }
        };
        checks.push(check("loads", true, plugin.digest()));
        match world {
            World::Capability => {
                for hook in Hook::CAPABILITY.into_iter().filter(|hook| plugin.has(*hook)) {
                    let facts = self.facts().now().await;
                    checks.push(tried(&plugin, hook, inputs(hook, &config, &facts)).await);
                }
            }
            World::Dns => checks.push(answers(&plugin, self.facts().now().await).await),
            World::WorkspaceImporter => {
                let mut inputs = inputs(Hook::Probe, &config, &self.facts().now().await);
                inputs = Project::ALL.into_iter().flat_map(|project| project.looked_at(&inputs)).collect();
                checks.push(tried(&plugin, Hook::Probe, inputs.clone()).await);
                checks.push(tried(&plugin, Hook::Import, jobs(&plugin, &inputs).await).await);
            }
        }
        Ok(checks)
    }
}

type Inputs = Vec<(String, Input)>;

/// Calls a hook twice with each input, and tells of the first that is not as it should be.
async fn tried(plugin: &Plugin, hook: Hook, inputs: Inputs) -> PluginCheck {
    let name = hook.to_string();
    // A hook that failed says nothing of the next one.
    plugin.enable();
    let (mut longest, mut most, mut refused) = (Duration::ZERO, 0, 0);
    let count = inputs.len();
    for (what, input) in inputs {
        let mut outcomes = Vec::new();
        for _ in 0..2 {
            // Each time with a state and a guest that nobody has used before.
            let state: Arc<dyn StateStore> = Arc::new(MemoryState::default());
            let mut input = input.clone();
            if input.sandbox.is_some() {
                input.sandbox = Some(Arc::new(Calm::default()));
            }
            let begin = Instant::now();
            let result = plugin.call(hook, input, &state).await;
            longest = longest.max(begin.elapsed());
            if let Some(fault) = fault(&result) {
                return check(name, false, format!("{what}: {fault}"));
            }
            most = most.max(result.as_ref().map_or(0, |outcome| outcome.plan.len()));
            refused += usize::from(result.is_err());
            outcomes.push(calls::outcome(&result));
        }
        if outcomes[0] != outcomes[1] {
            let detail = format!(
                "{what}: the same call gave {} and then {}",
                short(&outcomes[0]),
                short(&outcomes[1])
            );
            return check(name, false, detail);
        }
    }
    let errors = if refused == 0 { String::new() } else { format!(", {refused} gave an error of its own") };
    let detail = format!(
        "{count} inputs, twice each: always the same; at most {most} effects, {:.1} ms{errors}",
        longest.as_secs_f64() * 1e3
    );
    check(name, true, detail)
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 300 { text } else { text.chars().take(300).chain(['…']).collect() }
}

/// Why an outcome is not one that a plugin may give. An error in its own words is.
fn fault(result: &Result<Outcome, CallError>) -> Option<String> {
    match result {
        Ok(_) | Err(CallError::Failed { .. }) => None,
        Err(error) => Some(format!("{}; {}", calls::told(error), error.hint())),
    }
}

/// A VM like most.
fn typical() -> Option<VmFacts> {
    let vm = json!({
        "id": "0123456789ab", "name": "dev", "image_reference": "debian:bookworm",
        "image_digest": format!("sha256:{}", "a".repeat(64)), "image_properties": { "os": "debian" },
        "kernel_release": "6.1.0", "cpus": 2, "memory_bytes": 1_u64 << 30, "disk_bytes": 8_u64 << 30,
        "network": "nat", "addresses": ["192.0.2.7"], "labels": { "team": "core" }, "temporary": false,
    });
    serde_json::from_value(vm).ok()
}

/// What a hook may meet.
fn inputs(hook: Hook, config: &Value, facts: &Arc<BTreeMap<String, String>>) -> Inputs {
    let reasons: &[&str] = match hook {
        Hook::Cleanup => &["stopped", "deleted", "start-failed", "plugin-removed"],
        Hook::ConfigChange => &["configured"],
        Hook::Doctor => &["doctor"],
        _ => &["start", "plan"],
    };
    let mut vms = vec![("no VM", None)];
    if hook != Hook::Doctor
        && let Some(vm) = typical()
    {
        let bare = VmFacts { network: "none".to_owned(), addresses: Vec::new(), ..vm.clone() };
        let odd = VmFacts {
            image_reference: "…/ \"'$(x)`\\ \u{202e}".to_owned(),
            labels: [
                ("".to_owned(), "".to_owned()),
                ("\"; drop".to_owned(), "a\nb\t\u{7f}".repeat(50)),
                ("../..".to_owned(), "%n%s{}".to_owned()),
            ]
            .into(),
            ..vm.clone()
        };
        let huge = VmFacts {
            name: "a".repeat(63).parse().unwrap_or_else(|_| vm.name.clone()),
            cpus: u32::MAX,
            memory_bytes: u64::MAX,
            disk_bytes: u64::MAX,
            addresses: vec![IpAddr::from([192, 0, 2, 9]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1])],
            ..vm.clone()
        };
        let plain = VmFacts {
            labels: BTreeMap::new(),
            image_properties: BTreeMap::new(),
            temporary: true,
            ..vm.clone()
        };
        vms = vec![
            ("a VM", Some(vm)),
            ("a VM without network", Some(bare)),
            ("a VM with odd labels", Some(odd)),
            ("a VM of the largest size", Some(huge)),
            ("a temporary VM without labels", Some(plain)),
        ];
    }
    let live = matches!(hook, Hook::PostStart | Hook::ConfigChange | Hook::Import);
    let mut inputs = Vec::new();
    for reason in reasons {
        for (what, vm) in &vms {
            let guest = live.then(|| Arc::new(Calm::default()) as Arc<dyn Sandbox>);
            let input = Input {
                reason: (*reason).to_owned(),
                vm: vm.clone(),
                facts: facts.clone(),
                former_config: (hook == Hook::ConfigChange).then(|| config.clone()),
                sandbox: guest,
                now_unix_ms: 1_700_000_000_000,
                seed: [7; 32],
                dry_run: *reason == "plan",
                ..Input::default()
            };
            inputs.push((format!("{what} ({reason})"), input));
        }
        if let Some((_, vm)) = vms.first() {
            let nowhere = Input {
                reason: (*reason).to_owned(),
                vm: vm.clone(),
                former_config: (hook == Hook::ConfigChange).then(|| config.clone()),
                sandbox: live.then(|| Arc::new(Calm::default()) as Arc<dyn Sandbox>),
                ..Input::default()
            };
            inputs.push((format!("a host of which nothing is known ({reason})"), nowhere));
        }
    }
    inputs
}

/// An importer's work for all that it offers.
async fn jobs(plugin: &Plugin, probes: &Inputs) -> Inputs {
    let state: Arc<dyn StateStore> = Arc::new(MemoryState::default());
    let mut jobs = Vec::new();
    for (what, input) in probes {
        let Ok(outcome) = plugin.call(Hook::Probe, input.clone(), &state).await else { continue };
        for (offer, replace) in
            outcome.offers.into_iter().flat_map(|offer| [(offer.clone(), false), (offer, true)])
        {
            let job = Job {
                strategy: offer.strategy.clone(),
                destination: "/home/dev/project".to_owned(),
                user: "dev".to_owned(),
                uid: 1000,
                gid: 1000,
                replace,
            };
            let guest: Arc<dyn Sandbox> = Arc::new(Calm::default());
            let input = Input { job: Some(job), sandbox: Some(guest), vm: typical(), ..input.clone() };
            let over = if replace { " in place of what is there" } else { "" };
            jobs.push((format!("{what}, {}{over}", offer.strategy), input));
        }
    }
    jobs
}

/// Asks a resolver, twice.
async fn answers(plugin: &Arc<Plugin>, facts: Arc<BTreeMap<String, String>>) -> PluginCheck {
    let names = ["dev", "gone", "", "..", "a.b.c", "xn--", "-", "DEV", "\u{e9}"];
    let mut both = Vec::new();
    for _ in 0..2 {
        let state: Arc<dyn StateStore> = Arc::new(MemoryState::default());
        let input = Input { facts: facts.clone(), reason: "start".to_owned(), ..Input::default() };
        let started = Resolver::start(plugin.clone(), input, state, Arc::new(Names)).await;
        let resolver = match started {
            Ok(resolver) => resolver,
            Err(error) => return check("resolve", false, vm_types::report::chain(&error)),
        };
        let mut answers = vec![format!("{:?}", resolver.zones())];
        for zone in resolver.zones().to_vec() {
            for name in names {
                for record_type in [1, 28, 12, 255, 65_535] {
                    let query = Query {
                        name: if name.is_empty() { zone.clone() } else { format!("{name}.{zone}") },
                        query_type: record_type,
                        query_class: 1,
                        asker: Some("dev".to_owned()),
                    };
                    match resolver.resolve(query).await {
                        Ok(answer) => answers.push(format!("{answer:?}")),
                        Err(vm_plugin::ResolveError::Call(CallError::Failed { error, .. })) => {
                            answers.push(error.to_string());
                        }
                        Err(error) => {
                            let detail = format!("{name:?} in {zone:?}: {}", vm_types::report::chain(&error));
                            return check("resolve", false, detail);
                        }
                    }
                }
            }
        }
        both.push(answers);
    }
    let same = both[0] == both[1];
    let detail = if same {
        format!("{} questions, twice each: always the same", both[0].len() - 1)
    } else {
        "the same questions got other answers the second time".to_owned()
    };
    check("resolve", same, detail)
}

struct Names;

impl Directory for Names {
    fn names(&self) -> Vec<String> {
        vec!["dev".to_owned()]
    }

    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        if name == "dev" { vec![IpAddr::from([192, 0, 2, 7])] } else { Vec::new() }
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        (address == IpAddr::from([192, 0, 2, 7])).then(|| "dev".to_owned())
    }
}

/// A guest in which every command succeeds and says nothing.
#[derive(Default)]
struct Calm(Mutex<BTreeMap<String, Vec<u8>>>);

async fn all(blob: &Arc<dyn Blob>) -> Result<Vec<u8>, PluginError> {
    blob.read(0, usize::try_from(blob.size().await?).unwrap_or(usize::MAX)).await
}

#[async_trait]
impl Sandbox for Calm {
    async fn run(&self, _: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        Ok(GuestOutput { code: Some(0), ..GuestOutput::default() })
    }

    async fn write_file(&self, path: &str, content: Arc<dyn Blob>, _: FileMode) -> Result<(), PluginError> {
        let content = all(&content).await?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), content);
        Ok(())
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let file = files.get(path).ok_or_else(|| PluginError::new("guest.not-found", path))?;
        Ok(file[..file.len().min(limit)].to_vec())
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(MemoryBlob(self.read_file(path, usize::MAX).await?.into())))
    }

    async fn unpack(&self, archive: Arc<dyn Blob>, _: &str, _: u32, _: u32) -> Result<(), PluginError> {
        all(&archive).await.map(|_| ())
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(!files.keys().any(|path| is_below(path, directory)))
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|path, _| !is_below(path, directory));
        Ok(())
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
        self.clear(path).await
    }
}

fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// A small workspace, as importers may meet one.
#[derive(Debug, Clone, Copy)]
enum Project {
    /// A git repository with changes, which nobody has brought anywhere.
    Git,
    /// One that was brought to the guest before, and that the guest has worked on.
    Prepared,
    /// A directory that git does not know.
    Plain,
}

impl Project {
    const ALL: [Self; 3] = [Self::Git, Self::Prepared, Self::Plain];

    /// The same inputs with this to look at.
    fn looked_at(self, inputs: &Inputs) -> Inputs {
        let what = match self {
            Self::Git => "a git repository",
            Self::Prepared => "one prepared before",
            Self::Plain => "a plain directory",
        };
        let with = |(about, input): &(String, Input)| {
            let input = Input { repository: Some(Arc::new(self)), ..input.clone() };
            (format!("{about}, {what}"), input)
        };
        inputs.iter().map(with).collect()
    }

    fn is_git(self) -> bool {
        !matches!(self, Self::Plain)
    }

    fn of_git(self, bytes: &[u8]) -> Result<Arc<dyn Blob>, PluginError> {
        let none = || PluginError::new("workspace.not-a-repository", "it is no git repository");
        if self.is_git() { Ok(blob(bytes)) } else { Err(none()) }
    }
}

fn blob(text: &[u8]) -> Arc<dyn Blob> {
    Arc::new(MemoryBlob(text.into()))
}

/// Two blocks of zeros are an empty tar archive.
const EMPTY: &[u8] = &[0; 1024];

#[async_trait]
impl Repository for Project {
    fn facts(&self) -> RepoFacts {
        let common = RepoFacts {
            name: "project".to_owned(),
            files: 2,
            bytes: 21,
            prepared: matches!(self, Self::Prepared),
            ..RepoFacts::default()
        };
        if !self.is_git() {
            return common;
        }
        RepoFacts {
            is_git: true,
            head: Some("0".repeat(40)),
            branch: Some("main".to_owned()),
            dirty: true,
            modified: 1,
            untracked: 1,
            traits: ["lfs", "shallow", "submodules"].map(str::to_owned).into(),
            ..common
        }
    }

    async fn paths(&self, prefix: &str) -> Result<Vec<String>, PluginError> {
        let paths = ["README.md", "src/main.rs"].into_iter();
        Ok(paths.filter(|path| path.starts_with(prefix)).map(str::to_owned).collect())
    }

    async fn submodules(&self) -> Result<Vec<String>, PluginError> {
        Ok(Vec::new())
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        Ok(path.as_bytes()[..path.len().min(limit)].to_vec())
    }

    async fn archive(&self, _: &[String]) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(blob(EMPTY))
    }

    async fn bundle(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        self.of_git(b"# v2 git bundle\n")
    }

    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError> {
        self.of_git(b"")
    }

    async fn history(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        self.of_git(EMPTY)
    }

    async fn compare(&self, _: &str) -> Result<Arc<dyn Difference>, PluginError> {
        Ok(Arc::new(*self))
    }
}

#[async_trait]
impl Difference for Project {
    fn summary(&self) -> DifferenceSummary {
        match self {
            Self::Git | Self::Plain => DifferenceSummary::default(),
            Self::Prepared => DifferenceSummary {
                known: true,
                changed: 2,
                removed: 1,
                bytes: 21,
                overwritten: vec!["README.md".to_owned()],
            },
        }
    }

    async fn apply(&self, _: u32, _: u32) -> Result<(), PluginError> {
        Ok(())
    }
}
