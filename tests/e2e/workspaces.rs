//! Workspaces: a repository in a VM is the host's, and the work done there comes back as it is.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};
use vm_tests::{
    World, programs,
    repository::{Repository, tree_of},
    world::BOOT,
};

/// A VM that work is done in.
pub(crate) fn start(world: &World, name: &str) {
    world.vm(&["create", "--name", name, "--memory", "512M", "--start"]).run().exits(0);
}

/// A copy on the host of what the guest has in a directory.
pub(crate) fn copied(world: &World, vm: &str, directory: &str, name: &str) -> Repository {
    let archive =
        world.vm(&["ssh", vm, &format!("tar -C '{directory}' -c .")]).within(BOOT).run().exits(0).stdout;
    let to = world.directory().join(name);
    fs::create_dir(&to).unwrap();
    let tar = world.directory().join("copied.tar");
    fs::write(&tar, archive).unwrap();
    let untar = Command::new("tar").arg("-C").arg(&to).arg("-xpf").arg(&tar).status().unwrap();
    assert!(untar.success());
    fs::remove_file(tar).unwrap();
    Repository(to)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn each_importer_brings_what_the_host_has() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("project"), 20, 3000);
    let path = text(&host.0).to_owned();

    let plan = world.ask(&["workspace", "plan", &path]);
    assert_eq!(
        (plan["chosen"].as_str(), plan["to"].as_str()),
        (Some("git/shallow"), Some("/work/project")),
        "{plan}"
    );
    assert_eq!(plan["facts"]["branch"], "main");
    assert_eq!(
        (&plan["facts"]["modified"], &plan["facts"]["deleted"], &plan["facts"]["untracked"]),
        (&json!(1), &json!(1), &json!(1))
    );

    start(&world, "a");
    let prepare = |arguments: &[&str]| {
        let arguments: Vec<_> =
            ["workspace", "prepare", "a", &path].iter().chain(arguments).copied().collect();
        world.ask(&arguments)["workspace"].clone()
    };
    let shallow = prepare(&[]);
    assert_eq!(
        (&shallow["strategy"], &shallow["base"]),
        (&json!("shallow"), &json!(host.git(&["rev-parse", "HEAD"])))
    );
    let copy = copied(&world, "a", "/work/project", "shallow");
    assert_eq!(copy.state(), host.state());
    assert_eq!(copy.whole_tree(), host.whole_tree());
    assert_eq!(tree_of(&copy.0), host.files());
    assert_eq!(copy.git(&["rev-list", "--count", "HEAD"]), "1");

    // What changes on the host afterwards, commits included, is all that is sent then.
    host.write("src/part00/module00/file0.c", "edited on the host\n");
    fs::remove_file(host.0.join("untracked/new file")).unwrap();
    host.write("added", "added on the host\n");
    host.git(&["add", "added"]);
    host.git(&["commit", "-q", "-m", "one more", "added"]);
    world.vm(&["ssh", "a", "echo mine >/work/project/of-the-guest"]).run().exits(0);
    let again = prepare(&[]);
    assert_eq!((&again["importer"], &again["strategy"]), (&json!("incremental"), &json!("changes")));
    let copy = copied(&world, "a", "/work/project", "incremental");
    assert_eq!(copy.read("of-the-guest"), "mine\n");
    fs::remove_file(copy.0.join("of-the-guest")).unwrap();
    assert_eq!(copy.state(), host.state());
    assert_eq!(tree_of(&copy.0), host.files());

    let full = prepare(&["--full", "--to", "/srv/full"]);
    assert_eq!(full["strategy"], "full");
    let copy = copied(&world, "a", "/srv/full", "full");
    assert_eq!(copy.state(), host.state());
    assert_eq!(copy.git(&["rev-list", "HEAD"]), host.git(&["rev-list", "HEAD"]));

    prepare(&["--importer", "copy", "--to", "/srv/copy", "--user", "daemon"]);
    let copy = copied(&world, "a", "/srv/copy", "copy");
    assert!(!copy.0.join(".git").exists());
    assert_eq!(tree_of(&copy.0), host.files());
    world.vm(&["ssh", "a", "stat -c %U /srv/copy /srv/copy/run.sh"]).run().exits(0).says("daemon\ndaemon\n");

    let listed = world.ask(&["workspace", "ls", "a"]);
    let paths: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/srv/copy", "/srv/full", "/work/project"]);
    // Not over what is there, unless somebody says so.
    let over = ["workspace", "prepare", "a", &path, "--importer", "copy", "--to", "/srv/full"];
    world.vm(&over).run().exits(4).complains("/srv/full");
    world.vm(&[&over[..], &["--replace"]].concat()).run().exits(0);
    world.vm(&["ssh", "a", "test ! -e /srv/full/.git"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn the_guests_work_comes_back() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("project"), 5, 100);
    let path = text(&host.0).to_owned();
    start(&world, "a");
    world.vm(&["workspace", "prepare", "a", &path]).run().exits(0);
    let work = r#"cd /work/project && set -e
        echo 'edited in the guest' >src/part01/module01/file1.c
        rm src/part02/module02/file2.c
        chmod 644 run.sh
        mkdir -p new/deep; printf 'a\0b\377' >new/deep/blob; ln -s ../run.sh new/link
        mkdir -p ignored; echo no >ignored/me; echo no >x.o
        echo 'both' >to-be-changed"#;
    world.vm(&["ssh", "a", work]).run().exits(0);

    let status = world.ask(&["workspace", "status", "a"]);
    let changed: Vec<_> = status["guest"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["path"].as_str().unwrap(), one["kind"].as_str().unwrap()))
        .collect();
    let expected = [
        ("new/deep/blob", "added"),
        ("new/link", "added"),
        ("run.sh", "mode_changed"),
        ("src/part01/module01/file1.c", "modified"),
        ("src/part02/module02/file2.c", "deleted"),
        ("to-be-changed", "modified"),
    ];
    assert_eq!(changed, expected, "{status}");
    assert_eq!(status["host"], json!([]));

    let copy = copied(&world, "a", "/work/project", "copy");
    let before = (host.state(), host.files());

    // As a branch: what git makes of the guest's tree.
    let dry = world.ask(&["workspace", "export", "a", "--branch", "work/vm", "--dry-run"]);
    assert_eq!((&dry["dry_run"], &dry["how"]), (&json!(true), &json!("branch")));
    assert_eq!(host.git(&["branch", "--list", "work/vm"]), "");
    world.vm(&["workspace", "export", "a", "--branch", "work/vm", "-m", "from the VM"]).run().exits(0);
    assert_eq!(host.git(&["rev-parse", "work/vm^{tree}"]), copy.whole_tree());
    assert_eq!(host.git(&["log", "-1", "--format=%s", "work/vm"]), "from the VM");
    assert_eq!(host.git(&["rev-parse", "work/vm~1"]), host.git(&["rev-parse", "main"]));

    // As a patch: on the commit it gives the same.
    let patch = world.vm(&["workspace", "diff", "a"]).run().exits(0).stdout;
    let file = world.directory().join("work.patch");
    world.vm(&["workspace", "export", "a", "--patch", text(&file)]).run().exits(0);
    assert_eq!(fs::read(&file).unwrap(), patch);
    let clone = Repository(world.directory().join("clone"));
    host.git(&["clone", "-q", &path, text(&clone.0)]);
    clone.git_with(&["apply", "--binary", "--index"], &patch);
    assert_eq!(clone.git(&["write-tree"]), copy.whole_tree());
    assert_eq!((host.state(), host.files()), before, "nothing of the host's own has changed");

    // As files, in another place.
    let out = world.directory().join("out");
    world.vm(&["workspace", "export", "a", "--files", text(&out)]).run().exits(0);
    let files = tree_of(&out);
    assert_eq!(files[&b"new/deep/blob".to_vec()], copy.files()[&b"new/deep/blob".to_vec()]);
    assert!(!files.contains_key(b"x.o".as_slice()), "git ignores it");

    // Onto the host's own, but for what the host has changed itself.
    host.write("to-be-changed", "newer on the host\n");
    let dry = world.vm(&["workspace", "export", "a", "--apply", "--dry-run", "--json"]).run().exits(4).json();
    assert_eq!(names(&dry["conflicts"]), ["to-be-changed"]);
    assert!(!host.0.join("new").exists());
    let applied = world.vm(&["workspace", "export", "a", "--apply"]).run().exits(4);
    applied.complains("to-be-changed");
    assert_eq!(host.read("to-be-changed"), "newer on the host\n");
    let mut expected = copy.files();
    let own = host.files();
    expected.insert(b"to-be-changed".to_vec(), own[&b"to-be-changed".to_vec()].clone());
    assert_eq!(own, expected);
    assert_eq!(host.read("ignored/large"), "ignored\n");

    // Work that goes on after it was brought back is no conflict with itself.
    world.vm(&["ssh", "a", "echo 'edited again' >/work/project/src/part01/module01/file1.c"]).run().exits(0);
    let applied = world.vm(&["workspace", "export", "a", "--apply", "--json"]).run().exits(4).json();
    assert_eq!(names(&applied["conflicts"]), ["to-be-changed"]);
    assert_eq!(host.read("src/part01/module01/file1.c"), "edited again\n");
    world.leaves_nothing();
}

