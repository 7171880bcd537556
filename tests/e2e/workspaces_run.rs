//! `vm run PATH`: whatever becomes of the command, its exit code is told and its work comes back.

use std::{fs, os::unix::fs::MetadataExt};

use vm_tests::{
    World, fixtures,
    repository::{Repository, tree_of},
};

use crate::workspaces::text;

/// A command that does something and fails.
const FAILS: [&str; 4] = ["--", "sh", "-c", "echo made >made; rm run.sh; echo partly >to-be-changed; exit 3"];

#[test]
fn the_work_of_a_command_that_fails_comes_back_in_any_form() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("project"), 3, 30);
    let path = text(&host.0).to_owned();
    let before = (host.state(), host.files());
    let run = |export: &str| {
        let options = ["run", &path, "--memory", "512M", "--export", export];
        world.vm(&[&options[..], &FAILS].concat()).run().exits(3)
    };
    let mut expected = host.files();
    expected.remove(b"run.sh".as_slice());

    run("branch=failed")
        .says("")
        .must("stderr says what came back", |ran| String::from_utf8_lossy(&ran.stderr).contains("failed"));
    let clone = Repository(world.directory().join("clone"));
    host.git(&["clone", "-q", "-b", "failed", &path, text(&clone.0)]);
    assert_eq!((clone.read("made"), clone.read("to-be-changed")), ("made\n".into(), "partly\n".into()));
    assert!(!clone.0.join("run.sh").exists());
    assert_eq!(host.git(&["rev-parse", "failed~1"]), host.git(&["rev-parse", "main"]));

    let patch = world.directory().join("failed.patch");
    run(&format!("patch={}", text(&patch)));
    let patched = Repository(world.directory().join("patched"));
    host.git(&["clone", "-q", "-b", "main", &path, text(&patched.0)]);
    patched.git_with(&["apply", "--index", "--binary"], &fs::read(&patch).unwrap());
    assert_eq!(patched.git(&["write-tree"]), clone.git(&["rev-parse", "HEAD^{tree}"]));

    let files = world.directory().join("files");
    run(&format!("files={}", text(&files)));
    let brought = tree_of(&files);
    let names: Vec<_> = brought.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    assert_eq!(names, ["made", "to-be-changed"]);
    assert_eq!(brought[b"made".as_slice()], tree_of(&clone.0)[b"made".as_slice()]);
    assert_eq!((host.state(), host.files()), before, "nothing of the host's own has changed");
    assert!(world.names().is_empty(), "nothing is left of any");
    world.leaves_nothing();
}

#[test]
fn a_guest_without_git_has_the_repository_all_the_same() {
    let world = World::new();
    let host = Repository::with_history(world.directory().join("project"), 3, 30);
    let path = text(&host.0).to_owned();
    let run = |command: &[&str]| {
        world.vm(&[&["run", &path, "--memory", "512M", "--importer", "git", "--"], command].concat()).run()
    };
    // As any other program that is not there.
    run(&["git", "status"]).exits(127).says("").complains("git: command not found");
    // What the importer brings needs none.
    let head = format!("{}\n", host.git(&["rev-parse", "HEAD"]));
    run(&["sh", "-c", "cat \"$(sed 's/^ref: /.git\\//' .git/HEAD)\""]).exits(0).says(&head);
    assert!(world.names().is_empty(), "nothing is left of either");
    world.leaves_nothing();
}

#[test]
fn work_that_was_applied_goes_on_from_there() {
    let world = World::new();
    let host = world.directory().join("plain");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("script"), "true\n").unwrap();
    // The same file under a name of somewhere else.
    fs::hard_link(host.join("script"), world.directory().join("elsewhere")).unwrap();
    let create = ["create", "--name", "a", "--image", fixtures::BUSYBOX, "--memory", "256M", "--start"];
    world.vm(&create).run().exits(0);
    world.vm(&["workspace", "prepare", "a", text(&host)]).run().exits(0);
    let work = |script: &str| {
        world.vm(&["ssh", "a", &format!("cd /work/plain && {script}")]).run().exits(0);
        world.vm(&["workspace", "export", "a", "--apply"]).run().exits(0);
    };
    work("mkdir -p new/deep empty && echo 1 >new/deep/file && chmod 755 script");
    assert_eq!(fs::read_to_string(host.join("new/deep/file")).unwrap(), "1\n");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&host.join("script")), 0o755);
    assert_eq!(mode(&world.directory().join("elsewhere")), 0o644, "nothing outside changes");
    // What came then is the guest's to change.
    work("rm -r new && echo 2 >new && rmdir empty && ln -s new empty");
    assert_eq!(fs::read_to_string(host.join("new")).unwrap(), "2\n");
    assert_eq!(fs::read_link(host.join("empty")).unwrap(), std::path::Path::new("new"));
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    world.leaves_nothing();
}
