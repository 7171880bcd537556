//! Files written to a directory, and applied to the host's own.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown, symlink},
};

use vm_workspace::export::{ApplyReport, Change, ChangeKind, ExportError, Wish};

use crate::world::{World, files_of, git, make_executable, snapshot, write};

const FILES: Wish = Wish::Files { ignored: false };

fn names(paths: &[Vec<u8>]) -> Vec<String> {
    paths.iter().map(|path| String::from_utf8_lossy(path).into_owned()).collect()
}

/// Work of every kind on these files.
fn worked(history: bool) -> World {
    let files = [
        ("same", "0\n"),
        ("edited", "1\n"),
        ("script", "2\n"),
        ("removed/deep/file", "3\n"),
        ("becomes-link", "4\n"),
        ("becomes-directory", "5\n"),
        ("directory/file", "6\n"),
    ];
    let mut world = if history { World::with(&files) } else { World::plain() };
    for (name, content) in files {
        write(&world.host().join(name), content.as_bytes());
    }
    symlink("same", world.host().join("link")).unwrap();
    if history {
        git(&world.host(), &["add", "--all"]);
        git(&world.host(), &["commit", "--quiet", "-m", "a link"]);
    }
    world.prepare(history);
    let guest = world.guest();
    write(&guest.join("edited"), b"edited\n");
    make_executable(&guest.join("script"));
    fs::remove_dir_all(guest.join("removed")).unwrap();
    fs::remove_file(guest.join("becomes-link")).unwrap();
    symlink("/nowhere", guest.join("becomes-link")).unwrap();
    fs::remove_file(guest.join("becomes-directory")).unwrap();
    write(&guest.join("becomes-directory/inner"), b"inner\n");
    fs::remove_dir_all(guest.join("directory")).unwrap();
    write(&guest.join("directory"), b"a file now\n");
    fs::remove_file(guest.join("link")).unwrap();
    symlink("edited", guest.join("link")).unwrap();
    write(&guest.join("new/\u{e9} file\n"), b"new\n");
    write(&guest.join("empty"), b"");
    world
}

#[test]
fn changes_are_told() {
    use ChangeKind::{Added, Deleted, ModeChanged, Modified, TypeChanged};
    for history in [true, false] {
        let mut export = worked(history).export(FILES);
        let changes = export.changes().unwrap();
        let expected = [
            ("becomes-directory", Deleted),
            ("becomes-directory/inner", Added),
            ("becomes-link", TypeChanged),
            // Git knows no directories.
            ("directory", if history { Added } else { TypeChanged }),
            ("directory/file", Deleted),
            ("edited", Modified),
            ("empty", Added),
            ("link", Modified),
            ("new/\u{e9} file\n", Added),
            ("removed", Deleted),
            ("removed/deep", Deleted),
            ("removed/deep/file", Deleted),
            ("script", ModeChanged),
        ];
        let expected: Vec<Change> = expected
            .iter()
            .filter(|(path, _)| !history || !matches!(*path, "removed" | "removed/deep"))
            .map(|(path, kind)| Change { path: path.as_bytes().to_vec(), kind: *kind })
            .collect();
        assert_eq!(changes, expected, "git: {history}");
    }
}

#[test]
fn all_of_it_is_applied_and_then_there_is_nothing_to_do() {
    for history in [true, false] {
        let world = worked(history);
        let before = snapshot(&world.host());
        let mut export = world.export(FILES);
        let dry = export.apply(true).unwrap();
        assert_eq!(snapshot(&world.host()), before, "a dry run changes nothing");
        let report = export.apply(false).unwrap();
        assert_eq!(report, dry, "a dry run foretells");
        assert!(report.conflicts.is_empty() && report.failed.is_empty(), "{report:?}");
        assert_eq!(files_of(&world.host()), files_of(&world.guest()));
        assert!(!world.host().join("removed").exists(), "a directory goes with its last file");
        let again = world.export(FILES).apply(false).unwrap();
        assert_eq!(
            (again.written, again.removed, again.conflicts),
            (vec![], vec![], vec![]),
            "git: {history}"
        );
    }
}