#[test]
fn a_run_takes_a_directory_along_and_brings_it_back() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("my repo"), 3, 30);
    let path = text(&host.0).to_owned();
    let script = "pwd; cat to-be-changed; echo made >made; exit 3";
    let command = ["--memory", "512M", "--export", "apply", "--", "sh", "-c", script];
    let ran = world.vm(&[&["run", &path][..], &command].concat()).run().exits(3);
    ran.says("/work/my-repo\nchanged, not committed\n");
    assert_eq!(host.read("made"), "made\n");
    assert!(world.names().is_empty(), "nothing is left of it");

    // What could not be brought back is not thrown away.
    let conflict = "echo there >made; echo go; while [ ! -e go ]; do sleep 0.1; done; rm go";
    let running = world
        .vm(&["run", &path, "--memory", "512M", "--export", "apply", "--", "sh", "-c", conflict])
        .start();
    running.expect("go\n", BOOT);
    host.write("made", "meanwhile\n");
    let vm = world.names().remove(0);
    world.vm(&["ssh", &vm, "touch /work/my-repo/go"]).run().exits(0);
    let ended = running.finish(BOOT).exits(125);
    ended.complains("made").complains(&format!("VM {vm} is kept"));
    assert_eq!(host.read("made"), "meanwhile\n");
    assert_eq!(world.state(&vm), "running");
    world.vm(&["ssh", &vm, "cat /work/my-repo/made"]).run().exits(0).says("there\n");
    world.leaves_nothing();
}

