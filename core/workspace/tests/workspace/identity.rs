//! Whose rights are used. These need root, and say so where they have to be skipped.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::Command,
};

use vm_workspace::{Cancel, Identity, Selection, Workspace, WorkspaceError};

use crate::{
    guest::Guest,
    repo::{Repo, git_in, things, walk},
};

const USER: u32 = 54_321;
const OTHER: u32 = 54_322;

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: this test needs root, to act as somebody else");
    }
    root
}

/// A repository of another user's.
fn of_user() -> Repo {
    let repo = Repo::git_repository();
    repo.write("a", "1");
    repo.commit();
    fs::set_permissions(repo.home(), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(repo.scratch(), fs::Permissions::from_mode(0o711)).unwrap();
    give_away(&repo.top());
    repo
}

fn give_away(top: &Path) {
    chown(top, Some(USER), Some(USER)).unwrap();
    walk(top, b"", &mut |_, file| {
        std::os::unix::fs::lchown(file, Some(USER), Some(USER)).unwrap();
        true
    });
}

fn open_as(repo: &Repo, uid: u32, path: &Path) -> Result<Workspace, WorkspaceError> {
    let identity = Identity::for_caller(uid, uid, path)?;
    Workspace::open(path, identity, &repo.scratch(), Cancel::default())
}

#[test]
fn what_a_repository_names_is_not_run() {
    if !is_root() {
        return;
    }
    let repo = of_user();
    // Each run of it leaves a file with who ran it.
    let seen = repo.home().join("seen");
    fs::create_dir(&seen).unwrap();
    fs::set_permissions(&seen, fs::Permissions::from_mode(0o777)).unwrap();
    let text =
        format!("#!/bin/sh\necho \"$0\" >\"{}/$(basename \"$0\")-$(id -u)-$$\"\ncat\n", seen.display());
    let source = repo.home().join("source");
    fs::write(&source, text).unwrap();
    for name in ["monitor", "clean", "pre-commit", "post-index-change", "textconv"] {
        // A child writes what will be executed, so that no other child holds it open for writing.
        let program = repo.home().join(name);
        assert!(
            Command::new("install")
                .args(["-m", "755"])
                .arg(&source)
                .arg(&program)
                .status()
                .unwrap()
                .success()
        );
    }
    let program = |name: &str| repo.home().join(name).display().to_string();
    let as_user = |args: &[&str]| {
        let mut all = vec!["-c", "safe.directory=*"];
        all.extend(args);
        git_in(&repo.top(), &all);
    };
    as_user(&["config", "core.fsmonitor", &program("monitor")]);
    as_user(&["config", "filter.odd.clean", &program("clean")]);
    as_user(&["config", "core.hooksPath", &repo.home().display().to_string()]);
    repo.write(".gitattributes", "a filter=odd\n");
    repo.write("a", "22");
    give_away(&repo.top());
    let workspace = open_as(&repo, 0, &repo.top()).unwrap();
    assert_eq!(workspace.identity().uid, USER);
    let guest = Guest::new();
    guest.prepare(&workspace, None);
    workspace.patch(Vec::new()).unwrap();
    assert_eq!(things(&guest.top()), things(&repo.top()));
    let ran: Vec<String> =
        fs::read_dir(&seen).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    // Nor as the user, who may have done no more than unpack it.
    assert_eq!(ran, [""; 0]);
    // Nor does anything of root's stay there.
    walk(&repo.top(), b"", &mut |name, file| {
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::symlink_metadata(file).unwrap());
        assert_eq!(owner, USER, "{}", String::from_utf8_lossy(name));
        true
    });
    assert_eq!(fs::read_dir(repo.scratch()).unwrap().count(), 0);
}

#[test]
fn nobody_gets_a_file_they_may_not_read() {
    if !is_root() {
        return;
    }
    let repo = of_user();
    repo.write("roots", "secret");
    repo.mode("roots", 0o600);
    let workspace = open_as(&repo, USER, &repo.top()).unwrap();
    let error = workspace.archive(Selection::All, std::io::sink()).unwrap_err();
    assert!(matches!(&error, WorkspaceError::Read { path, .. } if path == "roots"), "{error}");
    assert!(error.hint().unwrap().contains("rights"));
    assert!(matches!(workspace.read_file(b"roots", 9), Err(WorkspaceError::Read { .. })));
    fs::set_permissions(repo.home(), fs::Permissions::from_mode(0o700)).unwrap();
    let error = open_as(&repo, USER, &repo.top()).unwrap_err();
    assert!(matches!(error, WorkspaceError::Open { .. }), "{error}");
}

#[test]
fn another_users_repository_is_for_its_owner_to_trust() {
    if !is_root() {
        return;
    }
    let repo = of_user();
    let error = open_as(&repo, OTHER, &repo.top()).unwrap_err();
    assert!(matches!(error, WorkspaceError::ForeignRepository { .. }), "{error}");
    assert!(error.hint().unwrap().contains("safe.directory"));
}

#[test]
fn a_directory_below_the_top_does_not_decide_who_acts() {
    if !is_root() {
        return;
    }
    let repo = of_user();
    fs::create_dir(repo.top().join("roots")).unwrap();
    let workspace = open_as(&repo, 0, &repo.top().join("roots")).unwrap();
    assert_eq!(
        (workspace.identity().uid, workspace.top()),
        (USER, repo.top().canonicalize().unwrap().as_path())
    );
}

#[test]
fn scratch_out_of_reach_is_told() {
    if !is_root() {
        return;
    }
    let repo = of_user();
    fs::set_permissions(repo.scratch(), fs::Permissions::from_mode(0o700)).unwrap();
    let error = open_as(&repo, USER, &repo.top()).unwrap().git_directory(None, Vec::new()).unwrap_err();
    assert!(matches!(error, WorkspaceError::Scratch { .. }) && error.hint().is_some(), "{error}");
}

#[test]
fn who_is_not_root_is_themselves() {
    if nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: this test needs not to be root");
        return;
    }
    assert_eq!(Identity::for_caller(0, 0, Path::new("/")).unwrap(), Identity::own());
}
