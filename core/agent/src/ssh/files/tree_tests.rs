//! Surveys, digests, removing and packing by paths, by the daemon's client and with what a guest may have in store.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};
use russh::client;
use tokio::sync::mpsc;
use vm_guest::GuestError;
use vm_types::guest::{
    FILES_SUBSYSTEM,
    files::{Seen, SeenDecoder, SeenKind, code},
};

use vm_archive::Output;

use super::tree::survey;
use crate::ssh::{
    guest_tests::guest,
    tests::{connect, outcome},
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn paths(paths: &[&[u8]]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| path.to_vec()).collect()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, GuestError>) -> (String, String) {
    match result {
        Err(GuestError::File { code, message }) => (code, message),
        other => panic!("{other:?}"),
    }
}

/// Names of every kind, and everything that may have a name.
fn oddities(top: &Path) {
    let at = |name: &[u8]| top.join(OsStr::from_bytes(name));
    for directory in [&b"a"[..], b"a.d", b"-r", b"\xff\xfe", b"a/deep/er"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    for (name, content) in [
        (&b"a-b"[..], &b"1"[..]),
        (b"a/c", b"12"),
        (b"a/deep/er/file", b""),
        (b"a.d/x", b"x"),
        (b"-r/-f", b"dash"),
        (b"\xff\xfe/new\nline", b"n"),
        (b" ", b"blank"),
        (b"*", b"star"),
    ] {
        fs::write(at(name), content).unwrap();
    }
    symlink("a/c", at(b"link")).unwrap();
    symlink(OsStr::from_bytes(b"/no\xfewhere"), at(b"lost")).unwrap();
    symlink("a", at(b"to-a")).unwrap();
    nix::unistd::mkfifo(&at(b"pipe"), Mode::S_IRWXU).unwrap();
    drop(UnixListener::bind(at(b"socket")).unwrap());
    // Before the modes, of which a change of owner takes some away.
    chown(at(b"a/c"), Some(12), Some(34)).unwrap();
    for (name, mode) in
        [(&b"a"[..], 0o755), (b"a/c", 0o4711), (b"-r", 0o1777), (b"\xff\xfe/new\nline", 0o644)]
    {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
}

/// What a survey has to tell, by stat(2).
fn stated(top: &Path) -> Vec<Seen> {
    fn walk(top: &Path, directory: &Path, all: &mut BTreeMap<Vec<u8>, Seen>) {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let (at, meta) = (entry.path(), entry.metadata().unwrap());
            let path = at.strip_prefix(top).unwrap().as_os_str().as_bytes().to_vec();
            let kind = match meta.file_type() {
                kind if kind.is_dir() => SeenKind::Directory,
                kind if kind.is_file() => SeenKind::File,
                kind if kind.is_symlink() => SeenKind::Symlink,
                _ => SeenKind::Other,
            };
            let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            let seen = Seen {
                path: path.clone(),
                kind,
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
                size: if matches!(kind, SeenKind::File | SeenKind::Symlink) { meta.len() } else { 0 },
                mtime: time(meta.mtime(), meta.mtime_nsec()),
                ctime: time(meta.ctime(), meta.ctime_nsec()),
                inode: meta.ino(),
                target: meta
                    .is_symlink()
                    .then(|| fs::read_link(&at).unwrap().as_os_str().as_bytes().to_vec()),
            };
            all.insert(path, seen);
            if kind == SeenKind::Directory {
                walk(top, &at, all);
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(top, top, &mut all);
    all.into_values().collect()
}

#[tokio::test]
async fn a_survey_tells_what_stat_tells_in_the_order_of_bytes() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    assert_eq!(guest.survey(text(&top)).await.unwrap(), []);
    oddities(&top);
    let found = guest.survey(text(&top)).await.unwrap();
    assert_eq!(found, stated(&top));
    assert!(found.len() > 15 && found.iter().any(|seen| seen.path == b"a-b"));
    // The way to the top may have links.
    symlink(&top, served.path("way")).unwrap();
    assert_eq!(guest.survey(text(&served.path("way"))).await.unwrap(), found);

    assert_eq!(guest.survey(text(&served.path("none"))).await.unwrap(), []);
    let (code, message) = refusal(guest.survey(text(&top.join("a-b"))).await);
    assert!(code == code::NOT_DIRECTORY && message.contains("a-b"), "{code}: {message}");
    assert_eq!(refusal(guest.survey("relative").await).0, code::REQUEST);
    let mut deep = top.join("deep");
    (0..600).for_each(|_| deep.push("d"));
    fs::create_dir_all(&deep).unwrap();
    let (code, message) = refusal(guest.survey(text(&top)).await);
    assert!(code == code::FAILED && message.contains("too deep"), "{code}: {message}");
}

/// [`survey`] by itself.
fn direct(top: &Path) -> Vec<Seen> {
    let (output, mut pieces) = mpsc::channel(4);
    std::thread::scope(|scope| {
        let work = scope.spawn(move || survey(text(top), &Output(output)));
        let (mut all, mut decoder) = (Vec::new(), SeenDecoder::default());
        while let Some(piece) = pieces.blocking_recv() {
            decoder.push(&piece, |seen| all.push(seen)).unwrap();
        }
        work.join().unwrap().unwrap();
        decoder.finish().unwrap();
        all
    })
}

#[test]
fn what_is_mounted_is_not_gone_into() {
    let directory = tempfile::tempdir().unwrap();
    // In a mount namespace of a thread of its own, which ends with it.
    let work = || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["tree/tmpfs", "tree/bound", "source"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("source/file"), "").unwrap();
        fs::write(at("tree/file"), "").unwrap();
        fs::write(at("tree/plain"), "").unwrap();
        mount(Some("none"), &at("tree/tmpfs"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(at("tree/tmpfs/file"), "").unwrap();
        for (from, to) in [("source", "tree/bound"), ("source/file", "tree/file")] {
            mount(Some(&at(from)), &at(to), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        }
        let told: Vec<_> = direct(&at("tree")).into_iter().map(|seen| (seen.path, seen.kind)).collect();
        let wanted = [
            (&b"bound"[..], SeenKind::Directory),
            (b"file", SeenKind::Other),
            (b"plain", SeenKind::File),
            (b"tmpfs", SeenKind::Directory),
        ];
        assert_eq!(told, wanted.map(|(path, kind)| (path.to_vec(), kind)));
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

#[test]
fn a_tree_that_changes_meanwhile_is_told_of_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: String| directory.path().join(name);
    for number in 0..40 {
        fs::create_dir_all(at(format!("d{number}/in"))).unwrap();
        fs::write(at(format!("d{number}/stays")), "").unwrap();
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // What is a directory now is a link or nothing next.
            for round in 0.. {
                let place = at(format!("d{}/in", round % 40));
                let _ = fs::remove_dir(&place);
                let _ = symlink("/", &place);
                let _ = fs::remove_file(&place);
                let _ = fs::create_dir(&place);
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
            }
        });
        for _ in 0..50 {
            let told = direct(directory.path());
            assert_eq!(told.iter().filter(|seen| seen.path.ends_with(b"stays")).count(), 40);
            assert!(!told.iter().any(|seen| seen.path.windows(4).any(|part| part == b"/in/")), "{told:?}");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[tokio::test]
async fn digests_are_of_regular_files_only() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    oddities(&top);
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(top.join("large"), &large).unwrap();
    let sum = |bytes: &[u8]| {
        let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
        Some(<[u8; 32]>::try_from(digest.as_ref()).unwrap())
    };
    let cases: [(&[u8], _); 14] = [
        (b"large", sum(&large)),
        (b"a/deep/er/file", sum(b"")),
        (b"\xff\xfe/new\nline", sum(b"n")),
        (b"-r/-f", sum(b"dash")),
        (b"a", None),
        (b"link", None),
        (b"lost", None),
        (b"to-a/c", None),
        (b"pipe", None),
        (b"socket", None),
        (b"none", None),
        (b"none/none", None),
        (b"a-b/below", None),
        (b"a/c", sum(b"12")),
    ];
    let asked = paths(&cases.map(|(path, _)| path));
    assert_eq!(guest.digests(text(&top), &asked).await.unwrap(), cases.map(|(_, digest)| digest));
    assert_eq!(guest.digests(text(&top), &[]).await.unwrap(), []);
    assert_eq!(
        ring::test::from_hex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad").unwrap(),
        sum(b"abc").unwrap()
    );
    let (code, _) = refusal(guest.digests(text(&served.path("none")), &asked).await);
    assert_eq!(code, code::NOT_FOUND);
}

#[tokio::test]
async fn what_is_named_is_removed_and_nothing_else() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    oddities(&top);
    let outside = served.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "").unwrap();
    symlink(&outside, top.join("out")).unwrap();
    symlink("../outside", top.join("a/out")).unwrap();
    let before = stated(&top);
    let stays = |seen: &Seen, gone: &[&[u8]]| !gone.contains(&seen.path.as_slice());
    let gone: &[&[u8]] =
        &[b"a/deep/er/file", b"a/deep/er", b"a/deep", b"link", b"-r/-f", b"pipe", b"\xff\xfe/new\nline"];
    let mut named = paths(gone);
    // Not there, not empty, or behind a link.
    named.extend(paths(&[
        b"none",
        b"none/none",
        b"a",
        b"out/precious",
        b"a/out/precious",
        b"to-a/c",
        b"a-b/x",
    ]));
    guest.remove(text(&top), &named).await.unwrap();
    let path = |seen: &Seen| seen.path.clone();
    let left: Vec<_> = stated(&top).iter().map(path).collect();
    let wanted: Vec<_> = before.iter().filter(|seen| stays(seen, gone)).map(path).collect();
    assert_eq!(left, wanted);
    assert!(outside.join("precious").exists());
    guest.remove(text(&top), &named).await.unwrap();
    assert_eq!(stated(&top).len(), wanted.len(), "absence is success");
}

#[tokio::test]
async fn chosen_entries_are_packed_in_their_order() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    oddities(&top);
    fs::hard_link(top.join("a/c"), top.join("hard")).unwrap();
    let chosen: &[&[u8]] =
        &[b"lost", b"a/c", b"none", b"a", b"\xff\xfe/new\nline", b"to-a/c", b"hard", b"socket", b"-r"];
    let mut archive = std::io::Cursor::new(Vec::new());
    let packed = guest.pack_selected(text(&top), &paths(chosen), &mut archive).await.unwrap();
    let archive = archive.into_inner();
    assert_eq!(packed.bytes, archive.len() as u64);
    let mut found = Vec::new();
    for entry in tar::Archive::new(archive.as_slice()).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        let link = entry.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default();
        content.extend_from_slice(&link);
        found.push((entry.path_bytes().into_owned(), entry.header().mode().unwrap(), content));
    }
    let wanted: [(&[u8], u32, &[u8]); 6] = [
        (b"lost", 0o777, b"/no\xfewhere"),
        (b"a/c", 0o4711, b"12"),
        (b"a/", 0o755, b""),
        (b"\xff\xfe/new\nline", 0o644, b"n"),
        (b"hard", 0o4711, b"12"),
        (b"-r/", 0o1777, b""),
    ];
    assert_eq!(found, wanted.map(|(path, mode, content)| (path.to_vec(), mode, content.to_vec())));
    let told: Vec<_> = packed.report.warnings.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(told, [code::VANISHED; 2], "{:?}", packed.report);
    assert!(packed.report.warnings[0].message.starts_with(text(&top.join("none"))), "{:?}", packed.report);
    assert_eq!((packed.report.entries, packed.report.files, packed.report.content), (6, 3, 5));
}

#[tokio::test]
async fn chosen_names_of_one_file_are_links_where_that_is_wanted() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    fs::write(top.join("a"), "12").unwrap();
    fs::hard_link(top.join("a"), top.join("b")).unwrap();
    fs::hard_link(top.join("a"), top.join("not chosen")).unwrap();
    let options = vm_types::guest::files::PackOptions { links: true, ..Default::default() };
    let mut archive = std::io::Cursor::new(Vec::new());
    guest.pack_selected_as(text(&top), &paths(&[b"a", b"b"]), options, &mut archive).await.unwrap();
    let archive = archive.into_inner();
    let mut found = Vec::new();
    for entry in tar::Archive::new(archive.as_slice()).entries().unwrap() {
        let entry = entry.unwrap();
        let link = entry.link_name_bytes().map(|link| link.into_owned());
        found.push((entry.path_bytes().into_owned(), entry.size(), link));
    }
    assert_eq!(found, [(b"a".to_vec(), 2, None), (b"b".to_vec(), 0, Some(b"a".to_vec()))]);
}

#[tokio::test]
async fn a_packed_path_has_the_name_that_it_is_given() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir_all(top.join("in")).unwrap();
    fs::write(top.join("in/file"), "").unwrap();
    let names = async |path: &Path, name: &str| {
        let options = vm_types::guest::files::PackOptions {
            name: Some(name.to_owned()),
            exclude: vec![text(&top.join("in/file")).to_owned()],
            ..Default::default()
        };
        let mut archive = std::io::Cursor::new(Vec::new());
        guest.pack(text(path), options, &mut archive).await?;
        let archive = archive.into_inner();
        let mut archive = tar::Archive::new(archive.as_slice());
        let path = |entry: tar::Entry<'_, _>| PathBuf::from(entry.path().unwrap()).display().to_string();
        Ok(archive.entries().unwrap().map(|entry| path(entry.unwrap())).collect::<Vec<_>>())
    };
    assert_eq!(names(&top, "new").await.unwrap(), ["new/", "new/in/"]);
    fs::write(top.join("other"), "").unwrap();
    assert_eq!(names(&top.join("other"), "-").await.unwrap(), ["-"]);
    for wrong in ["", ".", "..", "a/b", "a\0"] {
        assert_eq!(refusal(names(&top, wrong).await).0, code::REQUEST, "{wrong:?}");
    }
}

