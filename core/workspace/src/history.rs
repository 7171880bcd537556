//! What a guest gets of git: a `.git` made anew, never a copy of the host's, and later what has become of it.
//!
//! It is made in the scratch directory, with the repository's objects borrowed while that lasts, so nothing is ever written
//! to the repository. The guest gets commits, the trees and files they have, and what is staged; the branch, the index, and tags of
//! these commits. Of the configuration it gets who commits, where `origin` is (without passwords), and what decides how files are
//! compared. It gets no hooks, no other branches, no stashes and no reflogs.

mod build;
mod hand_over;
mod walk;

use std::io::Write;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Tree, Workspace, WorkspaceError,
    archive::Packer,
    facts::{Place, Repository},
    listing::{self, directories_above, within},
    text::{self, hex, path as of_bytes},
};

/// What a guest has of a workspace's git, as it was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// How far back it was asked for; all if absent.
    pub depth: Option<u32>,
    /// The workspace's own repository, then those of its submodules.
    pub repositories: Vec<Line>,
}

/// What a guest has of one repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Where its files are, relative to the workspace's top; empty for the top.
    #[serde(with = "text::bytes")]
    pub path: Vec<u8>,
    /// Where git has its own files, relative to the workspace's top.
    #[serde(with = "text::bytes")]
    pub git: Vec<u8>,
    /// The commit checked out.
    pub head: Option<String>,
    /// The branch checked out, without `refs/heads/`.
    #[serde(with = "text::optional_bytes")]
    pub branch: Option<Vec<u8>>,
    /// Commits whose parents the guest does not have.
    pub shallow: Vec<String>,
    /// A digest of the index.
    pub index: String,
}

impl History {
    /// The workspace's own repository.
    pub fn own(&self) -> Option<&Line> {
        self.repositories.first()
    }

    fn of(&self, path: &[u8]) -> Option<&Line> {
        self.repositories.iter().find(|line| line.path == path)
    }

    /// The files by which git knows what is checked out, with the SHA-256 of what they had.
    pub(crate) fn pointers(&self) -> Vec<(Vec<u8>, [u8; 32])> {
        let digest = |content: Vec<u8>| -> [u8; 32] { Sha256::digest(content).into() };
        let mut pointers = Vec::new();
        for line in &self.repositories {
            let at = |name: &[u8]| within(&line.git, name);
            let commit = line.head.as_ref().map(|head| format!("{head}\n").into_bytes());
            match (&line.branch, commit) {
                (Some(branch), commit) => {
                    let reference = [b"refs/heads/", branch.as_slice()].concat();
                    pointers.push((at(b"HEAD"), digest([b"ref: ", reference.as_slice(), b"\n"].concat())));
                    if let Some(commit) = commit {
                        pointers.push((at(&reference), digest(commit)));
                    }
                }
                (None, Some(commit)) => pointers.push((at(b"HEAD"), digest(commit))),
                (None, None) => {}
            }
        }
        pointers
    }
}

impl Workspace {
    /// Writes a tar archive of a `.git` made anew, with which a guest that has the files has a repository: the commit checked
    /// out, its history as far back as `depth` commits, the branch, the index; submodules below `.git/modules`. In the guest
    /// git says of status, commit, branch and tree what it says on the host.
    ///
    /// # Errors
    /// There is no git here; git's own; `to`'s.
    pub fn git_directory(
        &self,
        depth: Option<u32>,
        to: impl Write + Send,
    ) -> Result<History, WorkspaceError> {
        self.hand_git(depth, None, to)
    }

    /// The same for a guest that has `known` already: what it does not have, to be unpacked over what it has. Of a submodule that
    /// it does not have it gets all.
    ///
    /// # Errors
    /// As [`Self::git_directory`], and [`WorkspaceError::BaseGone`] where the repository does not have the guest's commit any more.
    pub fn git_update(&self, known: &History, to: impl Write + Send) -> Result<History, WorkspaceError> {
        self.hand_git(known.depth, Some(known), to)
    }

