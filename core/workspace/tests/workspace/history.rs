//! What a guest gets of git.

use std::{fs, os::unix::fs::symlink};

use vm_workspace::WorkspaceError;

use crate::{
    guest::{Guest, said},
    repo::{Repo, git_in, things, things_of, try_git},
};

/// A workspace in a guest is as it is on the host.
pub(crate) fn assert_same(repo: &Repo, guest: &Guest) {
    assert_eq!(said(&guest.top()), said(&repo.top()));
    assert_eq!(things(&guest.top()), things_of(&repo.open()));
    let checked = try_git(&guest.top(), &["fsck", "--full"]);
    let report = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
    assert!(checked.status.success() && !report.contains("missing"), "{report}");
}

fn with_history() -> Repo {
    let repo = Repo::git_repository();
    for number in 0..5 {
        repo.write("counter", number.to_string());
        repo.write(format!("file {number}"), "x");
        repo.commit();
        repo.git(&["tag", "-m", "annotated", &format!("v{number}")]);
    }
    repo
}

#[test]
fn depth_limits_how_far_back_it_goes() {
    let repo = with_history();
    for (depth, commits) in [(None, 5), (Some(1), 1), (Some(3), 3), (Some(9), 5)] {
        let guest = Guest::new();
        let baseline = guest.prepare(&repo.open(), depth);
        assert_eq!(guest.git(&["rev-list", "--count", "HEAD"]), commits.to_string(), "{depth:?}");
        assert_eq!(guest.git(&["tag"]).lines().count(), commits, "{depth:?}");
        assert_eq!(guest.git(&["describe"]), "v4");
        assert_eq!(baseline.history.unwrap().own().unwrap().shallow.is_empty(), commits == 5);
        assert_same(&repo, &guest);
    }
}

#[test]
fn nothing_of_the_hosts_goes_along_but_what_is_needed() {
    let repo = with_history();
    repo.git(&["branch", "other"]);
    repo.write("secret", "1");
    repo.git(&["stash", "-q", "-u"]);
    for (key, value) in [
        ("user.name", "Some Body"),
        ("user.email", "some@example.org"),
        ("remote.origin.url", "https://me:token@host.example/a.git"),
        ("core.fsmonitor", "/bin/false"),
        ("alias.x", "!false"),
        ("credential.helper", "store"),
    ] {
        repo.git(&["config", key, value]);
    }
    repo.write(".git/hooks/pre-commit", "#!/bin/false\n");
    repo.mode(".git/hooks/pre-commit", 0o755);
    let guest = Guest::new();
    guest.prepare(&repo.open(), None);
    let mut settings: Vec<String> =
        guest.git(&["config", "--local", "--list"]).lines().map(str::to_owned).collect();
    settings.sort();
    assert_eq!(
        settings,
        [
            "core.bare=false",
            "core.filemode=true",
            "core.repositoryformatversion=0",
            "remote.origin.fetch=+refs/heads/*:refs/remotes/origin/*",
            "remote.origin.url=https://host.example/a.git",
            "user.email=some@example.org",
            "user.name=Some Body"
        ]
    );
    assert_eq!(
        guest.git(&["for-each-ref", "--format=%(refname)", "refs/heads", "refs/stash"]),
        "refs/heads/main"
    );
    assert!(!guest.top().join(".git/hooks").exists() && !guest.top().join(".git/logs").exists());
    guest.git(&["commit", "-q", "--allow-empty", "-m", "work goes on"]);
}

#[test]
fn the_index_goes_along() {
    let repo = with_history();
    repo.write("staged", "1");
    repo.write("counter", "staged");
    repo.git(&["add", "-A"]);
    repo.write("counter", "and changed again");
    fs::remove_file(repo.top().join("file 1")).unwrap();
    repo.git(&["rm", "-q", "--cached", "file 2"]);
    repo.git(&["mv", "file 3", "renamed"]);
    repo.write("intended", "1");
    repo.git(&["add", "-N", "intended"]);
    repo.git(&["update-index", "--assume-unchanged", "file 4"]);
    repo.write("file 4", "unseen");
    let guest = Guest::new();
    guest.prepare(&repo.open(), Some(1));
    assert_same(&repo, &guest);
}

