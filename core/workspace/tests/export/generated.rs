//! Generated repositories of all kinds and work: whatever was done, what comes back is what git makes of it in the guest.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use proptest::{collection::vec, prelude::*, sample::select, test_runner::Config};
use vm_workspace::export::Wish;

use crate::world::{World, differing, files_of, git, git_with, path, snapshot, tree_of, write};

const NAMES: [&[u8]; 14] = [
    b"a",
    b"dir/b",
    b"dir/deep/c",
    b"dir",
    b"with space",
    b"new\nline",
    b"-dash",
    b"\xff\xfe/x",
    b":(top)y",
    b"*",
    b"build/out.o",
    b"out.o",
    b"\"quoted\"\\",
    b"windows.txt",
];

const CONTENTS: [&[u8]; 7] =
    [b"", b"1\n", b"1\n2\n3\n", b"\0\x01binary\xff", b"no end of line", b"1\r\n2\r\n", b"1\n2\r\n"];

#[derive(Debug, Clone)]
enum Act {
    Write(usize, usize),
    Large(usize),
    Remove(usize),
    Executable(usize, bool),
    Link(usize, usize),
    Rename(usize, usize),
    Ignore(usize),
    Stage,
    Commit,
    Untrack(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let name = 0..NAMES.len();
    prop_oneof![
        6 => (name.clone(), 0..CONTENTS.len()).prop_map(|(name, content)| Act::Write(name, content)),
        1 => name.clone().prop_map(Act::Large),
        2 => name.clone().prop_map(Act::Remove),
        2 => (name.clone(), any::<bool>()).prop_map(|(name, on)| Act::Executable(name, on)),
        1 => (name.clone(), name.clone()).prop_map(|(name, target)| Act::Link(name, target)),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Act::Rename(from, to)),
        1 => (0..3usize).prop_map(Act::Ignore),
        1 => Just(Act::Stage),
        2 => Just(Act::Commit),
        1 => name.prop_map(Act::Untrack),
    ]
}

/// Makes room for a path: what it has, and what stands where its directories are to be.
fn clear(top: &Path, file: &Path) {
    for above in file.ancestors().take_while(|above| *above != top) {
        let Ok(about) = fs::symlink_metadata(above) else { continue };
        if above == file && about.is_dir() {
            fs::remove_dir_all(above).unwrap();
        } else if !about.is_dir() {
            fs::remove_file(above).unwrap();
        }
    }
    fs::create_dir_all(file.parent().unwrap()).unwrap();
}

impl Act {
    fn run(&self, top: &Path) {
        let at = |name: usize| -> PathBuf { top.join(path(NAMES[name])) };
        let is_file = |file: &Path| fs::symlink_metadata(file).is_ok_and(|about| !about.is_dir());
        match *self {
            Self::Write(name, content) => {
                clear(top, &at(name));
                fs::write(at(name), CONTENTS[content]).unwrap();
            }
            Self::Large(name) => {
                clear(top, &at(name));
                let content: Vec<u8> = (0..70_000u32).flat_map(u32::to_le_bytes).collect();
                fs::write(at(name), content).unwrap();
            }
            Self::Remove(name) if is_file(&at(name)) => fs::remove_file(at(name)).unwrap(),
            Self::Remove(name) if at(name).is_dir() => fs::remove_dir_all(at(name)).unwrap(),
            Self::Executable(name, on)
                if fs::symlink_metadata(at(name)).is_ok_and(|about| about.is_file()) =>
            {
                let mode = if on { 0o755 } else { 0o644 };
                fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
            }
            Self::Link(name, target) => {
                clear(top, &at(name));
                symlink(path(NAMES[target]), at(name)).unwrap();
            }
            Self::Rename(from, to) if from != to && is_file(&at(from)) => {
                let moved = top.join(".moved");
                fs::rename(at(from), &moved).unwrap();
                clear(top, &at(to));
                fs::rename(moved, at(to)).unwrap();
            }
            Self::Ignore(which) => {
                write(&top.join(".gitignore"), [&b""[..], b"*.o\n", b"/dir/\n*.o\n!out.o\n"][which])
            }
            Self::Stage => drop(git(top, &["add", "--all"])),
            Self::Commit => {
                git(top, &["add", "--all"]);
                git(top, &["commit", "--quiet", "--allow-empty", "-m", "work"]);
            }
            Self::Untrack(name) => {
                let literal = [("GIT_LITERAL_PATHSPECS", "1")];
                let list = [NAMES[name], b"\0"].concat();
                let args = [
                    "rm",
                    "-r",
                    "--quiet",
                    "--cached",
                    "--force",
                    "--ignore-unmatch",
                    "--pathspec-from-file=-",
                    "--pathspec-file-nul",
                ];
                git_with(top, &args, &literal, &list).unwrap();
            }
            Self::Remove(_) | Self::Executable(..) | Self::Rename(..) => {}
        }
    }
}