    /// Whether the commit, the branch or the index of a repository is another one than the guest was given.
    pub(crate) fn has_moved(&self, known: &History) -> Result<bool, WorkspaceError> {
        let kept: Vec<&Repository> = self.kept().collect();
        if kept.len() != known.repositories.len() {
            return Ok(true);
        }
        for repository in kept {
            let Some(line) = known.of(&repository.path) else { return Ok(true) };
            if (&line.head, &line.branch) != (&repository.head, &repository.branch)
                || line.index != index_digest(&listing::staged(self.git(), &repository.directory)?)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// References that a guest has and that are in the way of the branches checked out now, as `a` is of `a/b`; git has both
    /// nowhere. What is in a directory comes behind it.
    pub(crate) fn references_in_the_way(&self, known: &History) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        for repository in self.kept() {
            let former = known.of(&repository.path);
            let (Some(line), Some(now)) = (former, &repository.branch) else { continue };
            let Some(then) = line.branch.as_deref() else { continue };
            let reference = |branch: &[u8]| within(&line.git, &[b"refs/heads/", branch].concat());
            if directories_above(now).any(|above| above == then) {
                found.push(reference(then));
            } else if directories_above(then).any(|above| above == now.as_slice()) {
                let inside = directories_above(then).filter(|above| above.len() >= now.len());
                found.extend(inside.chain([then]).map(reference));
            }
        }
        found
    }

    /// The repositories whose history goes into a guest.
    fn kept(&self) -> impl Iterator<Item = &Repository> {
        self.repositories().iter().filter(|repository| repository.place != Place::Stray)
    }

    fn hand_git(
        &self,
        depth: Option<u32>,
        known: Option<&History>,
        to: impl Write + Send,
    ) -> Result<History, WorkspaceError> {
        if self.own().is_none() {
            return Err(WorkspaceError::NotARepository { path: self.top().to_owned() });
        }
        let mut homes: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut made = Vec::new();
        for repository in self.kept() {
            let git = self.git_home(repository, &homes)?;
            homes.push((repository.path.clone(), git.clone()));
            let known = known.and_then(|known| known.of(&repository.path)).filter(|line| line.git == git);
            made.push(build::build(self, repository, git, depth, known)?);
        }
        let lines = made.iter().map(|made| made.line.clone()).collect();
        self.identity().act(|| {
            let open = |path: &std::path::Path| {
                Tree::open(path).map_err(|source| WorkspaceError::Scratch { path: path.to_owned(), source })
            };
            let mut packer = Packer::new(self.tree()?, to, self.cancel());
            for made in &made {
                let top = made.git_directory();
                packer.turn_to(open(&top)?)?;
                packer.add(b"", &made.line.git)?;
                for entry in listing::of_directory(&top, self.cancel())?.entries {
                    if made.goes(&entry.path) {
                        packer.add(&entry.path, &within(&made.line.git, &entry.path))?;
                    }
                }
                if !made.line.path.is_empty() && made.fresh {
                    let link =
                        [b"gitdir: ", build::way(&made.line.path, &made.line.git).as_slice(), b"\n"].concat();
                    packer.add_text(&within(&made.line.path, b".git"), &link)?;
                }
            }
            packer.finish().map(drop)
        })?;
        Ok(History { depth, repositories: lines })
    }

    /// Where git has its own files in the guest: where git itself would have put them.
    fn git_home(
        &self,
        repository: &Repository,
        homes: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<Vec<u8>, WorkspaceError> {
        // Submodules come behind what they are in, so the last one above is the next above.
        let above = homes.iter().rev().find(|(path, _)| {
            path.is_empty()
                || repository.path.strip_prefix(path.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        });
        let Some((above, home)) = above else { return Ok(b".git".to_vec()) };
        let below = repository.path.strip_prefix(above.as_slice()).unwrap_or(&repository.path);
        let below = below.strip_prefix(b"/").unwrap_or(below);
        let name = build::submodule_name(self.git(), &self.top().join(of_bytes(above)), below)?;
        Ok([home.as_slice(), b"/modules/", &name].concat())
    }
}

fn index_digest(staged: &[listing::Staged]) -> String {
    let mut hash = Sha256::new();
    for entry in staged {
        hash.update(format!(
            "{:o} {} {} {} {} ",
            entry.mode, entry.object, entry.stage, entry.skipped, entry.assumed
        ));
        hash.update(&entry.path);
        hash.update([0]);
    }
    hex(&hash.finalize())
}