#[test]
fn an_importer_of_somebody_elses_is_used_by_its_name_and_by_the_workspaces_own_wish() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("project"), 3, 60);
    let path = text(&host.0).to_owned();
    let slice = programs::test_plugin("slice");
    let configure =
        ["--config", r#"directories=["src"]"#, "--config", r#"command=["sh","-c","id -un >who"]"#];
    world.vm(&[&["plugin", "install", &slice, "--grant", "all"][..], &configure].concat()).run().exits(0);
    start(&world, "a");
    let brought = world.ask(&["workspace", "prepare", "a", &path, "--importer", "slice", "--user", "daemon"]);
    assert_eq!(brought["workspace"]["importer"], "slice");
    let copy = copied(&world, "a", "/work/project", "copy");
    let mut expected = host.files();
    expected.retain(|path, _| path.starts_with(b"src/"));
    let mut got = tree_of(&copy.0);
    got.retain(|path, _| path.starts_with(b"src/"));
    assert_eq!(got, expected);
    assert_eq!(copy.read("who"), "daemon\n");
    assert!(copy.read("SLICE.json").contains(&host.git(&["rev-parse", "HEAD"])));

    // The workspace says which one it wants, where, and whose; a person's word counts more.
    host.write("vm.toml", "[workspace]\nimporter = \"copy\"\nto = \"/srv/there\"\nuser = \"daemon\"\n");
    let plan = world.ask(&["workspace", "plan", &path]);
    assert_eq!(
        (&plan["chosen"], &plan["to"], &plan["user"]),
        (&json!("copy/files"), &json!("/srv/there"), &json!("daemon"))
    );
    let plan = world.ask(&["workspace", "plan", &path, "--importer", "git", "--to", "/x"]);
    assert_eq!((&plan["chosen"], &plan["to"]), (&json!("git/shallow"), &json!("/x")));
    host.write("vm.toml", "[workspace]\ncommand = \"rm\"\n");
    world.vm(&["workspace", "plan", &path]).run().exits(2).complains("command").complains("vm.toml");

    // One whose command fails says so in its own words.
    host.write("vm.toml", "");
    let fails = r#"command=["sh","-c","echo no such luck >&2; exit 9"]"#;
    world.vm(&["plugin", "configure", "slice", fails]).run().exits(0);
    let failed =
        world.vm(&["workspace", "prepare", "a", &path, "--importer", "slice", "--to", "/srv/b"]).run();
    failed.exits(10).complains("slice/directories").complains("no such luck");
    let listed = world.ask(&["workspace", "ls", "a"]);
    assert_eq!((&listed[0]["path"], &listed[0]["state"]), (&json!("/srv/b"), &json!("unfinished")));
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    world.vm(&["plugin", "remove", "slice", "--purge"]).run().exits(0);
    world.leaves_nothing();
}
