//! Which commits a guest gets.
//!
//! A guest whose history is cut off does not have what lies behind the cut, though the host knows those commits as ancestors.
//! So what is sent to it later is reckoned in the history as the guest sees it; and where new commits have old parents that it
//! lacks (a merge of an old branch), it gets these parents, cut off there.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::{Workspace, WorkspaceError, facts::Repository, files::read_small, history::Line};

const WALKING: &str = "walking through the history";

/// What to send.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// For `git pack-objects --revs`.
    pub(super) revisions: Vec<String>,
    /// Commits whose parents the guest will not have: all of them.
    pub(super) shallow: Vec<String>,
    /// The commits that the guest did not have; all of HEAD's history if absent.
    pub(super) commits: Option<HashSet<String>>,
}

/// A history as `git rev-list --parents` tells it.
struct Graph(HashMap<String, Vec<String>>);

impl Graph {
    fn of(
        workspace: &Workspace,
        repository: &Repository,
        revisions: &[&str],
    ) -> Result<Self, WorkspaceError> {
        let output = workspace
            .git()
            .at(&repository.directory)
            .args(["rev-list", "--parents"])
            .args(revisions)
            .output()
            .map_err(WorkspaceError::git(WALKING))?;
        let text = String::from_utf8_lossy(&output);
        let commits = text.lines().filter_map(|line| {
            let mut names = line.split(' ').map(str::to_owned);
            Some((names.next()?, names.collect()))
        });
        Ok(Self(commits.collect()))
    }

    /// The commits from one on, `depth` of them on any way at most, not going on from where it is cut; and those at the end
    /// of that.
    fn reach(
        &self,
        from: &str,
        depth: Option<u32>,
        cut: &HashSet<&str>,
    ) -> (HashSet<String>, BTreeSet<String>) {
        let (mut reached, mut ends) = (HashSet::from([from.to_owned()]), BTreeSet::new());
        let mut level = vec![from.to_owned()];
        let mut left = depth.map(|depth| depth.max(1) - 1);
        while !level.is_empty() {
            let mut next = Vec::new();
            for commit in level {
                let parents = self.0.get(&commit).map(Vec::as_slice).unwrap_or_default();
                if cut.contains(commit.as_str()) || parents.is_empty() {
                    continue;
                }
                if left == Some(0) {
                    ends.insert(commit);
                    continue;
                }
                next.extend(parents.iter().filter(|parent| reached.insert((*parent).clone())).cloned());
            }
            left = left.map(|left| left.saturating_sub(1));
            level = next;
        }
        (reached, ends)
    }
}

/// What a guest gets that has nothing yet.
pub(super) fn fresh(
    workspace: &Workspace,
    repository: &Repository,
    head: &str,
    depth: Option<u32>,
) -> Result<Plan, WorkspaceError> {
    let cut = host_shallow(workspace, repository)?;
    if depth.is_none() && cut.is_empty() {
        return Ok(Plan { revisions: vec![head.to_owned()], ..Plan::default() });
    }
    // One commit and its parents are known without a walk.
    let limit: &[&str] =
        if depth.is_some_and(|depth| depth <= 1) { &["--max-count=1", head] } else { &[head] };
    let graph = Graph::of(workspace, repository, limit)?;
    let (commits, ends) = graph.reach(head, depth, &HashSet::new());
    let mut shallow = ends;
    shallow.extend(cut.iter().filter(|commit| commits.contains(*commit)).cloned());
    let mut revisions = grafts(shallow.iter().chain(&cut));
    revisions.push(head.to_owned());
    Ok(Plan { revisions, shallow: shallow.into_iter().collect(), commits: Some(commits) })
}

/// What a guest gets that has `known` of this repository, with the commit `base`.
pub(super) fn update(
    workspace: &Workspace,
    repository: &Repository,
    head: &str,
    known: &Line,
    base: &str,
) -> Result<Plan, WorkspaceError> {
    let there = ["rev-parse", "--verify", "--quiet", "--end-of-options"];
    let found =
        workspace.git().at(&repository.directory).args(there).arg(format!("{base}^{{commit}}")).find();
    if found.map_err(WorkspaceError::git(WALKING))?.is_none() {
        return Err(WorkspaceError::BaseGone { commit: base.to_owned() });
    }
    let mut plan = Plan { shallow: known.shallow.clone(), commits: Some(HashSet::new()), ..Plan::default() };
    if head == base {
        return Ok(plan);
    }
    let host = host_shallow(workspace, repository)?;
    let new = Graph::of(workspace, repository, &[head, &format!("^{base}")])?;
    let mut lacking: BTreeSet<String> = new.0.values().flatten().cloned().collect();
    lacking.insert(head.to_owned());
    lacking.retain(|commit| !new.0.contains_key(commit) && commit != base);
    if known.shallow.is_empty() {
        // All that is behind the base is there.
        lacking.clear();
    } else if !lacking.is_empty() {
        let cut = known.shallow.iter().map(String::as_str).collect();
        let (there, _) = Graph::of(workspace, repository, &[base])?.reach(base, None, &cut);
        lacking.retain(|commit| !there.contains(commit));
    }
    let mut shallow: BTreeSet<String> = known.shallow.iter().chain(&lacking).cloned().collect();
    shallow.extend(host.iter().filter(|commit| new.0.contains_key(*commit)).cloned());
    plan.revisions = grafts(shallow.iter().chain(&host));
    plan.revisions.push(head.to_owned());
    plan.revisions.extend(lacking.iter().cloned());
    plan.revisions.push(format!("^{base}"));
    plan.shallow = shallow.into_iter().collect();
    plan.commits = Some(new.0.into_keys().chain(lacking).collect());
    Ok(plan)
}

/// They come before the commits, which are read with their parents as they then are.
fn grafts<'a>(commits: impl Iterator<Item = &'a String>) -> Vec<String> {
    let once: BTreeSet<&String> = commits.collect();
    once.into_iter().map(|commit| format!("--shallow {commit}")).collect()
}

/// Commits whose parents the host itself does not have.
fn host_shallow(workspace: &Workspace, repository: &Repository) -> Result<Vec<String>, WorkspaceError> {
    if !repository.shallow {
        return Ok(Vec::new());
    }
    let path = repository.common_directory.join("shallow");
    let text = workspace.identity().act(|| {
        read_small(&path, true).map_err(|source| WorkspaceError::Open { path: path.clone(), source })
    })?;
    let text = String::from_utf8_lossy(&text);
    // They go into the guest, so they are nothing but names of objects.
    let is_name = |line: &&str| !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(text.lines().filter(is_name).map(str::to_owned).collect())
}
