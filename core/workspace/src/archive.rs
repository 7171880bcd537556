//! Packs files as a tar archive while it is being read, and remembers what was packed.
//!
//! An entry's header tells its size before its content is read, and the content may change meanwhile. Small files are read
//! first, and again if they changed. Of others that changed a second version follows at the archive's end, where nothing
//! else is between their times, and whoever unpacks the archive ends with that.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_archive::pax::{Entry as Headers, EntryType};

use crate::{
    Cancel, Entry, EntryKind, Tree, Workspace, WorkspaceError,
    facts::unreadable,
    listing::directories_above,
    pax::Archive,
    text::{self, shown},
    tree::Look,
};

/// Files up to this size, in bytes, are read before anything is said of them.
const SMALL: u64 = 1 << 20;
/// Read at once, in bytes.
const CHUNK: usize = 1 << 20;
const SECOND: i128 = 1_000_000_000;
/// How often a file is read that changes whenever it is read.
const ATTEMPTS: usize = 4;
/// A time that is not older than this when it is looked at may be that of the next change, too: so coarse are the clocks of
/// filesystems.
const COARSE: Duration = Duration::from_secs(2);

/// Which entries of a workspace.
#[derive(Debug, Clone, Copy)]
pub enum Selection<'a> {
    /// All.
    All,
    /// Those whose paths start with one of these, all if there is none; and the directories above them.
    Prefixes(&'a [Vec<u8>]),
    /// Those with these paths.
    Paths(&'a [Vec<u8>]),
}

/// When a file of the host's has changed, and which it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostStat {
    /// When its content changed, in nanoseconds since 1970.
    #[serde(with = "text::nanos")]
    pub mtime: i128,
    /// When anything about it changed, in nanoseconds since 1970.
    #[serde(with = "text::nanos")]
    pub ctime: i128,
    /// Its number in its filesystem; 0 where the times do not tell whether it has changed since, as it had just changed.
    pub inode: u64,
}

/// What was sent of one entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentEntry {
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, nine of them.
    pub mode: u32,
    /// Of a file, in bytes.
    pub size: u64,
    /// Of a file's content.
    #[serde(with = "text::digest", default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<[u8; 32]>,
    /// Where a link leads.
    #[serde(with = "text::optional_bytes", default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Vec<u8>>,
    /// The host's file, when it was read.
    pub stat: HostStat,
}

/// What was sent, by path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// All entries.
    #[serde(with = "text::by_path")]
    pub entries: BTreeMap<Vec<u8>, SentEntry>,
    /// What was not sent, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl SentEntry {
    /// Whether both are the same for whoever has them: kind, permissions, content, target.
    pub fn same(&self, other: &Self) -> bool {
        let what = |entry: &Self| (entry.kind, entry.size, entry.sha256);
        // A link's permissions mean nothing, and are not the same everywhere.
        what(self) == what(other)
            && self.target == other.target
            && (self.kind == EntryKind::Symlink || self.mode == other.mode)
    }
}

impl Sent {
    /// Adds what was sent later, which counts where both have a path.
    pub fn extend(&mut self, later: Self) {
        self.entries.extend(later.entries);
        self.warnings.extend(later.warnings);
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.size).sum()
    }
}

impl Workspace {
    /// Writes a tar archive (PAX format) of entries of the workspace, with paths relative to its top, as they are now; sorted,
    /// directories before what is in them. What has vanished since the workspace was opened is left out, with a warning.
    ///
    /// # Errors
    /// A file that cannot be read, or that changes whenever it is read, and `to`'s.
    pub fn archive(&self, selection: Selection<'_>, to: impl Write + Send) -> Result<Sent, WorkspaceError> {
        let selected = self.select(selection);
        self.identity().act(|| {
            let mut packer = Packer::new(self.tree()?, to, self.cancel());
            for entry in selected {
                packer.add(&entry.path, &entry.path)?;
            }
            packer.finish()
        })
    }

    fn select(&self, selection: Selection<'_>) -> Vec<&Entry> {
        match selection {
            Selection::All => self.files().iter().collect(),
            Selection::Paths(paths) => {
                let mut entries: Vec<_> = paths.iter().filter_map(|path| self.entry(path)).collect();
                entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
                entries.dedup();
                entries
            }
            Selection::Prefixes(prefixes) => {
                let chosen = |path: &[u8]| {
                    prefixes.is_empty() || prefixes.iter().any(|prefix| path.starts_with(prefix))
                };
                let mut above = BTreeSet::new();
                for entry in self.files().iter().filter(|entry| chosen(&entry.path)) {
                    above.extend(directories_above(&entry.path));
                }
                let wanted = |entry: &&Entry| chosen(&entry.path) || above.contains(entry.path.as_slice());
                self.files().iter().filter(wanted).collect()
            }
        }
    }
}

/// Writes an archive of what is below a directory. It runs with the rights of whoever may read that.
pub(crate) struct Packer<'a, W> {
    tree: Tree,
    archive: Archive<W>,
    cancel: &'a Cancel,
    sent: Sent,
    /// Files that changed while they were read, by path and name.
    again: Vec<(Vec<u8>, Vec<u8>)>,
    buffer: Vec<u8>,
}