#[test]
fn a_conflict_goes_along() {
    let repo = with_history();
    repo.git(&["checkout", "-q", "-b", "other", "HEAD~1"]);
    repo.write("counter", "theirs");
    repo.commit();
    repo.git(&["checkout", "-q", "main"]);
    assert!(!try_git(&repo.top(), &["merge", "-q", "other"]).status.success());
    let guest = Guest::new();
    guest.prepare(&repo.open(), Some(1));
    assert_same(&repo, &guest);
}

#[test]
fn odd_places_are_as_good() {
    // Detached, before the first commit, sparse, shallow, linked, with long names of objects.
    let detached = with_history();
    detached.git(&["checkout", "-q", "--detach", "HEAD~2"]);
    let unborn = Repo::git_repository();
    unborn.write("a", "1");
    unborn.git(&["add", "a"]);
    let sparse = with_history();
    sparse.write("in/a", "1");
    sparse.write("out/b", "1");
    sparse.commit();
    sparse.git(&["sparse-checkout", "set", "in"]);
    let wide = Repo::of_format("sha256");
    wide.write("a", "1");
    wide.commit();
    for (name, repo) in [("detached", detached), ("sparse", sparse), ("wide", wide)] {
        println!("{name}");
        for depth in [None, Some(1)] {
            let guest = Guest::new();
            guest.prepare(&repo.open(), depth);
            assert_same(&repo, &guest);
        }
    }
    let guest = Guest::new();
    guest.take_git(&unborn.open(), None);
    fs::write(guest.top().join("a"), "1").unwrap();
    let status = ["status", "--porcelain=v2", "--branch"];
    assert_eq!(guest.git(&status), unborn.git(&status));

    let source = with_history();
    let url = format!("file://{}", source.top().display());
    git_in(source.home(), &["clone", "-q", "--depth=2", &url, "shallow"]);
    source.git(&["worktree", "add", "-q", "-b", "side", "../linked"]);
    fs::write(source.home().join("linked/new"), "1").unwrap();
    for (name, commits) in [("shallow", "2"), ("linked", "5")] {
        let workspace = source.try_open(&source.home().join(name)).unwrap();
        let guest = Guest::new();
        guest.prepare(&workspace, None);
        assert_eq!(guest.git(&["rev-list", "--count", "HEAD"]), commits);
        guest.git(&["fsck"]);
        assert_eq!(
            guest.git(&["status", "--porcelain"]),
            git_in(workspace.top(), &["status", "--porcelain"])
        );
        let guest = Guest::new();
        guest.prepare(&workspace, Some(1));
        assert_eq!(guest.git(&["rev-list", "--count", "HEAD"]), "1");
    }
}

