//! Importers: what they are told, and what is streamed between repository and guest.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde_json::json;
use vm_plugin::{
    CallError, Granted, Hook, Input, Limits, Outcome, Plugin, PluginError,
    call::Job,
    ports::{Blob, Difference, DifferenceSummary, MemoryBlob, Progress, RepoFacts, Repository, Stream},
};

use crate::common::{FakeGuest, component, input, limits, manifest, runtime, state, vm};

/// What a repository was asked for, and how it behaves.
#[derive(Default)]
struct Project {
    facts: RepoFacts,
    difference: DifferenceSummary,
    breaks: bool,
    made: AtomicUsize,
    unpacked: Mutex<Vec<String>>,
    applied: Mutex<Vec<(u32, u32)>>,
    hangs: bool,
    waits: AtomicBool,
    dropped: AtomicBool,
}

/// Made while it is read: three bytes, or an error behind them.
struct Made(Arc<Project>);

fn breaks() -> PluginError {
    PluginError::new("workspace.changed", "it changed while it was read").hint("try again")
}

#[async_trait]
impl Blob for Made {
    async fn size(&self) -> Result<u64, PluginError> {
        if self.0.breaks { Err(breaks()) } else { Ok(3) }
    }

    async fn digest(&self) -> Result<String, PluginError> {
        Ok(String::new())
    }

    async fn read(&self, _: u64, _: usize) -> Result<Vec<u8>, PluginError> {
        Ok(b"tar".to_vec())
    }

    fn stream(&self) -> Option<Stream> {
        self.0.made.fetch_add(1, Ordering::SeqCst);
        Some(Box::pin(std::io::Cursor::new(b"tar")))
    }

    fn unpacked(&self, directory: &str) {
        self.0.unpacked.lock().unwrap().push(directory.to_owned());
    }
}

struct Repo(Arc<Project>);

struct Dropped(Arc<Project>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.dropped.store(true, Ordering::SeqCst);
    }
}

#[async_trait]
impl Repository for Repo {
    fn facts(&self) -> RepoFacts {
        self.0.facts.clone()
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
        if self.0.hangs {
            let _dropped = Dropped(self.0.clone());
            self.0.waits.store(true, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        Ok(Arc::new(Made(self.0.clone())))
    }
    async fn bundle(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("git", "no history"))
    }
    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("git", "no history"))
    }
    async fn history(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(MemoryBlob(b"git".as_slice().into())))
    }
    async fn compare(&self, _: &str) -> Result<Arc<dyn Difference>, PluginError> {
        Ok(Arc::new(Changes(self.0.clone())))
    }
}

struct Changes(Arc<Project>);

#[async_trait]
impl Difference for Changes {
    fn summary(&self) -> DifferenceSummary {
        self.0.difference.clone()
    }

    async fn apply(&self, uid: u32, gid: u32) -> Result<(), PluginError> {
        self.0.applied.lock().unwrap().push((uid, gid));
        Ok(())
    }
}

