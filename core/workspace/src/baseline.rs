//! What a guest was given, and what is to be done so that it has what the host has now.
//!
//! The record has two sides: what was sent, with the host's times at that moment, and how the guest had it right after. So
//! what has changed since is known on either side by looking at times alone; content is read, and the guest asked for
//! digests, only where they differ.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Bound,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vm_types::guest::files::{Seen, SeenKind};

use crate::{
    Entry, EntryKind, History, Sent, SentEntry, Workspace, WorkspaceError, archive::inspect,
    listing::directories_above, text,
};

/// Of the record's form. A reader refuses later ones.
const VERSION: u32 = 1;

/// What a guest was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    version: u32,
    /// The top of the workspace.
    #[serde(with = "text::os_path")]
    pub source: PathBuf,
    /// The commit that was checked out on the host.
    pub base: Option<String>,
    /// The branch that was.
    #[serde(with = "text::optional_bytes")]
    pub branch: Option<Vec<u8>>,
    /// The importer that sent it.
    pub importer: String,
    /// Whether that was all of the workspace, so that what is not in `sent` is new on the host.
    #[serde(default)]
    pub whole: bool,
    /// What the guest has of git; absent where no history was sent.
    pub history: Option<History>,
    /// What was sent.
    pub sent: Sent,
    /// The guest's tree right after, sorted by path.
    #[serde(with = "text::seen")]
    pub guest: Vec<Seen>,
}

/// What a guest says of its files' contents, in the order of the paths; `None` of what is no file. For
/// [`Baseline::difference`].
pub type GuestDigests<'a> =
    dyn FnMut(&[Vec<u8>]) -> Result<Vec<Option<[u8; 32]>>, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// What is to be done in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// What is new or different on the host: for [`Workspace::archive`].
    pub send: Vec<Vec<u8>>,
    /// What is not in the workspace any more, in the order in which it is to be removed: what is in a directory before it.
    /// What stands where something of another kind is to be sent is among them, too.
    pub remove: Vec<Vec<u8>>,
    /// Of these paths the ones that the guest itself has changed, so that its work would be lost; and, where git's own files
    /// are to be sent, `HEAD` and the branch if the guest has moved them. What is only staged in the guest is not looked for.
    pub guest_changed: Vec<Vec<u8>>,
    /// Of the files that are to be sent.
    pub bytes: u64,
    /// Whether git's own files are to be sent, too: the host's commit, branch or index is another one.
    pub history: bool,
    /// What only has other times on the host: to be remembered, not to be sent.
    pub touched: Sent,
}

impl Difference {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.send.is_empty() && self.remove.is_empty() && !self.history
    }
}

impl Baseline {
    /// What a guest has after `sent` was unpacked in it and `guest` was seen there.
    pub fn new(
        workspace: &Workspace,
        importer: &str,
        history: Option<History>,
        sent: Sent,
        guest: Vec<Seen>,
    ) -> Self {
        Self {
            version: VERSION,
            source: workspace.top().to_owned(),
            base: workspace.head().map(Into::into),
            branch: workspace.branch().map(Into::into),
            importer: importer.into(),
            whole: true,
            history,
            sent,
            guest,
        }
    }

    /// The record after a difference was made up for: `sent` was sent of it, `history` is what the guest now has of git where
    /// that was sent anew, and `guest` was seen then. What the guest itself had changed before, and still has, stays known as a
    /// change of the guest's.
    #[must_use]
    pub fn after(
        &self,
        workspace: &Workspace,
        difference: &Difference,
        sent: Sent,
        history: Option<History>,
        guest: Vec<Seen>,
    ) -> Self {
        let history_sent = history.is_some();
        let fresh = |path: &[u8]| sent.entries.contains_key(path) || (history_sent && is_of_git(path));
        let former: BTreeMap<&[u8], &Seen> =
            self.guest.iter().map(|seen| (seen.path.as_slice(), seen)).collect();
        let removed: BTreeSet<&[u8]> = difference.remove.iter().map(Vec::as_slice).collect();
        let mut known: BTreeMap<Vec<u8>, Seen> = self
            .guest
            .iter()
            .filter(|seen| !removed.contains(seen.path.as_slice()) && !fresh(&seen.path))
            .map(|seen| (seen.path.clone(), seen.clone()))
            .collect();
        for seen in guest {
            // Directories get new times by what is put into them, which is no change of the guest's.
            let moved = former.get(seen.path.as_slice()).is_some_and(|former| {
                seen.kind == SeenKind::Directory
                    && former.kind == SeenKind::Directory
                    && former.mode == seen.mode
            });
            if fresh(&seen.path) || moved {
                known.insert(seen.path.clone(), seen);
            }
        }
        let mut all = self.sent.clone();
        all.warnings.clear();
        all.entries.retain(|path, _| !removed.contains(path.as_slice()));
        all.extend(difference.touched.clone());
        all.extend(sent);
        Self {
            version: VERSION,
            source: workspace.top().to_owned(),
            base: workspace.head().map(Into::into),
            branch: workspace.branch().map(Into::into),
            importer: self.importer.clone(),
            whole: self.whole,
            history: history.or_else(|| self.history.clone()),
            sent: all,
            guest: known.into_values().collect(),
        }
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), WorkspaceError> {
        vm_host::files::write_json(path, 0o600, self).map_err(failed(path))
    }

