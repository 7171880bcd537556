//! The effect journal of one scope (a VM, or the host as a whole) and its fold.
//!
//! ```text
//!   journal.jsonl   append-only, one step a line, written before the step it announces is taken
//!   handles.json    its fold: what is applied or half done now; replaced whole after each step
//! ```
//!
//! A line that was written survives the daemon. It must survive a power cut only where it announces something that does so too: the
//! intent of a file or disk is flushed, nothing else is. What such a cut can take away is an `applied` or `undone`, and
//! undoing once more what is not there is no harm.
//!
//! The journal is the truth, `handles.json` a convenience for readers; loading folds the journal anew. A torn last
//! line is what a crash in the middle of an append leaves: the step it announced was not taken, so it is dropped.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use vm_host::files;
use vm_types::{Effect, EffectId, Handle};

const HANDLES_VERSION: u32 = 1;

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
}

#[derive(Serialize, Deserialize)]
struct Line {
    at: u64,
    id: EffectId,
    #[serde(flatten)]
    entry: Entry,
}

#[derive(Serialize)]
struct Handles<'a> {
    version: u32,
    boot_id: &'a str,
    effects: &'a [Entry],
}

/// An open journal. One owner; every method is one durable step.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    handles: PathBuf,
    boot_id: String,
    file: File,
    /// In the order in which they were first intended.
    entries: Vec<Entry>,
}

impl Journal {
    /// Opens or begins a journal and folds it.
    ///
    /// # Errors
    /// Reading or creating it. A line that is no step is logged and passed over.
    pub fn open(path: &Path, handles: &Path, boot_id: &str) -> io::Result<Self> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let mut entries = Vec::new();
        for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Line>(line) {
                Ok(line) => fold(&mut entries, line.entry),
                // One damaged line must not make the VM, or the daemon, unusable: the others still say what to undo.
                Err(error) => {
                    tracing::error!(journal = %path.display(), %error, "an unreadable step was passed over")
                }
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        if whole < bytes.len() {
            file.set_len(whole as u64)?;
        }
        Ok(Self { path: path.into(), handles: handles.into(), boot_id: boot_id.into(), file, entries })
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
        let entry = Entry { effect: effect.clone(), phase, step, handle, boot_id: self.boot_id.clone() };
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut line = serde_json::to_vec(&Line { at, id: effect.id(), entry: entry.clone() })?;
        line.push(b'\n');
        if step != Step::Intent {
            fold(&mut self.entries, entry.clone());
        }
        self.append(&line)?;
        if step == Step::Intent && effect.outlives_reboot() {
            self.file.sync_data()?;
        }
        if step == Step::Intent {
            fold(&mut self.entries, entry);
        }
        if self.entries.is_empty() {
            // Nothing is left that the past lines could tell of.
            self.file.set_len(0)?;
        }
        let fold = Handles { version: HANDLES_VERSION, boot_id: &self.boot_id, effects: &self.entries };
        files::write_volatile(&self.handles, 0o600, &serde_json::to_vec_pretty(&fold)?)
    }

    /// Writes a line whole or not at all: half of one would spoil the next.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let before = self.file.metadata()?.len();
        self.file.write_all(line).inspect_err(|_| {
            let _ = self.file.set_len(before);
        })
    }

    /// Removes the journal with its fold. Only an empty one can be: otherwise something would be forgotten.
    ///
    /// # Errors
    /// Effects still open, or removal failing.
    pub fn remove(&mut self) -> io::Result<()> {
        if let Some(entry) = self.entries.first() {
            return Err(io::Error::other(format!("{} is still open", entry.effect.id())));
        }
        files::remove_if_there(&self.handles)?;
        files::remove_if_there(&self.path)
    }
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
            entries[index] = Entry { handle, ..new };
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
    fn an_empty_journal_leaves_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path());
        journal.record(&tap("a"), Phase::Start, Step::Intent, Handle::None).unwrap();
        journal.record(&tap("a"), Phase::Start, Step::Undone, Handle::None).unwrap();
        journal.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
