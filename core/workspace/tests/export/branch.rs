//! Commits and uncommitted work as a branch.

use std::fs;

use vm_workspace::export::{ExportError, Wish};

use crate::world::{World, differing, files_of, git, git_with, make_executable, snapshot, write};

fn revision(world: &World, name: &str) -> String {
    git(&world.host(), &["rev-parse", name])
}

#[test]
fn commits_and_what_is_not_committed_become_a_branch() {
    let mut world = World::with(&[("a", "1\n"), ("b", "2\n"), ("dir/c", "3\n"), (".gitignore", "*.o\n")]);
    world.prepare(true);
    let (host, guest) = (world.host(), world.guest());
    let base = revision(&world, "HEAD");
    write(&guest.join("a"), b"1 changed\n");
    git(&guest, &["commit", "--quiet", "-am", "second"]);
    git(&guest, &["mv", "b", "moved"]);
    git(&guest, &["commit", "--quiet", "-m", "third"]);
    write(&guest.join("new file"), b"\0binary");
    make_executable(&guest.join("new file"));
    write(&guest.join("made.o"), b"ignored");
    fs::remove_dir_all(guest.join("dir")).unwrap();

    let before = files_of(&host);
    let mut export = world.export(Wish::Branch);
    let report = export.branch("work/guest", "left over", false).unwrap();

    assert_eq!(report.commits, 3);
    assert!(report.uncommitted && report.continues);
    assert_eq!(report.base.as_deref(), Some(base.as_str()));
    assert_eq!(report.before, None);
    assert_eq!(revision(&world, "work/guest"), report.commit);
    assert_eq!(revision(&world, "work/guest^{tree}"), world.guest_tree());
    assert_eq!(revision(&world, "work/guest~1"), git(&guest, &["rev-parse", "HEAD"]));
    assert_eq!(
        git(&host, &["log", "--format=%s %an", "work/guest"]),
        "left over A B\nthird Guest\nsecond Guest\nfirst A B"
    );
    assert_eq!(git(&host, &["fsck", "--strict"]), "");
    assert_eq!(files_of(&host), before, "the files that are checked out are not touched");
    assert_eq!(revision(&world, "HEAD"), base);
}

#[test]
fn a_dry_run_changes_no_byte_of_the_repository() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "second"]);
    write(&world.guest().join("b"), b"3\n");
    // Git would like to write down that only this file's times have changed.
    let touched = fs::File::options().append(true).open(world.host().join("a")).unwrap();
    touched.set_modified(std::time::UNIX_EPOCH).unwrap();
    let before = snapshot(&world.host());
    let mut export = world.export(Wish::Branch);
    let dry = export.branch("x", "m", true).unwrap();
    assert_eq!(dry.commits, 2);
    assert_eq!(export.apply(true).unwrap().written.len(), 2);
    let mut patch = Vec::new();
    export.patch(&mut patch).unwrap();
    assert_eq!(differing(&snapshot(&world.host()), &before), Vec::<String>::new());
    let wet = export.branch("x", "m", false).unwrap();
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
    assert_eq!((dry.commits, dry.uncommitted), (wet.commits, wet.uncommitted));
}

#[test]
fn a_branch_only_moves_forward() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "second"]);
    let first = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert!(!first.uncommitted);

    write(&world.guest().join("a"), b"3\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "third"]);
    let second = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(second.before, Some(first.commit));
    assert_eq!(revision(&world, "x"), second.commit);

    git(&world.guest(), &["reset", "--quiet", "--hard", "HEAD~1"]);
    write(&world.guest().join("a"), b"4\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "another"]);
    let error = world.export(Wish::Branch).branch("x", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::BranchDiverged { .. }), "{error}");
    assert_eq!(revision(&world, "x"), second.commit);

    let error = world.export(Wish::Branch).branch("main", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::BranchCheckedOut { .. }), "{error}");
    assert_eq!(revision(&world, "main"), revision(&world, "HEAD"));
}

#[test]
fn names_that_git_does_not_take() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    let mut export = world.export(Wish::Branch);
    for name in ["", "-x", "a..b", "a b", "x.lock", "@{-1}", "HEAD", "a/", "/a", "a\0b", "a\nb", "../x"] {
        let error = export.branch(name, "m", false).unwrap_err();
        assert!(matches!(error, ExportError::BranchName { .. }), "{name:?}: {error}");
    }
}

