//! Importers that do not do what they should: it is said whose fault it is, nobody has to wait for it, and another one takes over.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{fs, path::Path};

use serde_json::Value;
use vm_tests::{
    Output, World, programs,
    repository::{Repository, tree_of},
    wait_until,
    world::{BOOT, SHORT},
};

use crate::workspaces::{copied, start, text};

/// Exit code of a failure that is a plugin's.
const PLUGIN: i32 = 10;
const TO: &str = "/work/project";

/// An archive of one file by any name, and then something that is none of it.
fn archive(file: &Path, name: &str, size: u64, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    // Not by the library's own way, which refuses such names.
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    fs::write(file, bytes).unwrap();
}

fn locks(world: &World) -> Vec<Value> {
    let locks = world.ask(&["daemon", "status", "--locks"]);
    let rows = locks["locks"].as_array().or(locks.as_array()).cloned().unwrap_or_default();
    rows.into_iter().filter(|lock| lock.to_string().contains("workspaces of vm")).collect()
}

fn import(world: &World, path: &str) -> Output {
    world.vm(&["workspace", "prepare", "a", path, "--importer", "clumsy"]).within(BOOT).run()
}

/// What failed is said, nothing of it is in the way, and another importer brings all.
fn another_takes_over(world: &World, host: &Repository, failed: Output, words: &[&str]) {
    let failed = failed.exits(PLUGIN).complains("clumsy/half").complains(TO).complains("hint: ");
    let _ = words.iter().fold(failed, |failed, word| failed.complains(word));
    wait_until("the workspaces' lock is free", SHORT, || locks(world).is_empty());
    let listed = world.ask(&["workspace", "ls", "a"]);
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((&listed[0]["state"], &listed[0]["importer"]), (&"unfinished".into(), &"clumsy".into()));
    // What there is of it is no workspace.
    world.vm(&["workspace", "export", "a", "--apply"]).run().exits(4).complains("not whole");
    let outside = "! ls -d /work/outside /work/beside /etc/outside 2>/dev/null";
    world.vm(&["ssh", "a", outside]).run().exits(0).says("");

    world.vm(&["workspace", "prepare", "a", text(&host.0), "--importer", "copy"]).run().exits(0);
    let copy = copied(world, "a", TO, "copy");
    assert_eq!(tree_of(&copy.0), host.files());
    fs::remove_dir_all(copy.0).unwrap();
    // It begins anew, where nothing is.
    world.vm(&["ssh", "a", "rm -r /work"]).run().exits(0);
}

#[test]
fn an_importer_that_fails_half_way_is_named_and_another_takes_over() {
    let world = World::new();
    // The first import has so many milliseconds in all, in place of half an hour.
    world.vm(&["daemon", "start"]).env("FAILPOINTS", "workspace.import.time=1*return(10000)").run().exits(0);
    let host = Repository::with_history(world.directory().join("project"), 3, 60);
    let path = text(&host.0).to_owned();
    let clumsy = programs::test_plugin("clumsy");
    world.vm(&["plugin", "install", &clumsy, "--grant", "all", "--config", "fault=stall"]).run().exits(0);
    start(&world, "a");
    let with_fault = |fault: &str| {
        world.vm(&["plugin", "configure", "clumsy", &format!("fault={fault}")]).run().exits(0);
        import(&world, &path)
    };
    // What waits in the guest ends, too.
    let late = import(&world, &path);
    wait_until("nothing of it runs in the guest", SHORT, || {
        world
            .vm(&["ssh", "a", "! grep -l '[1]000000' /proc/[0-9]*/cmdline 2>/dev/null"])
            .run()
            .status
            .success()
    });
    another_takes_over(&world, &host, late, &["clumsy was stopped", "longer than 10000 ms"]);

    let trapped = with_fault("panic");
    world.vm(&["ssh", "a", "ls /work/project"]).run().exits(0).says("src\n");
    another_takes_over(
        &world,
        &host,
        trapped,
        &["clumsy broke off", "dropped it", "vm plugin disable clumsy"],
    );
    let spun = with_fault("spin");
    another_takes_over(&world, &host, spun, &["clumsy was stopped", "250 ms of processor time"]);

    // Archives that are none, lead out, or claim what cannot be.
    let shown = world.ask(&["plugin", "show", "clumsy"]);
    let files = Path::new(shown["files_dir"].as_str().unwrap());
    fs::create_dir_all(files).unwrap();
    archive(&files.join("outside.tar"), "../outside", 4, b"evil");
    archive(&files.join("absolute.tar"), "/etc/outside", 4, b"evil");
    archive(&files.join("absurd.tar"), "absurd", 7 << 30, b"some of it");
    fs::write(files.join("noise.tar"), [7; 4096]).unwrap();
    for (fault, words) in [
        ("outside.tar", &["../outside"][..]),
        ("absolute.tar", &["/etc/outside"]),
        ("absurd.tar", &["absurd"]),
        ("noise.tar", &["tar"]),
        ("bundle", &["tar"]),
        ("beside", &["beside"]),
    ] {
        let garbage = with_fault(fault);
        another_takes_over(&world, &host, garbage, &[&["importer clumsy"], words].concat());
    }

    // Of a workspace that was brought it throws nothing away.
    world.vm(&["workspace", "prepare", "a", &path, "--importer", "copy"]).run().exits(0);
    with_fault("panic").exits(4).complains("--replace");
    assert_eq!(world.ask(&["workspace", "ls", "a"])[0]["state"], "prepared");
    world.vm(&["plugin", "remove", "clumsy", "--purge"]).run().exits(0);
    world.leaves_nothing();
}
