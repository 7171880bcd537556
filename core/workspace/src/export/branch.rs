//! A guest's commits as a branch of the host's.

use std::{ffi::OsString, path::Path};

use crate::{Git, GitCommand, GitError, WorkspaceError, export::ExportError, text::shown};

use super::{
    quarantine::{Host, Quarantine, unusable},
    refs::Head,
    report::BranchReport,
    session::{Export, act},
};

/// Where the quarantine has what is to go to the host.
const TIP: &str = "refs/heads/export";
/// Where branches are.
const HEADS: &str = "refs/heads/";

/// Whether git takes a name for a branch.
pub(super) fn check_name(git: GitCommand<'_>, name: &str) -> Result<(), ExportError> {
    let refused = || ExportError::BranchName { name: shown(name.as_bytes()) };
    // Git has these for itself where it reads names from people.
    if name.starts_with('-') || name == "HEAD" || name.contains('\0') {
        return Err(refused());
    }
    let checked = git.args(["check-ref-format", &reference(name)]).find();
    match checked.map_err(WorkspaceError::git("looking at the branch's name"))? {
        Some(_) => Ok(()),
        None => Err(refused()),
    }
}

fn reference(name: &str) -> String {
    format!("{HEADS}{name}")
}

/// Makes or moves the branch.
pub(super) fn branch(
    export: &Export,
    host: &Host,
    name: &str,
    message: &str,
    tree: &str,
    dry_run: bool,
) -> Result<BranchReport, ExportError> {
    let quarantine = &export.quarantine;
    let base = export.base.commit.as_deref();
    let head = match export.view.as_ref().map(|view| &view.head) {
        Some(Head::At(head)) => Some(head.as_str()),
        // A branch without commits is a new start only where the guest had none to begin with.
        _ => None,
    };
    if let Some(head) = head.filter(|head| Some(*head) != base) {
        whole(quarantine, head, base)?;
    }
    let parent = head.or(base);
    let committed = parent.map(|parent| tree_of(quarantine, parent)).transpose()?;
    let before = existing(&export.git, &host.top, name)?;
    let (commit, uncommitted) = match (parent, committed) {
        (Some(parent), Some(committed)) if committed == tree => (parent.to_owned(), false),
        _ => match &before {
            // Nothing has changed since it was made.
            Some(before) if is_commit(quarantine, before, tree, parent)? => (before.clone(), true),
            _ => (commit(export, host, tree, parent, message)?, true),
        },
    };
    let continues = match (head, base) {
        (Some(head), Some(base)) => is_ancestor(quarantine, base, head)?,
        _ => true,
    };
    let commits = count(quarantine, &commit, base)?;
    goes_on(quarantine, before.as_deref(), &commit, name)?;
    let submodules = export.submodules.iter().map(|submodule| {
        act(&export.identity, || submodule.plan(&export.git, &export.guest, &export.fetched, name))
    });
    let submodules: Vec<_> = submodules.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    if !dry_run {
        submodules.iter().try_for_each(|submodule| submodule.bring(name))?;
        if before.as_ref() != Some(&commit) {
            let target = Target { git: &export.git, quarantine, top: &host.top, base };
            target.bring(name, &commit)?;
        }
    }
    Ok(BranchReport {
        commit,
        before,
        base: base.map(str::to_owned),
        commits,
        uncommitted,
        continues,
        submodules: submodules.into_iter().map(|submodule| submodule.report).collect(),
    })
}

/// How many commits are new.
pub(super) fn count(quarantine: &Quarantine, commit: &str, base: Option<&str>) -> Result<u64, ExportError> {
    let mut count = quarantine.command().args(["rev-list", "--count", commit]);
    if let Some(base) = base {
        count = count.args(["--not", base]);
    }
    Ok(text(count.line().map_err(unusable)?).parse().unwrap_or_default())
}

