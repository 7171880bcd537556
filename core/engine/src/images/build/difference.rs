//! What a step has changed in a guest: two lists of all its files, before and after, become the paths that a layer has to have,
//! and the whiteouts of what is gone
//! (<https://github.com/opencontainers/image-spec/blob/v1.1.0/layer.md#change-types>).

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use vm_types::guest::files::{Seen, SeenKind};

/// What is below these is of the run; the directories themselves are of the image.
const OF_THE_RUN: [&[u8]; 4] = [b"dev", b"proc", b"run", b"sys"];
/// Every ext4 filesystem has its own.
const OF_THE_DISK: &[u8] = b"lost+found";
/// The zeros that end an archive, in bytes.
const END: usize = 1024;

/// By paths relative to the root, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// New, or not as before.
    pub(super) changed: Vec<Vec<u8>>,
    /// No longer there, of each tree that is gone the top only.
    pub(super) gone: Vec<Vec<u8>>,
}

fn counts(path: &[u8]) -> bool {
    let top = path.split(|byte| *byte == b'/').next().unwrap_or_default();
    top != OF_THE_DISK && (top.len() == path.len() || !OF_THE_RUN.contains(&top))
}

impl Difference {
    /// Of two lists that are sorted by path.
    pub(super) fn of(before: &[Seen], after: &[Seen]) -> Self {
        let mut difference = Self::default();
        let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(old), Some(new)) => old.path.cmp(&new.path),
            };
            let was = if order.is_le() { old.next() } else { None };
            let is = if order.is_ge() { new.next() } else { None };
            match (was, is) {
                (Some(was), None) if counts(&was.path) && stands(after, parent(&was.path)) => {
                    difference.gone.push(was.path.clone());
                }
                (was, Some(is)) if was != Some(is) && counts(&is.path) => {
                    difference.changed.push(is.path.clone());
                }
                _ => {}
            }
        }
        if !difference.changed.is_empty() {
            difference.join(after);
        }
        difference
    }

    /// Of a file with several names all are in the layer once one of them is: they are one file there, too, and not a new one
    /// beside that of the layers below.
    fn join(&mut self, after: &[Seen]) {
        // Names of one file differ in nothing but themselves; a number alone may be of something mounted.
        let file = |seen: &Seen| (seen.kind != SeenKind::Directory).then_some((seen.inode, seen.ctime));
        let is_changed = |seen: &Seen| self.changed.binary_search(&seen.path).is_ok();
        let files: HashSet<_> = after.iter().filter(|seen| is_changed(seen)).filter_map(file).collect();
        let belongs = |seen: &&Seen| {
            counts(&seen.path) && (is_changed(seen) || file(seen).is_some_and(|file| files.contains(&file)))
        };
        self.changed = after.iter().filter(belongs).map(|seen| seen.path.clone()).collect();
    }

    /// Whether nothing has changed.
    pub(super) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.gone.is_empty()
    }

    /// The beginning of a tar archive, without an end mark: the whiteouts.
    ///
    /// # Errors
    /// A name that no archive can have.
    pub(super) fn whiteouts(&self) -> io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for path in &self.gone {
            let path = Path::new(OsStr::from_bytes(path));
            let mut name = std::ffi::OsString::from(".wh.");
            name.push(path.file_name().unwrap_or_default());
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o600);
            header.set_size(0);
            let whiteout: PathBuf = path.with_file_name(name);
            tar.append_data(&mut header, whiteout, io::empty())?;
        }
        let mut bytes = tar.into_inner()?;
        bytes.truncate(bytes.len() - END);
        Ok(bytes)
    }
}

fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|slash| &path[..slash])
}

