//! What would be in the way of work that comes back, told before there is any.

use std::{fs, os::unix::fs::PermissionsExt};

use vm_workspace::{
    WorkspaceError,
    export::{ExportError, Wish, beforehand},
};

use crate::world::{World, git, snapshot, write};

#[test]
fn a_branch_that_cannot_be_made_is_told() {
    let world = World::with(&[("a", "1\n")]);
    let host = world.host();
    git(&host, &["branch", "there"]);
    git(&host, &["branch", "deep/er"]);
    git(&host, &["commit", "--quiet", "--allow-empty", "-m", "second"]);
    git(&host, &["branch", "elsewhere"]);
    git(&host, &["reset", "--quiet", "--hard", "HEAD~1"]);
    let workspace = world.workspace();
    let before = snapshot(&host);
    for name in ["new", "there", "deep/new", "thereafter", "dee"] {
        assert_eq!(beforehand::branch(&workspace, name).unwrap(), Vec::<String>::new(), "{name}");
    }
    let warnings = beforehand::branch(&workspace, "elsewhere").unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("elsewhere has commits"), "{warnings:?}");
    let refused = |name: &str| beforehand::branch(&workspace, name).unwrap_err();
    assert!(matches!(refused("a..b"), ExportError::BranchName { .. }));
    assert!(matches!(refused("main"), ExportError::BranchCheckedOut { .. }));
    for name in ["there/x", "there/x/y", "deep", "deep/er/x"] {
        let error = refused(name);
        assert!(
            matches!(error, ExportError::BranchInTheWay { .. }) && error.hint().is_some(),
            "{name}: {error}"
        );
    }
    assert!(snapshot(&host) == before, "it only looks");

    let plain = World::plain();
    let error = beforehand::branch(&plain.workspace(), "x").unwrap_err();
    assert!(matches!(error, ExportError::Workspace(WorkspaceError::NotARepository { .. })), "{error}");
}

#[test]
fn a_branch_without_a_commit_is_checked_out_nonetheless() {
    let mut world = World::plain();
    git(&world.host(), &["init", "--quiet", "--initial-branch=main"]);
    write(&world.host().join("a"), b"1\n");
    let error = beforehand::branch(&world.workspace(), "main").unwrap_err();
    assert!(matches!(error, ExportError::BranchCheckedOut { .. }), "{error}");
    assert_eq!(beforehand::branch(&world.workspace(), "x").unwrap(), Vec::<String>::new());
    world.prepare(false);
    let error = world.export(Wish::Branch).branch("main", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::BranchCheckedOut { .. }), "{error}");
}

#[test]
fn an_export_says_the_same_of_a_branch_that_stands_in_the_way() {
    let mut world = World::with(&[("a", "1\n")]);
    git(&world.host(), &["branch", "there"]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    let error = world.export(Wish::Branch).branch("there/x", "m", false).unwrap_err();
    assert_eq!(error.to_string(), "the branch there/x cannot be beside the branch there");
}

#[test]
fn a_directory_that_takes_no_files_is_told() {
    let mut world = World::with(&[("a", "1\n")]);
    write(&world.beside("file"), b"");
    fs::create_dir(world.beside("locked")).unwrap();
    fs::set_permissions(world.beside("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    let root = nix::unistd::geteuid().is_root();
    if root {
        world.give_to(54_321);
        fs::create_dir(world.beside("open")).unwrap();
        fs::set_permissions(world.beside("open"), fs::Permissions::from_mode(0o777)).unwrap();
    } else {
        fs::create_dir(world.beside("open")).unwrap();
    }
    let workspace = world.workspace();
    let look = |name: &str| beforehand::directory(&workspace, &world.beside(name));
    look("open").unwrap();
    look("open/not/there/yet").unwrap();
    for name in ["file", "file/below", "locked", "locked/below"] {
        let error = look(name).unwrap_err();
        let ExportError::Host { path, .. } = &error else { panic!("{name}: {error}") };
        assert!(path.contains(name.split('/').next().unwrap()) && error.hint().is_some(), "{error}");
    }
    assert_eq!(fs::read_dir(world.beside("open")).unwrap().count(), 0, "nothing is made");
}
