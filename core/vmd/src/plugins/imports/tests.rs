//! The importers themselves, with real workspaces, and a directory for a guest.

mod trial;

use std::{fs, sync::atomic::Ordering};

use serde_json::json;
use vm_plugin::ports::{Blob, FileMode, GuestCommand, Sandbox};

use self::trial::{DESTINATION, Directory, Trial, Watch, built, git, write};
use super::{
    super::tests::{Bench, params},
    *,
};

#[tokio::test]
async fn a_repository_is_brought_and_then_what_has_changed() {
    let mut trial = Trial::new().await;
    trial.repository();
    assert_eq!(trial.offered().await, ["git/shallow", "git/full", "copy/files"]);
    let imported = trial.bring("git/shallow", false).await;
    trial.same_to_git();
    assert!(!trial.in_guest("target").exists());
    assert!(imported.bytes > 0 && imported.findings[0].subject == DESTINATION, "{imported:?}");
    assert_eq!((imported.baseline.importer.as_str(), imported.baseline.whole), ("git/shallow", true));
    assert_eq!(imported.baseline.base.as_deref(), Some(trial.git(&["rev-parse", "HEAD"]).trim()));
    assert_eq!(git(&trial.guest.place(DESTINATION), &["rev-list", "--count", "HEAD"]), "1\n");
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1);
    assert!(
        trial
            .watch
            .steps
            .lock()
            .unwrap()
            .iter()
            .any(|(step, done)| step.starts_with("sending") && *done == 0)
    );

    // The guest works, and so does the host.
    write(&trial.in_guest("own.txt"), "the guest's");
    write(&trial.in_guest("result"), "the guest's");
    trial.write("src/main.rs", "fn main() {}");
    fs::remove_file(trial.host.path().join("new.txt")).unwrap();
    trial.git(&["commit", "-qam", "three"]);
    assert_eq!(trial.offered().await[0], "incremental/changes");
    let imported = trial.bring("incremental/changes", false).await;
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1, "what is known was not thrown away");
    assert_eq!(fs::read_to_string(trial.in_guest("src/main.rs")).unwrap(), "fn main() {}");
    assert!(!trial.in_guest("new.txt").exists());
    let guest = trial.guest.place(DESTINATION);
    assert_eq!(git(&guest, &["rev-parse", "HEAD"]), trial.git(&["rev-parse", "HEAD"]));
    assert_eq!(git(&guest, &["status", "--porcelain"]), " M own.txt\n?? result\n");
    assert_eq!((imported.baseline.importer.as_str(), imported.baseline.whole), ("git/shallow", true));
    // What the guest has changed is still known as its own.
    let then = |path: &str| imported.baseline.guest.iter().find(|seen| seen.path == path.as_bytes()).cloned();
    let now = trial.guest.survey(DESTINATION).await.unwrap();
    let now = |path: &str| now.iter().find(|seen| seen.path == path.as_bytes()).cloned();
    assert!(then("own.txt") != now("own.txt") && then("result").is_none());
    assert_eq!(then("src/main.rs"), now("src/main.rs"));

    // Both at once.
    trial.write("own.txt", "the host's");
    let failure = trial.refused("incremental/changes").await;
    assert_eq!((failure.code.as_str(), failure.plugin.as_str()), ("workspace.guest-changed", "incremental"));
    assert!(failure.message.contains("own.txt") && failure.hint.unwrap().contains("--replace"));
    assert_eq!(fs::read_to_string(trial.in_guest("own.txt")).unwrap(), "the guest's");
    trial.bring("incremental/changes", true).await;
    assert_eq!(fs::read_to_string(trial.in_guest("own.txt")).unwrap(), "the host's");

    // Commits of the guest count as its work, too.
    git(&guest, &["commit", "-qam", "the guest's"]);
    trial.git(&["commit", "-qam", "the host's"]);
    let failure = trial.refused("incremental/changes").await;
    assert!(failure.message.contains("\".git\""), "{failure:?}");
    // Nothing new: nothing to do.
    trial.git(&["reset", "-q", "--soft", "HEAD^"]);
    let before = trial.guest.changes.load(Ordering::SeqCst);
    trial.git(&["reset", "-q"]);
    let imported = trial.bring("incremental/changes", false).await;
    assert_eq!(imported.findings[0].message, "nothing has changed");
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn all_of_the_history_comes_if_somebody_wants_it() {
    let mut trial = Trial::new().await;
    trial.repository();
    trial.bring("git/full", false).await;
    trial.same_to_git();
    let guest = trial.guest.place(DESTINATION);
    assert_eq!(git(&guest, &["log", "--format=%H %s"]), trial.git(&["log", "--format=%H %s"]));
}

