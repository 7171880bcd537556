//! The importers that come with the daemon, and one that does not: what they offer for which repository, what they bring, and when they
//! refuse.

use std::{
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use vm_plugin::{
    CallError, Grant, Granted, Hook, Input, Outcome, Plugin, PluginError,
    call::{Job, Offer},
    ports::{
        Blob, Difference, DifferenceSummary, FileMode, GuestCommand, GuestOutput, MemoryBlob, RepoFacts,
        Repository, Sandbox,
    },
};

use crate::host::{Source, built, input, load, load_from, scratch, state, workspace};

/// What happened, in order, in guest and repository.
#[derive(Default)]
struct Events(Mutex<Vec<String>>);

impl Events {
    fn add(&self, event: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Project {
    facts: RepoFacts,
    difference: DifferenceSummary,
    events: Arc<Events>,
}

impl Project {
    fn new(facts: RepoFacts, events: &Arc<Events>) -> Self {
        Self { facts, difference: DifferenceSummary::default(), events: events.clone() }
    }
}

/// A blob whose content says what it is.
fn named(name: String) -> Arc<dyn Blob> {
    Arc::new(MemoryBlob(name.into_bytes().into()))
}

#[async_trait]
impl Repository for Project {
    fn facts(&self) -> RepoFacts {
        self.facts.clone()
    }

    async fn paths(&self, prefix: &str) -> Result<Vec<String>, PluginError> {
        let paths = ["Makefile", "docs/a.md", "src/main.rs", "src/lib.rs"].into_iter();
        Ok(paths.filter(|path| path.starts_with(prefix)).map(str::to_owned).collect())
    }

    async fn submodules(&self) -> Result<Vec<String>, PluginError> {
        Ok(Vec::new())
    }

    async fn read_file(&self, path: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        Ok(path.as_bytes().to_vec())
    }

    async fn archive(&self, prefixes: &[String]) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(named(format!("files [{}]", prefixes.join(" "))))
    }

    async fn bundle(&self, _: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(named("bundle".to_owned()))
    }

    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(named("patch".to_owned()))
    }

    async fn history(&self, depth: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(named(format!("history {depth:?}")))
    }

    async fn compare(&self, directory: &str) -> Result<Arc<dyn Difference>, PluginError> {
        self.events.add(format!("compare {directory}"));
        Ok(Arc::new(Changes(self.difference.clone(), self.events.clone())))
    }
}

struct Changes(DifferenceSummary, Arc<Events>);

#[async_trait]
impl Difference for Changes {
    fn summary(&self) -> DifferenceSummary {
        self.0.clone()
    }

    async fn apply(&self, uid: u32, gid: u32) -> Result<(), PluginError> {
        self.1.add(format!("apply for {uid}:{gid}"));
        Ok(())
    }
}

struct Guest {
    occupied: bool,
    answer: GuestOutput,
    events: Arc<Events>,
}

#[async_trait]
impl Sandbox for Guest {
    async fn run(&self, command: GuestCommand, _: usize) -> Result<GuestOutput, PluginError> {
        let (user, directory) = (command.user.as_deref(), command.directory.as_deref());
        self.events.add(format!("run {:?} as {user:?} in {directory:?}", command.command));
        Ok(self.answer.clone())
    }

    async fn write_file(
        &self,
        path: &str,
        content: Arc<dyn Blob>,
        mode: FileMode,
    ) -> Result<(), PluginError> {
        let content = String::from_utf8_lossy(&content.read(0, usize::MAX).await?).into_owned();
        self.events.add(format!("write {path} for {}:{}: {content}", mode.uid, mode.gid));
        Ok(())
    }

    async fn read_file(&self, path: &str, _: usize) -> Result<Vec<u8>, PluginError> {
        Err(PluginError::new("guest.no-file", path))
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        Err(PluginError::new("guest.no-file", path))
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), PluginError> {
        let content = String::from_utf8_lossy(&archive.read(0, usize::MAX).await?).into_owned();
        self.events.add(format!("unpack {content} in {directory} for {uid}:{gid}"));
        Ok(())
    }

    async fn is_empty(&self, _: &str) -> Result<bool, PluginError> {
        Ok(!self.occupied)
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        self.events.add(format!("clear {directory}"));
        Ok(())
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.events.add(format!("remove {path}"));
        Ok(())
    }
}

fn git() -> RepoFacts {
    RepoFacts {
        name: "site".to_owned(),
        is_git: true,
        head: Some("0123456789abcdef0123456789abcdef01234567".to_owned()),
        branch: Some("main".to_owned()),
        dirty: true,
        files: 4,
        bytes: 5000,
        modified: 1,
        untracked: 2,
        ..RepoFacts::default()
    }
}

fn plain() -> RepoFacts {
    RepoFacts { name: "site".to_owned(), files: 4, bytes: 5000, ..RepoFacts::default() }
}

async fn offers(plugin: &Plugin, facts: RepoFacts) -> Vec<Offer> {
    let project = Project::new(facts, &Arc::default());
    let input = Input { vm: None, repository: Some(Arc::new(project)), ..input() };
    plugin.call(Hook::Probe, input, &state()).await.unwrap_or_else(|error| panic!("{error}")).offers
}

/// One import into a guest, with a destination that is occupied or not.
struct Trial {
    project: Project,
    job: Job,
    occupied: bool,
    answer: GuestOutput,
}

impl Trial {
    fn new(strategy: &str) -> Self {
        let job = Job {
            strategy: strategy.to_owned(),
            destination: "/work/site".to_owned(),
            user: "dev".to_owned(),
            uid: 1000,
            gid: 100,
            replace: false,
        };
        let answer = GuestOutput { code: Some(0), ..GuestOutput::default() };
        Self { project: Project::new(git(), &Arc::default()), job, occupied: false, answer }
    }

    /// What came of it, and what was done.
    async fn run(self, plugin: &Plugin) -> (Result<Outcome, CallError>, Vec<String>) {
        let events = self.project.events.clone();
        let guest = Guest { occupied: self.occupied, answer: self.answer, events: events.clone() };
        let input = Input {
            repository: Some(Arc::new(self.project)),
            sandbox: Some(Arc::new(guest)),
            job: Some(self.job),
            ..input()
        };
        (plugin.call(Hook::Import, input, &state()).await, events.take())
    }
}

fn refusal(result: Result<Outcome, CallError>) -> PluginError {
    match result {
        Err(CallError::Failed { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn importers_are_small_and_ask_for_repository_and_guest_alone() {
    for name in ["copy", "git", "incremental"] {
        let plugin = load(Source::Fresh, name, json!({})).await;
        let component = Source::Fresh.directory(name).join(&plugin.manifest().component);
        assert!(component.metadata().unwrap().len() < 110_000, "{name} has grown");
        let grants: Vec<_> = plugin.manifest().grants.iter().map(|request| request.grant.clone()).collect();
        assert_eq!(grants, [Grant::Repository {}, Grant::GuestLive {}], "{name}");
    }
}

#[tokio::test]
async fn what_is_known_comes_first_then_what_knows_git_then_a_copy() {
    let mut best = Vec::new();
    for facts in
        [plain(), git(), RepoFacts { prepared: true, ..git() }, RepoFacts { prepared: true, ..plain() }]
    {
        let mut all = Vec::new();
        for name in ["copy", "git", "incremental"] {
            let plugin = load(Source::Fresh, name, json!({})).await;
            all.extend(
                offers(&plugin, facts.clone()).await.into_iter().map(|offer| (offer.score, name, offer)),
            );
        }
        all.sort_by_key(|(score, ..)| std::cmp::Reverse(*score));
        best.push(
            all.iter().map(|(_, name, offer)| format!("{name}/{}", offer.strategy)).collect::<Vec<_>>(),
        );
    }
    assert_eq!(best[0], ["copy/files"]);
    assert_eq!(best[1], ["git/shallow", "git/full", "copy/files"]);
    assert_eq!(best[2], ["incremental/changes", "git/shallow", "git/full", "copy/files"]);
    assert_eq!(best[3], ["incremental/changes", "copy/files"]);
}

#[tokio::test]
async fn offers_say_what_is_brought_and_what_is_not() {
    let plugin = load(Source::Fresh, "git", json!({ "depth": 3 })).await;
    let odd = RepoFacts { traits: vec!["lfs".to_owned(), "worktree".to_owned()], ..git() };
    let offers = offers(&plugin, odd).await;
    assert_eq!(offers[0].description, "the last 3 commits, 4 files (1 modified, 2 untracked)");
    assert_eq!(offers[1].description, "the whole history, 4 files (1 modified, 2 untracked)");
    for offer in &offers {
        assert!(offer.warnings.len() == 1 && offer.warnings[0].contains("LFS"), "{offer:?}");
    }

    let plugin = load(Source::Fresh, "copy", json!({})).await;
    assert_eq!(self::offers(&plugin, plain()).await[0].description, "4 files, 4.8 KiB");
    assert!(self::offers(&plugin, plain()).await[0].warnings.is_empty());
    assert!(self::offers(&plugin, git()).await[0].warnings[0].contains("history"));
}

#[tokio::test]
async fn git_brings_the_history_and_all_files_on_top() {
    let plugin = load(Source::Fresh, "git", json!({})).await;
    for (strategy, history) in [("shallow", "history Some(1)"), ("full", "history None")] {
        let (outcome, events) = Trial::new(strategy).run(&plugin).await;
        let brought = [
            format!("unpack {history} in /work/site for 1000:100"),
            "unpack files [] in /work/site for 1000:100".to_owned(),
        ];
        assert_eq!(events, brought);
        assert_eq!(outcome.unwrap().findings[0].subject, "/work/site");
    }
    let (result, events) = Trial::new("files").run(&plugin).await;
    assert_eq!(refusal(result).code, "workspace.unknown-strategy");
    assert!(events.is_empty());
}

#[tokio::test]
async fn what_nobody_knows_is_only_thrown_away_if_somebody_says_so() {
    for (name, strategy) in [("git", "shallow"), ("copy", "files")] {
        let plugin = load(Source::Fresh, name, json!({})).await;
        let occupied = || Trial { occupied: true, ..Trial::new(strategy) };
        let (result, events) = occupied().run(&plugin).await;
        let error = refusal(result);
        assert_eq!(error.code, "workspace.destination-not-empty");
        assert!(error.message.contains("/work/site") && error.hint.unwrap().contains("--replace"), "{name}");
        assert!(events.is_empty(), "{name}: {events:?}");

        let mut replace = occupied();
        replace.job.replace = true;
        let (result, events) = replace.run(&plugin).await;
        result.unwrap();
        assert_eq!(events[0], "clear /work/site");
        assert!(events[1].starts_with("unpack "), "{name}: {events:?}");
    }
}

fn changed(overwritten: &[&str]) -> DifferenceSummary {
    DifferenceSummary {
        known: true,
        changed: 3,
        removed: 1,
        bytes: 70,
        overwritten: overwritten.iter().map(|path| (*path).to_owned()).collect(),
    }
}

#[tokio::test]
async fn changes_are_brought_and_the_guests_work_is_not_overwritten_unasked() {
    let plugin = load(Source::Fresh, "incremental", json!({})).await;
    let with = |difference: DifferenceSummary, replace| {
        let mut trial = Trial { occupied: true, ..Trial::new("changes") };
        trial.project.difference = difference;
        trial.job.replace = replace;
        trial
    };
    let (result, events) = with(changed(&[]), false).run(&plugin).await;
    assert_eq!(result.unwrap().findings[0].message, "3 changed, 1 gone");
    assert_eq!(events, ["compare /work/site", "apply for 1000:100"]);

    let (result, events) = with(changed(&[".git", "a b"]), false).run(&plugin).await;
    let error = refusal(result);
    assert_eq!(error.code, "workspace.guest-changed");
    assert!(error.message.contains("\".git\", \"a b\""), "{}", error.message);
    assert_eq!(events, ["compare /work/site"]);

    let (result, events) = with(changed(&["a"]), true).run(&plugin).await;
    let findings = result.unwrap().findings;
    assert!(findings[1].message.starts_with("1 paths"), "{findings:?}");
    assert_eq!(events.last().map(String::as_str), Some("apply for 1000:100"));

    for replace in [false, true] {
        let (result, events) = with(DifferenceSummary::default(), replace).run(&plugin).await;
        assert_eq!(refusal(result).code, "workspace.not-prepared");
        assert_eq!(events, ["compare /work/site"]);
    }
}

/// The importer in `tests/importer`, built once: it is in no workspace of this repository.
fn foreign() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let out = BUILT.get_or_init(|| {
        let out = scratch().join("fixtures");
        let mut build = Command::new(workspace().join("build"));
        build.arg(&out).arg("--fixtures").env("PLUGINS_TARGET", scratch().join("plugins/build"));
        built(&mut build);
        out
    });
    out.join("slice")
}

async fn slice(config: Value) -> Plugin {
    load_from(&foreign(), config, Granted::All).await
}

#[tokio::test]
async fn somebody_elses_importer_does_what_none_of_ours_does() {
    let plugin = slice(json!({ "directories": ["src/"], "command": ["make", "all"] })).await;
    let offer = &offers(&plugin, git()).await[0];
    assert_eq!((offer.strategy.as_str(), offer.description.as_str()), ("directories", "2 files of src/"));
    let (result, events) = Trial::new("directories").run(&plugin).await;
    assert_eq!(result.unwrap().findings[0].message, "2 files");
    assert_eq!(
        events,
        [
            "unpack files [src/] in /work/site for 1000:100",
            "write /work/site/SLICE.json for 1000:100: \
         {\"repository\":\"site\",\"commit\":\"0123456789abcdef0123456789abcdef01234567\",\"files\":2}",
            "run [\"make\", \"all\"] as Some(\"dev\") in Some(\"/work/site\")",
        ]
    );

    let mut trial = Trial::new("directories");
    trial.answer =
        GuestOutput { code: Some(2), stderr: b"make: no rule\n".to_vec(), ..GuestOutput::default() };
    let (result, _) = trial.run(&plugin).await;
    let error = refusal(result);
    assert_eq!(
        (error.code.as_str(), error.message.as_str()),
        ("slice.command", "make failed: make: no rule")
    );

    let nothing = slice(json!({ "directories": ["lib"] })).await;
    assert!(offers(&nothing, git()).await.is_empty());
    let (result, events) = Trial::new("directories").run(&nothing).await;
    assert!(refusal(result).code == "slice.nothing" && events.is_empty());
}
