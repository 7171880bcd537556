//! Patches that `git apply --binary` takes.

use std::io::{self, Write};

use crate::{WorkspaceError, export::ExportError, git::passed_on};

use super::{
    compare::After,
    fetch::Content,
    place::{Found, Place},
    quarantine::Quarantine,
    report::PatchReport,
    session::{Export, act},
};

/// Counts what is passed on.
struct Counted<'a> {
    to: &'a mut dyn Write,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let length = self.to.write(buffer)?;
        self.bytes += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// From one tree to another.
pub(super) fn of_trees(
    quarantine: &Quarantine,
    from: &str,
    tree: &str,
    to: &mut dyn Write,
) -> Result<PatchReport, ExportError> {
    let mut counted = Counted { to, bytes: 0 };
    quarantine
        .command()
        .args(["diff-tree", "-r", "-p", "--binary", "--full-index", "--no-renames", "--no-ext-diff"])
        .args(["--no-textconv", "--no-color", "--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"])
        .args([from, tree])
        .stream(&mut counted)
        .map_err(passed_on("making the patch"))?;
    counted.flush().map_err(|source| WorkspaceError::Output { source })?;
    Ok(PatchReport { bytes: counted.bytes, left_out: Vec::new() })
}

/// Where there is no git: from the host's files, as far as they are as they were sent.
pub(super) fn of_files(export: &Export, to: &mut dyn Write) -> Result<PatchReport, ExportError> {
    let deltas = export.deltas();
    let (trees, left_out) = act(&export.identity, || {
        let place = Place::open(&export.top)?;
        let before = export.quarantine.index("sent", None)?;
        let after = export.quarantine.index("export", None)?;
        let (mut old, mut new, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for delta in &deltas {
            export.cancel.check()?;
            let sent = delta.sent.filter(|sent| sent.kind != crate::EntryKind::Directory);
            let file = export.scratch.path().join(format!("sent-{}", old.len()));
            match (sent, sent.map(|_| place.copy(&delta.path, &file, &export.cancel)).transpose()?) {
                (Some(sent), Some(Found::File { sha256, .. })) if sent.sha256 == Some(sha256) => {
                    let content = Content { file, size: sent.size, sha256, mode: sent.mode };
                    before.file(&delta.path, &content, sent.mode & 0o100 != 0)?;
                    old.push(delta.path.as_slice());
                }
                (Some(sent), Some(Found::Link { target, .. })) if sent.target.as_ref() == Some(&target) => {
                    before.link(&delta.path, &target)?;
                    old.push(delta.path.as_slice());
                }
                (Some(_), _) => {
                    left_out.push(delta.path.clone());
                    continue;
                }
                (None, _) => {}
            }
            match &delta.after {
                After::File { content, mode } => {
                    after.file(&delta.path, content, mode & 0o100 != 0)?;
                    new.push(delta.path.as_slice());
                }
                After::Link { target } => {
                    after.link(&delta.path, target)?;
                    new.push(delta.path.as_slice());
                }
                After::Nothing | After::Directory => {}
            }
        }
        before.add(&old)?;
        after.add(&new)?;
        Ok(((before.tree()?, after.tree()?), left_out))
    })?;
    let report = of_trees(&export.quarantine, &trees.0, &trees.1, to)?;
    Ok(PatchReport { left_out, ..report })
}
