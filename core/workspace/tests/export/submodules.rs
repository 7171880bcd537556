//! Work in submodules, and in submodules of these.

use std::{fs, path::Path};

use vm_workspace::{
    WorkspaceError,
    export::{ExportError, Wish, beforehand},
};

use crate::world::{World, differing, git, make_executable, snapshot, write};

const WHO: [&str; 4] = ["-c", "user.name=A", "-c", "user.email=a@b.example"];

fn commit(directory: &Path, message: &str) -> String {
    git(directory, &["add", "--all"]);
    git(directory, &[&WHO[..], &["commit", "--quiet", "-m", message]].concat());
    git(directory, &["rev-parse", "HEAD"])
}

fn add(directory: &Path, url: &Path, name: &str) {
    let add = ["submodule", "--quiet", "add", url.to_str().unwrap(), name];
    git(directory, &[&["-c", "protocol.file.allow=always"][..], &add].concat());
    git(directory, &[&WHO[..], &["commit", "--quiet", "-m", "with a submodule"]].concat());
}

/// A workspace with the submodule `sub`, and that with the submodule `in ner`.
fn nested() -> (World, [World; 2]) {
    let (inner, middle) = (World::with(&[("i", "1\n")]), World::with(&[("s", "1\n"), ("t", "2\n")]));
    add(&middle.host(), &inner.host(), "in ner");
    let world = World::with(&[("a", "1\n")]);
    add(&world.host(), &middle.host(), "sub");
    let update =
        ["-c", "protocol.file.allow=always", "submodule", "--quiet", "update", "--init", "--recursive"];
    git(&world.host(), &update);
    (world, [middle, inner])
}

#[test]
fn commits_in_submodules_become_branches_there() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let (host, guest) = (world.host(), world.guest());
    let places = ["sub/in ner", "sub", "."];
    write(&guest.join("sub/in ner/i"), b"work\n");
    write(&guest.join("sub/s"), b"work\n");
    write(&guest.join("a"), b"work\n");
    let heads = places.map(|place| commit(&guest.join(place), "the guest's"));
    // Packed or not is the same.
    git(&guest.join("sub"), &["gc", "--quiet", "--prune=now"]);
    write(&guest.join("sub/t"), b"not committed\n");
    let before = snapshot(&host);

    let mut export = world.export(Wish::Branch);
    let dry = export.branch("from/guest", "m", true).unwrap();
    assert_eq!(differing(&snapshot(&host), &before), Vec::<String>::new(), "a dry run changes nothing");
    let report = export.branch("from/guest", "m", false).unwrap();
    assert_eq!(dry.submodules, report.submodules);
    let told: Vec<_> =
        report.submodules.iter().map(|one| (one.path.as_slice(), one.commit.as_str(), one.commits)).collect();
    assert_eq!(told, [(&b"sub"[..], heads[1].as_str(), 1), (b"sub/in ner", heads[0].as_str(), 1)]);
    for (place, head) in places.iter().zip(&heads) {
        assert_eq!(&git(&host.join(place), &["rev-parse", "from/guest"]), head, "{place}");
        assert_eq!(git(&host.join(place), &["fsck", "--strict"]), "", "{place}");
    }
    // All that the workspace's commit names is there, without a fetch.
    assert_eq!(git(&host, &["rev-parse", "from/guest:sub"]), heads[1]);
    assert_eq!(git(&host.join("sub"), &["rev-parse", "from/guest:in ner"]), heads[0]);
    git(&host, &["checkout", "--quiet", "from/guest"]);
    git(&host, &["submodule", "--quiet", "update", "--recursive", "--no-fetch"]);
    assert_eq!(fs::read(host.join("sub/in ner/i")).unwrap(), b"work\n");
    assert_eq!(fs::read(host.join("sub/t")).unwrap(), b"2\n");
    let warnings = export.warnings();
    assert!(
        warnings.iter().any(|warning| warning.contains("not committed in the submodule sub")),
        "{warnings:?}"
    );
    assert!(!warnings.iter().any(|warning| warning.contains("stays in")), "{warnings:?}");
}

