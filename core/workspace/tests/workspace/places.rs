//! Generated work in repositories of all kinds, which goes on while they are sent: each file comes whole, and in the end a guest has
//! what the host has.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{TestCaseResult, TestRunner},
};
use vm_workspace::{Baseline, Selection, Workspace};

use crate::{
    generated::{Act, act, perform},
    guest::{Guest, said},
    packing::Interfering,
    repo::{Repo, Thing, commit, git_in, path, things, things_of, try_git},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A working tree beside the one that the repository was made with.
    Linked,
    /// A part of the files is not checked out.
    Sparse,
    /// The host itself has no more than the last commits.
    Shallow,
    /// Another repository in it, which has one in it, too.
    Submodule,
    /// Files that Git LFS keeps, where there is no Git LFS.
    Lfs,
    /// No branch.
    Detached,
}

/// The submodules of [`Kind::Submodule`].
const INNER: [&str; 2] = ["sub", "sub/deep/er"];

fn file(directory: &Path, name: &str, content: &str) {
    let file = directory.join(name);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, content).unwrap();
}

/// A repository with as many commits.
fn history(directory: PathBuf, commits: u32) -> PathBuf {
    fs::create_dir_all(&directory).unwrap();
    git_in(&directory, &["init", "-q"]);
    for number in 0..commits {
        file(&directory, ".gitignore", "ignored/\n");
        file(&directory, "counter", &number.to_string());
        commit(&directory);
    }
    directory
}

impl Kind {
    fn make(self) -> Repo {
        let repo = Repo::plain();
        let (top, source) = (repo.top(), repo.home().join("source"));
        let to = top.to_str().unwrap();
        match self {
            Self::Linked => {
                git_in(&history(source, 3), &["worktree", "add", "-q", "-b", "side", to]);
            }
            Self::Sparse => {
                history(top.clone(), 2);
                file(&top, "out/a", "1");
                file(&top, "out/deep/b", "1");
                commit(&top);
                git_in(&top, &["sparse-checkout", "set", "--no-cone", "/*", "!/out/"]);
                assert!(!top.join("out").exists());
            }
            Self::Shallow => {
                let url = format!("file://{}", history(source, 4).display());
                git_in(repo.home(), &["clone", "-q", "--depth=2", &url, to]);
            }
            Self::Submodule => {
                let (inner, middle) = (repo.home().join("inner"), source);
                history(inner, 2);
                history(middle.clone(), 2);
                git_in(&middle, &["submodule", "--quiet", "add", "../inner", "deep/er"]);
                commit(&middle);
                history(top.clone(), 1);
                git_in(&top, &["submodule", "--quiet", "add", "../source", "sub"]);
                git_in(&top, &["submodule", "--quiet", "update", "--init", "--recursive"]);
                commit(&top);
            }
            Self::Lfs => {
                history(top.clone(), 1);
                file(
                    &top,
                    ".gitattributes",
                    "a filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs -text\n",
                );
                file(&top, "kept.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
                commit(&top);
            }
            Self::Detached => {
                history(top.clone(), 3);
                git_in(&top, &["checkout", "-q", "--detach", "HEAD~1"]);
            }
        }
        repo
    }

    /// The repositories in it, by their directories.
    fn places(self) -> &'static [&'static str] {
        match self {
            Self::Submodule => &["", INNER[0], INNER[1]],
            _ => &[""],
        }
    }

    /// Whether it is known for what it is, before anything was done to it.
    fn is_told(self, workspace: &Workspace) -> bool {
        let facts = workspace.facts();
        match self {
            Self::Linked => facts.worktree,
            Self::Sparse => facts.sparse,
            Self::Shallow => facts.shallow,
            Self::Submodule => facts.submodules == INNER,
            Self::Lfs => facts.lfs,
            Self::Detached => facts.detached && facts.branch.is_none(),
        }
    }

    fn assert_same(self, repo: &Repo, guest: &Guest) {
        assert_eq!(things(&guest.top()), things_of(&repo.open()));
        for place in self.places() {
            let (host, guest) = (repo.top().join(place), guest.top().join(place));
            assert_eq!(said(&guest), said(&host), "{place:?}");
            let checked = try_git(&guest, &["fsck", "--full"]);
            assert!(checked.status.success(), "{place:?}: {}", String::from_utf8_lossy(&checked.stderr));
        }
    }
}