#[test]
fn a_rewritten_history_is_told() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    git(&world.guest(), &["commit", "--quiet", "--amend", "-am", "first, better"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert!(!report.continues);
    assert_eq!(report.commits, 1);
    assert_eq!(revision(&world, "x"), git(&world.guest(), &["rev-parse", "HEAD"]));
}

#[test]
fn packed_detached_and_collected() {
    let mut world = World::with(&[("a", "1\n"), ("b", &"x".repeat(5000))]);
    world.prepare(true);
    let guest = world.guest();
    for round in 0..5 {
        write(&guest.join("a"), format!("{round}\n").as_bytes());
        git(&guest, &["commit", "--quiet", "-am", "more"]);
    }
    git(&guest, &["gc", "--quiet", "--prune=now"]);
    git(&guest, &["pack-refs", "--all"]);
    git(&guest, &["checkout", "--quiet", "--detach"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.uncommitted), (5, false));
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
}

#[test]
fn a_guest_without_git_gives_one_commit() {
    for remove in [false, true] {
        let mut world = World::with(&[("a", "1\n"), ("b", "2\n"), (".gitignore", "*.o\n")]);
        world.prepare(remove);
        if remove {
            fs::remove_dir_all(world.guest().join(".git")).unwrap();
        }
        write(&world.guest().join("a"), b"2\n");
        write(&world.guest().join("c.o"), b"ignored");
        fs::remove_file(world.guest().join("b")).unwrap();
        let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
        assert_eq!((report.commits, report.uncommitted), (1, true));
        assert_eq!(git(&world.host(), &["diff", "--name-status", "--no-renames", "main", "x"]), "M\ta\nD\tb");
    }
}

#[test]
fn what_the_host_had_not_committed_comes_along() {
    let mut world = World::with(&[("a", "1\n"), ("b", "2\n"), ("gone", "3\n")]);
    write(&world.host().join("a"), b"dirty\n");
    write(&world.host().join("untracked"), b"u\n");
    fs::remove_file(world.host().join("gone")).unwrap();
    world.prepare(true);
    write(&world.guest().join("b"), b"work\n");
    // It goes on on the host; the branch is of what the guest has.
    write(&world.host().join("a"), b"dirtier\n");
    world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
    assert_eq!(git(&world.host(), &["show", "x:a"]), "dirty");
    assert_eq!(git(&world.host(), &["show", "x:untracked"]), "u");
}

#[test]
fn an_export_that_was_begun_for_files_is_no_patch_or_branch() {
    let mut world = World::with(&[("a", "1\n")]);
    write(&world.host().join("a"), b"dirty\n");
    world.prepare(true);
    let mut export = world.export(Wish::Files { ignored: false });
    let error = export.patch(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, ExportError::NotWished { .. }), "{error}");
    let error = world.export(Wish::Patch).branch("x", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::NotWished { .. }), "{error}");
}

/// As root for a tree of somebody else's: all that is made is that user's.
#[test]
fn somebody_elses_tree_stays_theirs() {
    const USER: u32 = 54_321;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can act as others");
        return;
    }
    let mut world = World::with(&[("a", "1\n"), ("dir/b", "2\n")]);
    world.give_to(USER);
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("a"), b"2\n");
    git(&guest, &["commit", "--quiet", "-am", "second"]);
    write(&guest.join("new/c"), b"3\n");
    fs::remove_file(guest.join("dir/b")).unwrap();
    let mut export = world.export(Wish::Branch);
    let report = export.branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.uncommitted), (2, true));
    export.patch(&mut Vec::new()).unwrap();
    let applied = export.apply(false).unwrap();
    assert_eq!((applied.written.len(), applied.removed.len(), applied.failed), (2, 1, vec![]));
    for seen in crate::world::survey(&world.host()) {
        assert_eq!((seen.uid, seen.gid), (USER, USER), "{}", String::from_utf8_lossy(&seen.path));
    }
    // What that user may not write stays as it is.
    let locked = world.host().join("locked");
    fs::create_dir(&locked).unwrap();
    write(&guest.join("locked/d"), b"4\n");
    let report = world.export(Wish::Branch).apply(false).unwrap();
    assert_eq!(report.failed.len(), 1, "{report:?}");
    assert_eq!(fs::read_dir(&locked).unwrap().count(), 0);
}

