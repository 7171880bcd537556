//! The effect journal of one scope (a VM, or the host as a whole) and its fold.
//!
//! ```text
//!   journal.jsonl   append-only, one step a line, written before the step it announces is taken
//!   handles.json    its fold: what is applied or half done; replaced whole soon after a phase has ended
//! ```
//!
//! A line that was written survives the daemon. It must survive a power cut only where it announces a directory or disk that
//! does so too and that nobody else can tell of; those are flushed, nothing else is. What such a cut can take away otherwise
//! is void after it, or lies below a directory that is on record; and undoing once more what is not there is no harm.
//!
//! The journal is the truth: loading folds it anew. `handles.json` is for readers, and for the day on which the journal is
//! damaged: what only it knows then counts as half done. A torn last line is what a crash in the middle of an append leaves: the
//! step it announced was not taken, so it is dropped.
//!
//! The file is open while a phase is under way and closed where it ends ([`Journal::rest`]), so a VM that nobody works on costs
//! no descriptor. [`Journal::settle`] follows where nobody waits for it, for it flushes: it replaces `handles.json`, and rewrites
//! a journal that has grown as its fold.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vm_host::{clock::unix_seconds, files};
use vm_types::{Effect, EffectId, Handle, plan::RefName};

/// Of `handles.json`. A newer one is not read.
const HANDLES_VERSION: u32 = 1;

/// A journal that has grown beyond this is rewritten: after a few starts.
const COMPACT_BYTES: u64 = 16 << 10;

/// Which part of a VM's life an effect belongs to; unwinding undoes one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// From creation to deletion.
    Create,
    /// From start to stop.
    Start,
    /// As long as the daemon needs it.
    Host,
}

/// How far an effect is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// About to be applied; may or may not be there.
    Intent,
    /// Applied.
    Applied,
    /// About to be undone; may or may not be there.
    Undoing,
    /// Undone; no longer in the fold.
    Undone,
}

/// One effect in the fold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The effect.
    pub effect: Effect,
    /// Its phase.
    pub phase: Phase,
    /// Its last step.
    pub step: Step,
    /// What applying it yielded; [`Handle::None`] before.
    pub handle: Handle,
    /// The host boot of its last step.
    pub boot_id: String,
    /// The plugin that planned it; none where the core did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
}

/// Who planned an effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct By {
    /// The plugin's name.
    pub plugin: String,
    /// What the plugin calls it in later hooks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<RefName>,
    /// It stays when everything else is undone: only a person removes it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

impl Entry {
    /// What the reference to it stands for.
    pub fn value(&self) -> Option<String> {
        value(&self.effect, &self.handle)
    }
}

/// What a reference to an applied effect stands for.
pub(crate) fn value(effect: &Effect, handle: &Handle) -> Option<String> {
    match (effect, handle) {
        (_, Handle::Value { value }) => Some(value.clone()),
        (Effect::Disk { path, .. } | Effect::File { path, .. }, _) => Some(path.display().to_string()),
        _ => None,
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    at: u64,
    id: EffectId,
    #[serde(flatten)]
    entry: Entry,
}

/// What `handles.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Handles {
    version: u32,
    boot_id: String,
    effects: Vec<Entry>,
}

impl Handles {
    /// Nothing where the file is not there, not readable, damaged or of a later version: the journal has it all.
    fn read(path: &Path) -> Vec<Entry> {
        match files::read_json::<Self>(path) {
            Ok(Some(handles)) if handles.version == HANDLES_VERSION => handles.effects,
            Ok(Some(handles)) => {
                tracing::warn!(path = %path.display(), version = handles.version, "handles of another version");
                Vec::new()
            }
            Ok(None) => Vec::new(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "unreadable handles");
                Vec::new()
            }
        }
    }
}

/// A journal. One owner; every method is one durable step.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    handles: PathBuf,
    boot_id: String,
    /// Open while a phase is under way.
    file: Option<File>,
    length: u64,
    /// Whether there were steps since `handles.json` was written.
    unsettled: bool,
    /// Whether somebody is about to write it.
    settling: bool,
    /// In the order in which they were first intended.
    entries: Vec<Entry>,
}

