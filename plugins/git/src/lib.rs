//! Brings git repositories into guests: the history, and on top of it the files as they are, with all that is not committed.
//!
//! `shallow` brings as many commits of the history as the configuration says, one by default; `full` brings all of it. Either way
//! `git status` in the guest says what it says on the host. Git need not be in the guest.

use serde::Deserialize;
use vm_plugin_sdk::{Context, Importer, Job, Offers, Repo, Report, Result, Sandbox, Vm, importer, info};

/// Better than a copy for whatever git knows.
const SHALLOW: u32 = 80;
/// More than most need.
const FULL: u32 = 70;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Git {
    /// Commits of each line of history in a shallow import.
    depth: u32,
}

/// How much of the history is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strategy {
    Shallow,
    Full,
}

impl Strategy {
    const ALL: [Self; 2] = [Self::Shallow, Self::Full];

    fn name(self) -> &'static str {
        match self {
            Self::Shallow => "shallow",
            Self::Full => "full",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name)
    }

    fn score(self) -> u32 {
        match self {
            Self::Shallow => SHALLOW,
            Self::Full => FULL,
        }
    }
}

/// What is said of a repository.
#[derive(Debug, Clone, Default)]
struct About {
    has_commit: bool,
    files: u64,
    modified: u64,
    deleted: u64,
    untracked: u64,
    traits: Vec<String>,
}

impl About {
    fn of(repo: &Repo) -> Self {
        Self {
            has_commit: repo.head().is_some(),
            files: repo.files(),
            modified: repo.modified(),
            deleted: repo.deleted(),
            untracked: repo.untracked(),
            traits: repo.traits(),
        }
    }

    /// What is not committed, in words; empty where all is.
    fn uncommitted(&self) -> String {
        let parts = [(self.modified, "modified"), (self.deleted, "deleted"), (self.untracked, "untracked")];
        let parts = parts.into_iter().filter(|(count, _)| *count > 0);
        parts.map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
    }

    fn describe(&self, strategy: Strategy, depth: u32) -> String {
        let history = match strategy {
            _ if !self.has_commit => "no commit yet".to_owned(),
            Strategy::Shallow if depth == 1 => "the last commit".to_owned(),
            Strategy::Shallow => format!("the last {depth} commits"),
            Strategy::Full => "the whole history".to_owned(),
        };
        let files = if self.files == 1 { "1 file".to_owned() } else { format!("{} files", self.files) };
        match self.uncommitted() {
            uncommitted if uncommitted.is_empty() => format!("{history}, {files}"),
            uncommitted => format!("{history}, {files} ({uncommitted})"),
        }
    }

    fn warnings(&self) -> impl Iterator<Item = &'static str> {
        let about = |name: &String| {
            Some(match name.as_str() {
                "lfs" => {
                    "what Git LFS keeps is brought as it is in the directory; the guest fetches no other versions"
                }
                "shallow" => "the host has only a part of the history, and so will the guest",
                "sparse" => "files outside of the sparse checkout stay on the host",
                _ => return None,
            })
        };
        self.traits.iter().filter_map(about)
    }
}

impl Importer for Git {
    fn probe(&self, _: &Context, repo: &Repo, offers: &Offers) -> Result {
        if !repo.is_git() {
            return Ok(());
        }
        let about = About::of(repo);
        for strategy in Strategy::ALL {
            offers.add(strategy.name(), strategy.score(), &about.describe(strategy, self.depth));
            about.warnings().for_each(|warning| offers.warn(strategy.name(), warning));
        }
        Ok(())
    }

    fn run(
        &self,
        _: &Context,
        vm: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result {
        let strategy = Strategy::parse(&job.strategy()).ok_or_else(|| job.unknown_strategy())?;
        let depth = match strategy {
            Strategy::Shallow => Some(self.depth),
            Strategy::Full => None,
        };
        let destination = job.destination();
        job.make_room(sandbox)?;
        report.progress("sending the history");
        sandbox.unpack(&repo.history(depth)?, &destination, job.uid(), job.gid())?;
        let about = About::of(repo);
        report.progress(&format!("sending {} files", about.files));
        // All of them, those of the commit too: no git need be in the guest that could take them out of the history, and they are
        // to be what they are on the host, with their modes and times.
        sandbox.unpack(&repo.archive(&[])?, &destination, job.uid(), job.gid())?;
        let brought = about.describe(strategy, self.depth);
        info!("{} to {}: {brought}", repo.name(), vm.name());
        report.ok(&destination, &brought);
        Ok(())
    }
}

importer!(Git);

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { has_commit: true, files: 12, ..About::default() }
    }

    #[test]
    fn what_is_brought_is_told_in_words() {
        assert_eq!(about().describe(Strategy::Shallow, 1), "the last commit, 12 files");
        assert_eq!(about().describe(Strategy::Shallow, 20), "the last 20 commits, 12 files");
        let dirty = About { files: 1, modified: 1, untracked: 3, ..about() };
        assert_eq!(dirty.describe(Strategy::Full, 1), "the whole history, 1 file (1 modified, 3 untracked)");
        let new = About { has_commit: false, untracked: 12, ..about() };
        assert_eq!(new.describe(Strategy::Full, 1), "no commit yet, 12 files (12 untracked)");
    }

    #[test]
    fn what_is_not_there_in_the_guest_is_warned_of_and_the_rest_is_not() {
        let odd =
            About { traits: ["detached", "lfs", "sparse", "worktree"].map(str::to_owned).into(), ..about() };
        let warnings: Vec<_> = odd.warnings().collect();
        assert!(warnings.len() == 2 && warnings[0].contains("LFS") && warnings[1].contains("sparse"));
        assert_eq!(about().warnings().count(), 0);
    }

    #[test]
    fn strategies_are_found_by_the_names_they_are_offered_by() {
        for strategy in Strategy::ALL {
            assert_eq!(Strategy::parse(strategy.name()), Some(strategy));
        }
        assert_eq!(Strategy::parse("files"), None);
    }
}