#[test]
fn no_work_is_no_commit() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    let mut export = world.export(Wish::Branch);
    assert_eq!(export.changes().unwrap(), []);
    let report = export.branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.uncommitted), (0, false));
    assert_eq!(revision(&world, "x"), revision(&world, "HEAD"));
}

#[test]
fn a_repository_without_commits() {
    let mut world = World::plain();
    git(&world.host(), &["init", "--quiet", "--initial-branch=main"]);
    write(&world.host().join("a"), b"1\n");
    world.prepare(true);
    write(&world.guest().join("b"), b"2\n");
    git(&world.guest(), &["add", "b"]);
    git(&world.guest(), &["commit", "--quiet", "-m", "start"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.uncommitted), (2, true));
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
}

#[test]
fn sha256_and_shallow_hosts() {
    let mut world = World::plain();
    git(&world.host(), &["init", "--quiet", "--initial-branch=main", "--object-format=sha256"]);
    write(&world.host().join("a"), b"1\n");
    git(&world.host(), &["add", "a"]);
    let who = ["-c", "user.name=A", "-c", "user.email=a@b.example"];
    git(&world.host(), &[&who[..], &["commit", "--quiet", "-m", "first"]].concat());
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "second"]);
    fs::remove_file(world.guest().join("a")).unwrap();
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.commit.len()), (2, 64));
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());

    let mut world = World::with(&[("a", "1\n")]);
    let origin = world.beside("origin");
    write(&world.host().join("a"), b"2\n");
    git(&world.host(), &["commit", "--quiet", "-am", "second"]);
    fs::rename(world.host(), &origin).unwrap();
    let url = format!("file://{}", origin.display());
    git(&world.beside(""), &["clone", "--quiet", "--depth=1", &url, "host"]);
    world.prepare(true);
    write(&world.guest().join("a"), b"3\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "third"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.continues), (1, true));
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
    assert_eq!(git(&world.host(), &["rev-list", "--count", "x"]), "2");
    assert_eq!(git(&world.host(), &["fsck", "--strict"]), "");
}

#[test]
fn a_linked_working_tree_and_a_detached_head() {
    let mut world = World::with(&[("a", "1\n")]);
    let main = world.beside("main");
    fs::rename(world.host(), &main).unwrap();
    git(&main, &["worktree", "add", "--quiet", "--detach", world.host().to_str().unwrap()]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    git(&world.guest(), &["commit", "--quiet", "-am", "second"]);
    world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(git(&main, &["rev-parse", "x^{tree}"]), world.guest_tree());
    let error = world.export(Wish::Branch).branch("main", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::BranchCheckedOut { .. }), "it is, elsewhere: {error}");
}

#[test]
fn attributes_of_the_guest_are_applied_and_its_filters_are_not() {
    let mut world = World::with(&[("a", "1\n"), ("crlf", "1\r\n2\r\n")]);
    world.prepare(true);
    let (guest, ran) = (world.guest(), world.beside("ran"));
    write(&guest.join(".gitattributes"), b"*.txt text\n*.bin filter=evil\n*.big filter=lfs\n");
    write(&guest.join("x.txt"), b"1\r\n2\r\n");
    write(&guest.join("x.bin"), b"content\n");
    git(&guest, &["config", "filter.evil.clean", &format!("touch {}; cat", ran.display())]);
    git(&guest, &["config", "core.fsmonitor", &format!("touch {}", ran.display())]);
    write(
        &guest.join(".git/hooks/reference-transaction"),
        format!("#!/bin/sh\ntouch {}\n", ran.display()).as_bytes(),
    );
    make_executable(&guest.join(".git/hooks/reference-transaction"));
    let mut export = world.export(Wish::Branch);
    export.branch("x", "m", false).unwrap();
    let warnings = export.warnings().join("\n");
    assert!(warnings.contains("x.bin is committed as it is in the guest: the filter evil"), "{warnings}");
    assert!(!warnings.contains("x.txt"), "{warnings}");
    assert_eq!(git(&world.host(), &["cat-file", "-s", "x:x.txt"]), "4");
    assert_eq!(git(&world.host(), &["cat-file", "-s", "x:x.bin"]), "8");
    assert!(!ran.exists(), "nothing of the guest's configuration is run");
}