#[test]
fn a_submodules_branch_only_moves_forward_and_all_is_seen_to_before_anything_is_written() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let (host, guest) = (world.host(), world.guest());
    write(&guest.join("sub/s"), b"work\n");
    commit(&guest.join("sub"), "the guest's");
    write(&guest.join("a"), b"work\n");
    commit(&guest, "the guest's");
    // The host has a branch of that name in the submodule, with work of its own.
    let tree = git(&host.join("sub"), &["rev-parse", "HEAD^{tree}"]);
    let own = git(&host.join("sub"), &[&WHO[..], &["commit-tree", &tree, "-m", "own"]].concat());
    git(&host.join("sub"), &["branch", "x", &own]);
    let error = world.export(Wish::Branch).branch("x", "m", false).unwrap_err();
    let ExportError::BranchDiverged { name } = &error else { panic!("{error}") };
    assert_eq!(name, "x of the submodule sub");
    assert_eq!(git(&host, &["for-each-ref", "--format=%(refname)"]), "refs/heads/main");
    assert_eq!(git(&host.join("sub"), &["rev-parse", "x"]), own);

    git(&host.join("sub"), &["checkout", "--quiet", "-b", "y"]);
    let error = world.export(Wish::Branch).branch("y", "m", false).unwrap_err();
    assert!(matches!(error, ExportError::BranchCheckedOut { .. }), "{error}");

    let first = world.export(Wish::Branch).branch("z", "m", false).unwrap();
    write(&guest.join("sub/s"), b"more\n");
    let head = commit(&guest.join("sub"), "more");
    let second = world.export(Wish::Branch).branch("z", "m", false).unwrap();
    assert_eq!(second.submodules[0].before.as_ref(), Some(&first.submodules[0].commit));
    assert_eq!(git(&host.join("sub"), &["rev-parse", "z"]), head);
    // What the host has by now is not brought again.
    let third = world.export(Wish::Branch).branch("z", "m", false).unwrap();
    assert_eq!((third.submodules.len(), third.commit), (0, second.commit));
}

#[test]
fn what_only_a_branch_brings_is_said_of_all_else() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let guest = world.guest();
    let warned = |wish| world.export(wish).warnings();
    assert_eq!(warned(Wish::Patch), Vec::<String>::new());
    write(&guest.join("sub/in ner/i"), b"work\n");
    commit(&guest.join("sub/in ner"), "the guest's");
    for wish in [Wish::Patch, Wish::Files { ignored: false }] {
        let warnings = warned(wish);
        assert!(
            warnings.len() == 1 && warnings[0].contains("sub/in ner, which only a branch"),
            "{warnings:?}"
        );
    }
    // One that the guest has added itself.
    let other = World::with(&[("o", "1\n")]);
    add(&guest, &other.host(), "added");
    let warnings = warned(Wish::Branch);
    assert!(
        warnings
            .iter()
            .any(|warning| warning.starts_with("the host has no repository of the submodule added")),
        "{warnings:?}"
    );
}

#[test]
fn a_submodule_may_be_called_as_logs_are() {
    let mut world = World::with(&[("a", "1\n")]);
    let other = World::with(&[("o", "1\n")]);
    for name in ["logs", "tools/logs/x", "plain"] {
        add(&world.host(), &other.host(), name);
    }
    world.prepare(true);
    git(&world.guest().join("plain"), &["checkout", "--quiet", "-b", "a/logs/b"]);
    let heads = ["logs", "plain", "tools/logs/x"].map(|name| {
        let directory = world.guest().join(name);
        write(&directory.join("o"), name.as_bytes());
        (name, commit(&directory, "the guest's"))
    });
    let report = world.export(Wish::Branch).branch("x", "m", false).unwrap();
    assert_eq!(report.submodules.len(), 3);
    for (name, head) in heads {
        assert_eq!(git(&world.host().join(name), &["rev-parse", "x"]), head, "{name}");
    }
}

