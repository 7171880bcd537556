//! Trees made up by chance, with every name that a file can have: what is unpacked is what was packed, here and by GNU tar.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{Mode, UtimensatFlags, utimensat},
        time::TimeSpec,
    },
    unistd::mkfifo,
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, RngSeed, TestRunner},
};
use rustix::fs::{XattrFlags, lsetxattr};
use tokio::sync::mpsc;
use vm_types::guest::files::{PackOptions, UnpackOptions};

use crate::{Output, Replaced, Unpacking, pack, unpack};

/// One entry that is to be made, if it can be.
#[derive(Debug, Clone)]
struct Thing {
    /// Names, each in the one before.
    path: Vec<Vec<u8>>,
    what: What,
    mode: u32,
    time: (i64, i64),
    attribute: bool,
}

#[derive(Debug, Clone)]
enum What {
    Directory,
    File(Vec<u8>),
    /// Size in bytes, and where there is data.
    Holes(u64, Vec<u64>),
    Link(Vec<u8>),
    /// To the file that was made so many files before.
    Hard(usize),
    Pipe,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let letters = select(&b"ab -\n\t\xff\\=\"/*"[..]).prop_map(|byte| if byte == b'/' { b'_' } else { byte });
    prop_oneof![
        4 => vec(letters, 1..8),
        1 => select(vec![b"-rf".to_vec(), b"...".to_vec(), b"12 path=up\n".to_vec(), b" ".to_vec(), "\u{e4}".into()]),
        // As long as a header's field, and up to what a filesystem takes.
        1 => (select(&[99_usize, 100, 101, 155, 254, 255][..]), select(&b"n\n\xff"[..]))
            .prop_map(|(length, end)| [b"l".repeat(length - 1), vec![end]].concat()),
    ]
    .prop_filter("no name", |name| !matches!(name.as_slice(), b"." | b".."))
}

fn what() -> impl Strategy<Value = What> {
    prop_oneof![
        3 => Just(What::Directory),
        4 => vec(any::<u8>(), 0..40).prop_map(What::File),
        1 => select(&[511_usize, 512, 513, 32_768, 70_001][..]).prop_map(|size| What::File(vec![7; size])),
        1 => (1_u64..600_000, vec(0_u64..600_000, 0..4)).prop_map(|(size, data)| What::Holes(size, data)),
        2 => vec(name(), 1..5).prop_map(|names| What::Link(names.join(&b'/'))),
        2 => (0_usize..5).prop_map(What::Hard),
        1 => Just(What::Pipe),
    ]
}

fn thing() -> impl Strategy<Value = Thing> {
    let modes = select(&[0o644_u32, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0o700][..]);
    let times = (-2_000_000_000_i64..10_000_000_000, prop_oneof![Just(0), 0_i64..1_000_000_000]);
    (vec(name(), 1..4), what(), modes, times, any::<bool>())
        .prop_map(|(path, what, mode, time, attribute)| Thing { path, what, mode, time, attribute })
}

