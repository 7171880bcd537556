//! What the guest did to the files that it was sent.

use vm_types::guest::files::{Seen, SeenKind};

use crate::{Baseline, EntryKind, SentEntry};

use super::{
    fetch::{Content, Fetched},
    guest::Guest,
    names::git_directory,
    report::{Change, ChangeKind},
};

/// What the guest has at a path now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum After {
    Nothing,
    /// Only where there is no git, and only if nothing is in it.
    Directory,
    File {
        content: Content,
        /// Permission bits for the host.
        mode: u32,
    },
    Link {
        target: Vec<u8>,
    },
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Delta<'a> {
    pub(super) path: Vec<u8>,
    pub(super) kind: ChangeKind,
    /// What the host had when it was sent.
    pub(super) sent: Option<&'a SentEntry>,
    pub(super) after: After,
}

impl Delta<'_> {
    pub(super) fn change(&self) -> Change {
        Change { path: self.path.clone(), kind: self.kind }
    }
}

/// Compares. `is_git` tells that of permissions only the owner's right to execute counts, and that directories are nothing of
/// their own; `passes` whether a path that was not sent is wanted.
pub(super) fn deltas<'a>(
    baseline: &'a Baseline,
    guest: &Guest,
    fetched: &Fetched,
    is_git: bool,
    passes: impl Fn(&[u8]) -> bool,
) -> Vec<Delta<'a>> {
    let compare = Compare { baseline, guest, fetched, is_git };
    // A directory without git is sent with the repositories in it; what is git's own never comes back.
    let sent = baseline.sent.entries.iter().filter(|(path, _)| git_directory(path).is_none());
    let mut deltas: Vec<Delta<'a>> = sent.filter_map(|(path, sent)| compare.sent(path, sent)).collect();
    let others =
        guest.entries().filter(|seen| !baseline.sent.entries.contains_key(&seen.path) && passes(&seen.path));
    deltas.extend(others.filter_map(|seen| compare.other(seen)));
    deltas.sort_by(|one, other| one.path.cmp(&other.path));
    deltas
}

struct Compare<'a, 'g> {
    baseline: &'a Baseline,
    guest: &'g Guest,
    fetched: &'g Fetched,
    is_git: bool,
}

impl<'a> Compare<'a, '_> {
    /// A path that was sent.
    fn sent(&self, path: &[u8], sent: &'a SentEntry) -> Option<Delta<'a>> {
        let delta = |kind, after| Some(Delta { path: path.to_vec(), kind, sent: Some(sent), after });
        if self.guest.is_unchanged(path) || self.fetched.vanished().contains(path) {
            return None;
        }
        let Some(seen) = self.guest.get(path) else {
            let counts = sent.kind != EntryKind::Directory || !self.is_git;
            return counts.then(|| delta(ChangeKind::Deleted, After::Nothing)).flatten();
        };
        match (sent.kind, seen.kind) {
            // A pipe or a socket is nothing that could be brought back; what was there stays on the host.
            (_, SeenKind::Other) | (EntryKind::Directory, SeenKind::Directory) => None,
            (_, SeenKind::Directory) if self.is_git || !self.is_empty(path) => {
                delta(ChangeKind::Deleted, After::Nothing)
            }
            (_, SeenKind::Directory) => delta(ChangeKind::TypeChanged, After::Directory),
            (EntryKind::Symlink, SeenKind::Symlink) => {
                let kind = (sent.target != seen.target).then_some(ChangeKind::Modified)?;
                delta(kind, self.after(seen)?)
            }
            (EntryKind::File, SeenKind::File) => {
                let after = self.after(seen)?;
                let After::File { content, mode } = &after else { return None };
                let kind = if sent.sha256 != Some(content.sha256) {
                    ChangeKind::Modified
                } else if self.bits(sent.mode) != self.bits(*mode) {
                    ChangeKind::ModeChanged
                } else {
                    return None;
                };
                delta(kind, after)
            }
            (EntryKind::Directory, SeenKind::File | SeenKind::Symlink) if self.is_git => {
                delta(ChangeKind::Added, self.after(seen)?)
            }
            (
                EntryKind::File | EntryKind::Symlink | EntryKind::Directory,
                SeenKind::File | SeenKind::Symlink,
            ) => delta(ChangeKind::TypeChanged, self.after(seen)?),
        }
    }

    /// A path that was not.
    fn other(&self, seen: &Seen) -> Option<Delta<'a>> {
        if self.guest.is_unchanged(&seen.path) || self.fetched.vanished().contains(&seen.path) {
            return None;
        }
        let after = match seen.kind {
            SeenKind::Directory if self.is_git || !self.is_empty(&seen.path) => return None,
            SeenKind::Directory => After::Directory,
            _ => self.after(seen)?,
        };
        Some(Delta { path: seen.path.clone(), kind: ChangeKind::Added, sent: None, after })
    }

    fn after(&self, seen: &Seen) -> Option<After> {
        match seen.kind {
            SeenKind::Symlink => Some(After::Link { target: seen.target.clone()? }),
            SeenKind::File => {
                let content = self.fetched.get(&seen.path)?.clone();
                let mode = self.mode(&seen.path, content.mode);
                Some(After::File { content, mode })
            }
            SeenKind::Directory | SeenKind::Other => None,
        }
    }

    /// Permission bits for the host: of a file that was sent those it had there, but for what the guest changed.
    fn mode(&self, path: &[u8], now: u32) -> u32 {
        let sent = self.baseline.sent.entries.get(path).filter(|sent| sent.kind == EntryKind::File);
        match (sent, self.is_git) {
            (Some(sent), true) if (sent.mode ^ now) & 0o100 == 0 => sent.mode,
            (Some(sent), true) if now & 0o100 != 0 => sent.mode | (sent.mode & 0o444) >> 2,
            (Some(sent), true) => sent.mode & !0o111,
            (None, true) => {
                if now & 0o100 == 0 {
                    0o644
                } else {
                    0o755
                }
            }
            (Some(sent), false)
                if self.guest.before(path).is_some_and(|before| before.mode & 0o777 == now) =>
            {
                sent.mode
            }
            (_, false) => now,
        }
    }

    /// The bits that count.
    fn bits(&self, mode: u32) -> u32 {
        if self.is_git { mode & 0o100 } else { mode & 0o777 }
    }

    fn is_empty(&self, directory: &[u8]) -> bool {
        self.guest.has_nothing_below(directory)
    }
}