#[test]
fn commits_that_the_host_has_on_no_branch_are_brought_again() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let (host, guest) = (world.host(), world.guest());
    let sub = host.join("sub");
    write(&guest.join("sub/s"), b"work\n");
    let head = commit(&guest.join("sub"), "the guest's");
    let bring = |name: &str| world.export(Wish::Branch).branch(name, "m", false);
    // Git finds out only when it has the objects that it cannot make the branch.
    let lock = ["rev-parse", "--path-format=absolute", "--git-path", "refs/heads/a.lock"];
    let lock = git(&sub, &lock);
    write(Path::new(&lock), b"");
    let error = bring("a").unwrap_err();
    assert!(matches!(error, ExportError::Workspace(WorkspaceError::Git { .. })), "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("*.lock")), "{error}");
    fs::remove_file(lock).unwrap();
    assert_eq!(git(&sub, &["cat-file", "-t", &head]), "commit", "this has seen to another case");
    assert_eq!(bring("a").unwrap().submodules.len(), 1);
    assert_eq!(git(&sub, &["rev-parse", "a"]), head);
    assert_eq!(bring("b").unwrap().submodules.len(), 0, "the host has it");
    git(&sub, &["branch", "--quiet", "-D", "a"]);
    assert_eq!(bring("c").unwrap().submodules.len(), 1);
    assert_eq!(git(&sub, &["rev-parse", "c"]), head);
    // What is checked out counts without a branch.
    git(&sub, &["checkout", "--quiet", "--detach", &head]);
    git(&sub, &["branch", "--quiet", "-D", "c"]);
    assert_eq!(bring("d").unwrap().submodules.len(), 0);
}

#[test]
fn commits_of_a_submodule_that_was_cloned_in_the_guest_are_said_to_stay() {
    let (mut world, [other, _]) = nested();
    world.prepare(true);
    let (guest, other) = (world.guest(), other.host());
    let url = other.to_str().unwrap();
    fs::remove_dir_all(guest.join("sub")).unwrap();
    for name in ["lib", "sub"] {
        git(&guest, &["clone", "--quiet", url, name]);
        write(&guest.join(name).join("s"), b"work\n");
        commit(&guest.join(name), "the guest's");
    }
    git(&guest, &["submodule", "--quiet", "add", url, "lib"]);
    for wish in [Wish::Branch, Wish::Patch, Wish::Files { ignored: false }] {
        let warnings = world.export(wish).warnings();
        let of = |start: &str| warnings.iter().filter(|warning| warning.starts_with(start)).count();
        assert_eq!(of("the host has no repository of the submodule lib"), 1, "{wish:?}: {warnings:?}");
        assert_eq!(of("the submodule sub was made anew"), 1, "{wish:?}: {warnings:?}");
    }
}

#[test]
fn a_file_that_leads_to_no_possible_directory_makes_no_submodule() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let guest = world.guest();
    let link = |length: usize| [&b"gitdir: .git/modules/"[..], &b"a/".repeat(length / 2), b"a\n"].concat();
    for (name, length) in [("good", 100), ("long", 5000), ("huge", 9000)] {
        write(&guest.join("sub").join(name).join(".git"), &link(length));
    }
    let warnings = world.export(Wish::Patch).warnings();
    let told = |start: &str| warnings.iter().any(|warning| warning.starts_with(start));
    assert!(told("the host has no repository of the submodule sub/good"), "{warnings:?}");
    for name in ["long", "huge"] {
        assert!(told(&format!("sub/{name}/.git stays in the guest")), "{name}: {warnings:?}");
    }
}

#[test]
fn a_branch_that_a_submodule_cannot_get_is_told_beforehand() {
    let (world, _others) = nested();
    let sub = world.host().join("sub");
    git(&sub, &["branch", "there"]);
    git(&sub, &["checkout", "--quiet", "-b", "own"]);
    git(&sub, &[&WHO[..], &["commit", "--quiet", "--allow-empty", "-m", "own"]].concat());
    git(&sub, &["checkout", "--quiet", "-b", "next", "there"]);
    let look = |name: &str| beforehand::branch(&world.workspace(), name).unwrap();
    for name in ["new", "there"] {
        assert_eq!(look(name), Vec::<String>::new(), "{name}");
    }
    for (name, expected) in [
        ("next", "the branch next is checked out in"),
        ("own/er", "the branch own/er cannot be beside the branch own"),
        ("own", "the branch own of the submodule sub has commits"),
    ] {
        let warnings = look(name);
        assert!(warnings.len() == 1 && warnings[0].contains(expected), "{name}: {warnings:?}");
        assert!(warnings[0].contains("the submodule sub"), "{name}: {warnings:?}");
    }
}

