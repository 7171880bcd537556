//! Programs that a guest's repository, or the host's own, names: none of them runs on the host when work comes back.

use std::{fs, path::Path};

use vm_workspace::export::Wish;

use crate::world::{World, git, git_with, make_executable, write};

/// Writes a program that tells that it ran, and by which name, in files of a directory.
fn program(world: &World, name: &str) -> String {
    let file = world.beside(&format!("program-{name}"));
    let told = world.beside("ran").join(name);
    write(&told.with_file_name(".keep"), b"");
    write(&file, format!("#!/bin/sh\ntouch {}\ncat\nexit 0\n", told.display()).as_bytes());
    make_executable(&file);
    file.to_str().unwrap().to_owned()
}

/// Which programs ran.
fn ran(world: &World) -> Vec<String> {
    let names = fs::read_dir(world.beside("ran")).unwrap();
    let mut names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != ".keep");
    names.sort();
    names
}

/// Names programs in every way that git has, in a repository and its working tree.
fn arm(world: &World, top: &Path) {
    let bundle = world.beside("bundle");
    git(top, &["bundle", "create", "--quiet", bundle.to_str().unwrap(), "--branches"]);
    let file = world.beside("included");
    let included =
        format!("[filter \"included\"]\n\tclean = {0}\n\tsmudge = {0}\n", program(world, "included"));
    write(&file, included.as_bytes());
    let hooks = top.join(".git/evil-hooks");
    for hook in [
        "applypatch-msg",
        "post-checkout",
        "post-commit",
        "post-index-change",
        "post-merge",
        "pre-commit",
        "pre-auto-gc",
        "pre-receive",
        "reference-transaction",
        "update",
    ] {
        let program = program(world, &format!("hook-{hook}"));
        for directory in [&hooks, &top.join(".git/hooks")] {
            write(&directory.join(hook), format!("#!/bin/sh\nexec {program}\n").as_bytes());
            make_executable(&directory.join(hook));
        }
    }
    for (key, name) in [
        ("core.fsmonitor", "fsmonitor"),
        ("core.sshCommand", "ssh"),
        ("core.pager", "pager"),
        ("core.editor", "editor"),
        ("core.askPass", "askpass"),
        ("core.gitProxy", "proxy"),
        ("core.alternateRefsCommand", "alternate-refs"),
        ("credential.helper", "credential"),
        ("diff.external", "diff-external"),
        ("diff.evil.textconv", "textconv"),
        ("diff.evil.command", "diff-command"),
        ("merge.evil.driver", "merge-driver"),
        ("filter.evil.clean", "clean"),
        ("filter.evil.smudge", "smudge"),
        ("filter.proc.process", "process"),
        ("gpg.program", "gpg"),
        ("sequence.editor", "sequence"),
        ("uploadpack.packObjectsHook", "pack-objects"),
    ] {
        git(top, &["config", key, &program(world, name)]);
    }
    for (key, value) in [
        ("core.hooksPath", hooks.to_str().unwrap()),
        ("include.path", file.to_str().unwrap()),
        ("filter.evil.required", "true"),
        ("commit.gpgSign", "true"),
        ("tag.gpgSign", "true"),
        ("fetch.bundleURI", bundle.to_str().unwrap()),
        ("protocol.ext.allow", "always"),
        (&format!("url.ext::sh -c {}</dev/null .insteadOf", program(world, "transport")), "/"),
    ] {
        git(top, &["config", key, value]);
    }
    for name in ["fetch", "diff", "status", "ls-files", "rev-parse", "read-tree"] {
        git(
            top,
            &["config", &format!("alias.{name}"), &format!("!{}", program(world, &format!("alias-{name}")))],
        );
    }
    let attributes = b"*.a filter=evil diff=evil merge=evil\n*.b filter=proc\n*.c filter=included\n";
    write(&top.join(".gitattributes"), attributes);
    write(&top.join(".git/info/attributes"), attributes);
}

/// Work of all sorts, that git would call such programs for.
fn work(top: &Path) {
    for name in ["one.a", "one.b", "one.c", "new.a", "new.b", "new.c"] {
        write(&top.join(name), b"work\n");
    }
}

