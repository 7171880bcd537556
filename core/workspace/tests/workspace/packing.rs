//! Archives of files.

use std::{
    fs,
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, symlink},
    },
};

use sha2::{Digest, Sha256};
use vm_workspace::{Cancel, Identity, Selection, Workspace, WorkspaceError};

use crate::{
    guest::Guest,
    repo::{Repo, path, things, things_of},
};

/// Does something when so many bytes have come, then takes the rest.
pub(crate) struct Interfering<F: FnMut()> {
    pub(crate) bytes: Vec<u8>,
    pub(crate) at: usize,
    pub(crate) act: F,
}

impl<F: FnMut()> Write for Interfering<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= self.at {
            (self.act)();
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn names_modes_links_and_sizes_are_exact() {
    let repo = Repo::plain();
    for name in
        [&b"-dash"[..], b"two\nlines", b"\xff\xfe", b" blank ", b".dot", "dir/\u{e9}".as_bytes(), b"dir/*"]
    {
        repo.write(name, name);
    }
    repo.write([b"long/".as_slice(), b"n".repeat(200).as_slice()].concat(), "long");
    repo.write([b"lines/".as_slice(), b"n\n".repeat(60).as_slice()].concat(), "lines");
    symlink("n\n".repeat(60), repo.top().join("lines/link")).unwrap();
    repo.write("empty", "");
    repo.write("large", vec![7; (3 << 20) + 1]);
    repo.mode("dir/*", 0o755);
    repo.mode("empty", 0o400);
    repo.mode("long", 0o700);
    symlink("/absolute/and/away", repo.top().join("absolute")).unwrap();
    symlink(path(b"\xffdangling\n"), repo.top().join("dangling")).unwrap();
    symlink("long/".to_owned() + &"../long/".repeat(40), repo.top().join("far")).unwrap();
    let workspace = repo.open();
    let guest = Guest::new();
    let mut tar = Vec::new();
    let sent = workspace.archive(Selection::All, &mut tar).unwrap();
    guest.unpack(&tar);
    assert_eq!(things(&guest.top()), things(&repo.top()));
    assert_eq!(
        sent.entries.keys().collect::<Vec<_>>(),
        workspace.files().iter().map(|entry| &entry.path).collect::<Vec<_>>()
    );
    let large = &sent.entries[&b"large"[..]];
    assert_eq!(large.sha256, Some(Sha256::digest(vec![7; (3 << 20) + 1]).into()));
    for name in ["large", "empty"] {
        // Who unpacks here knows seconds only.
        let modified = |top: &std::path::Path| top.join(name).metadata().unwrap().mtime();
        assert_eq!(modified(&guest.top()), modified(&repo.top()), "{name}");
    }
}

#[test]
fn a_selection_has_what_was_chosen_and_the_directories_above() {
    let repo = Repo::plain();
    for name in ["a/b/c", "a/b.x", "a/z", "ab", "q/r"] {
        repo.write(name, name);
    }
    let workspace = repo.open();
    let chosen = |selection: Selection<'_>| {
        let sent = workspace.archive(selection, io::sink()).unwrap();
        sent.entries.into_keys().map(|path| String::from_utf8(path).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(chosen(Selection::Prefixes(&[b"a/b".to_vec()])), ["a", "a/b", "a/b.x", "a/b/c"]);
    assert_eq!(
        chosen(Selection::Prefixes(&[b"a/b/".to_vec(), b"q".to_vec()])),
        ["a", "a/b", "a/b/c", "q", "q/r"]
    );
    assert_eq!(chosen(Selection::Paths(&[b"q/r".to_vec(), b"ab".to_vec(), b"none".to_vec()])), ["ab", "q/r"]);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_sent_as_it_is_then() {
    let repo = Repo::plain();
    repo.write("large", vec![1; 8 << 20]);
    let workspace = repo.open();
    let mut once = true;
    let mut to = Interfering {
        bytes: Vec::new(),
        at: 2 << 20,
        act: || {
            if std::mem::take(&mut once) {
                repo.write("large", "short now");
            }
        },
    };
    let sent = workspace.archive(Selection::All, &mut to).unwrap();
    let guest = Guest::new();
    guest.unpack(&to.bytes);
    assert_eq!(fs::read(guest.top().join("large")).unwrap(), b"short now");
    assert_eq!(sent.entries[&b"large"[..]].sha256, Some(Sha256::digest(b"short now").into()));
}

#[test]
fn a_file_that_never_rests_is_named() {
    let repo = Repo::plain();
    repo.write("restless", vec![1; 3 << 20]);
    let workspace = repo.open();
    let mut count = 0_u64;
    let to = Interfering {
        bytes: Vec::new(),
        at: 1,
        act: || {
            count += 1;
            let file = fs::OpenOptions::new().append(true).open(repo.top().join("restless")).unwrap();
            (&file).write_all(&[1]).unwrap();
        },
    };
    let error = workspace.archive(Selection::All, to).unwrap_err();
    assert!(matches!(&error, WorkspaceError::Changing { path } if path == "restless"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn what_vanishes_is_left_out_and_told() {
    let repo = Repo::plain();
    repo.write("a", "1");
    repo.write("b", "1");
    repo.write("d/c", "1");
    let workspace = repo.open();
    fs::remove_file(repo.top().join("b")).unwrap();
    // A link is not followed to where a directory was.
    fs::rename(repo.top().join("d"), repo.home().join("elsewhere")).unwrap();
    symlink(repo.home().join("elsewhere"), repo.top().join("d")).unwrap();
    let mut tar = Vec::new();
    let sent = workspace.archive(Selection::All, &mut tar).unwrap();
    assert_eq!(sent.entries.keys().map(|path| path.as_bytes_text()).collect::<Vec<_>>(), ["a", "d"]);
    assert_eq!(sent.warnings, ["b vanished before it was sent", "d/c vanished before it was sent"]);
    let guest = Guest::new();
    guest.unpack(&tar);
    assert!(guest.top().join("d").is_symlink());
}

trait Text {
    fn as_bytes_text(&self) -> &str;
}

impl Text for Vec<u8> {
    fn as_bytes_text(&self) -> &str {
        std::ffi::OsStr::from_bytes(self).to_str().unwrap()
    }
}

#[test]
fn giving_up_ends_it() {
    let repo = Repo::plain();
    for number in 0..50 {
        repo.write(format!("{number}"), vec![1; 1 << 20]);
    }
    let cancel = Cancel::default();
    let workspace = Workspace::open(&repo.top(), Identity::own(), &repo.scratch(), cancel.clone()).unwrap();
    let mut guard = Some(cancel.on_drop());
    let mut to = Interfering { bytes: Vec::new(), at: 1, act: || drop(guard.take()) };
    assert!(matches!(workspace.archive(Selection::All, &mut to), Err(WorkspaceError::Cancelled)));
    assert!(to.bytes.len() < 10 << 20);
    assert!(matches!(repo_open_cancelled(&repo, cancel), WorkspaceError::Cancelled));
}

fn repo_open_cancelled(repo: &Repo, cancel: Cancel) -> WorkspaceError {
    Workspace::open(&repo.top(), Identity::own(), &repo.scratch(), cancel).unwrap_err()
}

#[test]
fn whoever_reads_no_more_is_not_the_hosts_fault() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let repo = Repo::git_repository();
    repo.write("a", "1");
    repo.commit();
    let workspace = repo.open();
    assert!(matches!(workspace.archive(Selection::All, Closed), Err(WorkspaceError::Output { .. })));
    assert!(matches!(workspace.git_directory(None, Closed), Err(WorkspaceError::Output { .. })));
    assert!(matches!(workspace.bundle(None, Closed), Err(WorkspaceError::Output { .. })));
    assert_eq!(things_of(&workspace), things(&repo.top()));
}