#[test]
fn objects_of_a_submodule_that_are_missing_or_wrong_do_not_reach_the_host() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let (host, guest) = (world.host(), world.guest());
    write(&guest.join("sub/s"), b"work\n");
    let head = commit(&guest.join("sub"), "the guest's");
    let blob = git(&guest.join("sub"), &["rev-parse", "HEAD:s"]);
    let objects = guest.join(".git/modules/sub/objects");
    let object = |name: &str| objects.join(&name[..2]).join(&name[2..]);
    for wrong in [false, true] {
        fs::remove_file(object(&blob)).unwrap();
        if wrong {
            fs::copy(object(&head), object(&blob)).unwrap();
        }
        let before = snapshot(&host);
        let error = world.export(Wish::Branch).branch("x", "m", false).unwrap_err();
        assert!(
            matches!(error, ExportError::History { .. } | ExportError::Refused { .. }),
            "{wrong}: {error:?}"
        );
        for place in [host.clone(), host.join("sub")] {
            let names = git(&place, &["for-each-ref", "--format=%(refname)", "refs/heads/x"]);
            assert_eq!(names, "", "{wrong}");
        }
        // Git leaves what it gave up as a file of its own sort, which its gc removes.
        let mut others = differing(&snapshot(&host), &before);
        others.retain(|path| !path.contains("/objects/pack/tmp_pack_"));
        assert_eq!(others, Vec::<String>::new(), "{wrong}");
        if !wrong {
            fs::copy(object(&head), object(&blob)).unwrap();
        }
    }
}

#[test]
fn each_repository_ignores_what_its_own_lists_say() {
    let (mut world, _others) = nested();
    let host = world.host();
    // What only the host's own lists have goes along.
    let exclude = |place: &str| {
        host.join(git(
            &host.join(place),
            &["rev-parse", "--path-format=absolute", "--git-path", "info/exclude"],
        ))
    };
    for (place, pattern) in [(".", "*.top\n"), ("sub", "*.sub\n"), ("sub/in ner", "*.inner\n")] {
        write(&exclude(place), pattern.as_bytes());
    }
    world.prepare(true);
    let guest = world.guest();
    write(&guest.join("sub/.gitignore"), b"*.sub-list\n");
    write(&guest.join("sub/in ner/.gitignore"), b"*.inner-list\n");
    write(&guest.join(".gitignore"), b"*.top-list\n");
    let kinds = ["top", "top-list", "sub", "sub-list", "inner", "inner-list"];
    for place in ["", "sub/", "sub/in ner/"] {
        for kind in kinds {
            write(&guest.join(format!("{place}made.{kind}")), b"made\n");
        }
    }
    let mut export = world.export(Wish::Files { ignored: false });
    let written = export.apply(true).unwrap().written;
    let mut found: Vec<String> =
        written.iter().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    found.retain(|path| path.contains("made"));
    // What git itself says.
    let mut expected = Vec::new();
    for (place, prefix) in [(".", ""), ("sub", "sub/"), ("sub/in ner", "sub/in ner/")] {
        let said = git(&guest.join(place), &["ls-files", "--others", "--exclude-standard", "*made*"]);
        expected.extend(said.lines().map(|name| format!("{prefix}{name}")));
    }
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(found.len(), 12, "each repository ignores two of six");
}

#[test]
fn nothing_of_a_submodules_configuration_is_run() {
    let (mut world, _others) = nested();
    world.prepare(true);
    let (guest, ran) = (world.guest(), world.beside("ran"));
    let program = world.beside("program");
    write(&program, format!("#!/bin/sh\ntouch {}\ncat\n", ran.display()).as_bytes());
    make_executable(&program);
    let program = program.to_str().unwrap();
    write(&guest.join("sub/s"), b"work\n");
    commit(&guest.join("sub"), "the guest's");
    let own = guest.join(".git/modules/sub");
    for (key, value) in [
        ("core.fsmonitor", program),
        ("core.hooksPath", "hooks"),
        ("filter.evil.clean", program),
        ("filter.evil.smudge", program),
        ("uploadpack.packObjectsHook", program),
        ("core.alternateRefsCommand", program),
    ] {
        git(&own, &["config", key, value]);
    }
    write(&guest.join("sub/.gitattributes"), b"* filter=evil\n");
    for hook in ["reference-transaction", "post-checkout", "pre-receive", "post-index-change"] {
        write(&own.join("hooks").join(hook), format!("#!/bin/sh\nexec {program}\n").as_bytes());
        make_executable(&own.join("hooks").join(hook));
    }
    write(&own.join("objects/info/alternates"), b"/nonexistent\n");
    let mut export = world.export(Wish::Branch);
    let report = export.branch("x", "m", false).unwrap();
    export.apply(false).unwrap();
    assert_eq!(report.submodules.len(), 1);
    assert!(!ran.exists(), "a program of the guest's ran on the host");
}