/// Whether a directory is there; of what is in one that is not, nothing more need be said.
fn stands(all: &[Seen], directory: Option<&[u8]>) -> bool {
    let Some(directory) = directory else { return true };
    let found = all.binary_search_by(|seen| seen.path.as_slice().cmp(directory));
    found.is_ok_and(|at| all[at].kind == SeenKind::Directory)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(path: &str, kind: SeenKind, ctime: i128) -> Seen {
        Seen {
            path: path.into(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            ctime,
            inode: 1,
            target: None,
        }
    }

    fn all(entries: &[(&str, SeenKind, i128)]) -> Vec<Seen> {
        let mut all: Vec<_> = entries.iter().map(|(path, kind, ctime)| seen(path, *kind, *ctime)).collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all
    }

    fn text(paths: &[Vec<u8>]) -> Vec<&str> {
        paths.iter().map(|path| std::str::from_utf8(path).unwrap()).collect()
    }

    use SeenKind::{Directory, File};

    #[test]
    fn what_is_new_changed_or_gone_is_told_once() {
        let before = all(&[
            ("a", Directory, 1),
            ("a/b", File, 1),
            ("a-b", File, 1),
            ("d", Directory, 1),
            ("d/e", Directory, 1),
            ("d/e/f", File, 1),
            ("turns", Directory, 1),
            ("turns/x", File, 1),
            ("same", File, 1),
            ("run", Directory, 1),
            ("run/pid", File, 1),
        ]);
        let after = all(&[
            ("a", Directory, 2),
            ("a-b", File, 2),
            ("a/new", File, 2),
            ("turns", File, 2),
            ("same", File, 1),
            ("run", Directory, 1),
            ("run/other", File, 2),
            ("lost+found", Directory, 2),
            ("proc", Directory, 1),
        ]);
        let difference = Difference::of(&before, &after);
        assert_eq!(text(&difference.changed), ["a", "a-b", "a/new", "proc", "turns"]);
        assert_eq!(text(&difference.gone), ["a/b", "d"]);
        assert!(Difference::of(&after, &after).is_empty());

        let mut archive = difference.whiteouts().unwrap();
        assert_eq!(archive.len() % 512, 0);
        archive.extend([0; END]);
        let mut archive = tar::Archive::new(archive.as_slice());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["a/.wh.b", ".wh.d"]);
    }

    #[test]
    fn all_names_of_a_file_are_in_the_layer_once_one_is() {
        let link = |path, ctime, inode| Seen { inode, ..seen(path, File, ctime) };
        let before = [link("a", 1, 7), link("b", 1, 8), link("c", 1, 7), seen("d", Directory, 1)];
        // The clock may stand still, or be set back to where it was.
        let mut after = before.to_vec();
        after.extend([link("e", 1, 7), link("f", 2, 8), seen("run", Directory, 1), link("run/g", 1, 7)]);
        assert_eq!(text(&Difference::of(&before, &after).changed), ["a", "c", "e", "f", "run"]);
    }

    /// Applies a difference to the old paths as whoever unpacks a layer does.
    fn applied(before: &[Seen], after: &[Seen]) -> Vec<Vec<u8>> {
        let difference = Difference::of(before, after);
        let is_below = |path: &[u8], top: &[u8]| path.starts_with(top) && path.get(top.len()) == Some(&b'/');
        let mut paths: Vec<Vec<u8>> = before.iter().map(|seen| seen.path.clone()).collect();
        paths.retain(|path| !difference.gone.iter().any(|top| path == top || is_below(path, top)));
        for path in difference.changed {
            let now = &after[after.binary_search_by(|seen| seen.path.cmp(&path)).unwrap()];
            if now.kind != Directory {
                paths.retain(|other| !is_below(other, &path));
            }
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        paths.sort();
        paths
    }

    /// A tree of short names, whose parents are all there.
    fn tree() -> impl Strategy<Value = Vec<Seen>> {
        prop::collection::vec(("[ab-](/[ab]){0,2}", any::<bool>(), 0i128..2), 0..12).prop_map(|wanted| {
            let mut found: std::collections::BTreeMap<String, (SeenKind, i128)> = Default::default();
            for (path, directory, ctime) in wanted {
                let kind = if directory { Directory } else { File };
                let parents: Vec<_> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
                if parents.iter().any(|parent| found.get(parent).is_some_and(|(kind, _)| *kind != Directory))
                {
                    continue;
                }
                for parent in parents {
                    found.entry(parent).or_insert((Directory, 0));
                }
                found.entry(path).or_insert((kind, ctime));
            }
            let mut all: Vec<_> =
                found.iter().map(|(path, (kind, ctime))| seen(path, *kind, *ctime)).collect();
            all.sort_by(|a, b| a.path.cmp(&b.path));
            all
        })
    }

    proptest! {
        #[test]
        fn a_difference_makes_the_one_tree_the_other(before in tree(), after in tree()) {
            let wanted: Vec<_> = after.iter().map(|seen| seen.path.clone()).collect();
            prop_assert_eq!(applied(&before, &after), wanted);
        }
    }
}
