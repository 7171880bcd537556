//! The file service by the daemon's client, and by one that does not keep to anything.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use russh::{Channel, client};
use tar::{Builder, EntryType, Header};
use tokio::time::{sleep, timeout};
use vm_guest::{Guest, GuestError};
use vm_types::guest::{FILES_SUBSYSTEM, files::code};

use crate::ssh::{
    guest_tests::guest,
    tests::{PATIENCE, connect, connect_as, outcome},
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The code and message of what must have failed.
fn refusal<T: std::fmt::Debug>(result: Result<T, GuestError>) -> (String, String) {
    match result {
        Err(GuestError::File { code, message }) => (code, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn files_are_written_and_read_whatever_is_in_them() {
    let (guest, served) = guest().await;
    let path = served.path("new/er/file");
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    guest.write_file(text(&path), data.as_slice(), 0o4751, 12, 34).await.unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o4751, 12, 34));
    assert!(fs::read(&path).unwrap() == data);

    let got = guest.read_file(text(&path), data.len()).await.unwrap();
    assert!(got.bytes == data && !got.more);
    let got = guest.read_file(text(&path), 70_000).await.unwrap();
    assert!(got.bytes == data[..70_000] && got.more);
    assert_eq!(guest.read_file(text(&path), 0).await.unwrap().bytes, b"");
    let mut all = std::io::Cursor::new(Vec::new());
    assert_eq!(guest.read_to(text(&path), &mut all).await.unwrap(), data.len() as u64);
    assert!(all.into_inner() == data);
    // Has no size before it is read.
    assert!(!guest.read_file("/proc/self/status", 10_000).await.unwrap().bytes.is_empty());
    guest.write_file(text(&path), tokio::io::empty(), 0o600, 0, 0).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no drafts are left");
}

#[tokio::test]
async fn links_are_replaced_by_writing_and_followed_by_reading() {
    let (guest, served) = guest().await;
    let (precious, link) = (served.path("precious"), served.path("link"));
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, &link).unwrap();
    assert_eq!(guest.read_file(text(&link), 100).await.unwrap().bytes, b"precious");
    guest.write_file(text(&link), &b"new"[..], 0o644, 0, 0).await.unwrap();
    assert!(!link.is_symlink());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
}

#[tokio::test]
async fn what_is_no_file_is_refused_by_name() {
    let (guest, served) = guest().await;
    let directory = served.path("dir");
    fs::create_dir(&directory).unwrap();
    let fifo = served.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(served.path("plain"), "").unwrap();
    let below_file = served.path("plain/below");
    let none = served.path("none");
    let read = async |path: &Path| refusal(guest.read_file(text(path), 10).await);
    let write = async |path: &Path| refusal(guest.write_file(text(path), &b"x"[..], 0o600, 0, 0).await);
    for (got, wanted, name) in [
        (read(&none).await, code::NOT_FOUND, &none),
        (read(&directory).await, code::IS_DIRECTORY, &directory),
        (read(&fifo).await, code::NOT_REGULAR, &fifo),
        (read(&below_file).await, code::NOT_DIRECTORY, &below_file),
        (write(&directory).await, code::IS_DIRECTORY, &directory),
        (write(&fifo).await, code::NOT_REGULAR, &fifo),
        (write(Path::new("/")).await, code::IS_DIRECTORY, &"/".into()),
        (read(Path::new("etc/passwd")).await, code::REQUEST, &"etc/passwd".into()),
        (write(Path::new("x")).await, code::REQUEST, &"x".into()),
    ] {
        assert_eq!(got.0, wanted, "{got:?}");
        assert!(got.1.contains(text(name)), "{got:?}");
    }
    let (code, message) = write(&below_file).await;
    assert!(code == code::NOT_DIRECTORY || code == code::FAILED, "{code}: {message}");
    assert_eq!(fs::read_to_string(served.path("plain")).unwrap(), "");
}

#[test]
fn a_full_disk_has_its_own_code() {
    let error = std::io::Error::from_raw_os_error(nix::libc::ENOSPC);
    let failure = vm_archive::Failure::of("/a", &error);
    let wanted = "/a: No space left on device";
    assert!(
        matches!(&failure, vm_archive::Failure::Told { code: code::NO_SPACE, message } if message == wanted),
        "{failure:?}"
    );
}

#[tokio::test]
async fn only_root_may_use_it_and_only_it_exists() {
    let (handle, good) = connect_as("nobody", true).await;
    assert!(good);
    let refused = async |handle: &client::Handle<_>, name: &str| {
        let mut channel = handle.channel_open_session().await.unwrap();
        channel.request_subsystem(true, name).await.unwrap();
        matches!(channel.wait().await, Some(russh::ChannelMsg::Failure))
    };
    assert!(refused(&handle, FILES_SUBSYSTEM).await);
    let handle = connect().await;
    assert!(refused(&handle, "sftp").await);
    assert!(!refused(&handle, FILES_SUBSYSTEM).await);
}

async fn opened(handle: &client::Handle<crate::ssh::tests::Client>) -> Channel<client::Msg> {
    let channel = handle.channel_open_session().await.unwrap();
    channel.request_subsystem(true, FILES_SUBSYSTEM).await.unwrap();
    channel
}

#[tokio::test]
async fn nonsense_is_answered_with_an_error() {
    let handle = connect().await;
    for nonsense in [
        &b"hello\n"[..],
        b"",
        b"{\"op\":\"read\"}\n",
        b"{\"op\":\"remove\",\"path\":\"/\"}\n",
        &[b'x'; 100_000],
    ] {
        let mut channel = opened(&handle).await;
        let _ = channel.data(nonsense).await;
        let _ = channel.eof().await;
        let got = outcome(&mut channel).await;
        assert_eq!(got.status, Some(1), "{got:?}");
        assert!(got.stderr.contains(code::REQUEST) && got.stderr.ends_with('\n'), "{got:?}");
    }
}

/// Waits until so many files are being made in a directory, whether they have names yet or not.
async fn until_drafts(directory: &Path, count: usize) {
    let drafts = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let open = open.filter_map(|file| fs::read_link(file.path()).ok());
        open.filter(|file| file.starts_with(directory) && file != directory).count()
    };
    let wait = async {
        while drafts() != count {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("so many files are being made in time");
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_client_that_goes_half_way_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let top = fs::canonicalize(directory.path()).unwrap();
    let old = top.join("file");
    fs::write(&old, "old").unwrap();
    let begin = async |handle: &client::Handle<_>| {
        let channel = opened(handle).await;
        let request = format!(
            "{{\"op\":\"write\",\"path\":\"{}\",\"mode\":420,\"uid\":0,\"gid\":0}}\nhalf of it",
            old.display()
        );
        channel.data(request.as_bytes()).await.unwrap();
        until_drafts(&top, 1).await;
        channel
    };
    // The channel goes.
    let handle = connect().await;
    let channel = begin(&handle).await;
    channel.close().await.unwrap();
    until_drafts(&top, 0).await;
    // The connection goes.
    let channel = begin(&handle).await;
    handle.disconnect(russh::Disconnect::ByApplication, "", "").await.unwrap();
    until_drafts(&top, 0).await;
    drop(channel);
    assert_eq!(names(&top), ["file"]);
    assert_eq!(fs::read_to_string(&old).unwrap(), "old");
}

#[tokio::test]
async fn a_source_that_fails_and_a_dropped_future_leave_nothing() {
    let (guest, served) = guest().await;
    let directory = served.path("dir");
    fs::create_dir(&directory).unwrap();
    let directory = fs::canonicalize(directory).unwrap();
    let path = directory.join("file");
    let broken = tokio_util::io::StreamReader::new(futures::stream::iter([
        Ok(bytes::Bytes::from_static(b"half of it")),
        Err(std::io::Error::other("torn")),
    ]));
    let error = guest.write_file(text(&path), broken, 0o600, 0, 0).await.unwrap_err();
    assert!(matches!(&error, GuestError::Source { source } if source.to_string() == "torn"), "{error:?}");
    until_drafts(&directory, 0).await;

    let (mut feed, source) = tokio::io::duplex(100);
    tokio::io::AsyncWriteExt::write_all(&mut feed, b"half of it").await.unwrap();
    // Cancel-safe is what is tested: the write is dropped while it waits for more.
    tokio::select! {
        got = guest.write_file(text(&path), source, 0o600, 0, 0) => panic!("{got:?}"),
        () = until_drafts(&directory, 1) => {}
    }
    until_drafts(&directory, 0).await;
    assert!(names(&directory).is_empty());
}

/// An archive in the making, which refuses no name.
struct Archive(Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, name: &str, kind: EntryType, mode: u32, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_234_567_890);
        header.set_size(content.len() as u64);
        header.set_uid(7777);
        header.set_gid(7777);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.add(name, EntryType::Regular, 0o644, "", content)
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.add(name, EntryType::Symlink, 0o777, target, b"")
    }

    fn hardlink(self, name: &str, target: &str) -> Self {
        self.add(name, EntryType::Link, 0o644, target, b"")
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

#[tokio::test]
async fn archives_are_unpacked_whatever_they_are_compressed_with() {
    let (guest, served) = guest().await;
    let long = format!("deep/{}/{}", "x".repeat(120), "y".repeat(120));
    let mut archive = Archive::new()
        .add("./", EntryType::Directory, 0o700, "", b"")
        .file("plain", b"a\xff")
        .add("./bin/", EntryType::Directory, 0o751, "", b"")
        .add("bin/run", EntryType::Regular, 0o4755, "", b"#!")
        .symlink("lib", "bin")
        .file("lib/by-link", b"inside")
        .symlink("absolute", "/no/such")
        .hardlink("bin/also", "./plain")
        .file("not/listed/above", b"");
    let mut header = Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o600);
    archive.0.append_data(&mut header, &long, &b"long"[..]).unwrap();
    let mut pax = Header::new_ustar();
    pax.set_size(3);
    pax.set_mode(0o600);
    archive.0.append_pax_extensions([("path", &b"by-pax"[..])]).unwrap();
    pax.set_path("ignored").unwrap();
    pax.set_cksum();
    archive.0.append(&pax, &b"pax"[..]).unwrap();
    let plain = archive.done();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    for (name, packed) in [
        ("plain", plain.clone()),
        ("gzip", gzip.finish().unwrap()),
        ("zstd", zstd::encode_all(plain.as_slice(), 1).unwrap()),
    ] {
        let directory = served.path(name).join("made");
        // The second time over the first.
        for _ in 0..2 {
            guest.unpack(packed.as_slice(), text(&directory), 12, 34).await.unwrap();
            let at = |path: &str| directory.join(path);
            assert_eq!(fs::read(at("plain")).unwrap(), b"a\xff");
            assert_eq!(fs::read(at(&long)).unwrap(), b"long");
            assert_eq!(fs::read(at("by-pax")).unwrap(), b"pax");
            assert_eq!(fs::read(at("bin/by-link")).unwrap(), b"inside");
            assert_eq!(fs::read_link(at("absolute")).unwrap(), Path::new("/no/such"));
            assert_eq!(fs::metadata(at("bin/also")).unwrap().ino(), fs::metadata(at("plain")).unwrap().ino());
            let mode = |path: &str| fs::symlink_metadata(at(path)).unwrap().permissions().mode() & 0o7777;
            assert_eq!((mode("bin"), mode("bin/run"), mode("not/listed")), (0o751, 0o4755, 0o755));
            assert_eq!(fs::metadata(at("bin/run")).unwrap().mtime(), 1_234_567_890);
            for path in ["", "plain", "bin", "bin/run", "absolute", "not", "not/listed", &long] {
                let meta = fs::symlink_metadata(at(path)).unwrap();
                assert_eq!((meta.uid(), meta.gid()), (12, 34), "{path:?}");
            }
        }
    }
}

#[tokio::test]
async fn directories_that_are_there_stay_as_they_are() {
    let (guest, served) = guest().await;
    let shared = served.path("dir/shared");
    fs::create_dir_all(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    let archive = Archive::new()
        .add("./", EntryType::Directory, 0o700, "", b"")
        .add("shared/", EntryType::Directory, 0o700, "", b"")
        .file("shared/x", b"x")
        .done();
    guest.unpack(archive.as_slice(), text(&served.path("dir")), 12, 34).await.unwrap();
    let meta = fs::metadata(&shared).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o1777, 0));
    let (code, message) = refusal(
        guest
            .unpack(Archive::new().file("shared", b"").done().as_slice(), text(&served.path("dir")), 0, 0)
            .await,
    );
    assert_eq!(code, code::IS_DIRECTORY, "{message}");
}

