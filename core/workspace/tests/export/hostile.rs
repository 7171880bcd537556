//! Guests that want to get out.

use std::{fs, io, os::unix::fs::symlink};

use vm_types::guest::files::{Seen, SeenKind};
use vm_workspace::export::{Export, ExportError, Wish};

use crate::world::{World, archive, files_of, git, pack, snapshot, survey, write};

const FILES: Wish = Wish::Files { ignored: false };

fn prepared() -> World {
    let mut world = World::with(&[("a", "1\n")]);
    world.prepare(true);
    world
}

fn file(path: &[u8]) -> Seen {
    Seen {
        path: path.to_vec(),
        kind: SeenKind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: 5,
        mtime: 0,
        ctime: i128::MAX / 2,
        inode: 0,
        target: None,
    }
}

/// Begins with entries that the guest made up.
fn with(world: &World, added: &[Seen]) -> Result<Export, ExportError> {
    let mut list = survey(&world.guest());
    list.extend(added.iter().cloned());
    list.sort_by(|one, other| one.path.cmp(&other.path));
    Export::begin(&world.workspace(), world.baseline(), list, FILES)
}

#[test]
fn paths_that_lead_out_are_refused() {
    let world = prepared();
    let link = Seen { kind: SeenKind::Symlink, target: Some(b"/etc".to_vec()), ..file(b"l") };
    for added in [
        vec![file(b"../x")],
        vec![file(b"/etc/x")],
        vec![file(b"x/../../y")],
        vec![file(b"a"), file(b"a")],
        vec![file(b"a/b")],
        vec![link, file(b"l/passwd")],
    ] {
        let error = with(&world, &added).err();
        assert!(matches!(error, Some(ExportError::Survey { .. })), "{:?}", added[0].path);
    }
}

#[test]
fn names_of_gits_own_directory_stay_in_the_guest() {
    for history in [true, false] {
        let mut world = if history { World::with(&[("a", "1\n")]) } else { World::plain() };
        write(&world.host().join("a"), b"1\n");
        world.prepare(history);
        let guest = world.guest();
        for name in
            [".GIT/hooks/post-checkout", "git~1", "dir/.git/config", "dir/.Git ./x", ".g\u{200c}it/config"]
        {
            write(&guest.join(name), b"evil");
        }
        if !history {
            write(&guest.join(".git/config"), b"[core]\n\tfsmonitor = evil\n");
        }
        write(&guest.join("dir/fine"), b"fine\n");
        let mut export = world.export(Wish::Patch);
        let report = export.apply(false).unwrap();
        assert_eq!(report.written, [b"dir/fine".to_vec()]);
        let warnings = export.warnings().join("\n");
        for name in [".GIT", "git~1", "dir/.git", "dir/.Git ."] {
            assert!(warnings.contains(&format!("{name} stays in the guest")), "{name}: {warnings}");
        }
        let names: Vec<Vec<u8>> = files_of(&world.host()).into_keys().collect();
        assert_eq!(names, [b"a".to_vec(), b"dir/fine".to_vec()]);
        let mut patch = Vec::new();
        export.patch(&mut patch).unwrap();
        assert!(!String::from_utf8_lossy(&patch).contains("evil"));
    }
}

#[test]
fn what_was_not_asked_for_is_refused() {
    let world = prepared();
    write(&world.guest().join("new"), b"12345");
    for name in [&b"other"[..], b"../x", b"/etc/passwd", b".git/config", b".git/hooks/x"] {
        let mut export = with(&world, &[]).unwrap();
        let first = export.wanted().unwrap();
        assert!(!first.iter().any(|path| path == name));
        export.take(pack(&world.guest(), &first).as_slice()).unwrap();
        assert_eq!(export.wanted().unwrap(), [b"new".to_vec()]);
        let error = export.take(archive([(name, &b"evil!"[..], 0o644)]).as_slice()).unwrap_err();
        assert!(matches!(error, ExportError::Unasked { .. }), "{error}");
        // It is still wanted: nothing of that archive was taken.
        assert_eq!(export.wanted().unwrap(), [b"new".to_vec()]);
        assert!(matches!(export.changes(), Err(ExportError::NotFetched { count: 1 })));
    }
}

#[test]
fn archives_that_are_none_or_end_early_are_refused() {
    let world = prepared();
    write(&world.guest().join("a"), &[b'x'; 2000]);
    let whole = {
        let mut export = with(&world, &[]).unwrap();
        pack(&world.guest(), &export.wanted().unwrap())
    };
    for bad in [&b"nonsense".repeat(200)[..], &whole[..whole.len() - 1024], &whole[..700], b""] {
        let mut export = with(&world, &[]).unwrap();
        let wanted = export.wanted().unwrap();
        let error = export.take(bad).unwrap_err();
        assert!(matches!(error, ExportError::Archive { .. }), "{} bytes: {error}", bad.len());
        assert_eq!(export.wanted().unwrap(), wanted);
    }
}