/// Why a file's content was not packed as it was at any one time.
enum Unsteady {
    Gone,
    Changed,
}

impl<'a, W: Write> Packer<'a, W> {
    pub(crate) fn new(tree: Tree, to: W, cancel: &'a Cancel) -> Self {
        let archive = Archive::new(to);
        Self { tree, archive, cancel, sent: Sent::default(), again: Vec::new(), buffer: Vec::new() }
    }

    /// Goes on with what is below another directory.
    pub(crate) fn turn_to(&mut self, tree: Tree) -> Result<(), WorkspaceError> {
        self.settle()?;
        self.tree = tree;
        Ok(())
    }

    /// Packs the entry of this path as it is now, under a name.
    pub(crate) fn add(&mut self, path: &[u8], name: &[u8]) -> Result<(), WorkspaceError> {
        self.cancel.check()?;
        let Some(look) = self.tree.look(path).map_err(unreadable(path))? else {
            self.vanished(name);
            return Ok(());
        };
        match EntryKind::of(look.kind) {
            Some(EntryKind::Directory) => self.put(name, EntryKind::Directory, &look, None, None),
            Some(EntryKind::Symlink) => match self.tree.target(path).map_err(unreadable(path))? {
                Some(target) => self.put(name, EntryKind::Symlink, &look, Some(target), None),
                None => {
                    self.vanished(name);
                    Ok(())
                }
            },
            Some(EntryKind::File) => match self.file(path, name)? {
                Ok(()) => Ok(()),
                Err(Unsteady::Gone) => {
                    self.vanished(name);
                    Ok(())
                }
                Err(Unsteady::Changed) => {
                    self.again.push((path.to_vec(), name.to_vec()));
                    Ok(())
                }
            },
            None => {
                self.sent
                    .warnings
                    .push(format!("{} is a pipe, socket or device: it is left out", shown(path)));
                Ok(())
            }
        }
    }

    /// Packs a file that is nowhere on the disk.
    pub(crate) fn add_text(&mut self, name: &[u8], content: &[u8]) -> Result<(), WorkspaceError> {
        let look = Look {
            kind: rustix::fs::FileType::RegularFile,
            mode: 0o644,
            size: content.len() as u64,
            stat: HostStat::default(),
        };
        self.put(name, EntryKind::File, &look, None, Some(content))
    }

    /// Ends the archive; what is in it.
    pub(crate) fn finish(mut self) -> Result<Sent, WorkspaceError> {
        self.settle()?;
        self.archive.finish().map_err(passing_on)?;
        Ok(self.sent)
    }

    /// Packs again what changed.
    fn settle(&mut self) -> Result<(), WorkspaceError> {
        for attempt in 1.. {
            let again = std::mem::take(&mut self.again);
            let Some((first, _)) = again.first() else { break };
            if attempt == ATTEMPTS {
                return Err(WorkspaceError::Changing { path: shown(first) });
            }
            for (path, name) in again {
                self.add(&path, &name)?;
            }
        }
        Ok(())
    }

    fn vanished(&mut self, name: &[u8]) {
        self.sent.entries.remove(name);
        self.sent.warnings.push(format!("{} vanished before it was sent", shown(name)));
    }