/// All that is below a directory, with content.
fn tree(directory: &Path) -> Vec<(std::path::PathBuf, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        if meta.is_dir() {
            found.extend(tree(&entry.path()));
        }
        let content = meta.is_file().then(|| fs::read(entry.path()).unwrap());
        found.push((entry.path(), content));
    }
    found.sort();
    found
}

#[tokio::test]
async fn hostile_archives_write_nothing_outside() {
    let (guest, served) = guest().await;
    let outside = served.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let out = text(&outside).to_owned();
    let evil = |name: &str| Archive::new().file(name, b"evil").done();
    let cases = [
        ("up", evil("../outside/evil"), "../outside/evil"),
        ("up-within", evil("a/../../outside/evil"), "a/../../outside/evil"),
        ("absolute", evil(&format!("{out}/evil")), &format!("{out}/evil")),
        ("link-absolute", Archive::new().symlink("l", &out).file("l/evil", b"evil").done(), "l/evil"),
        ("link-relative", Archive::new().symlink("l", "../outside").file("l/evil", b"evil").done(), "l/evil"),
        (
            "link-chain",
            Archive::new().symlink("a", "b").symlink("b", "..").file("a/outside/evil", b"evil").done(),
            "a/outside/evil",
        ),
        (
            "link-deep",
            Archive::new().symlink("l", "../outside").file("l/new/evil", b"evil").done(),
            "l/new/evil",
        ),
        (
            "directory-behind-link",
            Archive::new()
                .symlink("l", "../outside")
                .add("l/d/", EntryType::Directory, 0o755, "", b"")
                .done(),
            "l/d/",
        ),
        (
            "directory-on-link",
            Archive::new().symlink("l", "../outside").add("l/", EntryType::Directory, 0o777, "", b"").done(),
            "l/",
        ),
        ("hardlink-absolute", Archive::new().hardlink("h", &format!("{out}/secret")).done(), "h, a link to"),
        ("hardlink-up", Archive::new().hardlink("h", "../outside/secret").done(), "h, a link to"),
        (
            "hardlink-by-link",
            Archive::new().symlink("l", "../outside").hardlink("h", "l/secret").done(),
            "h, a link to l/secret",
        ),
        ("hardlink-nowhere", Archive::new().hardlink("h", ".").done(), "h, a link to"),
        ("up-only", evil(".."), ".."),
    ];
    let before = tree(&outside);
    for (what, archive, named) in cases {
        let directory = served.path(what);
        let (code, message) = refusal(guest.unpack(archive.as_slice(), text(&directory), 1, 1).await);
        assert_eq!(code, code::OUTSIDE, "{what}: {message}");
        assert!(message.contains(named), "{what}: {message}");
        assert_eq!(tree(&outside), before, "{what}");
        assert_eq!(fs::metadata(&outside).unwrap().uid(), 0, "{what}");
    }
    // Written to, but not through.
    let directory = served.path("through");
    let archive = Archive::new()
        .symlink("file", &format!("{out}/secret"))
        .file("file", b"evil")
        .symlink("hard", &format!("{out}/secret"))
        .hardlink("harder", "hard")
        .file("harder", b"evil")
        .done();
    guest.unpack(archive.as_slice(), text(&directory), 1, 1).await.unwrap();
    assert_eq!(tree(&outside), before);
    assert_eq!(fs::read(directory.join("file")).unwrap(), b"evil");
    // A link that somebody in the guest has laid.
    let directory = served.path("laid");
    fs::create_dir(&directory).unwrap();
    symlink(&outside, directory.join("l")).unwrap();
    let (code, _) = refusal(guest.unpack(evil("l/evil").as_slice(), text(&directory), 1, 1).await);
    assert_eq!((code.as_str(), tree(&outside) == before), (code::OUTSIDE, true));
}

