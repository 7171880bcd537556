//! What a workspace is.

use std::{fs, os::unix::fs::symlink};

use vm_workspace::{EntryKind, WorkspaceError};

use crate::repo::{Repo, git_in};

fn paths(repo: &Repo) -> Vec<String> {
    let workspace = repo.open();
    workspace.files().iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect()
}

#[test]
fn a_repository_is_described() {
    let repo = Repo::git_repository();
    repo.write(".gitignore", "*.o\nbuilt/\n");
    for name in ["kept", "gone", "staged", "dir/changed"] {
        repo.write(name, "1");
    }
    let head = repo.commit();
    fs::remove_file(repo.top().join("gone")).unwrap();
    repo.write("dir/changed", "2");
    repo.write("staged", "2");
    repo.git(&["add", "staged"]);
    repo.write("new", "12345");
    repo.write("x.o", "ignored");
    repo.write("built/deep/file", "ignored");
    let workspace = repo.try_open(&repo.top().join("dir")).unwrap();
    let facts = workspace.facts();
    assert_eq!(facts.path, repo.top().canonicalize().unwrap());
    assert_eq!((facts.name.as_str(), facts.is_git, facts.detached), ("top", true, false));
    assert_eq!((facts.head.as_deref(), facts.branch.as_deref()), (Some(head.as_str()), Some("main")));
    assert_eq!((facts.modified, facts.untracked, facts.deleted), (2, 1, 1));
    assert_eq!((facts.worktree, facts.sparse, facts.shallow, facts.lfs), (false, false, false, false));
    assert_eq!(facts.warnings, [""; 0]);
    let found = [".gitignore", "dir", "dir/changed", "kept", "new", "staged"];
    assert_eq!(paths(&repo), found);
    let sizes: u64 = found
        .iter()
        .map(|name| repo.top().join(name))
        .filter(|file| file.is_file())
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert_eq!((facts.files, facts.bytes), (5, sizes));
    assert_eq!(workspace.read_file(b"new", 3).unwrap(), b"123");
    assert!(matches!(workspace.read_file(b"x.o", 3), Err(WorkspaceError::NoSuchFile { .. })));
    assert!(matches!(workspace.read_file(b"../scratch", 3), Err(WorkspaceError::NoSuchFile { .. })));
}