/// Whether the branch would move forward, if it is there.
pub(super) fn goes_on(
    quarantine: &Quarantine,
    before: Option<&str>,
    commit: &str,
    name: &str,
) -> Result<(), ExportError> {
    match before {
        Some(before) if !is_ancestor(quarantine, before, commit)? => {
            Err(ExportError::BranchDiverged { name: shown(name.as_bytes()) })
        }
        _ => Ok(()),
    }
}

/// All that a commit of the guest stands on must be there, here or on the host.
pub(super) fn whole(quarantine: &Quarantine, head: &str, base: Option<&str>) -> Result<(), ExportError> {
    if !quarantine.has_commit(head)? {
        return Err(ExportError::History { reason: format!("its commit {head} is not among its objects") });
    }
    let walk = quarantine.command().args(["rev-list", "--objects", "--quiet", head]);
    let walk = match base {
        Some(base) => walk.args(["--not", base]),
        None => walk,
    };
    walk.output().map(drop).map_err(unusable)
}

fn tree_of(quarantine: &Quarantine, commit: &str) -> Result<String, ExportError> {
    let tree =
        quarantine.command().args(["rev-parse", "--verify", "--quiet"]).arg(format!("{commit}^{{tree}}"));
    tree.line().map(text).map_err(unusable)
}

/// Whether a commit has this tree and no other parent than this one.
fn is_commit(
    quarantine: &Quarantine,
    commit: &str,
    tree: &str,
    parent: Option<&str>,
) -> Result<bool, ExportError> {
    let said = quarantine.command().args(["log", "--max-count=1", "--format=%T %P", commit]).line();
    Ok(text(said.map_err(unusable)?) == format!("{tree} {}", parent.unwrap_or_default()))
}

fn is_ancestor(quarantine: &Quarantine, ancestor: &str, commit: &str) -> Result<bool, ExportError> {
    let asked = quarantine.command().args(["merge-base", "--is-ancestor", ancestor, commit]).find();
    asked.map(|found| found.is_some()).map_err(unusable)
}

/// Commits the tree in the quarantine, in the name of who asked.
fn commit(
    export: &Export,
    host: &Host,
    tree: &str,
    parent: Option<&str>,
    message: &str,
) -> Result<String, ExportError> {
    let (name, email) = (setting(&export.git, host, "user.name")?, setting(&export.git, host, "user.email")?);
    let user = export.identity.name();
    let name = name.unwrap_or_else(|| user.clone());
    let email = email.unwrap_or_else(|| format!("{user}@localhost"));
    let mut command = export.quarantine.command().args(["commit-tree", tree, "-F", "-"]);
    if let Some(parent) = parent {
        command = command.args(["-p", parent]);
    }
    let made = command
        .env("GIT_AUTHOR_NAME", &name)
        .env("GIT_AUTHOR_EMAIL", &email)
        .env("GIT_COMMITTER_NAME", &name)
        .env("GIT_COMMITTER_EMAIL", &email)
        .input(format!("{}\n", message.trim_end()).into_bytes())
        .line();
    Ok(text(made.map_err(WorkspaceError::git("committing what the guest had not committed"))?))
}

/// A setting of the person's or the repository's.
fn setting(git: &Git, host: &Host, name: &str) -> Result<Option<String>, ExportError> {
    let value = git.at(&host.top).args(["config", "--get", name]).find();
    let value = value.map_err(WorkspaceError::git("reading git's configuration"))?;
    Ok(value.map(text).filter(|value| !value.trim().is_empty()))
}