#[tokio::test]
async fn broken_and_strange_archives_are_told_apart() {
    let (guest, served) = guest().await;
    let unpack = async |archive: &[u8]| refusal(guest.unpack(archive, text(&served.path("dir")), 0, 0).await);
    let whole = Archive::new().file("one", b"1").file("two", &[b'2'; 5000]).done();
    let (code, message) = unpack(&whole[..1024]).await;
    assert_eq!(code, code::TRUNCATED, "{message}");
    let (code, message) = unpack(&whole[..4000]).await;
    assert!(code != code::OUTSIDE && message.contains("two"), "{code}: {message}");
    assert!(served.path("dir/one").exists() && !served.path("dir/two").exists(), "whole files only");
    assert_eq!(unpack(b"").await.0, code::TRUNCATED);
    assert_eq!(unpack(&[b'x'; 5000]).await.0, code::MALFORMED);
    let mut damaged = whole.clone();
    damaged[1024 + 3] ^= 1;
    let (code, message) = unpack(&damaged).await;
    assert!(code == code::MALFORMED && message.contains("behind one"), "{code}: {message}");
    let device = Archive::new().add("null", EntryType::Char, 0o666, "", b"").done();
    let (code, message) = unpack(&device).await;
    assert!(code == code::UNSUPPORTED && message.contains("null"), "{code}: {message}");
    // A name of 8 MiB would be kept in memory.
    let bomb = Archive::new().add("././@LongLink", EntryType::GNULongName, 0, "", &vec![b'n'; 8 << 20]);
    let (code, message) = unpack(&bomb.file("x", b"").done()).await;
    assert!(code == code::MALFORMED && message.contains("more than 1 MiB"), "{code}: {message}");

    let damaged = {
        let mut packed = zstd::encode_all(whole.as_slice(), 1).unwrap();
        let middle = packed.len() / 2;
        packed.truncate(middle);
        packed
    };
    let error = guest.unpack(damaged.as_slice(), text(&served.path("dir")), 0, 0).await.unwrap_err();
    assert!(matches!(error, GuestError::Source { .. }), "{error:?}");
}

#[tokio::test]
async fn a_refused_archive_does_not_stop_its_sender_nor_others() {
    let (guest, served) = guest().await;
    let mut archive = Archive::new().file("../evil", b"evil").done();
    archive.resize(20 << 20, 0);
    let directory = served.path("dir");
    let refused = timeout(PATIENCE, guest.unpack(archive.as_slice(), text(&directory), 0, 0)).await;
    assert_eq!(refusal(refused.unwrap()).0, code::OUTSIDE);
    assert_good(&guest).await;
}

async fn assert_good(guest: &Guest) {
    let got = timeout(PATIENCE, guest.run(vm_guest::Command::new(["echo", "good"]), 100)).await;
    assert_eq!(got.unwrap().unwrap().stdout, b"good\n");
}