/// What is done, in order.
#[derive(Debug)]
struct Work {
    first: Vec<Act>,
    /// In submodules.
    inner: Vec<Act>,
    /// When so many bytes are on their way.
    at: usize,
    meanwhile: Vec<Act>,
    then: Vec<Act>,
    depth: Option<u32>,
}

fn work() -> impl Strategy<Value = Work> {
    let of_files = || act().prop_filter("while they are sent, files change", Act::is_of_files);
    let depth = select(vec![None, Some(1), Some(2)]);
    (vec(act(), 5..20), vec(act(), 0..8), 0..20_000_usize, vec(of_files(), 0..6), vec(act(), 0..8), depth)
        .prop_map(|(first, inner, at, meanwhile, then, depth)| Work {
            first,
            inner,
            at,
            meanwhile,
            then,
            depth,
        })
}

/// Sends all of it, while something is done to it.
fn send(workspace: &Workspace, guest: &Guest, work: &Work) -> Baseline {
    let history = workspace.head().is_some().then(|| guest.take_git(workspace, work.depth));
    let mut once = true;
    let mut to = Interfering {
        bytes: Vec::new(),
        at: work.at,
        act: || {
            if std::mem::take(&mut once) {
                work.meanwhile.iter().for_each(|act| perform(workspace.top(), act));
            }
        },
    };
    let sent = workspace.archive(Selection::All, &mut to).unwrap();
    guest.unpack(&to.bytes);
    Baseline::new(workspace, "test", history, sent, guest.survey())
}

/// What is neither as it was nor as it is.
fn mixed(
    guest: &BTreeMap<Vec<u8>, Thing>,
    before: &BTreeMap<Vec<u8>, Thing>,
    after: &BTreeMap<Vec<u8>, Thing>,
) -> Vec<PathBuf> {
    let is_whole = |(name, thing): &(&Vec<u8>, &Thing)| {
        matches!(thing, Thing::Directory(_))
            || [before, after].iter().any(|things| things.get(*name) == Some(*thing))
    };
    guest.iter().filter(|one| !is_whole(one)).map(|(name, _)| path(name).to_owned()).collect()
}

fn trial(kind: Kind, work: &Work) -> TestCaseResult {
    let repo = kind.make();
    prop_assert!(kind.is_told(&repo.open()), "{:?}", repo.open().facts());
    // Back to where a repository is not in the other yet, it is a stray one, which is not brought.
    let stays = |act: &&Act| kind != Kind::Submodule || !matches!(act, Act::Detach);
    work.first.iter().filter(stays).for_each(|act| perform(&repo.top(), act));
    if kind == Kind::Submodule {
        for (number, act) in work.inner.iter().filter(stays).enumerate() {
            perform(&repo.top().join(INNER[number % 2]), act);
        }
    }
    let guest = Guest::new();
    let workspace = repo.open();
    let before = things_of(&workspace);
    let baseline = send(&workspace, &guest, work);
    if work.meanwhile.is_empty() {
        kind.assert_same(&repo, &guest);
    }
    let mixed = mixed(&things(&guest.top()), &before, &things(&repo.top()));
    prop_assert!(mixed.is_empty(), "{:?}", mixed);
    work.then.iter().filter(stays).for_each(|act| perform(&repo.top(), act));
    let (difference, after) = guest.catch_up(&repo.open(), &baseline);
    prop_assert_eq!(&difference.guest_changed, &Vec::<Vec<u8>>::new());
    kind.assert_same(&repo, &guest);
    prop_assert!(guest.difference(&repo.open(), &after).is_empty());
    Ok(())
}

fn in_any(kind: Kind) {
    // The same cases each time, so that a change is what fails; PROPTEST_RNG_SEED has others.
    let config = ProptestConfig {
        cases: 6,
        max_shrink_iters: 100,
        failure_persistence: None,
        rng_seed: crate::seed::seed(),
        ..ProptestConfig::default()
    };
    let done = TestRunner::new(config).run(&work(), |work| trial(kind, &work));
    done.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
}

#[test]
fn a_linked_working_tree() {
    in_any(Kind::Linked);
}

#[test]
fn a_sparse_checkout() {
    in_any(Kind::Sparse);
}

#[test]
fn a_shallow_clone() {
    in_any(Kind::Shallow);
}

#[test]
fn submodules() {
    in_any(Kind::Submodule);
}

#[test]
fn files_of_git_lfs() {
    in_any(Kind::Lfs);
}

#[test]
fn a_detached_head() {
    in_any(Kind::Detached);
}