    fn file(&mut self, path: &[u8], name: &[u8]) -> Result<Result<(), Unsteady>, WorkspaceError> {
        let failed = unreadable(path);
        for _ in 0..ATTEMPTS {
            let Some(mut file) = self.tree.file(path).map_err(&failed)? else {
                return Ok(Err(Unsteady::Gone));
            };
            let before = Look::of_file(&file).map_err(&failed)?;
            if before.size > SMALL {
                return self.large(path, name, file, before);
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.clear();
            (&mut file).take(SMALL + 1).read_to_end(&mut buffer).map_err(&failed)?;
            let steady =
                Look::of_file(&file).map_err(&failed)? == before && buffer.len() as u64 == before.size;
            let outcome =
                if steady { self.put(name, EntryKind::File, &before, None, Some(&buffer)) } else { Ok(()) };
            self.buffer = buffer;
            outcome?;
            if steady {
                return Ok(Ok(()));
            }
        }
        Ok(Err(Unsteady::Changed))
    }

    /// Packs as many bytes as the file had when it was opened, whatever becomes of it.
    fn large(
        &mut self,
        path: &[u8],
        name: &[u8],
        mut file: File,
        before: Look,
    ) -> Result<Result<(), Unsteady>, WorkspaceError> {
        let failed = unreadable(path);
        self.headers(name, EntryKind::File, &before, before.size, b"").map_err(passing_on)?;
        let mut hash = Sha256::new();
        let mut left = before.size;
        self.buffer.resize(CHUNK, 0);
        while left > 0 {
            self.cancel.check()?;
            let room = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            match file.read(&mut self.buffer[..room]) {
                Ok(0) => break,
                Ok(length) => {
                    let piece = &self.buffer[..length];
                    hash.update(piece);
                    self.archive.content(piece).map_err(passing_on)?;
                    left -= length as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        self.archive.zeros(left).and_then(|()| self.archive.fill()).map_err(passing_on)?;
        if left > 0 || Look::of_file(&file).map_err(&failed)? != before {
            return Ok(Err(Unsteady::Changed));
        }
        self.record(name, EntryKind::File, &before, None, Some(hash.finalize().into()));
        Ok(Ok(()))
    }

    fn put(
        &mut self,
        name: &[u8],
        kind: EntryKind,
        look: &Look,
        target: Option<Vec<u8>>,
        content: Option<&[u8]>,
    ) -> Result<(), WorkspaceError> {
        let content_of = content.unwrap_or_default();
        self.headers(name, kind, look, content_of.len() as u64, target.as_deref().unwrap_or_default())
            .and_then(|()| self.archive.content(content_of))
            .and_then(|()| self.archive.fill())
            .map_err(passing_on)?;
        self.record(name, kind, look, target, content.map(|content| Sha256::digest(content).into()));
        Ok(())
    }

    /// Owners are not told: in the guest all belongs to one user.
    fn headers(
        &mut self,
        name: &[u8],
        kind: EntryKind,
        look: &Look,
        size: u64,
        target: &[u8],
    ) -> std::io::Result<()> {
        let (kind, end) = match kind {
            EntryKind::File => (EntryType::Regular, &b""[..]),
            EntryKind::Directory => (EntryType::Directory, &b"/"[..]),
            EntryKind::Symlink => (EntryType::Symlink, &b""[..]),
        };
        // Times of filesystems have no more seconds than that, and what is left of one fits.
        let seconds = i64::try_from(look.stat.mtime.div_euclid(SECOND)).unwrap_or(i64::MAX);
        let nanos = look.stat.mtime.rem_euclid(SECOND) as u32;
        self.archive.entry(&Headers {
            name: &[name, end].concat(),
            kind,
            mode: look.mode,
            uid: 0,
            gid: 0,
            mtime: (seconds, nanos),
            link: target,
            size,
            device: (0, 0),
            xattrs: &[],
            sparse: None,
        })
    }

    fn record(
        &mut self,
        name: &[u8],
        kind: EntryKind,
        look: &Look,
        target: Option<Vec<u8>>,
        sha256: Option<[u8; 32]>,
    ) {
        let size = if kind == EntryKind::File { look.size } else { 0 };
        let entry = SentEntry { kind, mode: look.mode, size, sha256, target, stat: look.stat.settled() };
        self.sent.entries.insert(name.to_vec(), entry);
    }
}

fn passing_on(source: std::io::Error) -> WorkspaceError {
    WorkspaceError::Output { source }
}

impl HostStat {
    /// What will tell later whether the file has changed, which times of just now do not.
    fn settled(self) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let latest = i128::try_from(now.saturating_sub(COARSE).as_nanos()).unwrap_or(i128::MAX);
        if self.ctime < latest { self } else { Self { inode: 0, ..self } }
    }

    /// Whether a file that has this now is as it was when it had the other.
    pub(crate) fn proves(&self, former: &Self) -> bool {
        former.inode != 0 && self == former
    }
}

/// What an entry of the host's is now, as it would be sent; `None` where there is none that could be.
///
/// # Errors
/// It cannot be read, or changes whenever it is read.
pub(crate) fn inspect(
    tree: &mut Tree,
    path: &[u8],
    cancel: &Cancel,
) -> Result<Option<SentEntry>, WorkspaceError> {
    let failed = unreadable(path);
    for _ in 0..ATTEMPTS {
        let Some(look) = tree.look(path).map_err(&failed)? else { return Ok(None) };
        let Some(kind) = EntryKind::of(look.kind) else { return Ok(None) };
        let mut entry = SentEntry {
            kind,
            mode: look.mode,
            size: 0,
            sha256: None,
            target: None,
            stat: look.stat.settled(),
        };
        match kind {
            EntryKind::Directory => return Ok(Some(entry)),
            EntryKind::Symlink => {
                if let Some(target) = tree.target(path).map_err(&failed)? {
                    entry.target = Some(target);
                    return Ok(Some(entry));
                }
            }
            EntryKind::File => {
                let Some(mut file) = tree.file(path).map_err(&failed)? else { continue };
                let before = Look::of_file(&file).map_err(&failed)?;
                let mut hash = Sha256::new();
                let mut buffer = vec![0; CHUNK.min(usize::try_from(before.size).unwrap_or(CHUNK) + 1)];
                loop {
                    cancel.check()?;
                    match file.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(length) => hash.update(&buffer[..length]),
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
                if Look::of_file(&file).map_err(&failed)? == before {
                    (entry.mode, entry.size, entry.stat) = (before.mode, before.size, before.stat.settled());
                    entry.sha256 = Some(hash.finalize().into());
                    return Ok(Some(entry));
                }
            }
        }
    }
    Err(WorkspaceError::Changing { path: shown(path) })
}