impl Journal {
    /// Reads a journal and folds it. One that is not there is begun by its first step.
    ///
    /// # Errors
    /// Reading it. A line that is no step is logged and passed over.
    pub fn open(path: &Path, handles: &Path, boot_id: &str) -> io::Result<Self> {
        let (bytes, mut damaged) = match std::fs::read(path) {
            Ok(bytes) => (bytes, false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Vec::new(), true),
            Err(error) => return Err(error),
        };
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let mut entries = Vec::new();
        for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Line>(line) {
                Ok(line) => fold(&mut entries, line.entry),
                // One damaged line must not make the VM, or the daemon, unusable: the others still say what to undo.
                Err(error) => {
                    tracing::error!(journal = %path.display(), %error, "an unreadable step was passed over");
                    damaged = true;
                }
            }
        }
        if damaged {
            for entry in Handles::read(handles) {
                if !entries.iter().any(|known| known.effect.id() == entry.effect.id()) {
                    entries.push(Entry { step: Step::Undoing, ..entry });
                }
            }
        }
        if whole < bytes.len() {
            OpenOptions::new().write(true).open(path)?.set_len(whole as u64)?;
        }
        Ok(Self {
            path: path.into(),
            handles: handles.into(),
            boot_id: boot_id.into(),
            file: None,
            length: whole as u64,
            unsettled: false,
            settling: false,
            entries,
        })
    }

    /// What is applied or half done, in the order in which it was begun.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The effect of this id if it is applied in this boot.
    pub fn applied(&self, id: &EffectId) -> Option<&Entry> {
        self.entries.iter().find(|entry| {
            entry.effect.id() == *id && entry.step == Step::Applied && entry.boot_id == self.boot_id
        })
    }

    /// The effect of this id if it is applied or half done, in whatever boot.
    pub fn open_entry(&self, id: &EffectId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.effect.id() == *id)
    }

    /// The host boot in which it was opened.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Records a step. What has already happened is known here even if it could not be written.
    ///
    /// # Errors
    /// Writing; an [`Step::Intent`] is then void, and what it announces must not be done.
    pub fn record(&mut self, effect: &Effect, phase: Phase, step: Step, handle: Handle) -> io::Result<()> {
        self.record_by(effect, phase, step, handle, None)
    }

    /// [`Self::record`] of an effect that a plugin planned. Later steps need not say so again.
    ///
    /// # Errors
    /// As of [`Self::record`].
    pub fn record_by(
        &mut self,
        effect: &Effect,
        phase: Phase,
        step: Step,
        handle: Handle,
        by: Option<&By>,
    ) -> io::Result<()> {
        let boot_id = self.boot_id.clone();
        let entry = Entry { effect: effect.clone(), phase, step, handle, boot_id, by: by.cloned() };
        let line = line(&entry)?;
        if step != Step::Intent {
            fold(&mut self.entries, entry.clone());
        }
        self.append(&line)?;
        if step == Step::Intent {
            if phase == Phase::Create && matches!(effect, Effect::Directory { .. } | Effect::CowDisk { .. }) {
                self.file()?.sync_data()?;
            }
            fold(&mut self.entries, entry);
        }
        if self.entries.is_empty() {
            // Nothing is open: no line is left that the past lines could tell of.
            self.file()?.set_len(0)?;
            self.length = 0;
        }
        Ok(())
    }

    /// Closes the file until the next step. To be called where a phase ends.
    ///
    /// Whether [`Self::settle`] should follow and nobody has been told so yet.
    pub fn rest(&mut self) -> bool {
        self.file = None;
        self.unsettled && !std::mem::replace(&mut self.settling, true)
    }

    /// What is to be written, if there were steps since it was last. No step may be taken until [`Fold::write`] has ended.
    pub fn settle(&mut self) -> Option<Fold> {
        self.settling = false;
        if !std::mem::take(&mut self.unsettled) {
            return None;
        }
        // What is open would be the former file once the journal is rewritten.
        self.file = None;
        let grown = self.length > COMPACT_BYTES;
        Some(Fold {
            journal: grown.then(|| self.path.clone()),
            path: self.handles.clone(),
            handles: Handles {
                version: HANDLES_VERSION,
                boot_id: self.boot_id.clone(),
                effects: self.entries.clone(),
            },
        })
    }

    /// Writes a line whole or not at all: half of one would spoil the next.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        self.unsettled = true;
        self.file()?;
        let before = self.length;
        let file = self.file()?;
        file.write_all(line).inspect_err(|_| {
            let _ = file.set_len(before);
        })?;
        self.length = before + line.len() as u64;
        Ok(())
    }

    fn file(&mut self) -> io::Result<&mut File> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
                // It may have been rewritten since.
                self.length = file.metadata()?.len();
                file
            }
        };
        Ok(self.file.insert(file))
    }

    /// Removes the journal with its fold. Only an empty one can be: otherwise something would be forgotten.
    ///
    /// # Errors
    /// Effects still open, or removal failing.
    pub fn remove(&mut self) -> io::Result<()> {
        if let Some(entry) = self.entries.first() {
            return Err(io::Error::other(format!("{} is still open", entry.effect.id())));
        }
        self.file = None;
        self.unsettled = false;
        self.length = 0;
        files::remove_if_there(&self.handles)?;
        files::remove_if_there(&self.path)
    }
}

