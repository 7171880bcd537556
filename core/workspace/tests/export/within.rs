//! Repositories within what was sent, and what only the guest's index knows.

use std::{fs, os::unix::fs::symlink};

use vm_workspace::export::Wish;

use crate::world::{World, git, git_with, snapshot, write};

const WHO: [&str; 4] = ["-c", "user.name=A", "-c", "user.email=a@b.example"];

fn with_submodule() -> (World, World) {
    let (world, other) =
        (World::with(&[("a", "1\n"), (".gitignore", "*.o\n")]), World::with(&[("s", "1\n"), ("t", "2\n")]));
    let url = other.host();
    let add = ["submodule", "--quiet", "add", url.to_str().unwrap(), "sub"];
    git(&world.host(), &[&["-c", "protocol.file.allow=always"][..], &add].concat());
    git(&world.host(), &["commit", "--quiet", "-m", "with a submodule"]);
    (world, other)
}

#[test]
fn a_repository_in_a_directory_without_git_stays_as_the_host_has_it() {
    let mut world = World::plain();
    let inner = world.host().join("a");
    write(&inner.join("x"), b"1\n");
    git(&inner, &["init", "--quiet", "--initial-branch=main"]);
    git(&inner, &["add", "x"]);
    git(&inner, &[&WHO[..], &["commit", "--quiet", "-m", "first"]].concat());
    world.prepare(false);
    let guest = world.guest().join("a");
    git(&guest, &["gc", "--quiet", "--prune=now"]);
    fs::remove_file(guest.join(".git/config")).unwrap();
    symlink("/etc/hostname", guest.join(".git/config")).unwrap();
    write(&guest.join(".git/hooks/pre-commit"), b"#!/bin/sh\n");
    write(&guest.join("x"), b"2\n");
    let before = snapshot(&inner.join(".git"));
    let mut export = world.export(Wish::Files { ignored: true });
    assert_eq!(export.changes().unwrap().len(), 1);
    assert_eq!(export.apply(false).unwrap().written, [b"a/x".to_vec()]);
    let aside = world.beside("aside");
    assert_eq!(export.files(&aside, false).unwrap().written, [b"a/x".to_vec()]);
    assert!(export.warnings().iter().any(|warning| warning.starts_with("a/.git stays")));
    assert!(snapshot(&inner.join(".git")) == before && !aside.join("a/.git").exists());
}

#[test]
fn another_commit_of_a_submodule_that_is_not_checked_out() {
    let (mut world, other) = with_submodule();
    write(&other.host().join("s"), b"2\n");
    git(&other.host(), &["commit", "--quiet", "-am", "second"]);
    let commit = git(&other.host(), &["rev-parse", "HEAD"]);
    git(&world.host(), &["submodule", "--quiet", "deinit", "--force", "sub"]);
    world.prepare(true);
    let entry = format!("160000,{commit},sub");
    git(&world.guest(), &["update-index", "--cacheinfo", &entry]);
    git(&world.guest(), &["commit", "--quiet", "-m", "merged"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert!(!report.uncommitted, "the tree is that of the commit");
    assert_eq!(git(&world.host(), &["rev-parse", "x:sub"]), commit);
}

#[test]
fn files_in_place_of_a_submodule() {
    let (mut world, _other) = with_submodule();
    world.prepare(true);
    let guest = world.guest();
    git(&guest, &["rm", "--quiet", "--cached", "sub"]);
    fs::remove_file(guest.join("sub/.git")).unwrap();
    git(&guest, &["add", "sub"]);
    git(&guest, &["commit", "--quiet", "-m", "no submodule any more"]);
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(git(&world.host(), &["rev-parse", "x^{tree}"]), world.guest_tree());
    assert_eq!(git(&world.host(), &["show", "x:sub/t"]), "2");
    assert!(!report.uncommitted);
}

#[test]
fn what_is_ignored_around_a_submodule_is_not_in_it() {
    let (mut world, _other) = with_submodule();
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("sub/.gitignore"), b"*.tmp\n");
    for name in ["made.o", "sub/made.o", "sub/made.tmp", "sub/dir/made.o"] {
        write(&guest.join(name), b"new\n");
    }
    let written = world.export(Wish::Files { ignored: false }).apply(false).unwrap().written;
    assert_eq!(written, [b"sub/.gitignore".to_vec(), b"sub/dir/made.o".to_vec(), b"sub/made.o".to_vec()]);
}

#[test]
fn what_a_sparse_checkout_has_in_its_index_alone() {
    for committed in [true, false] {
        let mut world = World::with(&[("in/a", "1\n"), ("out/b", "2\n"), ("out/c", "3\n")]);
        git(&world.host(), &["sparse-checkout", "set", "in"]);
        world.prepare(true);
        let guest = world.guest();
        let blob = git_with(&guest, &["hash-object", "-w", "--stdin"], &[], b"merged\n").unwrap();
        for name in ["out/b", "out/new"] {
            let entry = format!("100644,{blob},{name}");
            git(&guest, &["update-index", "--add", "--cacheinfo", &entry]);
            git(&guest, &["update-index", "--skip-worktree", name]);
        }
        if committed {
            git(&guest, &["commit", "--quiet", "-m", "merged"]);
        }
        let mut patch = Vec::new();
        world.export(Wish::Patch).patch(&mut patch).unwrap();
        assert_eq!(String::from_utf8_lossy(&patch).matches("+merged").count(), 2, "{committed}");
        let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
        assert_eq!(report.uncommitted, !committed);
        let names = git(&world.host(), &["diff", "--name-status", "main", "x"]);
        assert_eq!(names, "M\tout/b\nA\tout/new", "{committed}");
    }
}

#[test]
fn an_index_that_names_what_nobody_has() {
    let mut world = World::with(&[("in/a", "1\n"), ("out/b", "2\n")]);
    git(&world.host(), &["sparse-checkout", "set", "in"]);
    world.prepare(true);
    let guest = world.guest();
    let entry = format!("100644,{},out/b", "1".repeat(40));
    git(&guest, &["update-index", "--cacheinfo", &entry]);
    git(&guest, &["update-index", "--skip-worktree", "out/b"]);
    write(&guest.join("in/a"), b"work\n");
    let mut export = world.export(Wish::Branch);
    export.branch("x", "m", false).unwrap();
    assert_eq!(git(&world.host(), &["diff", "--name-status", "main", "x"]), "M\tin/a");
    assert!(export.warnings().iter().any(|warning| warning.starts_with("out/b is as the host has it")));
}
