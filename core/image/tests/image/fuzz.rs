//! The reader of layers against archives that no tool would write.
//!
//! Archives of the corpus, in each form that there is, are changed at random, mostly where it hurts: in their headers, with the check
//! sums put right again. Whatever comes of it is a filesystem that e2fsck finds nothing wrong with, the same each time, or an error
//! that has a hint and leaves nothing; never a panic, and never the end of patience.
//!
//! In a test there are a few hundred tries, the same each time. `make fuzz` goes on for `VM_FUZZ_SECONDS` with others, and keeps what
//! breaks it in `VM_FUZZ_OUT`.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner},
};
use vm_image::{
    ImageError,
    rootfs::{self, LayerSource, TarSource},
};

use crate::common::{Bench, silent};

const BLOCK: usize = 512;
/// For one archive of some 20 KiB, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(120);
/// Tries in a test.
const CASES: u32 = 150;

/// A change of one archive. Places are parts of 65536 of it.
#[derive(Debug, Clone)]
enum Change {
    Byte {
        at: u16,
        value: u8,
    },
    /// Ends there.
    Cut {
        at: u16,
    },
    /// So many blocks once more, elsewhere.
    Repeat {
        from: u16,
        blocks: usize,
        to: u16,
    },
    Remove {
        at: u16,
        blocks: usize,
    },
    /// A field of a header.
    Field {
        header: u16,
        field: (usize, usize),
        value: &'static [u8],
    },
    /// A record of its own length in front of an entry.
    Pax {
        header: u16,
        key: &'static str,
        value: &'static [u8],
    },
}