#[test]
fn what_the_host_changed_is_left_alone_and_named() {
    for history in [true, false] {
        let world = worked(history);
        let host = world.host();
        write(&host.join("edited"), b"by the host\n");
        make_executable(&host.join("becomes-link"));
        write(&host.join("removed/deep/file"), b"newer\n");
        write(&host.join("directory/own"), b"in the way\n");
        write(&host.join("becomes-directory"), b"kept\n");
        write(&host.join("empty"), b"not empty\n");
        write(&host.join("unrelated"), b"u\n");
        fs::remove_file(host.join("link")).unwrap();
        symlink("elsewhere", host.join("link")).unwrap();
        let before = files_of(&host);
        let mut export = world.export(FILES);
        let dry = export.apply(true).unwrap();
        let report = export.apply(false).unwrap();
        assert_eq!(report, dry);
        let mut expected = vec![
            "becomes-directory",
            "becomes-directory/inner",
            "becomes-link",
            "directory",
            "edited",
            "empty",
            "link",
            "removed/deep/file",
        ];
        if !history {
            expected.splice(7..7, ["removed", "removed/deep"]);
        }
        assert_eq!(names(&report.conflicts), expected);
        assert_eq!(names(&report.written), ["new/\u{e9} file\n", "script"]);
        assert_eq!(names(&report.removed), ["directory/file"]);
        let after = files_of(&host);
        for (path, content) in &before {
            let name = String::from_utf8_lossy(path);
            if !matches!(&*name, "directory/file" | "script") {
                assert_eq!(after.get(path), Some(content), "{name}");
            }
        }
    }
}

#[test]
fn what_both_did_alike_is_no_conflict() {
    let world = worked(true);
    let host = world.host();
    write(&host.join("edited"), b"edited\n");
    fs::remove_dir_all(host.join("removed")).unwrap();
    fs::remove_file(host.join("link")).unwrap();
    symlink("edited", host.join("link")).unwrap();
    let report = world.export(FILES).apply(false).unwrap();
    assert_eq!(names(&report.unchanged), ["edited", "link", "removed/deep/file"]);
    assert_eq!(report.conflicts, Vec::<Vec<u8>>::new());
    assert_eq!(files_of(&host), files_of(&world.guest()));
}

#[test]
fn directories_that_became_links_are_not_gone_through() {
    let mut world = World::with(&[("dir/file", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("dir/file"), b"2\n");
    write(&world.guest().join("dir/new"), b"3\n");
    let outside = world.beside("outside");
    write(&outside.join("file"), b"1\n");
    fs::remove_dir_all(world.host().join("dir")).unwrap();
    symlink(&outside, world.host().join("dir")).unwrap();
    let report = world.export(FILES).apply(false).unwrap();
    assert_eq!(names(&report.conflicts), ["dir/file", "dir/new"]);
    assert_eq!(snapshot(&outside).len(), 1);
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"1\n");
}

#[test]
fn empty_directories_are_not_in_the_way_of_git() {
    let mut world = World::with(&[("dir/deep/a", "1\n"), ("b", "2\n")]);
    fs::remove_file(world.host().join("dir/deep/a")).unwrap();
    world.prepare(false);
    write(&world.guest().join("dir"), b"a file\n");
    let mut export = world.export(FILES);
    let dry = export.apply(true).unwrap();
    assert!(world.host().join("dir/deep").is_dir());
    let report = export.apply(false).unwrap();
    assert_eq!(report, dry);
    assert_eq!(names(&report.written), ["dir"]);

    write(&world.guest().join("b2"), b"3\n");
    fs::create_dir_all(world.host().join("b2/deep")).unwrap();
    write(&world.host().join("b2/deep/file"), b"mine\n");
    let report = world.export(FILES).apply(false).unwrap();
    assert_eq!(names(&report.conflicts), ["b2"]);
    assert!(world.host().join("b2/deep/file").exists());
}

#[test]
fn files_go_to_a_directory_and_replace_nothing_there() {
    let world = worked(true);
    let to = world.beside("out/of/there");
    let mut export = world.export(FILES);
    let dry = export.files(&to, true).unwrap();
    assert!(!to.exists());
    let report = export.files(&to, false).unwrap();
    assert_eq!(report, dry);
    let expected: Vec<String> = [
        "becomes-directory/inner",
        "becomes-link",
        "directory",
        "edited",
        "empty",
        "link",
        "new/\u{e9} file\n",
        "script",
    ]
    .map(String::from)
    .to_vec();
    assert_eq!(names(&report.written), expected);
    let guest = files_of(&world.guest());
    let written = files_of(&to);
    assert_eq!(written.len(), expected.len());
    assert!(written.iter().all(|(path, content)| guest.get(path) == Some(content)));

    write(&to.join("edited"), b"mine\n");
    let again = world.export(FILES).files(&to, false).unwrap();
    assert_eq!(names(&again.conflicts), ["edited"]);
    assert_eq!(again.unchanged.len(), expected.len() - 1);
    assert_eq!(fs::read(to.join("edited")).unwrap(), b"mine\n");
}

#[test]
fn ignored_files_come_if_they_are_wanted() {
    let mut world = World::with(&[("a", "1\n"), (".gitignore", "/target\n")]);
    world.prepare(true);
    write(&world.guest().join("target/out"), b"built\n");
    write(&world.guest().join("b"), b"2\n");
    let report = world.export(FILES).files(&world.beside("one"), false).unwrap();
    assert_eq!(names(&report.written), ["b"]);
    let report = world.export(Wish::Files { ignored: true }).files(&world.beside("two"), false).unwrap();
    assert_eq!(names(&report.written), ["b", "target/out"]);
}

#[test]
fn what_git_ignores_is_not_fetched() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    write(&world.guest().join(".gitignore"), b"/node_modules\n");
    write(&world.guest().join("node_modules/big"), &[0; 1 << 20]);
    let mut export = vm_workspace::export::Export::begin(
        &world.workspace(),
        world.baseline(),
        crate::world::survey(&world.guest()),
        FILES,
    )
    .unwrap();
    let mut asked = Vec::new();
    loop {
        let wanted = export.wanted().unwrap();
        if wanted.is_empty() {
            break;
        }
        asked.extend(wanted.iter().cloned());
        export.take(crate::world::pack(&world.guest(), &wanted).as_slice()).unwrap();
    }
    assert!(asked.contains(&b".gitignore".to_vec()));
    assert!(!asked.contains(&b"node_modules/big".to_vec()), "{:?}", names(&asked));
}