#[test]
fn submodules_work_in_the_guest() {
    let repo = Repo::git_repository();
    for name in ["inner", "outer"] {
        git_in(repo.home(), &["init", "-q", name]);
        fs::write(repo.home().join(name).join("file"), name).unwrap();
    }
    let (inner, outer) = (repo.home().join("inner"), repo.home().join("outer"));
    for (directory, module) in [(&inner, None), (&outer, Some("../inner"))] {
        if let Some(module) = module {
            git_in(directory, &["submodule", "--quiet", "add", module, "deep/nested"]);
        }
        git_in(directory, &["add", "-A"]);
        git_in(directory, &["commit", "-qm", "1"]);
    }
    repo.git(&["submodule", "--quiet", "add", "--name", "a name", "../outer", "dir/outer"]);
    repo.git(&["submodule", "--quiet", "add", "../inner", "absent"]);
    repo.git(&["submodule", "--quiet", "update", "--init", "--recursive"]);
    repo.commit();
    repo.git(&["submodule", "--quiet", "deinit", "absent"]);
    repo.write("dir/outer/deep/nested/file", "changed");
    let guest = Guest::new();
    let workspace = repo.open();
    let baseline = guest.prepare(&workspace, Some(1));
    assert_eq!(things(&guest.top()), things_of(&workspace));
    for place in ["", "dir/outer", "dir/outer/deep/nested"] {
        assert_eq!(said(&guest.top().join(place)), said(&repo.top().join(place)), "{place}");
    }
    assert!(guest.top().join(".git/modules/a name/modules/deep/nested/HEAD").is_file());
    let state = |said: String| {
        // What follows in brackets is what other branches and tags are near.
        said.lines().map(|line| line.split(" (").next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let ask = ["submodule", "status", "--recursive"];
    assert_eq!(state(guest.git(&ask)), state(repo.git(&ask)));

    // A commit in the submodule, and the one that records it.
    git_in(&repo.top().join("dir/outer/deep/nested"), &["commit", "-qam", "2"]);
    git_in(&repo.top().join("dir/outer"), &["commit", "-qam", "2"]);
    repo.commit();
    guest.catch_up(&repo.open(), &baseline);
    for place in ["", "dir/outer", "dir/outer/deep/nested"] {
        assert_eq!(said(&guest.top().join(place)), said(&repo.top().join(place)), "{place}");
        git_in(&guest.top().join(place), &["fsck"]);
    }
}

#[test]
fn an_update_brings_what_is_new_and_no_more() {
    let repo = with_history();
    repo.write(
        "big",
        (0..200_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>(),
    );
    repo.commit();
    for depth in [None, Some(1), Some(2)] {
        let guest = Guest::new();
        let baseline = guest.prepare(&repo.open(), depth);
        repo.write("counter", format!("{depth:?}"));
        // What was there before the guest's history, and is again.
        repo.write("file 1", "0");
        repo.commit();
        repo.write("staged", "only staged");
        repo.git(&["add", "staged"]);
        let mut tar = Vec::new();
        repo.open().git_update(baseline.history.as_ref().unwrap(), &mut tar).unwrap();
        assert!(tar.len() < 100_000, "{}", tar.len());
        let (difference, after) = guest.catch_up(&repo.open(), &baseline);
        assert!(difference.history && difference.guest_changed.is_empty(), "{:?}", difference.guest_changed);
        assert_same(&repo, &guest);
        assert!(guest.difference(&repo.open(), &after).is_empty());
    }
}

#[test]
fn an_update_over_old_and_other_history() {
    let repo = with_history();
    // An old branch is merged, whose history the guest lacks.
    repo.git(&["checkout", "-q", "-b", "old", "HEAD~3"]);
    repo.write("from old", "1");
    repo.commit();
    repo.git(&["checkout", "-q", "main"]);
    let guest = Guest::new();
    let baseline = guest.prepare(&repo.open(), Some(1));
    repo.git(&["merge", "-q", "-m", "merge", "old"]);
    let (_, baseline) = guest.catch_up(&repo.open(), &baseline);
    assert_same(&repo, &guest);
    // Back to before what the guest has, on another branch.
    repo.git(&["checkout", "-q", "-b", "back", "HEAD~3"]);
    let (_, baseline) = guest.catch_up(&repo.open(), &baseline);
    assert_same(&repo, &guest);
    // Branches of which git cannot have both.
    repo.git(&["branch", "-m", "back/below/deep"]);
    let (_, baseline) = guest.catch_up(&repo.open(), &baseline);
    assert_same(&repo, &guest);
    repo.git(&["branch", "-m", "back"]);
    let (_, baseline) = guest.catch_up(&repo.open(), &baseline);
    assert_same(&repo, &guest);
    // A history that has nothing in common.
    repo.git(&["checkout", "-q", "--orphan", "fresh"]);
    repo.write("alone", "1");
    repo.commit();
    let (_, baseline) = guest.catch_up(&repo.open(), &baseline);
    assert_same(&repo, &guest);
    // What the guest has is gone.
    repo.git(&["commit", "-q", "--amend", "-m", "other"]);
    repo.git(&["reflog", "expire", "--expire=now", "--all"]);
    repo.git(&["gc", "-q", "--prune=now"]);
    let error = repo.open().git_update(baseline.history.as_ref().unwrap(), Vec::new()).unwrap_err();
    assert!(matches!(error, WorkspaceError::BaseGone { .. }), "{error}");
}

#[test]
fn a_bundle_can_be_cloned_and_a_patch_applied() {
    let repo = with_history();
    let bundle = repo.home().join("bundle");
    repo.open().bundle(None, fs::File::create(&bundle).unwrap()).unwrap();
    git_in(repo.home(), &["clone", "-q", "bundle", "clone"]);
    let clone = repo.home().join("clone");
    assert_eq!(git_in(&clone, &["rev-parse", "HEAD"]), repo.git(&["rev-parse", "HEAD"]));

    repo.write("counter", [0, 159, 146, 150]);
    repo.write("new/bin", [0, 255]);
    repo.write("new/empty", "");
    repo.write("file 1", "staged");
    repo.git(&["add", "file 1"]);
    repo.mode("file 0", 0o755);
    fs::remove_file(repo.top().join("file 3")).unwrap();
    symlink("nowhere", repo.top().join("link")).unwrap();
    let patch = repo.home().join("patch");
    repo.open().patch(fs::File::create(&patch).unwrap()).unwrap();
    git_in(&clone, &["apply", "--binary", "--index", patch.to_str().unwrap()]);
    assert_eq!(things(&clone), things(&repo.top()));
}

#[test]
fn a_partial_clone_says_what_is_missing() {
    let repo = with_history();
    repo.git(&["config", "uploadpack.allowFilter", "true"]);
    let url = format!("file://{}", repo.top().display());
    git_in(repo.home(), &["clone", "-q", "--filter=blob:none", &url, "partial"]);
    let workspace = repo.try_open(&repo.home().join("partial")).unwrap();
    let error = workspace.git_directory(None, Vec::new()).unwrap_err();
    assert!(error.hint().is_some_and(|hint| hint.contains("partial clone")), "{error:?}");
    // What is checked out is there.
    let guest = Guest::new();
    guest.prepare(&workspace, Some(1));
    guest.git(&["fsck"]);
}

#[test]
fn a_repository_does_not_choose_which_of_the_users_files_go_along() {
    let repo = with_history();
    let secret = repo.home().join("secret");
    fs::write(&secret, "-----BEGIN KEY-----\n").unwrap();
    repo.git(&["config", "core.excludesFile", secret.to_str().unwrap()]);
    repo.git(&["config", "core.sparseCheckout", "true"]);
    for name in ["exclude", "sparse-checkout"] {
        let file = repo.top().join(".git/info").join(name);
        let _ = fs::remove_file(&file);
        std::os::unix::fs::symlink(&secret, file).unwrap();
    }
    let guest = Guest::new();
    guest.prepare(&repo.open(), None);
    for name in ["exclude", "sparse-checkout"] {
        let text = fs::read_to_string(guest.top().join(".git/info").join(name)).unwrap_or_default();
        assert!(!text.contains("KEY"), "{name}: {text}");
    }
}

#[test]
fn tags_of_tags_are_whole() {
    for depth in [None, Some(1)] {
        let repo = with_history();
        repo.git(&["tag", "-a", "-m", "inner", "inner"]);
        repo.git(&["tag", "-a", "-m", "outer", "outer", "inner"]);
        repo.git(&["tag", "-d", "inner"]);
        let guest = Guest::new();
        guest.prepare(&repo.open(), depth);
        assert_eq!(guest.git(&["rev-parse", "outer^{commit}"]), repo.git(&["rev-parse", "HEAD"]));
        assert_eq!(guest.git(&["fsck", "--connectivity-only"]), "");
    }
}