    /// Reads a record; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read, or a later version wrote it.
    pub fn load(path: &Path) -> Result<Option<Self>, WorkspaceError> {
        /// What all versions have.
        #[derive(Deserialize)]
        struct Any {
            version: u32,
        }
        let content = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            content => content.map_err(failed(path))?,
        };
        let damaged = |error| failed(path)(io::Error::new(io::ErrorKind::InvalidData, error));
        // It is large, so it is read through once unless something is wrong with it.
        match serde_json::from_slice::<Self>(&content) {
            Ok(baseline) if baseline.version == VERSION => Ok(Some(baseline)),
            read => {
                let Any { version } = serde_json::from_slice(&content).map_err(damaged)?;
                if version != VERSION {
                    return Err(WorkspaceError::BaselineVersion { path: path.to_owned(), version });
                }
                read.map(Some).map_err(damaged)
            }
        }
    }

    /// What is to be done in the guest so that it has what the host has now. `survey` is what is in the guest now; the guest
    /// is asked for digests only of what has other times than the record says.
    ///
    /// # Errors
    /// The host's files cannot be read, the guest does not answer.
    pub fn difference(
        &self,
        workspace: &Workspace,
        survey: &[Seen],
        ask: &mut GuestDigests<'_>,
    ) -> Result<Difference, WorkspaceError> {
        let mut difference = Difference::default();
        let now = self.host_now(workspace, &mut difference)?;
        if let Some(history) = &self.history {
            difference.history = workspace.has_moved(history)?;
            difference.remove.extend(workspace.references_in_the_way(history));
        }
        let guest = Guest {
            now: survey.iter().map(|seen| (seen.path.as_slice(), seen)).collect(),
            then: self.guest.iter().map(|seen| (seen.path.as_slice(), seen)).collect(),
        };
        self.guest_side(&now, &guest, ask, &mut difference)?;
        Ok(difference)
    }

    /// Fills in `send`, `remove` and `touched`. What the entries to be sent are now.
    fn host_now(
        &self,
        workspace: &Workspace,
        difference: &mut Difference,
    ) -> Result<BTreeMap<Vec<u8>, SentEntry>, WorkspaceError> {
        let unsure: Vec<&Entry> = workspace.files().iter().filter(|entry| !self.has(entry)).collect();
        let now: BTreeMap<Vec<u8>, SentEntry> = workspace.identity().act(|| {
            let mut tree = workspace.tree()?;
            let mut now = BTreeMap::new();
            for entry in unsure {
                now.extend(
                    inspect(&mut tree, &entry.path, workspace.cancel())?.map(|is| (entry.path.clone(), is)),
                );
            }
            Ok(now)
        })?;
        for (path, entry) in &now {
            match self.sent.entries.get(path) {
                Some(former) if former.same(entry) => {
                    difference.touched.entries.insert(path.clone(), entry.clone());
                }
                former => {
                    // A file cannot be unpacked where a directory is, nor the reverse.
                    if former.is_some_and(|former| former.kind != entry.kind) {
                        difference.remove.push(path.clone());
                    }
                    difference.send.push(path.clone());
                    difference.bytes += entry.size;
                }
            }
        }
        let gone = |path: &&Vec<u8>| workspace.entry(path).is_none();
        difference.remove.extend(self.sent.entries.keys().filter(gone).cloned());
        Ok(now)
    }

    /// Whether what was sent is proven to be what the host has.
    fn has(&self, entry: &Entry) -> bool {
        self.sent.entries.get(&entry.path).is_some_and(|sent| match entry.kind {
            // Nothing of a directory is sent but that it is there, and who may use it.
            EntryKind::Directory => (sent.kind, sent.mode) == (entry.kind, entry.mode),
            _ => sent.kind == entry.kind && entry.stat.proves(&sent.stat),
        })
    }

    /// Fills in `guest_changed`, and adds to `remove` what the guest has put in the way.
    fn guest_side(
        &self,
        now: &BTreeMap<Vec<u8>, SentEntry>,
        guest: &Guest<'_>,
        ask: &mut GuestDigests<'_>,
        difference: &mut Difference,
    ) -> Result<(), WorkspaceError> {
        let mut found =
            Found { guest, changed: BTreeSet::new(), in_the_way: BTreeSet::new(), unsure: Vec::new() };
        for path in difference.send.iter().chain(&difference.remove) {
            found.compare(path, self.sent.entries.get(path), now.get(path));
        }
        if difference.history
            && let Some(history) = &self.history
        {
            for (path, content) in history.pointers() {
                match guest.now.get(path.as_slice()) {
                    Some(seen) if guest.as_it_was(seen) => {}
                    Some(_) => found.unsure.push((path, [Some(content), None])),
                    None => _ = found.changed.insert(path),
                }
            }
        }
        let Found { mut changed, mut in_the_way, unsure, .. } = found;
        if !unsure.is_empty() {
            let paths: Vec<Vec<u8>> = unsure.iter().map(|(path, _)| path.clone()).collect();
            let digests = ask(&paths).map_err(|source| WorkspaceError::Ask { source })?;
            if digests.len() != paths.len() {
                return Err(WorkspaceError::Ask {
                    source: "it answered for other files than it was asked".into(),
                });
            }
            for ((path, harmless), digest) in unsure.into_iter().zip(digests) {
                if digest.is_none() || !harmless.contains(&digest) {
                    changed.insert(path);
                }
            }
        }
        in_the_way.extend(std::mem::take(&mut difference.remove));
        // Paths of what is in a directory come behind its own.
        difference.remove = in_the_way.into_iter().rev().collect();
        difference.guest_changed = changed.into_iter().collect();
        Ok(())
    }
}