/// Gives zeros for ever.
struct Endless(Vec<u8>);

impl io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            buffer.fill(0);
            return Ok(buffer.len());
        }
        let length = buffer.len().min(self.0.len());
        buffer[..length].copy_from_slice(&self.0[..length]);
        self.0.drain(..length);
        Ok(length)
    }
}

#[test]
fn sizes_without_end_are_refused() {
    let world = prepared();
    let mut export = with(&world, &[]).unwrap();
    let head = export.wanted().unwrap().into_iter().find(|path| path == b".git/HEAD").unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_path(String::from_utf8(head).unwrap()).unwrap();
    header.set_size((8 << 30) - 1);
    header.set_mode(0o644);
    header.set_cksum();
    let error = export.take(Endless(header.as_bytes().to_vec())).unwrap_err();
    assert!(matches!(error, ExportError::TooMuch), "{error}");
    // A name of that length would be kept in memory.
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_cksum();
    let error = export.take(Endless(header.as_bytes().to_vec())).unwrap_err();
    assert!(matches!(error, ExportError::Archive { .. }), "{error}");
}

#[test]
fn what_vanishes_meanwhile_is_neither_brought_nor_removed() {
    let world = prepared();
    write(&world.guest().join("a"), b"2\n");
    write(&world.guest().join("b"), b"3\n");
    let mut export = with(&world, &[]).unwrap();
    loop {
        let mut wanted = export.wanted().unwrap();
        if wanted.is_empty() {
            break;
        }
        wanted.retain(|path| path != b"a" && path != b"b");
        export.take(pack(&world.guest(), &wanted).as_slice()).unwrap();
    }
    assert_eq!(export.changes().unwrap(), []);
    assert_eq!(export.warnings().iter().filter(|warning| warning.contains("changed while")).count(), 2);
    export.apply(false).unwrap();
    assert_eq!(fs::read(world.host().join("a")).unwrap(), b"1\n");
}

#[test]
fn links_of_the_guest_are_links_and_nothing_is_written_through_them() {
    let world = prepared();
    let outside = world.beside("outside");
    write(&outside.join("file"), b"precious\n");
    let guest = world.guest();
    fs::remove_file(guest.join("a")).unwrap();
    symlink(outside.join("file"), guest.join("a")).unwrap();
    symlink(&outside, guest.join("dir")).unwrap();
    symlink("../../outside/file", guest.join(".gitignore")).unwrap();
    symlink("../../outside/file", guest.join(".gitattributes")).unwrap();
    symlink("../../outside/file", guest.join(".gitmodules")).unwrap();
    let before = snapshot(&outside);
    let mut export = world.export(Wish::Branch);
    export.branch("x", "m", false).unwrap();
    export.apply(false).unwrap();
    assert_eq!(snapshot(&outside), before);
    assert_eq!(fs::read_link(world.host().join("a")).unwrap(), outside.join("file"));
    assert!(git(&world.host(), &["ls-tree", "x", "a"]).starts_with("120000"));
}

#[test]
fn a_guests_git_that_lies_is_not_believed() {
    let world = prepared();
    let git_directory = world.guest().join(".git");
    let away = "ref: ../../../../etc/passwd\n";
    for (name, content) in [
        ("HEAD", away),
        ("index", "DIRC nonsense"),
        ("packed-refs", "\0\0\0"),
        ("info/exclude", "\0[[[***"),
        ("objects/info/alternates", "/"),
        ("shallow", "nonsense"),
    ] {
        write(&git_directory.join(name), content.as_bytes());
    }
    write(&world.guest().join("b"), b"2\n");
    let mut export = world.export(Wish::Branch);
    let report = export.branch("x", "m", false).unwrap();
    assert_eq!((report.commits, report.uncommitted), (1, true));
    assert_eq!(git(&world.host(), &["diff", "--name-status", "main", "x"]), "A\tb");
    assert!(export.warnings().iter().any(|warning| warning.contains("index")), "{:?}", export.warnings());

    // A commit that is not among the objects is told, not guessed.
    write(&git_directory.join("HEAD"), format!("{}\n", "a".repeat(40)).as_bytes());
    let error = world.export(Wish::Branch).branch("y", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::History { .. }), "{error}");
}