/// Brings work back in every way.
fn bring_all(world: &World) {
    let aside = world.beside("aside");
    for wish in [Wish::Files { ignored: true }, Wish::Patch, Wish::Branch] {
        let mut export = world.export(wish);
        assert!(!export.changes().unwrap().is_empty());
        export.apply(true).unwrap();
        export.files(&aside, false).unwrap();
        if wish != (Wish::Files { ignored: true }) {
            let mut patch = Vec::new();
            export.patch(&mut patch).unwrap();
            assert!(String::from_utf8_lossy(&patch).contains("+work"));
        }
        if wish == Wish::Branch {
            export.branch("dry", "m", true).unwrap();
            export.branch("x", "m", false).unwrap();
            // Another commit, and the branch moves.
            export.apply(false).unwrap();
        }
        export.warnings();
    }
}

/// What came by a bundle that a configuration names.
fn bundled(top: &Path) -> String {
    git(top, &["for-each-ref", "refs/bundles"])
}

fn files() -> World {
    World::with(&[("one.a", "1\n"), ("one.b", "1\n"), ("one.c", "1\n")])
}

#[test]
fn of_the_guests_repository_none_runs_on_the_host() {
    let mut world = files();
    world.prepare(true);
    let guest = world.guest();
    work(&guest);
    git(&guest, &["commit", "--quiet", "-am", "the guest's"]);
    write(&guest.join("one.a"), b"work again\n");
    arm(&world, &guest);
    // They do run where somebody runs git: so this test would notice.
    let _ = git_with(&guest, &["diff", "HEAD"], &[], b"");
    let _ = git_with(&guest, &["add", "--all"], &[], b"");
    let _ = git_with(&guest, &["fetch", "--quiet", "/somewhere"], &[], b"");
    let there = ran(&world);
    for name in ["fsmonitor", "diff-command", "clean", "included", "hook-post-index-change", "transport"] {
        assert!(there.contains(&name.to_owned()), "{name} would not be noticed: {there:?}");
    }
    assert_ne!(bundled(&guest), "", "bundles would not be noticed");
    fs::remove_dir_all(world.beside("ran")).unwrap();
    write(&world.beside("ran/.keep"), b"");
    // The index is as git has left it; the working tree is said to be the host's.
    let host = world.host();
    git(&guest, &["config", "core.worktree", host.to_str().unwrap()]);
    let _ = fs::remove_dir_all(world.beside("ran"));
    write(&world.beside("ran/.keep"), b"");
    let configuration = fs::read(host.join(".git/config")).unwrap();

    bring_all(&world);

    assert_eq!(ran(&world), Vec::<String>::new());
    assert_eq!(fs::read(host.join(".git/config")).unwrap(), configuration);
    assert!(!host.join(".git/evil-hooks").exists() && !host.join(".git/info/attributes").exists());
    assert_eq!(git(&host, &["show", "x:new.a"]), "work", "no filter has changed it either");
    assert_eq!(fs::read(host.join("one.a")).unwrap(), b"work again\n");
}

#[test]
fn of_the_hosts_own_repository_none_runs_either() {
    // Somebody else's repository that was unpacked on the host: its owner may never have run git in it.
    let mut world = files();
    let host = world.host();
    arm(&world, &host);
    let _ = fs::remove_dir_all(world.beside("ran"));
    write(&world.beside("ran/.keep"), b"");
    write(&host.join("one.b"), b"not committed\n");
    world.prepare(true);
    assert_eq!(ran(&world), Vec::<String>::new(), "when it was brought");
    work(&world.guest());
    let guests = ["-c", "core.hooksPath=/dev/null", "commit", "--quiet", "-am", "the guest's"];
    git(&world.guest(), &guests);
    write(&world.guest().join("one.c"), b"work again\n");
    bring_all(&world);
    assert_eq!(ran(&world), Vec::<String>::new(), "when it was brought back");
    assert_eq!(bundled(&host), "", "nor is anything fetched from elsewhere");
    assert_eq!(fs::read(host.join("one.c")).unwrap(), b"work again\n");
}
