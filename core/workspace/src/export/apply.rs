//! Brings files to the host, where they are as they were sent.

use std::collections::{BTreeSet, HashSet};

use vm_types::guest::files::SeenKind;

use crate::{Cancel, EntryKind, SentEntry, export::ExportError};

use super::{
    compare::{After, Delta},
    guest::Guest,
    place::{Found, New, Outcome, Place},
    report::ApplyReport,
};

/// Brings what the guest did into a tree. It is a copy of the workspace as far as `sent` counts: with false, paths are
/// expected to be free, and what the guest removed is no matter.
pub(super) struct Apply<'a> {
    pub(super) place: &'a Place,
    pub(super) guest: &'a Guest,
    pub(super) deltas: &'a [Delta<'a>],
    pub(super) is_git: bool,
    pub(super) is_workspace: bool,
    pub(super) dry_run: bool,
    pub(super) cancel: &'a Cancel,
}

/// What became of a path.
enum Fate {
    Written,
    Removed,
    Unchanged,
    Conflict,
}

impl Apply<'_> {
    /// Does it. What cannot be done leaves the rest alone, until the disk is full.
    pub(super) fn run(&self) -> Result<ApplyReport, ExportError> {
        let mut report = ApplyReport::default();
        let mut gone = HashSet::new();
        let removals =
            self.deltas.iter().rev().filter(|delta| self.is_workspace && delta.after == After::Nothing);
        let mut emptied = BTreeSet::new();
        for delta in removals {
            self.cancel.check()?;
            let fate = self.remove(delta, &gone);
            if matches!(fate, Ok(Fate::Removed)) {
                gone.insert(delta.path.clone());
                emptied.extend(above(&delta.path).map(<[u8]>::to_vec));
            }
            note(&mut report, &delta.path, fate)?;
        }
        // A directory goes with the last file in it, as with git, unless the guest has it still.
        for directory in emptied.iter().rev() {
            if self.guest.get(directory).is_none_or(|seen| seen.kind != SeenKind::Directory) {
                let freed = match self.dry_run {
                    true => self.place.is_empty_but_for(directory, &gone).unwrap_or(false),
                    // What is not empty stays, and may be in the way of what is to be written.
                    false => self.place.remove_directory(directory).unwrap_or(false),
                };
                if freed {
                    gone.insert(directory.clone());
                }
            }
        }
        for delta in self.deltas.iter().filter(|delta| delta.after != After::Nothing) {
            self.cancel.check()?;
            let fate = self.bring(delta, &gone);
            note(&mut report, &delta.path, fate)?;
        }
        for list in [&mut report.removed, &mut report.unchanged, &mut report.conflicts] {
            list.sort();
        }
        Ok(report)
    }

    fn remove(&self, delta: &Delta<'_>, gone: &HashSet<Vec<u8>>) -> Result<Fate, ExportError> {
        let found = self.place.look(&delta.path, self.cancel)?;
        if found == Found::Directory && delta.sent.is_some_and(|sent| sent.kind == EntryKind::Directory) {
            let empty = match self.dry_run {
                true => self.place.is_empty_but_for(&delta.path, gone)?,
                false => self.place.remove_directory(&delta.path)?,
            };
            return Ok(if empty { Fate::Removed } else { Fate::Conflict });
        }
        let is_directory =
            |path: &[u8]| self.guest.get(path).is_some_and(|seen| seen.kind == SeenKind::Directory);
        // A directory that took the place of a file did so on either side.
        if matches!(found, Found::Absent | Found::Blocked)
            || found == Found::Directory && is_directory(&delta.path)
        {
            return Ok(Fate::Unchanged);
        }
        let Some(key) = found.key().filter(|_| self.is_as_sent(&found, delta.sent)) else {
            return Ok(Fate::Conflict);
        };
        if self.dry_run {
            return Ok(Fate::Removed);
        }
        Ok(match self.place.remove(&delta.path, key)? {
            Outcome::Done => Fate::Removed,
            Outcome::Changed => Fate::Conflict,
        })
    }

    fn bring(&self, delta: &Delta<'_>, gone: &HashSet<Vec<u8>>) -> Result<Fate, ExportError> {
        let mut found = self.place.look(&delta.path, self.cancel)?;
        if self.dry_run {
            // Nothing has been removed that would have been.
            let freed = gone.contains(&delta.path)
                || found == Found::Blocked && above(&delta.path).any(|directory| gone.contains(directory));
            if freed {
                found = Found::Absent;
            }
        }
        if self.is_after(&found, &delta.after) {
            return Ok(Fate::Unchanged);
        }
        // An empty directory that was sent makes room, and to git empty directories are nothing.
        let was_sent = delta.sent.is_some_and(|sent| sent.kind == EntryKind::Directory);
        if found == Found::Directory && self.is_workspace && (was_sent || self.is_git) {
            let free = match (self.dry_run, self.is_git) {
                (true, true) => self.place.has_no_files_but_for(&delta.path, gone)?,
                (true, false) => self.place.is_empty_but_for(&delta.path, gone)?,
                (false, true) => self.place.remove_directories(&delta.path)?,
                (false, false) => self.place.remove_directory(&delta.path)?,
            };
            if free {
                found = Found::Absent;
            }
        }
        if !self.is_as_sent(&found, delta.sent) {
            return Ok(Fate::Conflict);
        }
        if self.dry_run {
            return Ok(Fate::Written);
        }
        let outcome = match &delta.after {
            After::Nothing => Outcome::Done,
            After::Directory => {
                match found.key().map(|key| self.place.remove(&delta.path, key)).transpose()? {
                    Some(Outcome::Changed) => Outcome::Changed,
                    Some(Outcome::Done) | None if self.place.make_directory(&delta.path)? => Outcome::Done,
                    Some(Outcome::Done) | None => Outcome::Changed,
                }
            }
            After::File { content, mode } => match &found {
                // Of a file with other names, which may be outside, a new one has the bits.
                Found::File { sha256, key, alone: true, .. } if *sha256 == content.sha256 => {
                    self.place.set_mode(&delta.path, *key, *mode)?
                }
                _ => {
                    self.place.put(&delta.path, &found, New::File { content: &content.file, mode: *mode })?
                }
            },
            After::Link { target } => self.place.put(&delta.path, &found, New::Link { target })?,
        };
        Ok(match outcome {
            Outcome::Done => Fate::Written,
            Outcome::Changed => Fate::Conflict,
        })
    }

    /// Whether nobody has touched it on the host.
    fn is_as_sent(&self, found: &Found, sent: Option<&SentEntry>) -> bool {
        // A directory is nothing to keep by the time it is empty.
        let sent = sent.filter(|sent| self.is_workspace && sent.kind != EntryKind::Directory);
        match (found, sent) {
            (Found::Absent, None) => true,
            (Found::File { sha256, mode, .. }, Some(sent)) => {
                sent.kind == EntryKind::File
                    && sent.sha256 == Some(*sha256)
                    && self.bits(*mode) == self.bits(sent.mode)
            }
            (Found::Link { target, .. }, Some(sent)) => {
                sent.kind == EntryKind::Symlink && sent.target.as_ref() == Some(target)
            }
            _ => false,
        }
    }

    /// Whether it is as the guest has it already.
    fn is_after(&self, found: &Found, after: &After) -> bool {
        match (found, after) {
            (Found::File { sha256, mode: has, .. }, After::File { content, mode }) => {
                content.sha256 == *sha256 && self.bits(*has) == self.bits(*mode)
            }
            (Found::Link { target: has, .. }, After::Link { target }) => has == target,
            (Found::Directory, After::Directory) => true,
            (Found::Absent | Found::Blocked, After::Nothing) => true,
            _ => false,
        }
    }

    fn bits(&self, mode: u32) -> u32 {
        if self.is_git { mode & 0o100 } else { mode & 0o777 }
    }
}

/// Writes down what became of a path.
fn note(report: &mut ApplyReport, path: &[u8], fate: Result<Fate, ExportError>) -> Result<(), ExportError> {
    use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let list = match fate {
        Ok(Fate::Written) => &mut report.written,
        Ok(Fate::Removed) => &mut report.removed,
        Ok(Fate::Unchanged) => &mut report.unchanged,
        Ok(Fate::Conflict) => &mut report.conflicts,
        // The next one would not fare better.
        Err(ExportError::Host { source, .. })
            if !matches!(source.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem) =>
        {
            report.failed.push((path.to_vec(), source.to_string()));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    list.push(path.to_vec());
    Ok(())
}

/// The directories that a path is in, the nearest last.
fn above(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| path.get(..at).unwrap_or_default())
}