#[tokio::test]
async fn paths_that_lead_elsewhere_are_refused_on_both_sides() {
    let (guest, served) = guest().await;
    fs::create_dir(served.path("top")).unwrap();
    fs::write(served.path("precious"), "").unwrap();
    let top = text(&served.path("top")).to_owned();
    for path in [&b"../precious"[..], b"/etc/passwd", b"", b".", b"a//b", b"a/", b"a\0b"] {
        let refused = guest.remove(&top, &paths(&[path])).await.unwrap_err();
        assert!(matches!(refused, GuestError::Path { .. }) && refused.hint().is_some(), "{refused:?}");
    }
    // By a client that sends them nevertheless.
    let handle = connect().await;
    let long = "x".repeat(5000);
    for path in
        ["../precious\0", "/etc/passwd\0", "\0", "a/../../precious\0", "unended", &format!("{long}\0")]
    {
        for request in ["\"op\":\"remove\"", "\"op\":\"digests\"", "\"op\":\"pack\",\"selected\":true"] {
            let key = if request.contains("pack") { "path" } else { "directory" };
            let line = format!("{{{request},\"{key}\":\"{top}\"}}\n{path}");
            let got = sent(&handle, line.as_bytes()).await;
            assert!(got.contains(code::REQUEST), "{line}: {got}");
        }
    }
    assert!(served.path("precious").exists());
}