#[tokio::test]
async fn a_plain_directory_is_copied_and_what_is_there_is_not_thrown_away_unasked() {
    let mut trial = Trial::new().await;
    trial.write("a/b", "c");
    fs::create_dir(trial.host.path().join("empty")).unwrap();
    assert_eq!(trial.offered().await, ["copy/files"]);
    write(&trial.in_guest("precious"), "somebody's");
    let failure = trial.refused("copy/files").await;
    assert_eq!(failure.code, "workspace.destination-not-empty");
    assert_eq!(
        (trial.watch.begun.load(Ordering::SeqCst), trial.guest.changes.load(Ordering::SeqCst)),
        (0, 0)
    );

    let imported = trial.bring("copy/files", true).await;
    assert_eq!(trial.watch.begun.load(Ordering::SeqCst), 1);
    assert!(!trial.in_guest("precious").exists() && trial.in_guest("empty").is_dir());
    assert_eq!(fs::read_to_string(trial.in_guest("a/b")).unwrap(), "c");
    assert!(imported.baseline.history.is_none() && imported.baseline.base.is_none());

    trial.write("a/b", "d");
    assert_eq!(trial.offered().await, ["incremental/changes", "copy/files"]);
    trial.bring("incremental/changes", false).await;
    assert_eq!(fs::read_to_string(trial.in_guest("a/b")).unwrap(), "d");

    // Its disk is gone: what was known of it is worth nothing.
    fs::remove_dir_all(trial.guest.place(DESTINATION)).unwrap();
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
}

#[tokio::test]
async fn what_is_in_the_guest_is_safe_from_importers_that_do_not_look() {
    let (_root, guest) = Directory::new();
    let watch = Arc::new(Watch::default());
    write(&guest.place(DESTINATION).join("precious"), "somebody's");
    let blob = || -> Arc<dyn Blob> { Arc::new(vm_plugin::ports::MemoryBlob(b"x"[..].into())) };
    let watched = |replace| Watched::new(guest.clone(), watch.clone(), DESTINATION, replace);
    let careful = watched(false);
    let mode = FileMode { mode: 0o644, uid: 0, gid: 0 };
    for refused in [
        careful.clear(DESTINATION).await,
        careful.remove("/work/site/precious").await,
        careful.write_file("/work/site/precious", blob(), mode).await,
        careful.unpack(blob(), DESTINATION, 0, 0).await,
    ] {
        assert_eq!(refused.unwrap_err().code, "workspace.destination-not-empty");
    }
    // A command is not refused, and is no beginning: the next import would throw away what is there.
    careful.run(GuestCommand::default(), 0).await.unwrap();
    let begun = || watch.begun.load(Ordering::SeqCst);
    assert_eq!((begun(), guest.changes.load(Ordering::SeqCst)), (0, 0));

    watched(true).clear(DESTINATION).await.unwrap();
    assert_eq!(begun(), 1);
    let empty = watched(false);
    empty.write_file("/work/site/mine", blob(), mode).await.unwrap();
    // It stays its own, though there is something now.
    empty.write_file("/work/site/too", blob(), mode).await.unwrap();
    assert_eq!(begun(), 2);
}