/// Offset and length: name, mode, uid, size, mtime, type, link, magic, major, prefix, GNU's sparse map, its size.
const FIELDS: &[(usize, usize)] = &[
    (0, 100),
    (100, 8),
    (108, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (329, 8),
    (345, 155),
    (386, 96),
    (482, 13),
];

const VALUES: &[&[u8]] = &[
    b"",
    b"0",
    b"1",
    b"2",
    b"5",
    b"S",
    b"x",
    b"g",
    b"L",
    b"K",
    b"Z",
    b"..",
    b"../../outside",
    b"/absolute",
    b"d/file",
    b"d/file/below",
    b"d/soft/below",
    b"d/.wh.file",
    b"d/.wh..wh..opq",
    b".wh.d",
    b".wh.",
    b".wh...",
    b".wh..wh.plnk/1",
    b"lost+found",
    b"\xff\xfe",
    b"00000000000\0",
    b"00000001000\0",
    b"77777777777\0",
    b"\x80\0\0\0\0\0\0\0\0\0\x10\0",
    b"\x80\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"99999999999 ",
    b"-1",
    b"18446744073709551615",
    b"9223372036854775807",
    b"4294967295",
    b"4294967296",
    b"0,512,1000000000000,1",
    b"1000000000000",
];

const KEYS: &[&str] = &[
    "path",
    "linkpath",
    "size",
    "uid",
    "mtime",
    "GNU.sparse.major",
    "GNU.sparse.minor",
    "GNU.sparse.name",
    "GNU.sparse.realsize",
    "GNU.sparse.size",
    "GNU.sparse.map",
    "GNU.sparse.offset",
    "GNU.sparse.numbytes",
    "SCHILY.xattr.security.capability",
    "SCHILY.xattr.user.x",
    "SCHILY.xattr.system.posix_acl_access",
];

fn change() -> impl Strategy<Value = Change> {
    let at = any::<u16>;
    let field = || prop::sample::select(FIELDS);
    let value = || prop::sample::select(VALUES);
    prop_oneof![
        2 => (at(), any::<u8>()).prop_map(|(at, value)| Change::Byte { at, value }),
        1 => at().prop_map(|at| Change::Cut { at }),
        2 => (at(), 1..4_usize, at()).prop_map(|(from, blocks, to)| Change::Repeat { from, blocks, to }),
        1 => (at(), 1..4_usize).prop_map(|(at, blocks)| Change::Remove { at, blocks }),
        8 => (at(), field(), value()).prop_map(|(header, field, value)| Change::Field { header, field, value }),
        3 => (at(), prop::sample::select(KEYS), value())
            .prop_map(|(header, key, value)| Change::Pax { header, key, value }),
    ]
}

/// How an archive comes.
#[derive(Debug, Clone, Copy)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Debug, Clone)]
struct Case {
    /// Which archives of the corpus, and what becomes of each.
    layers: Vec<(prop::sample::Index, Vec<Change>)>,
    /// Whether check sums are put right.
    repaired: bool,
    packing: Packing,
    /// What becomes of the packed ones.
    damage: Vec<(u16, u8)>,
    /// As layers of an image, or one of them as a root filesystem.
    layered: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let layer = (any::<prop::sample::Index>(), prop::collection::vec(change(), 0..6));
    let packing = prop_oneof![6 => Just(Packing::Plain), 1 => Just(Packing::Gzip), 1 => Just(Packing::Zstd)];
    let damage = prop_oneof![
        9 => Just(Vec::new()),
        1 => prop::collection::vec((any::<u16>(), any::<u8>()), 1..4),
    ];
    let layers = prop::collection::vec(layer, 1..3);
    (layers, prop::bool::weighted(0.9), packing, damage, any::<bool>()).prop_map(
        |(layers, repaired, packing, damage, layered)| Case { layers, repaired, packing, damage, layered },
    )
}

fn place(part: u16, of: usize) -> usize {
    (usize::from(part) * of) >> 16
}

fn sum(block: &[u8]) -> u32 {
    let rest = block[..148].iter().chain(&block[156..BLOCK]);
    rest.map(|&byte| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ')
}

/// The blocks that are headers.
fn headers(archive: &[u8]) -> Vec<usize> {
    let stated = |block: &[u8]| {
        let text = std::str::from_utf8(&block[148..156]).ok()?;
        u32::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
    };
    let blocks = archive.chunks_exact(BLOCK).enumerate();
    blocks.filter(|(_, block)| stated(block) == Some(sum(block))).map(|(at, _)| at * BLOCK).collect()
}

fn repair(header: &mut [u8]) {
    let text = format!("{:06o}\0 ", sum(header));
    header[148..156].copy_from_slice(text.as_bytes());
}

impl Change {
    fn apply(&self, archive: &mut Vec<u8>, repaired: bool) {
        let blocks = archive.len() / BLOCK;
        let headers = headers(archive);
        let header = |part: u16| headers.get(place(part, headers.len())).copied();
        match *self {
            Self::Byte { at, value } if !archive.is_empty() => {
                let at = place(at, archive.len());
                archive[at] = value;
                let start = at / BLOCK * BLOCK;
                if repaired && headers.contains(&start) {
                    repair(&mut archive[start..start + BLOCK]);
                }
            }
            Self::Cut { at } => archive.truncate(place(at, archive.len())),
            Self::Repeat { from, blocks: count, to } if blocks > 0 => {
                let from = place(from, blocks) * BLOCK;
                let piece = archive[from..(from + count * BLOCK).min(archive.len())].to_vec();
                let to = place(to, blocks) * BLOCK;
                archive.splice(to..to, piece);
            }
            Self::Remove { at, blocks: count } if blocks > 0 => {
                let at = place(at, blocks) * BLOCK;
                archive.drain(at..(at + count * BLOCK).min(archive.len()));
            }
            Self::Field { header: part, field: (offset, length), value } => {
                let Some(start) = header(part) else { return };
                let field = &mut archive[start + offset..start + offset + length];
                field.fill(0);
                let count = value.len().min(length);
                field[..count].copy_from_slice(&value[..count]);
                if repaired {
                    repair(&mut archive[start..start + BLOCK]);
                }
            }
            Self::Pax { header: part, key, value } => {
                let Some(start) = header(part) else { return };
                let mut tar = crate::common::Tar::default();
                tar.push_pax(&[(key, value)]);
                archive.splice(start..start, tar.0);
            }
            Self::Byte { .. } | Self::Repeat { .. } | Self::Remove { .. } => {}
        }
    }
}

impl Packing {
    fn pack(self, archive: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => archive.to_vec(),
            Self::Zstd => zstd::encode_all(archive, 1).unwrap(),
            Self::Gzip => {
                let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                packer.write_all(archive).unwrap();
                packer.finish().unwrap()
            }
        }
    }
}

impl Case {
    fn archives(&self, corpus: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let layers = self.layers.iter().map(|(which, changes)| {
            let mut archive = which.get(corpus).clone();
            changes.iter().for_each(|change| change.apply(&mut archive, self.repaired));
            let mut packed = self.packing.pack(&archive);
            for (at, value) in &self.damage {
                let at = place(*at, packed.len());
                if let Some(byte) = packed.get_mut(at) {
                    *byte = *value;
                }
            }
            packed
        });
        layers.collect()
    }
}

fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<PathBuf> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "tar"));
    files.sort();
    assert!(files.len() > 5, "the corpus is not there");
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Makes a filesystem of archives.
async fn make(bench: &Bench, archives: &[Vec<u8>], layered: bool) -> Result<rootfs::BuiltRootfs, ImageError> {
    if !layered {
        let input = std::io::Cursor::new(archives[0].clone());
        let length = Some(archives[0].len() as u64);
        let source = TarSource::Reader { reader: Box::new(input), length };
        return rootfs::build(source, &bench.out(), &bench.scratch(), silent()).await;
    }
    let layers = archives.iter().enumerate().map(|(number, archive)| {
        let blob = bench.dir.path().join(format!("layer-{number}"));
        fs::write(&blob, archive).unwrap();
        LayerSource { blob, digest: None, diff_id: None }
    });
    let identity = format!("sha256:{}", "5".repeat(64)).parse().unwrap();
    rootfs::flatten(layers.collect(), identity, &bench.out(), &bench.scratch(), silent()).await
}