/// What the service says on standard error to this.
async fn sent(handle: &client::Handle<crate::ssh::tests::Client>, what: &[u8]) -> String {
    let mut channel = handle.channel_open_session().await.unwrap();
    channel.request_subsystem(true, FILES_SUBSYSTEM).await.unwrap();
    let _ = channel.data(what).await;
    let _ = channel.eof().await;
    let got = outcome(&mut channel).await;
    assert_eq!(got.status, Some(1), "{got:?}");
    got.stderr
}

#[tokio::test]
async fn paths_are_found_and_users_too() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    fs::create_dir(&top).unwrap();
    oddities(&top);
    let find = async |path: &Path, follow| {
        let found = guest.find(text(path), follow).await.unwrap();
        found.map(|found| (PathBuf::from(found.path), found.kind, found.size))
    };
    let real = fs::canonicalize(&top).unwrap();
    assert_eq!(find(&top.join("a/c"), false).await, Some((real.join("a/c"), SeenKind::File, 2)));
    assert_eq!(find(&top.join("link"), true).await, Some((real.join("a/c"), SeenKind::File, 2)));
    assert_eq!(find(&top.join("link"), false).await, Some((real.join("link"), SeenKind::Symlink, 0)));
    assert_eq!(
        find(&top.join("to-a/deep"), false).await,
        Some((real.join("a/deep"), SeenKind::Directory, 0))
    );
    assert_eq!(find(Path::new("/"), false).await, Some(("/".into(), SeenKind::Directory, 0)));
    for (nothing, follow) in [("none", false), ("lost", true), ("a-b/x", false), ("none/none", true)] {
        assert_eq!(find(&top.join(nothing), follow).await, None, "{nothing}");
    }
    assert_eq!(find(&top.join("lost"), false).await.map(|found| found.1), Some(SeenKind::Symlink));

    let root = guest.account("root").await.unwrap();
    assert_eq!((root.uid, root.gid), (0, 0));
    assert_eq!(guest.account("4242:4243").await.unwrap().gid, 4243);
    let (code, message) = refusal(guest.account("no-such-user").await);
    assert!(code == code::NO_USER && message.contains("no-such-user"), "{code}: {message}");
}

#[tokio::test]
async fn many_entries_are_told_of_digested_and_removed() {
    let (guest, served) = guest().await;
    let top = served.path("top");
    for directory in 0..100 {
        let at = top.join(format!("directory-{directory}/within"));
        fs::create_dir_all(&at).unwrap();
        (0..198).for_each(|file| fs::write(at.join(format!("file-{file}")), "x").unwrap());
    }
    let found = guest.survey(text(&top)).await.unwrap();
    assert_eq!(found.len(), 20_000);
    let files: Vec<_> =
        found.iter().filter(|seen| seen.kind == SeenKind::File).map(|seen| seen.path.clone()).collect();
    let digests = guest.digests(text(&top), &files).await.unwrap();
    assert_eq!(digests.len(), files.len());
    assert!(digests.iter().all(|digest| *digest == digests[0] && digest.is_some()));
    let mut all: Vec<_> = found.into_iter().map(|seen| seen.path).collect();
    all.reverse();
    guest.remove(text(&top), &all).await.unwrap();
    assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
}
