//! Imports that break off: they leave nothing in anybody's way.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs::{self, File},
    io::Write,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use vm_tests::{
    Running, World,
    repository::{Repository, tree_of},
    wait_until,
    world::{BOOT, SHORT},
};

use crate::workspaces::{copied, start, text};

/// Enough to be caught on its way into an emulated guest.
const LARGE: u64 = 600 << 20;

/// A repository with a large file, which nothing on its way can make small.
fn large(world: &World) -> Repository {
    let host = Repository::with_history(world.directory().join("project"), 3, 30);
    let mut random = fastrand::Rng::with_seed(1);
    let mut block = vec![0; 1 << 20];
    let mut file = File::create(host.0.join("large")).unwrap();
    for _ in 0..LARGE >> 20 {
        random.fill(&mut block);
        file.write_all(&block).unwrap();
    }
    host
}

/// Begins an import, and waits until bytes are on their way.
fn begin(world: &World, path: &str) -> Running {
    let running = world.vm(&["workspace", "prepare", "a", path, "--importer", "copy", "--replace"]).start();
    wait_until("an import is on its way", BOOT, || {
        let operations = world.ask(&["operation", "ls"]);
        operations
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["kind"] == "workspace_prepare" && one["progress"]["done"].as_u64() > Some(8 << 20))
    });
    running
}

fn locks(world: &World) -> Vec<Value> {
    let locks = world.ask(&["daemon", "status", "--locks"]);
    let rows = locks["locks"].as_array().or(locks.as_array()).cloned().unwrap_or_default();
    rows.into_iter().filter(|lock| lock.to_string().contains("workspaces of vm")).collect()
}

/// It is over, nobody holds anything, and the next attempt brings all of it.
fn works_again(world: &World, host: &Repository) {
    wait_until("the workspaces' lock is free", SHORT, || locks(world).is_empty());
    let listed = world.ask(&["workspace", "ls", "a"]);
    assert_eq!(listed[0]["state"], "unfinished", "{listed}");
    let aside = world.directory().join("large");
    fs::rename(host.0.join("large"), &aside).unwrap();
    world.vm(&["workspace", "prepare", "a", text(&host.0)]).run().exits(0);
    let copy = copied(world, "a", "/work/project", "copy");
    assert_eq!(tree_of(&copy.0), host.files());
    assert_eq!(copy.state(), host.state());
    fs::remove_dir_all(copy.0).unwrap();
    fs::rename(aside, host.0.join("large")).unwrap();
}

#[test]
fn an_import_is_in_nobodys_way_and_can_be_tried_again() {
    let world = World::new();
    let host = large(&world);
    let path = text(&host.0);
    start(&world, "a");

    // Whoever stops the VM does not wait for it.
    let running = begin(&world, path);
    assert_eq!(locks(&world).len(), 1);
    // Another one waits for the first, and is given up with it.
    let second = world.vm(&["workspace", "prepare", "a", path, "--to", "/srv/second"]).start();
    wait_until("a second import waits", SHORT, || locks(&world).len() == 2);
    world.vm(&["stop", "a"]).run().exits(0);
    running.finish(SHORT).exits(1).complains("VM a went down");
    second.finish(SHORT).exits(1).complains("VM a went down");
    world.vm(&["workspace", "prepare", "a", path]).run().exits(4).complains("vm start a");
    world.vm(&["start", "a"]).run().exits(0);
    works_again(&world, &host);

    // A VMM that dies under it.
    let running = begin(&world, path);
    world.kill(world.vmm_pid("a"));
    running.finish(SHORT).exits(1).complains("VM a went down");
    world.wait_for_state("a", "failed");
    world.vm(&["start", "a"]).run().exits(0);
    works_again(&world, &host);

    // Nobody who waits for it any more, and somebody who has changed his mind.
    let mut running = begin(&world, path);
    running.signal(Signal::SIGKILL);
    running.finish(SHORT).dies_of(Signal::SIGKILL);
    works_again(&world, &host);
    let mut running = begin(&world, path);
    running.signal(Signal::SIGINT);
    running.finish(SHORT).exits(130);
    works_again(&world, &host);

    // A guest without room.
    let fill = "fallocate -l $(($(stat -f -c '%a * %S' /) - (64 << 20))) /filler";
    world.vm(&["ssh", "a", fill]).run().exits(0);
    let full = ["workspace", "prepare", "a", path, "--importer", "copy", "--replace"];
    world.vm(&full).run().exits(5).complains("copy/files").complains("space");
    world.vm(&["ssh", "a", "rm /filler"]).run().exits(0);
    works_again(&world, &host);

    // Deleting is not kept waiting either, and forgets it all.
    let running = begin(&world, path);
    let directory = world.paths("a").state;
    world.vm(&["delete", "--force", "a"]).run().exits(0);
    running.finish(SHORT).exits(1).complains("VM a went down");
    assert!(!directory.exists());
    world.leaves_nothing();
}