#[test]
fn ignored_files_that_git_keeps_all_the_same() {
    let mut world = World::with(&[("a", "1\n"), ("kept.o", "o\n"), (".gitignore", "*.o\n/.gitignore\n")]);
    git(&world.host(), &["add", "--force", "kept.o", ".gitignore"]);
    git(&world.host(), &["commit", "--quiet", "--amend", "-m", "all"]);
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("kept.o"), b"changed\n");
    write(&guest.join("forced.o"), b"f\n");
    write(&guest.join("other.o"), b"x\n");
    write(&guest.join("dir/private"), b"p\n");
    write(&guest.join(".git/info/exclude"), b"private\n");
    git(&guest, &["add", "--force", "forced.o"]);
    world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
    let names = git(&world.host(), &["ls-tree", "-r", "--name-only", "x"]);
    assert_eq!(names, ".gitignore\na\nforced.o\nkept.o");
}

#[test]
fn a_sparse_checkout_keeps_what_is_not_there() {
    for history in [true, false] {
        let mut world = World::with(&[("in/a", "1\n"), ("out/b", "2\n"), ("c", "3\n")]);
        git(&world.host(), &["sparse-checkout", "set", "in"]);
        world.prepare(history);
        write(&world.guest().join("in/a"), b"work\n");
        world.export(Wish::Branch).branch("x", "m", false).unwrap();
        assert_eq!(git(&world.host(), &["diff", "--name-status", "main", "x"]), "M\tin/a", "{history}");
    }
}

#[test]
fn submodules_are_told_of() {
    let mut world = World::with(&[("a", "1\n")]);
    let other = World::with(&[("s", "1\n"), ("t", "2\n")]);
    let url = other.host();
    let allow = ["-c", "protocol.file.allow=always"];
    let add = ["submodule", "--quiet", "add", url.to_str().unwrap(), "sub"];
    git(&world.host(), &[&allow[..], &add].concat());
    git(&world.host(), &["commit", "--quiet", "-m", "with a submodule"]);
    world.prepare(true);
    let guest = world.guest();
    assert_eq!(git(&guest, &["status", "--porcelain"]), "");
    let mut export = world.export(Wish::Branch);
    assert_eq!(export.warnings(), Vec::<String>::new());
    export.branch("same", "m", false).unwrap();
    assert_eq!(revision(&world, "same"), revision(&world, "HEAD"));

    write(&guest.join("sub/s"), b"work\n");
    let who = ["-c", "user.name=A", "-c", "user.email=a@b.example"];
    git(&guest.join("sub"), &[&who[..], &["commit", "--quiet", "-am", "work"]].concat());
    write(&guest.join("sub/t"), b"uncommitted\n");
    let mut export = world.export(Wish::Branch);
    export.branch("x", "m", false).unwrap();
    assert_eq!(revision(&world, "x^{tree}"), world.guest_tree());
    assert_eq!(revision(&world, "x:sub"), git(&guest.join("sub"), &["rev-parse", "HEAD"]));
    let warnings = export.warnings().join("\n");
    assert!(warnings.contains("not committed in the submodule sub is in no patch"), "{warnings}");
    // As files they come like all others.
    export.apply(false).unwrap();
    assert_eq!(fs::read_to_string(world.host().join("sub/t")).unwrap(), "uncommitted\n");
    assert_eq!(fs::read_to_string(world.host().join("sub/s")).unwrap(), "work\n");
}