#[tokio::test]
async fn a_base_that_the_host_has_no_more_is_found_out_before_anything_is_done() {
    let mut trial = Trial::new().await;
    trial.repository();
    trial.bring("git/shallow", false).await;
    trial.git(&["commit", "-q", "--amend", "-am", "another"]);
    trial.git(&["reflog", "expire", "--expire=all", "--expire-unreachable=all", "--all"]);
    trial.git(&["gc", "-q", "--prune=now"]);
    trial.write("src/main.rs", "fn main() {}");
    let before = trial.guest.changes.load(Ordering::SeqCst);
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn nothing_is_changed_if_it_cannot_be_written_down_and_errors_say_whose_they_are() {
    let mut trial = Trial::new().await;
    trial.write("a", "a");
    trial.watch = Arc::new(Watch { objects: true, ..Watch::default() });
    let failure = trial.refused("copy/files").await;
    assert_eq!((failure.code.as_str(), failure.hint.as_deref()), ("store.full", Some("free space")));
    assert_eq!(trial.guest.changes.load(Ordering::SeqCst), 0);

    let nobody = ImportRequest { user: "nobody".to_owned(), ..trial.request("copy/files", false) };
    assert_eq!(trial.attempt(nobody).await.unwrap_err().code, "user.unknown");
    let failure = trial.refused("zip/files").await;
    assert!(failure.code == "plugin.unknown" && failure.message.contains("zip"), "{failure:?}");
    assert_eq!(trial.refused("copy/tar").await.code, "workspace.unknown-strategy");
    trial.manager.set_enabled("copy", false).await.unwrap();
    assert_eq!(trial.refused("copy/files").await.code, "plugin.disabled");
    assert!(trial.offered().await.is_empty());
    let source = trial.bench.source("from", "cap", "full", "");
    trial.manager.install(params(&source)).await.unwrap();
    assert_eq!(trial.refused("cap/files").await.code, "plugin.no-importer");
}

#[tokio::test]
async fn what_cannot_be_read_is_named_and_is_no_fault_of_the_importer() {
    let mut trial = Trial::new().await;
    trial.write("fine", "fine");
    trial.write("gone/file", "x");
    let request = trial.request("copy/files", false);
    // As if somebody removed it between looking and reading.
    fs::remove_dir_all(trial.host.path()).unwrap();
    for _ in 0..4 {
        let failure = trial.attempt(request.clone()).await.map(|imported| imported.findings).unwrap_err();
        assert!(failure.code.starts_with("workspace.") && failure.hint.is_some(), "{failure:?}");
    }
    let plugin = trial.manager.find("copy").unwrap();
    assert!(plugin.loaded().unwrap().disabled().is_none());
    trial.host = tempfile::tempdir().unwrap();
    trial.write("fine", "fine");
    trial.bring("copy/files", true).await;
}

#[tokio::test]
async fn a_part_that_somebody_elses_importer_brings_is_not_taken_for_all() {
    let mut trial = Trial::new().await;
    let source = built(true).join("slice");
    let mut install = params(source.to_str().unwrap());
    install.config = Some(json!({ "directories": ["src"], "command": ["make"] }));
    trial.manager.install(install).await.unwrap();
    trial.repository();
    let imported = trial.bring("slice/directories", false).await;
    let mut brought: Vec<_> = fs::read_dir(trial.guest.place(DESTINATION))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    brought.sort();
    assert_eq!(brought, ["SLICE.json", "src"]);
    assert_eq!(*trial.guest.commands.lock().unwrap(), [["make"]]);
    assert!(
        !imported.baseline.whole && imported.baseline.sent.entries.contains_key(b"src/main.rs".as_slice())
    );
    // What it wrote itself counts as the guest's work.
    let known: Vec<_> = imported.baseline.guest.iter().map(|seen| seen.path.as_slice()).collect();
    assert!(known.contains(&b"src/main.rs".as_slice()) && !known.contains(&b"SLICE.json".as_slice()));
    assert!(!trial.offered().await.contains(&"incremental/changes".to_owned()));
    assert_eq!(trial.refused("incremental/changes").await.code, "workspace.not-prepared");
}

#[tokio::test]
async fn all_of_them_pass_the_test_that_every_plugin_has_to_pass() {
    let bench = Bench::new();
    let manager = bench.open().await;
    for (name, fixture) in [("copy", false), ("git", false), ("incremental", false), ("slice", true)] {
        let checks = manager.test(built(fixture).join(name).to_str().unwrap()).await.unwrap();
        let hooks: Vec<_> = checks.iter().map(|check| check.check.as_str()).collect();
        assert_eq!(hooks, ["manifest", "configuration", "loads", "probe", "import"]);
        assert!(checks.iter().all(|check| check.ok), "{name}: {checks:?}");
        let import = &checks.last().unwrap().detail;
        assert!(!import.starts_with("0 inputs"), "{name}: {import}");
    }
}
