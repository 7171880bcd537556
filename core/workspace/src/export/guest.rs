//! The guest's tree as it was listed, beside how it was right after the workspace had been sent.

use vm_types::guest::files::{Seen, SeenKind};

use crate::{export::ExportError, text::shown};

use super::names::{git_directory, is_path};

/// Two lists of a guest's tree, both sorted.
#[derive(Debug)]
pub(super) struct Guest {
    now: Vec<Seen>,
    before: Vec<Seen>,
    /// The last change that is in the list of before, in nanoseconds. What was changed in the same tick of the guest's clock may
    /// have been changed again in it.
    last: i128,
}

impl Guest {
    /// Takes lists.
    ///
    /// # Errors
    /// What the guest tells cannot be a tree.
    pub(super) fn new(now: Vec<Seen>, mut before: Vec<Seen>) -> Result<Self, ExportError> {
        check(&now)?;
        before.sort_by(|one, other| one.path.cmp(&other.path));
        let last = before.iter().map(|seen| seen.ctime).max().unwrap_or_default();
        Ok(Self { now, before, last })
    }

    /// What is at a path.
    pub(super) fn get(&self, path: &[u8]) -> Option<&Seen> {
        find(&self.now, path)
    }

    /// What was at a path.
    pub(super) fn before(&self, path: &[u8]) -> Option<&Seen> {
        find(&self.before, path)
    }

    /// Whether a path has certainly not been touched.
    pub(super) fn is_unchanged(&self, path: &[u8]) -> bool {
        let (Some(now), Some(before)) = (self.get(path), self.before(path)) else { return false };
        match now.kind {
            SeenKind::File => now == before && now.ctime < self.last,
            SeenKind::Symlink => now.kind == before.kind && now.target == before.target,
            SeenKind::Directory | SeenKind::Other => now.kind == before.kind,
        }
    }

    /// All that is not in some `.git`.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Seen> {
        self.now.iter().filter(|seen| git_directory(&seen.path).is_none())
    }

    /// Files and links that are not in some `.git`.
    pub(super) fn files(&self) -> impl Iterator<Item = &Seen> {
        self.entries().filter(|seen| matches!(seen.kind, SeenKind::File | SeenKind::Symlink))
    }

    /// Files below a directory, with the rest of their paths.
    pub(super) fn below<'a, 'd>(
        &'a self,
        directory: &'d [u8],
    ) -> impl Iterator<Item = (&'a [u8], &'a Seen)> + use<'a, 'd> {
        let from = self.now.partition_point(|seen| seen.path.as_slice() < directory);
        let rest = self.now.get(from..).unwrap_or_default().iter();
        rest.take_while(move |seen| seen.path.starts_with(directory))
            .filter_map(move |seen| Some((seen.path.strip_prefix(directory)?.strip_prefix(b"/")?, seen)))
            .filter(|(_, seen)| seen.kind == SeenKind::File)
    }

    /// Whether a directory is empty.
    pub(super) fn has_nothing_below(&self, directory: &[u8]) -> bool {
        let below = [directory, b"/"].concat();
        let from = self.now.partition_point(|seen| seen.path < below);
        self.now.get(from).is_none_or(|seen| !seen.path.starts_with(&below))
    }

    /// Files by which git finds a repository of its own elsewhere, with the directories that they are in. The top's is none of them.
    pub(super) fn links(&self) -> impl Iterator<Item = (&[u8], &Seen)> {
        let files = self.now.iter().filter(|seen| seen.kind == SeenKind::File);
        let links = files.filter_map(|seen| Some((seen.path.strip_suffix(b"/.git")?, seen)));
        links.filter(|(top, _)| git_directory(top).is_none())
    }

    /// Directories of git's own, but for the top's and those of submodules. Each is named once.
    pub(super) fn repositories(&self, is_submodule: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let mut found: Vec<Vec<u8>> = Vec::new();
        for seen in &self.now {
            let Some(end) = git_directory(&seen.path) else { continue };
            let own = seen.path.get(..end).unwrap_or_default();
            let of_submodule = own.strip_suffix(b"/.git").is_some_and(&is_submodule);
            if own != b".git" && !of_submodule && found.last().is_none_or(|last| last != own) {
                found.push(own.to_vec());
            }
        }
        found.dedup();
        found
    }
}