/// A path, and the contents that make it harmless.
type Unsure = (Vec<u8>, [Option<[u8; 32]>; 2]);

/// Compares what is to be done with what the guest has.
struct Found<'a> {
    guest: &'a Guest<'a>,
    changed: BTreeSet<Vec<u8>>,
    /// To be removed before anything is unpacked.
    in_the_way: BTreeSet<Vec<u8>>,
    /// Files with other times than they had.
    unsure: Vec<Unsure>,
}

impl Found<'_> {
    /// `was` was sent, `will` is to be; nothing if the path is to be removed.
    fn compare(&mut self, path: &[u8], was: Option<&SentEntry>, will: Option<&SentEntry>) {
        let to_directory = will.is_some_and(|entry| entry.kind == EntryKind::Directory);
        if will.is_some() {
            self.look_above(path);
        }
        let Some(seen) = self.guest.now.get(path) else {
            // The guest has removed it, and it would come back.
            if was.is_some() && will.is_some() {
                self.changed.insert(path.to_vec());
            }
            return;
        };
        if will.is_some() && (seen.kind == SeenKind::Directory) != to_directory {
            self.in_the_way.insert(path.to_vec());
            for added in self.guest.added_below(path) {
                self.changed.insert(added.to_vec());
                self.in_the_way.insert(added.to_vec());
            }
        }
        if self.guest.as_it_was(seen) {
            return;
        }
        let harmless = [was, will].map(|entry| entry.filter(|entry| alike(seen, entry)));
        match seen.kind {
            SeenKind::File if harmless.iter().any(Option::is_some) => {
                self.unsure.push((path.to_vec(), harmless.map(|entry| entry.and_then(|entry| entry.sha256))));
            }
            SeenKind::Symlink if harmless.iter().any(Option::is_some) => {}
            // What else is in it stays, or is named itself.
            SeenKind::Directory if will.is_none() || to_directory => {}
            _ => _ = self.changed.insert(path.to_vec()),
        }
    }

    /// Looks for what the guest has where directories are to be.
    fn look_above(&mut self, path: &[u8]) {
        for above in directories_above(path) {
            if self.guest.now.get(above).is_some_and(|seen| seen.kind != SeenKind::Directory) {
                // What was sent there as something else is looked at by itself.
                if !self.guest.then.get(above).is_some_and(|then| then.kind != SeenKind::Directory) {
                    self.changed.insert(above.to_vec());
                }
                self.in_the_way.insert(above.to_vec());
            }
        }
    }
}

/// The guest's tree, now and when the record was made.
struct Guest<'a> {
    now: BTreeMap<&'a [u8], &'a Seen>,
    then: BTreeMap<&'a [u8], &'a Seen>,
}

impl Guest<'_> {
    fn as_it_was(&self, seen: &Seen) -> bool {
        self.then.get(seen.path.as_slice()).is_some_and(|then| {
            if seen.kind == SeenKind::Directory {
                (then.kind, then.mode) == (seen.kind, seen.mode)
            } else {
                *then == seen
            }
        })
    }

    /// What is below a path now and was not.
    fn added_below(&self, path: &[u8]) -> Vec<&[u8]> {
        let start = [path, b"/"].concat();
        let from = (Bound::Included(start.as_slice()), Bound::Unbounded);
        let inside = self.now.range::<[u8], _>(from).map(|(path, _)| *path);
        inside
            .take_while(|path| path.starts_with(&start))
            .filter(|path| !self.then.contains_key(path))
            .collect()
    }
}

/// Whether a guest's entry may be what was sent; of a file the content is not known.
fn alike(seen: &Seen, sent: &SentEntry) -> bool {
    match (seen.kind, sent.kind) {
        (SeenKind::File, EntryKind::File) => (seen.size, seen.mode & 0o777) == (sent.size, sent.mode),
        (SeenKind::Directory, EntryKind::Directory) => seen.mode & 0o777 == sent.mode,
        (SeenKind::Symlink, EntryKind::Symlink) => seen.target == sent.target,
        _ => false,
    }
}

/// Whether a path is within a `.git`, or one.
pub fn is_of_git(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(|name| name == b".git")
}

fn failed(path: &Path) -> impl Fn(io::Error) -> WorkspaceError + '_ {
    move |source| WorkspaceError::Baseline { path: path.to_owned(), source }
}