/// What the host has.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    /// A working tree beside the one that the repository was made with.
    Linked,
    /// A part of the files is not checked out.
    Sparse,
    /// No more than the last commits.
    Shallow,
    /// Files that Git LFS keeps, where there is no Git LFS.
    Lfs,
    /// No branch.
    Detached,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Plain, Self::Linked, Self::Sparse, Self::Shallow, Self::Lfs, Self::Detached];

    fn make(self) -> World {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
        let world =
            World::with(&[("first", "1\n"), ("out/x", "1\n"), ("out/deep/y", "1\n"), ("kept.bin", pointer)]);
        let host = world.host();
        // Instead of that one.
        let another = |make: &[&str]| {
            let first = world.beside("first");
            fs::rename(&host, &first).unwrap();
            git(&first, &["commit", "--quiet", "--allow-empty", "-m", "second"]);
            let words: Vec<_> = make.iter().chain(&[host.to_str().unwrap()]).copied().collect();
            git(&first, &words);
            for (key, value) in [("user.name", "A B"), ("user.email", "a@b.example")] {
                git(&host, &["config", key, value]);
            }
        };
        match self {
            Self::Plain => {}
            Self::Linked => another(&["worktree", "add", "--quiet", "-b", "side"]),
            Self::Shallow => another(&["clone", "--quiet", "--no-local", "--depth=1", "."]),
            Self::Sparse => drop(git(&host, &["sparse-checkout", "set", "--no-cone", "/*", "!/out/"])),
            Self::Lfs => {
                write(
                    &host.join(".git/info/attributes"),
                    b"kept.bin filter=lfs -text\nwith* filter=lfs -text\n",
                );
            }
            Self::Detached => drop(git(&host, &["checkout", "--quiet", "--detach"])),
        }
        world
    }
}

fn run(acts: &[Act], top: &Path) {
    for act in acts {
        act.run(top);
    }
}

proptest! {
    // The same cases each time, so that a change is what fails; PROPTEST_RNG_SEED has others.
    #![proptest_config(Config { cases: 36, failure_persistence: None, rng_seed: crate::seed::seed(), ..Config::default() })]

    #[test]
    fn what_comes_back_is_what_the_guest_has(
        kind in select(&Kind::ALL[..]),
        attributes in 0..3usize,
        start in vec(act(), 1..20),
        dirty in vec(act(), 0..8),
        work in vec(act(), 0..20),
        history in prop::bool::weighted(0.8),
    ) {
        let mut world = kind.make();
        let (host, guest) = (world.host(), world.guest());
        // They stay as they are: what git makes of a file whose attributes alone have changed depends on when it looked last.
        write(&host.join(".gitattributes"), [&b""[..], b"*.txt text\n", b"a binary\nwith* eol=crlf\n"][attributes]);
        run(&start, &host);
        git(&host, &["add", "--all"]);
        git(&host, &["commit", "--quiet", "--allow-empty", "-m", "start"]);
        run(&dirty, &host);
        // What the host ignores the guest never sees, and might not ignore any more.
        git(&host, &["clean", "-fdXq"]);
        // Git leaves an ignored directory that has taken the place of a file it keeps.
        let sent = world.workspace();
        prop_assume!(files_of(&host).keys().all(|path| sent.entry(path).is_some()));
        world.prepare(history);
        if history {
            run(&work, &guest);
        } else {
            let files: Vec<Act> = work
                .into_iter()
                .filter(|act| !matches!(act, Act::Stage | Act::Commit | Act::Untrack(_)))
                .collect();
            run(&files, &guest);
        }
        let before = snapshot(&host);
        let base = git(&host, &["rev-parse", "HEAD"]);
        let mut export = world.export(Wish::Branch);
        let dry = export.branch("x", "m", true).unwrap();
        let mut patch = Vec::new();
        export.patch(&mut patch).unwrap();
        let foretold = export.apply(true).unwrap();
        prop_assert_eq!(differing(&snapshot(&host), &before), Vec::<String>::new(), "nothing was done so far");

        // As a branch.
        let report = export.branch("x", "m", false).unwrap();
        let tree = git(&host, &["rev-parse", "x^{tree}"]);
        if history {
            prop_assert_eq!(&tree, &world.guest_tree());
            let head = git(&guest, &["rev-parse", "HEAD"]);
            let tip = if report.uncommitted { "x~1" } else { "x" };
            prop_assert_eq!(git(&host, &["rev-parse", tip]), head);
        }
        prop_assert_eq!((dry.commits, dry.uncommitted), (report.commits, report.uncommitted));
        prop_assert_eq!(git(&host, &["rev-parse", "HEAD"]), base.clone());

        // As a patch.
        let index = world.beside("index");
        let env = [("GIT_INDEX_FILE", index.to_str().unwrap())];
        git_with(&host, &["read-tree", &base], &env, b"").unwrap();
        if !patch.is_empty() {
            git_with(&host, &["apply", "--cached", "--binary"], &env, &patch).unwrap();
        }
        prop_assert_eq!(&git_with(&host, &["write-tree"], &env, b"").unwrap(), &tree);

        // Applied.
        let applied = export.apply(false).unwrap();
        prop_assert_eq!(&applied, &foretold);
        prop_assert_eq!(&applied.conflicts, &Vec::<Vec<u8>>::new());
        prop_assert_eq!(&applied.failed, &vec![]);
        let (has, wants) = (files_of(&host), files_of(&guest));
        for change in export.changes().unwrap() {
            prop_assert_eq!(has.get(&change.path), wants.get(&change.path), "{:?}", change);
        }
        if history {
            // What the guest ignores is the only difference.
            let index = world.beside("applied");
            let own = host.join(git(&host, &["rev-parse", "--git-path", "index"]));
            fs::copy(guest.join(".git/index"), own).unwrap();
            prop_assert_eq!(tree_of(&host, &index), tree);
        }
    }
}
