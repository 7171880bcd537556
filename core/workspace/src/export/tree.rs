//! The tree that `git add --all` would make of the guest's working tree.

use vm_types::guest::files::SeenKind;

use crate::export::ExportError;

use super::{
    fetch::Fetched,
    guest::Guest,
    quarantine::Quarantine,
    view::{Base, View},
};

/// Makes it. Of files that the guest has as the commit has them the commit's objects stand in it, all others are made from
/// what was fetched, with the conversions that the guest's `.gitattributes` ask of git itself.
pub(super) fn of_guest(
    guest: &Guest,
    base: &Base,
    view: &View,
    fetched: &Fetched,
    quarantine: &Quarantine,
) -> Result<String, ExportError> {
    let index = quarantine.index("export", base.commit.as_deref())?;
    let belongs = |path: &[u8]| !view.is_ignored(path) && !view.in_submodule(path) && !view.submodules.contains_key(path);
    let mut put = Vec::new();
    let mut links = Vec::new();
    for seen in guest.files().filter(|seen| belongs(&seen.path) && !base.holds(&seen.path, guest)) {
        match (&seen.target, fetched.get(&seen.path)) {
            (Some(target), _) if seen.kind == SeenKind::Symlink => links.push((seen.path.as_slice(), target.as_slice())),
            (_, Some(content)) => {
                index.file(&seen.path, content, content.mode & 0o100 != 0)?;
                put.push(seen.path.as_slice());
            }
            // It vanished.
            _ => {}
        }
    }
    for (path, target) in links {
        index.link(path, target)?;
        put.push(path);
    }
    let there = |path: &[u8]| {
        let file = guest.get(path).is_some_and(|seen| matches!(seen.kind, SeenKind::File | SeenKind::Symlink));
        file && belongs(path)
    };
    let lost = base.paths().filter(|path| {
        !there(path) && !view.is_skipped(path, base) && !fetched.vanished().contains(*path)
    });
    let lost = lost.chain(base.submodules().map(|(path, _)| path).filter(|path| !view.submodules.contains_key(*path)));
    index.remove(&lost.collect::<Vec<_>>())?;
    index.link_commits(view.submodules.iter().map(|(path, commit)| (path.as_slice(), commit.as_str())))?;
    index.add(&put)?;
    index.tree()
}