/// Makes what can be made; the kernel refuses what is in the way of another.
fn build(top: &Path, things: &[Thing]) {
    fs::create_dir(top).unwrap();
    let mut files: Vec<PathBuf> = Vec::new();
    let mut made: Vec<(PathBuf, &Thing)> = Vec::new();
    for thing in things {
        let path = thing.path.iter().fold(top.to_owned(), |path, name| path.join(OsStr::from_bytes(name)));
        let Ok(()) = fs::create_dir_all(path.parent().unwrap()) else { continue };
        let done = match &thing.what {
            What::Directory => fs::create_dir(&path).is_ok(),
            What::File(content) => {
                File::create_new(&path).and_then(|mut file| file.write_all(content)).is_ok()
            }
            What::Holes(size, data) => File::create_new(&path).is_ok_and(|file| {
                data.iter().for_each(|offset| file.write_all_at(b"data", *offset).unwrap());
                file.set_len(*size).unwrap();
                true
            }),
            What::Link(target) => symlink(OsStr::from_bytes(target), &path).is_ok(),
            What::Hard(back) => {
                files.iter().nth_back(*back).is_some_and(|file| fs::hard_link(file, &path).is_ok())
            }
            What::Pipe => mkfifo(&path, Mode::S_IRUSR).is_ok(),
        };
        if done {
            if matches!(thing.what, What::File(_) | What::Holes(..)) {
                files.push(path.clone());
            }
            made.push((path, thing));
        }
    }
    // What is in a directory first, as it changes that.
    made.sort_by(|(one, _), (other, _)| other.cmp(one));
    for (path, thing) in made {
        if thing.attribute {
            // Where the filesystem has none there is none to confuse anybody.
            let _ = lsetxattr(&path, "user.evil", b"\n12 path=evil\n16 size=100000\n", XattrFlags::empty());
        }
        if !path.is_symlink() {
            // Whoever runs this is to be able to look into it.
            let mode = if path.is_dir() { thing.mode | 0o700 } else { thing.mode | 0o400 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let time = TimeSpec::new(thing.time.0, thing.time.1);
        utimensat(AT_FDCWD, &path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
    }
}

/// All that is to be said of what is below a directory; of files with several names, which is the first.
fn described(top: &Path) -> BTreeMap<Vec<u8>, String> {
    fn walk(top: &Path, path: &Path, first: &mut HashMap<u64, Vec<u8>>, all: &mut BTreeMap<Vec<u8>, String>) {
        let mut paths: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let about = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(top).unwrap().as_os_str().as_bytes().to_vec();
            let mut text = format!("{:o} {}.{:09}", about.mode(), about.mtime(), about.mtime_nsec());
            if about.is_dir() {
                walk(top, &path, first, all);
            } else {
                let first = first.entry(about.ino()).or_insert(name.clone());
                text += &format!(" {} of {}", about.nlink(), first.escape_ascii());
            }
            if about.is_symlink() {
                text += &format!(" -> {:?}", fs::read_link(&path).unwrap());
            } else if about.is_file() {
                text += &format!(" {}", fs::read(&path).unwrap().escape_ascii());
            }
            all.insert(name, text);
        }
    }
    let mut all = BTreeMap::new();
    walk(top, top, &mut HashMap::new(), &mut all);
    all
}

/// Names of what two descriptions do not agree on.
fn differing(wanted: &BTreeMap<Vec<u8>, String>, found: &BTreeMap<Vec<u8>, String>) -> Vec<String> {
    let names = wanted.keys().chain(found.keys().filter(|name| !wanted.contains_key(*name)));
    let names = names.filter(|name| wanted.get(*name) != found.get(*name));
    let short = |text: Option<&String>| text.map(|text| text.chars().take(100).collect::<String>());
    names
        .map(|name| {
            format!("{}: {:?}, {:?}", name.escape_ascii(), short(wanted.get(name)), short(found.get(name)))
        })
        .collect()
}

fn packed(top: &Path, sparse: bool) -> Vec<u8> {
    let (output, mut pieces) = mpsc::channel(1);
    std::thread::scope(|scope| {
        let work = scope.spawn(move || {
            let options = PackOptions { sparse, ..PackOptions::default() };
            pack(top, None, &options, Replaced::new(), &Output(output)).unwrap()
        });
        let mut all = Vec::new();
        while let Some(piece) = pieces.blocking_recv() {
            all.extend_from_slice(&piece);
        }
        assert_eq!(work.join().unwrap().warnings, []);
        all
    })
}

#[test]
fn what_is_unpacked_is_what_was_packed() {
    let seed = match Config::default().rng_seed {
        RngSeed::Random => RngSeed::Fixed(7),
        asked => asked,
    };
    let config = Config { cases: 48, rng_seed: seed, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let cases = (vec(thing(), 0..25), any::<bool>());
    let outcome = runner.run(&cases, |(things, sparse)| {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        build(&at("from"), &things);
        let wanted = described(&at("from"));
        let archive = packed(&at("from"), sparse);
        let how = Unpacking {
            owner: None,
            modes: 0o7777,
            only: None,
            careful: false,
            options: UnpackOptions::default(),
        };
        let report = unpack(&at("to"), how, archive.as_slice()).unwrap();
        prop_assert_eq!(report.warnings, []);
        prop_assert_eq!(differing(&wanted, &described(&at("to"))), Vec::<String>::new());
        // Once more over what is there, whose directories stay as they are.
        unpack(&at("to"), how, archive.as_slice()).unwrap();
        let without_directories = |mut all: BTreeMap<Vec<u8>, String>| {
            all.retain(|_, text| !text.starts_with('4'));
            all
        };
        let (before, after) =
            (without_directories(wanted.clone()), without_directories(described(&at("to"))));
        prop_assert_eq!(differing(&before, &after), Vec::<String>::new(), "over what is there");
        fs::create_dir(at("tar")).unwrap();
        let mut tar = Command::new("tar")
            .args(["--extract", "--preserve-permissions", "--warning=no-timestamp", "--directory"])
            .arg(at("tar"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&archive).unwrap();
        prop_assert!(tar.wait().unwrap().success());
        prop_assert_eq!(differing(&wanted, &described(&at("tar"))), Vec::<String>::new(), "GNU tar");
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn holes_are_neither_sent_nor_filled() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir(at("from")).unwrap();
    let long = "l\n".repeat(100);
    let file = File::create_new(at("from").join(&long)).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"data", 1 << 39).unwrap();
    let archive = packed(&at("from"), true);
    assert!(archive.len() < 1 << 20, "{}", archive.len());
    let how =
        Unpacking { owner: None, modes: 0o777, only: None, careful: true, options: UnpackOptions::default() };
    let report = unpack(&at("to"), how, archive.as_slice()).unwrap();
    assert_eq!((report.files, report.content), (1, 1 << 40));
    let copy = File::open(at("to").join(&long)).unwrap();
    let about = copy.metadata().unwrap();
    assert!(about.len() == 1 << 40 && about.blocks() < 1 << 11, "{about:?}");
    let mut found = [0; 6];
    copy.read_exact_at(&mut found, (1 << 39) - 1).unwrap();
    assert_eq!(&found, b"\0data\0");
}
