//! The tree that `git add --all` would make of the guest's working tree.
//!
//! Two differences are meant. Filters of `.gitattributes` (Git LFS is one) are programs of somebody's configuration, so contents
//! go in as they are. And of a repository in the tree that is no submodule there are the files, not its commit.

use vm_types::guest::files::SeenKind;

use crate::{export::ExportError, text::shown};

use super::{
    fetch::Fetched,
    guest::Guest,
    quarantine::Quarantine,
    view::{Base, View},
};

/// Filters are told of one by one up to so many files.
const WARNINGS: usize = 20;

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Made {
    /// The tree's name.
    pub(super) tree: String,
    /// What is not in it, or not as one might think, for people.
    pub(super) warnings: Vec<String>,
}

/// Makes it. Of files that the guest has as the commit has them the commit's objects stand in it, all others are made from
/// what was fetched, with the conversions that the guest's `.gitattributes` ask of git itself.
pub(super) fn of_guest(
    guest: &Guest,
    base: &Base,
    view: &View,
    fetched: &Fetched,
    quarantine: &Quarantine,
) -> Result<Made, ExportError> {
    let index = quarantine.index("export", base.commit.as_deref())?;
    let belongs = |path: &[u8]| {
        !view.is_ignored(path) && !view.in_submodule(path) && !view.submodules.contains_key(path)
    };
    let mut warnings = Vec::new();
    let mut put = Vec::new();
    let mut links = Vec::new();
    for seen in guest.files().filter(|seen| belongs(&seen.path) && !base.holds(&seen.path, guest)) {
        match (&seen.target, fetched.get(&seen.path)) {
            (Some(_), _) if is_modules(&seen.path) => {
                warnings.push(format!("{} is a link, which git does not take", shown(&seen.path)));
            }
            (Some(target), _) if seen.kind == SeenKind::Symlink => {
                links.push((seen.path.as_slice(), target.as_slice()));
            }
            (_, Some(content)) => {
                index.file(&seen.path, content, content.mode & 0o100 != 0)?;
                put.push(seen.path.as_slice());
            }
            // It vanished.
            _ => {}
        }
    }
    let files = put.clone();
    for (path, target) in links {
        index.link(path, target)?;
        put.push(path);
    }
    let there = |path: &[u8]| {
        let file =
            guest.get(path).is_some_and(|seen| matches!(seen.kind, SeenKind::File | SeenKind::Symlink));
        file && belongs(path)
    };
    let lost = base
        .paths()
        .filter(|path| !there(path) && !view.is_skipped(path, base) && !fetched.vanished().contains(*path));
    let lost = lost
        .chain(base.submodules().map(|(path, _)| path).filter(|path| !view.submodules.contains_key(*path)));
    index.remove(&lost.collect::<Vec<_>>())?;
    let skipped: Vec<_> = view.staged_only(base).filter(|(path, ..)| !there(path)).collect();
    let readable = quarantine.contents(skipped.iter().map(|(_, _, object)| *object))?;
    let (staged, unknown): (Vec<_>, Vec<_>) =
        skipped.into_iter().partition(|(_, _, object)| readable.contains(*object));
    index.put(staged)?;
    warnings.extend(unknown.iter().take(WARNINGS).map(|(path, ..)| {
        format!("{} is as the host has it: the guest's index names an object that is not there", shown(path))
    }));
    index.link_commits(view.submodules.iter().map(|(path, commit)| (path.as_slice(), commit.as_str())))?;
    index.add(&put)?;
    let filtered = index.filtered(&files)?;
    warnings.extend(filtered.iter().take(WARNINGS).map(|(path, filter)| {
        format!("{} is committed as it is in the guest: the filter {filter} is not run", shown(path))
    }));
    if let Some(more @ 1..) = filtered.len().checked_sub(WARNINGS) {
        warnings
            .push(format!("{more} more files are committed as they are in the guest: filters are not run"));
    }
    Ok(Made { tree: index.tree()?, warnings })
}

/// Whether git reads submodules from a file of this name, which it therefore wants to be a file.
fn is_modules(path: &[u8]) -> bool {
    path.rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.eq_ignore_ascii_case(b".gitmodules"))
}