#[test]
fn a_directory_without_git_has_everything() {
    let repo = Repo::plain();
    repo.write("a/.hidden", "1");
    repo.write("-dash\n", "");
    fs::create_dir(repo.top().join("empty")).unwrap();
    symlink("/nowhere/at/all", repo.top().join("dangling")).unwrap();
    nix::unistd::mkfifo(&repo.top().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let workspace = repo.open();
    assert!(!workspace.facts().is_git && workspace.head().is_none());
    assert_eq!(paths(&repo), ["-dash\n", "a", "a/.hidden", "dangling", "empty"]);
    assert_eq!(workspace.entry(b"dangling").unwrap().kind, EntryKind::Symlink);
    assert_eq!(workspace.facts().warnings, ["pipe is a pipe, socket or device: it is left out"]);
    assert!(matches!(workspace.git_directory(None, Vec::new()), Err(WorkspaceError::NotARepository { .. })));
}

#[test]
fn what_is_no_working_tree_is_refused_clearly() {
    let repo = Repo::plain();
    repo.write("file", "");
    let refused = |name: &str| repo.try_open(&repo.top().join(name)).unwrap_err();
    assert!(matches!(refused("file"), WorkspaceError::NotADirectory { .. }));
    let missing = refused("missing");
    assert!(matches!(missing, WorkspaceError::Open { .. }) && missing.hint().is_some());
    repo.git(&["init", "-q", "--bare", "bare.git"]);
    assert!(matches!(refused("bare.git"), WorkspaceError::Bare { .. }));
    repo.git(&["init", "-q", "repo"]);
    assert!(matches!(refused("repo/.git"), WorkspaceError::WithinGit { .. }));
}

#[test]
fn before_the_first_commit_there_is_a_branch_and_no_head() {
    let repo = Repo::git_repository();
    repo.write("a", "1");
    let workspace = repo.open();
    let facts = workspace.facts();
    assert_eq!((facts.head.as_ref(), facts.branch.as_deref(), facts.untracked), (None, Some("main"), 1));
    assert!(matches!(workspace.bundle(None, Vec::new()), Err(WorkspaceError::NoCommit { .. })));
}

#[test]
fn linked_sparse_shallow_and_detached_are_told() {
    let repo = Repo::git_repository();
    repo.write("in/a", "1");
    repo.write("out/b", "1");
    repo.commit();
    repo.write("in/a", "2");
    repo.commit();
    repo.git(&["worktree", "add", "-q", "--detach", "../linked"]);
    let linked = repo.try_open(&repo.home().join("linked")).unwrap();
    assert!(linked.facts().worktree && linked.facts().detached && linked.facts().branch.is_none());
    let url = format!("file://{}", repo.top().display());
    git_in(repo.home(), &["clone", "-q", "--depth=1", &url, "shallow"]);
    assert!(repo.try_open(&repo.home().join("shallow")).unwrap().facts().shallow);
    repo.git(&["sparse-checkout", "set", "in"]);
    let sparse = repo.open();
    assert!(sparse.facts().sparse && !sparse.facts().dirty());
    assert_eq!(paths(&repo), ["in", "in/a"]);
}

#[test]
fn submodules_and_stray_repositories() {
    let repo = Repo::git_repository();
    repo.git(&["init", "-q", "../inner"]);
    let inner = repo.home().join("inner");
    fs::write(inner.join("in inner"), "1").unwrap();
    git_in(&inner, &["add", "-A"]);
    git_in(&inner, &["commit", "-qm", "1"]);
    let outer = repo.home().join("outer");
    git_in(repo.home(), &["init", "-q", "outer"]);
    git_in(&outer, &["submodule", "--quiet", "add", "../inner", "nested"]);
    git_in(&outer, &["commit", "-qm", "1"]);
    repo.write("a", "");
    repo.commit();
    for (source, name) in [("../outer", "module"), ("../inner", "closed")] {
        repo.git(&["submodule", "--quiet", "add", source, name]);
    }
    repo.git(&["submodule", "--quiet", "update", "--init", "--recursive"]);
    repo.commit();
    repo.git(&["submodule", "--quiet", "deinit", "closed"]);
    repo.write("module/nested/own work", "1");
    repo.git(&["init", "-q", "stray"]);
    repo.write("stray/file", "1");
    let workspace = repo.open();
    let facts = workspace.facts();
    assert_eq!(facts.submodules, ["closed", "module", "module/nested"]);
    assert_eq!(workspace.submodules().collect::<Vec<_>>(), [&b"module"[..], b"module/nested"]);
    // The file in the nested submodule, and the stray repository as git counts it, and its file.
    assert_eq!((facts.modified, facts.untracked), (0, 3));
    assert_eq!(
        paths(&repo),
        [
            ".gitmodules",
            "a",
            "closed",
            "module",
            "module/.gitmodules",
            "module/nested",
            "module/nested/in inner",
            "module/nested/own work",
            "stray",
            "stray/file"
        ]
    );
    assert!(facts.warnings.len() == 1 && facts.warnings[0].starts_with("stray "), "{:?}", facts.warnings);
}

#[test]
fn files_that_git_lfs_keeps_are_told() {
    let repo = Repo::git_repository();
    repo.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n");
    repo.write("a.txt", "");
    repo.commit();
    assert!(!repo.open().facts().lfs);
    repo.write("a.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    repo.commit();
    let workspace = repo.open();
    assert!(workspace.facts().lfs && workspace.facts().warnings.len() == 1);
}

#[test]
fn looking_changes_nothing() {
    let repo = Repo::git_repository();
    repo.write("a", "1");
    repo.commit();
    // Git would bring the index up to date.
    repo.write("a", "1");
    let state = || {
        let mut files = Vec::new();
        crate::repo::walk(&repo.top(), b"", &mut |name, file| {
            if file.is_file() {
                files.push((
                    name.to_vec(),
                    fs::read(file).unwrap(),
                    file.metadata().unwrap().modified().unwrap(),
                ));
            }
            true
        });
        files.sort();
        files
    };
    let before = state();
    let workspace = repo.open();
    workspace.git_directory(None, Vec::new()).unwrap();
    workspace.bundle(Some(1), Vec::new()).unwrap();
    repo.write("new", "1");
    repo.open().patch(Vec::new()).unwrap();
    fs::remove_file(repo.top().join("new")).unwrap();
    assert_eq!(state(), before);
    assert_eq!(fs::read_dir(repo.scratch()).unwrap().count(), 0);
}

#[test]
fn stashes_are_no_changes() {
    let repo = Repo::git_repository();
    repo.write("a", "1");
    repo.commit();
    repo.write("a", "2");
    repo.git(&["stash", "--quiet"]);
    repo.git(&["config", "status.showStash", "true"]);
    assert!(!repo.open().facts().dirty());
}

#[test]
fn filters_of_a_repository_are_not_run() {
    let repo = Repo::git_repository();
    let ran = repo.home().join("ran");
    repo.write("a", "1");
    repo.write("b", "1");
    repo.commit();
    repo.write("a", "22");
    repo.write("b", "22");
    // In no file that git keeps, and with a name that a setting on the command line cannot have.
    repo.write(".git/info/attributes", "a filter=x=y.z\nb filter=slow\n");
    let program = format!("touch '{}'; cat", ran.display());
    repo.git(&["config", "filter.x=y.z.clean", &program]);
    repo.git(&["config", "filter.x=y.z.required", "true"]);
    repo.git(&["config", "filter.slow.process", &program]);
    let workspace = repo.open();
    assert_eq!(workspace.facts().modified, 2);
    workspace.git_directory(None, Vec::new()).unwrap();
    let mut patch = Vec::new();
    workspace.patch(&mut patch).unwrap();
    assert!(String::from_utf8_lossy(&patch).contains("+22"));
    assert!(!ran.exists());
}