#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Progress for Said {
    fn says(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

async fn bring(limits: Limits, granted: Granted) -> Plugin {
    let manifest = manifest("bring", "workspace-importer");
    Plugin::new(&runtime(limits), manifest, &component("bring"), granted, json!({})).await.unwrap()
}

fn probe(project: &Arc<Project>) -> Input {
    Input { vm: None, repository: Some(Arc::new(Repo(project.clone()))), ..input() }
}

fn job(strategy: &str) -> Job {
    Job {
        strategy: strategy.to_owned(),
        destination: "/work".to_owned(),
        user: "dev".to_owned(),
        uid: 1000,
        gid: 1001,
        replace: false,
    }
}

fn import(project: &Arc<Project>, guest: &Arc<FakeGuest>, job: Job) -> Input {
    Input { vm: Some(vm()), sandbox: Some(guest.clone()), job: Some(job), ..probe(project) }
}

async fn run(plugin: &Plugin, input: Input) -> Result<Outcome, CallError> {
    plugin.call(Hook::Import, input, &state()).await
}

#[tokio::test]
async fn an_importer_offers_and_brings() {
    let plugin = bring(limits(), Granted::All).await;
    let facts = RepoFacts { is_git: true, files: 3, bytes: 70, ..RepoFacts::default() };
    let project = Arc::new(Project { facts, ..Project::default() });
    let offers = plugin.call(Hook::Probe, probe(&project), &state()).await.unwrap().offers;
    assert_eq!((offers.len(), offers[0].strategy.as_str(), offers[0].score), (1, "archive", 10));
    assert_eq!(offers[0].warnings, ["3 of 70 bytes"]);

    let (guest, said) = (Arc::new(FakeGuest::default()), Arc::new(Said::default()));
    let limit = Duration::from_secs(77);
    let input = Input {
        progress: Some(said.clone()),
        time_limit: Some(limit),
        ..import(&project, &guest, job("archive"))
    };
    let outcome = run(&plugin, input).await.unwrap();
    assert_eq!(*guest.unpacked.lock().unwrap(), ["/work: 3"]);
    assert_eq!(project.made.load(Ordering::SeqCst), 1, "it was made more than once");
    assert_eq!(*project.unpacked.lock().unwrap(), ["/work"], "whoever made it is not told");
    assert_eq!(outcome.findings[0].message, "3 bytes");
    assert_eq!(*said.0.lock().unwrap(), ["within 77000 ms"]);
    assert!(guest.removed.lock().unwrap().is_empty());

    let again = import(&project, &guest, Job { replace: true, ..job("archive") });
    run(&plugin, again).await.unwrap();
    assert_eq!(*guest.removed.lock().unwrap(), ["/work/*", "/work.old"]);
}

#[tokio::test]
async fn what_differs_is_told_and_applied() {
    let plugin = bring(limits(), Granted::All).await;
    let facts = RepoFacts {
        prepared: true,
        modified: 1,
        deleted: 2,
        untracked: 3,
        traits: vec!["shallow".to_owned()],
        ..RepoFacts::default()
    };
    let many = 100_000;
    let long = "x".repeat(100);
    let difference = DifferenceSummary {
        known: true,
        changed: 4,
        removed: 5,
        bytes: 6,
        overwritten: (0..many).map(|number| format!("{long}{number}")).collect(),
    };
    let project = Arc::new(Project { facts, difference, ..Project::default() });
    let offers = plugin.call(Hook::Probe, probe(&project), &state()).await.unwrap().offers;
    assert_eq!(offers[1].description, "(1, 2, 3) [\"shallow\"]");

    let guest = Arc::new(FakeGuest::default());
    let outcome = run(&plugin, import(&project, &guest, job("changes"))).await.unwrap();
    assert!(outcome.findings[0].message.starts_with("true 4 5 6 [\"xxx"), "{:?}", outcome.findings[0]);
    assert_eq!(*project.applied.lock().unwrap(), [(1000, 1001)]);
}

#[tokio::test]
async fn comparing_and_bringing_need_both_grants() {
    let project = Arc::new(Project::default());
    let guest = Arc::new(FakeGuest::default());
    for kind in ["guest-live", "repository"] {
        let mut manifest = manifest("bring", "workspace-importer");
        manifest.grants.retain(|request| !request.grant.line().contains(kind));
        let (runtime, wasm) = (runtime(limits()), component("bring"));
        let plugin = Plugin::new(&runtime, manifest, &wasm, Granted::All, json!({})).await.unwrap();
        for strategy in ["archive", "changes"] {
            let error = run(&plugin, import(&project, &guest, job(strategy))).await.unwrap_err();
            let missing = matches!(&error, CallError::Failed { error, .. } if error.code == "grant.missing");
            assert!(missing && error.hint().contains(kind), "{error}: {}", error.hint());
        }
    }
    assert!(project.applied.lock().unwrap().is_empty() && guest.unpacked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_the_host_cannot_make_is_no_fault_of_the_plugin() {
    let plugin = bring(Limits { failures: 1, ..limits() }, Granted::All).await;
    let project = Arc::new(Project { breaks: true, ..Project::default() });
    let guest = Arc::new(FakeGuest::default());
    let error = run(&plugin, import(&project, &guest, job("archive"))).await.unwrap_err();
    let told = matches!(&error, CallError::Failed { error, .. } if error.code == "workspace.changed");
    assert!(told && error.hint() == "try again", "{error}: {}", error.hint());
    assert!(plugin.disabled().is_none());

    let error = run(&plugin, import(&project, &guest, job("history 0"))).await.unwrap_err();
    assert!(matches!(&error, CallError::Failed { error, .. } if error.code == "bad.depth"), "{error}");
}

// Time passes only while all wait, so that no slow machine is taken for a slow guest.
#[tokio::test(start_paused = true)]
async fn an_import_ends_when_its_time_is_over_or_nobody_waits_for_it() {
    let plugin = bring(Limits { failures: 1, ..limits() }, Granted::All).await;
    let guest = Arc::new(FakeGuest::default());
    let hanging = || Arc::new(Project { hangs: true, ..Project::default() });
    let project = hanging();
    let limit = Some(Duration::from_secs(50));
    let input = Input { time_limit: limit, ..import(&project, &guest, job("archive")) };
    let error = run(&plugin, input).await.unwrap_err();
    assert!(matches!(error, CallError::TimedOut { .. }) && error.hint().contains("bring less"), "{error}");
    assert!(project.dropped.load(Ordering::SeqCst), "the host goes on");
    assert!(plugin.disabled().is_none(), "that the guest is slow is no fault of the plugin");

    let project = hanging();
    tokio::select! {
        biased;
        ended = run(&plugin, import(&project, &guest, job("archive"))) => panic!("{ended:?}"),
        () = async {
            while !project.waits.load(Ordering::SeqCst) {
                tokio::task::yield_now().await;
            }
        } => {}
    }
    assert!(project.dropped.load(Ordering::SeqCst), "the host goes on");
}