#[test]
fn objects_that_are_missing_or_wrong_do_not_reach_the_host() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("a"), b"2\n");
    git(&guest, &["commit", "--quiet", "-am", "second"]);
    let blob = git(&guest, &["rev-parse", "HEAD:a"]);
    let object = guest.join(".git/objects").join(&blob[..2]).join(&blob[2..]);
    let other = git_with(&guest, &["hash-object", "-w", "--stdin"], &[], b"evil\n").unwrap();
    let evil = guest.join(".git/objects").join(&other[..2]).join(&other[2..]);
    for replace in [false, true] {
        fs::remove_file(&object).unwrap();
        if replace {
            fs::copy(&evil, &object).unwrap();
        } else {
            // The index still knows it, and the file is what it was, so git does not look for it.
            fs::remove_file(guest.join(".git/index")).unwrap();
        }
        write(&guest.join("a"), b"3\n");
        let before = snapshot(&world.host());
        let error = world.export(Wish::Branch).branch("x", "m", false).unwrap_err();
        assert!(
            matches!(error, ExportError::History { .. } | ExportError::Refused { .. }),
            "{replace}: {error:?}"
        );
        let refs = git(&world.host(), &["for-each-ref", "--format=%(refname)"]);
        assert_eq!(refs, "refs/heads/main");
        assert_eq!(files_of(&world.host()).len(), before.iter().filter(|(path, _)| *path == b"a").count());
        if !replace {
            fs::copy(&evil, &object).unwrap();
        }
    }
}

#[test]
fn a_tree_with_a_repository_inside_is_refused_by_git() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    let guest = world.guest();
    let blob = git_with(&guest, &["hash-object", "-w", "--stdin"], &[], b"evil\n").unwrap();
    let mut inner = b"100644 .git\0".to_vec();
    inner.extend((0..20).map(|at| u8::from_str_radix(&blob[at * 2..at * 2 + 2], 16).unwrap()));
    let tree = git_with(&guest, &["hash-object", "-w", "--literally", "-t", "tree", "--stdin"], &[], &inner)
        .unwrap();
    let commit = git(&guest, &["commit-tree", &tree, "-p", "HEAD", "-m", "evil"]);
    git(&guest, &["update-ref", "refs/heads/main", &commit]);
    let error = world.export(Wish::Branch).branch("x", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::Refused { .. } | ExportError::History { .. }), "{error:?}");
    assert_eq!(git(&world.host(), &["for-each-ref", "--format=%(refname)"]), "refs/heads/main");
}

#[test]
fn the_same_work_twice_is_one_commit() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    let first = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    // A commit made in another second has another name.
    git(&world.host(), &["branch", "--force", "x", &recommitted(&world, "x")]);
    let again = world.export(Wish::Branch).branch("x", "another message", false).unwrap();
    assert_eq!(again.before.as_ref(), Some(&again.commit));
    assert_eq!(revision(&world, "x~1"), revision(&world, "main"));
    assert_eq!((again.commits, again.uncommitted), (first.commits, true));
}

/// A commit like another, of another time.
fn recommitted(world: &World, name: &str) -> String {
    git(&world.host(), &["commit-tree", &format!("{name}^{{tree}}"), "-p", &format!("{name}~1"), "-m", "m"])
}

#[test]
fn files_come_back_though_the_host_has_lost_the_commit() {
    let mut world = World::with(&[("a", "1\n"), (".gitignore", "*.o\n")]);
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("b"), &[vec![0; 1 << 20], b"x".to_vec(), vec![0; 600 << 10]].concat());
    write(&guest.join("c.o"), b"ignored\n");
    git(&world.host(), &["checkout", "--quiet", "--orphan", "new"]);
    git(&world.host(), &["commit", "--quiet", "-m", "another first"]);
    git(&world.host(), &["branch", "--quiet", "-D", "main"]);
    git(&world.host(), &["reflog", "expire", "--expire=now", "--all"]);
    git(&world.host(), &["gc", "--quiet", "--prune=now"]);
    let error = world.try_export(Wish::Branch).unwrap_err();
    assert!(error.hint().unwrap().contains("--files"), "{error}");
    let report = world.export(Wish::Files { ignored: false }).apply(false).unwrap();
    assert_eq!(report.written, [b"b".to_vec()]);
    let (host, guest) = (world.host().join("b"), guest.join("b"));
    assert!(fs::read(host).unwrap() == fs::read(guest).unwrap(), "also what is zeros");
}