/// A journal's fold on its way to the disk.
#[derive(Debug)]
pub struct Fold {
    /// The journal, where it has grown and is rewritten.
    journal: Option<PathBuf>,
    path: PathBuf,
    handles: Handles,
}

impl Fold {
    /// Rewrites the journal if it has grown, and replaces `handles.json`. Flushes to the disk, so it takes long.
    ///
    /// # Errors
    /// Writing. Nothing is lost: the journal is as it was.
    pub fn write(&self) -> io::Result<()> {
        if let Some(journal) = &self.journal {
            // One line for each open effect, whole or not at all.
            let mut bytes = Vec::new();
            for entry in &self.handles.effects {
                bytes.extend(line(entry)?);
            }
            files::write_atomic(journal, 0o600, &bytes)?;
        }
        if self.handles.effects.is_empty() {
            return files::remove_if_there(&self.path);
        }
        files::write_json(&self.path, 0o600, &self.handles)
    }
}

/// A step as it is written.
fn line(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut line =
        serde_json::to_vec(&Line { at: unix_seconds(), id: entry.effect.id(), entry: entry.clone() })?;
    line.push(b'\n');
    Ok(line)
}

fn fold(entries: &mut Vec<Entry>, new: Entry) {
    let id = new.effect.id();
    let known = entries.iter().position(|entry| entry.effect.id() == id);
    match (new.step, known) {
        (Step::Undone, Some(index)) => drop(entries.remove(index)),
        (Step::Undone, None) => {}
        (_, Some(index)) => {
            // What undo needs must outlive a step that does not know it, but not the boot it is of.
            let known = &entries[index];
            let keep = new.handle == Handle::None && known.boot_id == new.boot_id;
            let handle = if keep { known.handle.clone() } else { new.handle };
            let by = new.by.or_else(|| known.by.clone());
            entries[index] = Entry { handle, by, ..new };
        }
        (_, None) => entries.push(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(name: &str) -> Effect {
        Effect::Tap { name: name.into(), bridge: "b".into() }
    }

    fn settle(journal: &mut Journal) {
        journal.settle().expect("there were steps").write().unwrap();
    }

    fn open(dir: &Path) -> Journal {
        Journal::open(&dir.join("j.jsonl"), &dir.join("h.json"), "boot-1").unwrap()
    }

    #[test]
    fn a_reopened_journal_knows_what_is_open_and_in_which_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        for name in ["a", "b", "c"] {
            journal.record(&tap(name), Phase::Start, Step::Intent, Handle::None).unwrap();
            let handle = Handle::Previous { value: name.into() };
            journal.record(&tap(name), Phase::Start, Step::Applied, handle).unwrap();
        }
        journal.record(&tap("b"), Phase::Start, Step::Undoing, Handle::None).unwrap();
        journal.record(&tap("b"), Phase::Start, Step::Undone, Handle::None).unwrap();
        journal.record(&tap("c"), Phase::Start, Step::Undoing, Handle::None).unwrap();
        drop(journal);

        let mut journal = open(dir.path());
        let seen: Vec<_> =
            journal.entries().iter().map(|e| (e.effect.id().0, e.step, e.handle.clone())).collect();
        let previous = |value: &str| Handle::Previous { value: value.into() };
        assert_eq!(
            seen,
            [("tap:a".into(), Step::Applied, previous("a")), ("tap:c".into(), Step::Undoing, previous("c"))]
        );
        assert!(journal.remove().is_err(), "an open effect must not be forgotten");
    }

    #[test]
    fn a_torn_line_costs_that_line_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.jsonl");
        let mut journal = open(dir.path());
        journal.record(&tap("a"), Phase::Start, Step::Intent, Handle::None).unwrap();
        drop(journal);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{}", &whole[..20])).unwrap();
        let mut journal = open(dir.path());
        assert_eq!(journal.entries().len(), 1);
        journal.record(&tap("b"), Phase::Start, Step::Intent, Handle::None).unwrap();
        drop(journal);
        assert_eq!(open(dir.path()).entries().len(), 2);

        let damaged = [&whole.as_bytes()[..20], b"\xff\n", whole.as_bytes()].concat();
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(open(dir.path()).entries().len(), 1);
    }

    #[test]
    fn a_journal_that_has_grown_is_rewritten_and_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.jsonl");
        let mut journal = open(dir.path());
        let former = Handle::Previous { value: "0".into() };
        journal.record(&tap("kept"), Phase::Create, Step::Intent, Handle::None).unwrap();
        journal.record(&tap("kept"), Phase::Create, Step::Applied, former.clone()).unwrap();
        let mut largest = 0;
        for _ in 0..60 {
            for step in [Step::Intent, Step::Applied, Step::Undoing, Step::Undone] {
                journal.record(&tap("run"), Phase::Start, step, Handle::None).unwrap();
            }
            largest = largest.max(std::fs::metadata(&path).unwrap().len());
            journal.rest();
            settle(&mut journal);
        }
        assert!(largest < 2 * COMPACT_BYTES, "it has grown to {largest} bytes");
        journal.record(&tap("half"), Phase::Start, Step::Intent, Handle::None).unwrap();
        let before = journal.entries().to_vec();
        drop(journal);
        assert_eq!(open(dir.path()).entries(), before);
        assert_eq!(before[0].handle, former);
    }

    #[test]
    fn a_journal_at_rest_holds_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        assert!(!dir.path().join("j.jsonl").exists(), "looking makes no file");
        journal.record(&tap("a"), Phase::Start, Step::Intent, Handle::None).unwrap();
        assert!(journal.rest(), "there is something to be written down");
        assert!(journal.file.is_none());
        assert!(!journal.rest(), "somebody is about to");
        settle(&mut journal);
        assert!(!journal.rest(), "it is written");
        journal.record(&tap("b"), Phase::Start, Step::Intent, Handle::None).unwrap();
        drop(journal);
        assert_eq!(open(dir.path()).entries().len(), 2);
    }

    #[test]
    fn what_a_damaged_journal_has_lost_counts_as_half_done() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        for name in ["a", "b"] {
            journal.record(&tap(name), Phase::Start, Step::Applied, Handle::None).unwrap();
        }
        settle(&mut journal);
        drop(journal);
        let steps = || open(dir.path()).entries().iter().map(|entry| entry.step).collect::<Vec<_>>();
        assert_eq!(steps(), [Step::Applied, Step::Applied]);
        let path = dir.path().join("j.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("applied", "appl", 1)).unwrap();
        assert_eq!(steps(), [Step::Applied, Step::Undoing]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(steps(), [Step::Undoing, Step::Undoing]);
        // Handles that cannot be read cost nothing but themselves.
        for handles in ["{", r#"{"version":2,"boot_id":"","effects":[]}"#] {
            std::fs::write(dir.path().join("h.json"), handles).unwrap();
            assert!(steps().is_empty());
        }
    }

    #[test]
    fn what_a_former_boot_knew_of_a_thing_is_not_said_of_the_present_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        let former = Handle::Previous { value: "0".into() };
        journal.record(&tap("a"), Phase::Start, Step::Applied, former.clone()).unwrap();
        journal.record(&tap("a"), Phase::Start, Step::Undoing, Handle::None).unwrap();
        assert_eq!(journal.entries()[0].handle, former);
        drop(journal);
        let mut journal =
            Journal::open(&dir.path().join("j.jsonl"), &dir.path().join("h.json"), "boot-2").unwrap();
        journal.record(&tap("a"), Phase::Start, Step::Intent, Handle::None).unwrap();
        assert_eq!(journal.entries()[0].handle, Handle::None);
    }

    #[test]
    fn an_empty_journal_leaves_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        journal.record(&tap("a"), Phase::Start, Step::Intent, Handle::None).unwrap();
        journal.record(&tap("a"), Phase::Start, Step::Undone, Handle::None).unwrap();
        journal.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
