//! What an export needs of the host, seen to before there is any work to bring back. Nothing is written.

use std::{io, path::Path};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{
    Workspace, WorkspaceError,
    export::ExportError,
    facts::{Place, Repository},
    text::shown,
};

use super::{branch, session::act};

/// Sees whether a branch of the workspace's repository can be made or moved; what people should know of that, and of the same in
/// submodules, which get the branch only if the guest makes commits there.
///
/// # Errors
/// There is no git here; a name that git does not take; a branch that is checked out, or that others stand in the way of.
pub fn branch(workspace: &Workspace, name: &str) -> Result<Vec<String>, ExportError> {
    if workspace.git_common_directory().is_none() {
        return Err(WorkspaceError::NotARepository { path: workspace.top().to_owned() }.into());
    }
    branch::check_name(workspace.git().at(workspace.top()), name)?;
    let mut warnings = Vec::new();
    for repository in workspace.repositories().iter().filter(|one| one.place != Place::Stray) {
        let told = in_repository(workspace, repository, name);
        match (told, repository.place) {
            (
                Err(error @ (ExportError::BranchCheckedOut { .. } | ExportError::BranchInTheWay { .. })),
                Place::Submodule,
            ) => warnings.push(format!(
                "commits in the submodule {} could not be brought back: {error}",
                shown(&repository.path)
            )),
            (told, _) => warnings.extend(told?),
        }
    }
    Ok(warnings)
}

fn in_repository(
    workspace: &Workspace,
    repository: &Repository,
    name: &str,
) -> Result<Option<String>, ExportError> {
    let (git, top) = (workspace.git(), &repository.directory);
    let (Some(before), Some(head)) = (branch::existing(git, top, name)?, &repository.head) else {
        return Ok(None);
    };
    let asked = git.at(top).args(["merge-base", "--is-ancestor", &before, head]).find();
    let goes_on = asked.map_err(WorkspaceError::git("looking for the branch"))?.is_some();
    let of = match repository.place {
        Place::Submodule => format!(" of the submodule {}", shown(&repository.path)),
        Place::Top | Place::Stray => String::new(),
    };
    let warning = || {
        format!(
            "the branch {}{of} has commits that are not checked out: only work that is built on them can be brought there",
            shown(name.as_bytes())
        )
    };
    Ok((!goes_on).then(warning))
}

/// Sees whether files can be written into a directory, which is made later if it is not there.
///
/// # Errors
/// It, or what is in its place, is no directory, or may not be written to.
pub fn directory(workspace: &Workspace, directory: &Path) -> Result<(), ExportError> {
    act(workspace.identity(), || {
        // The next one above that is there would get it.
        for above in directory.ancestors() {
            match takes_files(above) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => {
                    return done.map_err(|source| ExportError::Host {
                        action: "write to",
                        path: shown(above.as_os_str().as_encoded_bytes()),
                        source,
                    });
                }
            }
        }
        Ok(())
    })
}

/// Whether a directory takes files, which one without a name tells.
fn takes_files(directory: &Path) -> io::Result<()> {
    if !std::fs::metadata(directory)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR) {
        // Its filesystem has none without names: the export will tell.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) | Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