#[test]
fn permissions_and_empty_directories_without_git() {
    let mut world = World::plain();
    write(&world.host().join("a"), b"1\n");
    fs::create_dir(world.host().join("goes")).unwrap();
    world.prepare(false);
    let guest = world.guest();
    fs::set_permissions(guest.join("a"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_dir(guest.join("goes")).unwrap();
    fs::create_dir_all(guest.join("comes/empty")).unwrap();
    let report = world.export(FILES).apply(false).unwrap();
    assert_eq!(names(&report.written), ["a", "comes/empty"]);
    assert_eq!(names(&report.removed), ["goes"]);
    assert_eq!(fs::metadata(world.host().join("a")).unwrap().mode() & 0o777, 0o600);
    assert!(world.host().join("comes/empty").is_dir());
    assert!(!world.host().join("goes").exists());
}

#[test]
fn a_host_file_that_may_not_be_replaced_does_not_keep_back_the_rest() {
    let mut world = World::with(&[("a", "1\n"), ("b", "1\n")]);
    world.prepare(true);
    write(&world.guest().join("a"), b"2\n");
    write(&world.guest().join("b"), b"2\n");
    // A socket has a's name now.
    fs::remove_file(world.host().join("a")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(world.host().join("a")).unwrap();
    let report = world.export(FILES).apply(false).unwrap();
    assert_eq!(names(&report.conflicts), ["a"]);
    assert_eq!(names(&report.written), ["b"]);
}

#[test]
fn times_alone_are_no_work() {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    let guest = world.guest();
    fs::rename(guest.join("a"), guest.join("b")).unwrap();
    write(&guest.join("a"), b"1\n");
    fs::remove_file(guest.join("b")).unwrap();
    let mut export = world.export(FILES);
    assert_eq!(export.changes().unwrap(), []);
    assert_eq!(export.apply(false).unwrap(), ApplyReport::default());
}

#[test]
fn what_root_brings_back_belongs_to_the_owner_of_the_workspace() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    const USER: u32 = 31_337;
    let mut world = World::with(&[("a", "1\n")]);
    world.give_to(USER);
    world.prepare(true);
    write(&world.guest().join("new/b"), b"2\n");
    // Where that user may not write nothing is written either.
    let error = world.export(FILES).files(&world.beside("out"), false).unwrap_err();
    assert!(matches!(error, ExportError::Host { .. }), "{error}");
    assert!(error.hint().unwrap().contains("the workspace's owner"));
    assert!(!world.beside("out").exists());
    let open = world.beside("open");
    fs::create_dir(&open).unwrap();
    chown(&open, Some(USER), Some(USER)).unwrap();
    let report = world.export(FILES).files(&open.join("out/er"), false).unwrap();
    assert_eq!(names(&report.written), ["new/b"]);
    for name in ["out", "out/er", "out/er/new", "out/er/new/b"] {
        let about = fs::metadata(open.join(name)).unwrap();
        assert_eq!((about.uid(), about.gid()), (USER, USER), "{name}");
    }
}
