//! Patches.

use std::{fs, os::unix::fs::symlink};

use vm_workspace::export::{PatchReport, Wish};

use crate::world::{World, files_of, git, git_with, make_executable, write};

fn patch(world: &World) -> (Vec<u8>, PatchReport) {
    let mut patch = Vec::new();
    let report = world.export(Wish::Patch).patch(&mut patch).unwrap();
    (patch, report)
}

#[test]
fn a_patch_makes_of_the_commit_what_the_guest_has() {
    let mut world = World::with(&[("a", "1\n"), ("b", "\0binary"), ("c", "3"), ("dir/d", "4\n")]);
    write(&world.host().join("c"), b"not committed");
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("a"), b"2\n");
    git(&guest, &["commit", "--quiet", "-am", "second"]);
    write(&guest.join("b"), b"\0other\xff");
    fs::remove_dir_all(guest.join("dir")).unwrap();
    make_executable(&guest.join("c"));
    symlink("a", guest.join("l")).unwrap();
    write(&guest.join("empty"), b"");
    let (patch, report) = patch(&world);
    assert_eq!(report, PatchReport { bytes: patch.len() as u64, left_out: vec![] });

    let index = world.beside("index");
    let env = [("GIT_INDEX_FILE", index.to_str().unwrap())];
    git_with(&world.host(), &["read-tree", "main"], &env, b"").unwrap();
    git_with(&world.host(), &["apply", "--cached", "--binary"], &env, &patch).unwrap();
    assert_eq!(git_with(&world.host(), &["write-tree"], &env, b"").unwrap(), world.guest_tree());
}

#[test]
fn nothing_done_is_an_empty_patch() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    assert_eq!(patch(&world), (vec![], PatchReport::default()));
}

#[test]
fn a_patch_without_git_is_from_what_was_sent() {
    let mut world = World::plain();
    for (name, content) in [("a", "1\n"), ("b", "2\n"), ("c", "3\n"), ("dir/d", "4\n")] {
        write(&world.host().join(name), content.as_bytes());
    }
    world.prepare(false);
    let guest = world.guest();
    write(&guest.join("a"), b"work\n");
    write(&guest.join("b"), b"\0binary\n");
    write(&guest.join("c"), b"work\n");
    fs::remove_file(guest.join("dir/d")).unwrap();
    write(&guest.join("new"), b"n\n");
    // There is nothing to compare this one with any more.
    write(&world.host().join("c"), b"newer\n");
    let (patch, report) = patch(&world);
    assert_eq!(report.left_out, [b"c".to_vec()]);
    git_with(&world.host(), &["apply", "--binary"], &[("GIT_CEILING_DIRECTORIES", "/")], &patch).unwrap();
    let mut expected = files_of(&guest);
    let host = files_of(&world.host());
    expected.insert(b"c".to_vec(), host[&b"c"[..]].clone());
    assert_eq!(host, expected);
}