/// The commit that a branch of a repository of the host's has.
///
/// # Errors
/// It is checked out, or cannot be there beside another one: git keeps branches in files and directories.
pub(super) fn existing(git: &Git, top: &Path, name: &str) -> Result<Option<String>, ExportError> {
    let wanted = reference(name);
    let above = name.match_indices('/').map(|(at, _)| reference(&name[..at]));
    let list = git
        .at(top)
        .args(["for-each-ref", "--format=%(objectname)%00%(refname)%00%(worktreepath)"])
        .arg(&wanted)
        .args(above.clone())
        .output()
        .map_err(WorkspaceError::git("looking for the branch"))?;
    let mut existing = None;
    // A pattern takes what is below such a name as well.
    for line in text(list).lines() {
        let mut fields = line.split('\0');
        let (Some(commit), Some(found), worktree) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if found == wanted {
            if let Some(worktree) = worktree.filter(|worktree| !worktree.is_empty()) {
                return Err(ExportError::BranchCheckedOut {
                    name: shown(name.as_bytes()),
                    worktree: shown(worktree.as_bytes()),
                });
            }
            existing = Some(commit.to_owned());
        } else if found.strip_prefix(&wanted).is_some_and(|rest| rest.starts_with('/'))
            || above.clone().any(|above| above == found)
        {
            let other = found.strip_prefix(HEADS).unwrap_or(found);
            return Err(ExportError::BranchInTheWay {
                name: shown(name.as_bytes()),
                other: shown(other.as_bytes()),
            });
        }
    }
    // One without a commit is in no list.
    if existing.is_none() {
        let head = git.at(top).args(["symbolic-ref", "--quiet", "HEAD"]).find();
        let head = head.map_err(WorkspaceError::git("looking for the branch"))?;
        if head.is_some_and(|head| head == wanted.as_bytes()) {
            return Err(ExportError::BranchCheckedOut {
                name: shown(name.as_bytes()),
                worktree: shown(top.as_os_str().as_encoded_bytes()),
            });
        }
    }
    Ok(existing)
}

/// A repository of the host's that gets a branch.
pub(super) struct Target<'a> {
    pub(super) git: &'a Git,
    /// Has the commit.
    pub(super) quarantine: &'a Quarantine,
    /// Its working tree.
    pub(super) top: &'a Path,
    /// A commit that it has.
    pub(super) base: Option<&'a str>,
}

impl Target<'_> {
    /// Brings the commit to the host. Git looks through all objects that come; it moves a branch only forward, and none that
    /// is checked out.
    pub(super) fn bring(&self, name: &str, commit: &str) -> Result<(), ExportError> {
        let Self { git, quarantine, top, base } = self;
        let doing = "bringing the guest's commits to the host";
        quarantine
            .command()
            .args(["update-ref", TIP, commit])
            .output()
            .map_err(WorkspaceError::git(doing))?;
        let mut fetch = git.at(top).args([
            "-c",
            "fetch.bundleURI=",
            "-c",
            "transfer.fsckObjects=true",
            "-c",
            "fetch.fsckObjects=true",
            "-c",
            "core.logAllRefUpdates=true",
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-prune",
            // Without it git does not look whether a branch moves backward.
            "--show-forced-updates",
            "--no-write-fetch-head",
            "--no-recurse-submodules",
            "--no-auto-maintenance",
        ]);
        if let Some(base) = base {
            fetch = fetch.arg(format!("--negotiation-tip={base}"));
        }
        let from = quarantine.directory();
        // The repository's configuration may rewrite addresses to another place, or to a program; the longest rule counts.
        let mut rewriting = OsString::from("url.");
        rewriting.push(from);
        rewriting.push(".insteadOf");
        let fetch = fetch
            .env("GIT_ALLOW_PROTOCOL", "file")
            .env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", rewriting)
            .env("GIT_CONFIG_VALUE_0", from);
        match fetch.arg(from).arg(format!("{TIP}:{}", reference(name))).output() {
            Ok(_) => Ok(()),
            Err(GitError::Failed { stderr, .. }) if stderr.contains("non-fast-forward") => {
                Err(ExportError::BranchDiverged { name: shown(name.as_bytes()) })
            }
            Err(GitError::Failed { stderr, .. }) if !is_of_the_host(&stderr) => {
                Err(ExportError::Refused { reason: shown(stderr.as_bytes()) })
            }
            Err(error) => Err(WorkspaceError::git(doing)(error).into()),
        }
    }
}

/// Whether git failed for a reason that is none of the guest's.
fn is_of_the_host(stderr: &str) -> bool {
    let reasons = ["No space left", "Disk quota", "ermission", "Read-only file system", "cannot lock ref"];
    reasons.iter().any(|reason| stderr.contains(reason))
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}