/// What must be so of anything.
async fn survives(archives: &[Vec<u8>], layered: bool) -> Result<(), String> {
    let bench = Bench::new();
    let made = tokio::time::timeout(PATIENCE, make(&bench, archives, layered)).await;
    let Ok(made) = made else { return Err(format!("it takes more than {PATIENCE:?}")) };
    match made {
        Ok(built) => {
            let checked = std::process::Command::new("e2fsck").arg("-fn").arg(bench.out()).output().unwrap();
            if !checked.status.success() {
                return Err(String::from_utf8_lossy(&checked.stdout).into_owned());
            }
            let first = digest(&bench.out());
            fs::remove_file(bench.out()).unwrap();
            let again = make(&bench, archives, layered).await.map_err(|error| format!("again: {error}"))?;
            if (again.digest, digest(&bench.out())) != (built.digest, first) {
                return Err("it is another one the second time".into());
            }
            Ok(())
        }
        Err(ImageError::Worker { source }) => Err(format!("a thread ended: {source}")),
        Err(error) if error.hint().is_none() => Err(format!("no hint: {error}")),
        Err(_) if bench.out().exists() || fs::read_dir(bench.scratch()).map_or(0, Iterator::count) > 0 => {
            Err("something is left".into())
        }
        Err(_) => Ok(()),
    }
}

/// Of what is stored of a file, without its holes: one may be a terabyte.
fn digest(path: &Path) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    use std::os::unix::fs::FileExt;
    let file = fs::File::open(path).unwrap();
    let (mut hash, mut at) = (Sha256::new(), 0);
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        let mut content = vec![0; usize::try_from(end - data).unwrap()];
        file.read_exact_at(&mut content, data).unwrap();
        hash.update(data.to_le_bytes());
        hash.update(&content);
        at = end;
    }
    hash.finalize().to_vec()
}

/// Tries; answers what broke it.
fn tries(config: ProptestConfig, rng: TestRng, corpus: &[Vec<u8>]) -> Result<(), String> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut runner = TestRunner::new_with_rng(config, rng);
    let tried = runner.run(&case(), |case| {
        let archives = case.archives(corpus);
        runtime.block_on(survives(&archives, case.layered)).map_err(|reason| {
            if let Some(out) = std::env::var_os("VM_FUZZ_OUT") {
                // The last that is written is the smallest.
                for (number, archive) in archives.iter().enumerate() {
                    fs::write(Path::new(&out).join(format!("layer-{number}.tar")), archive).unwrap();
                }
            }
            TestCaseError::fail(reason)
        })
    });
    tried.map_err(|error| error.to_string())
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn archives_that_no_tool_would_write_become_sound_filesystems_or_errors() {
    let corpus = corpus();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (number, archive) in corpus.iter().enumerate() {
        for layered in [false, true] {
            let survived = runtime.block_on(survives(std::slice::from_ref(archive), layered));
            survived.unwrap_or_else(|reason| panic!("archive {number}: {reason}"));
        }
    }
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    tries(config(CASES), rng, &corpus).unwrap_or_else(|reason| panic!("{reason}"));
}

/// For `make fuzz`.
#[test]
#[ignore = "it takes as long as it is told"]
fn fuzz_for_a_while() {
    let seconds = std::env::var("VM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    let (begun, corpus, mut cases) = (Instant::now(), corpus(), 0);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let mut seed = [0; 32];
        fs::File::open("/dev/urandom")
            .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut seed))
            .unwrap();
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        tries(config(200), rng, &corpus).unwrap_or_else(|reason| panic!("after {cases}: {reason}"));
        cases += 200;
    }
    println!("{cases} archives in {:.0?}", begun.elapsed());
}