fn find<'a>(list: &'a [Seen], path: &[u8]) -> Option<&'a Seen> {
    list.binary_search_by(|seen| seen.path.as_slice().cmp(path)).ok().and_then(|at| list.get(at))
}

/// Sorted, each path once, all of them possible, and each in a directory of the list.
fn check(list: &[Seen]) -> Result<(), ExportError> {
    let refuse = |path: &[u8], reason| Err(ExportError::Survey { path: shown(path), reason });
    for (at, seen) in list.iter().enumerate() {
        let earlier = list.get(..at).unwrap_or_default();
        if !is_path(&seen.path) {
            return refuse(&seen.path, "no path below a directory");
        }
        if earlier.last().is_some_and(|last| last.path >= seen.path) {
            return refuse(&seen.path, "out of order");
        }
        if let Some(slash) = seen.path.iter().rposition(|byte| *byte == b'/') {
            let above = find(earlier, seen.path.get(..slash).unwrap_or_default());
            if above.is_none_or(|above| above.kind != SeenKind::Directory) {
                return refuse(&seen.path, "what it is in is no directory");
            }
        }
        if seen.kind == SeenKind::Symlink
            && seen
                .target
                .as_ref()
                .is_none_or(|target| target.is_empty() || target.len() > 4095 || target.contains(&0))
        {
            return refuse(&seen.path, "a link to no path");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(path: &str, kind: SeenKind) -> Seen {
        Seen {
            path: path.into(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 1,
            mtime: 1,
            ctime: 1,
            inode: 1,
            target: (kind == SeenKind::Symlink).then(|| b"x".to_vec()),
        }
    }

    #[test]
    fn lists_that_no_tree_has_are_refused() {
        use SeenKind::{Directory, File, Symlink};
        for list in [
            vec![seen("../a", File)],
            vec![seen("/a", File)],
            vec![seen("b", File), seen("a", File)],
            vec![seen("a", File), seen("a", File)],
            vec![seen("a/b", File)],
            vec![seen("a", File), seen("a/b", File)],
            vec![seen("a", Symlink), seen("a/b", File)],
            vec![Seen { target: None, ..seen("a", Symlink) }],
        ] {
            let error = Guest::new(list.clone(), Vec::new()).err();
            assert!(matches!(error, Some(ExportError::Survey { .. })), "{list:?}");
        }
        Guest::new(vec![seen("a", Directory), seen("a-b", File), seen("a/b", File)], Vec::new()).unwrap();
    }

    #[test]
    fn a_file_of_the_last_tick_may_have_changed_in_it() {
        let list = vec![
            Seen { ctime: 5, ..seen("a", SeenKind::File) },
            Seen { ctime: 6, ..seen("b", SeenKind::File) },
        ];
        let guest = Guest::new(list.clone(), list).unwrap();
        assert!(guest.is_unchanged(b"a"));
        assert!(!guest.is_unchanged(b"b"));
    }

    #[test]
    fn repositories_within_are_named_once() {
        use SeenKind::{Directory, File};
        let list = vec![
            seen(".git", Directory),
            seen(".git/config", File),
            seen("a", Directory),
            seen("a/.git", Directory),
            seen("a/.git/config", File),
            seen("a/x", File),
            seen("sub", Directory),
            seen("sub/.git", File),
        ];
        let guest = Guest::new(list, Vec::new()).unwrap();
        assert_eq!(guest.repositories(|path| path == b"sub"), [b"a/.git".to_vec()]);
        assert_eq!(guest.files().map(|seen| seen.path.clone()).collect::<Vec<_>>(), [b"a/x".to_vec()]);
    }
}
