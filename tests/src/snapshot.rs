//! What a world looks like from outside the programs under test. Two snapshots that are equal mean that nothing was left.

use std::{collections::BTreeSet, fmt::Write, fs, path::Path};

use serde_json::Value;

use crate::World;

/// One line for each thing there is, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at links, addresses, routes, rules, firewall, forwarding, mounts, loop devices, processes and files.
    ///
    /// # Panics
    /// A tool that is needed for looking failing.
    pub fn take(world: &World) -> Self {
        let mut lines = BTreeSet::new();
        for (kind, tool, arguments) in [
            ("link", "ip", &["-j", "link"][..]),
            ("address", "ip", &["-j", "address"]),
            ("route", "ip", &["-j", "route", "show", "table", "all"]),
            ("rule", "ip", &["-j", "rule"]),
            ("nft", "nft", &["-j", "list", "ruleset"]),
        ] {
            let value = world.tool(tool, arguments).run().exits(0).json();
            let items = value.get("nftables").unwrap_or(&value).as_array().cloned().unwrap_or_default();
            lines.extend(items.iter().filter(|item| item.get("metainfo").is_none()).map(|item| {
                let mut item = item.clone();
                forget_lifetimes(&mut item);
                format!("{kind} {item}")
            }));
        }
        let forwarding = world.tool("cat", &["/proc/sys/net/ipv4/ip_forward"]).run().exits(0);
        lines.insert(format!("forwarding {}", forwarding.text().trim()));
        lines.extend(world.namespaces().mounts().lines().map(|line| format!("mount {line}")));
        let processes = world.namespaces().processes();
        lines.extend(processes.iter().map(|process| format!("process {}", process.arguments)));
        lines.extend(loops(world.directory()));
        for (kind, directory) in [("run", &world.dirs().run), ("state", &world.dirs().state)] {
            files(kind, &world.namespaces().path(directory), Path::new(""), &mut lines);
        }
        Self(lines)
    }

    /// Panics with what differs, where something does.
    ///
    /// # Panics
    /// See above; `context` is shown too.
    #[track_caller]
    pub fn must_equal(&self, before: &Self, context: &str) {
        let mut difference = String::new();
        for line in before.0.difference(&self.0) {
            let _ = writeln!(difference, "  gone  {line}");
        }
        for line in self.0.difference(&before.0) {
            let _ = writeln!(difference, "  new   {line}");
        }
        assert!(difference.is_empty(), "the host is not as it was before:\n{difference}{context}");
    }
}

/// Counts and time that pass of themselves.
fn forget_lifetimes(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for key in ["valid_life_time", "preferred_life_time", "expires", "packets", "bytes", "handle"] {
                map.remove(key);
            }
            map.values_mut().for_each(forget_lifetimes);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_lifetimes),
        _ => {}
    }
}

/// Loop devices over files of this world; all others of the host are none of ours.
fn loops(directory: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backed =
        devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    backed
        .filter(|file| Path::new(file.trim()).starts_with(directory))
        .map(|file| format!("loop {file}"))
        .collect()
}

fn files(kind: &str, root: &Path, below: &Path, lines: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root.join(below)).into_iter().flatten().flatten() {
        let path = below.join(entry.file_name());
        if is_kept(&path) {
            continue;
        }
        let what = entry.file_type().map_or("?", |kind| match (kind.is_dir(), kind.is_symlink()) {
            (true, _) => "directory",
            (_, true) => "link",
            _ => "file",
        });
        lines.insert(format!("{kind} {what} {}", path.display()));
        if what == "directory" {
            files(kind, root, &path, lines);
        }
    }
}

/// What a daemon may keep between two lives without owing it to a VM: its log, the database's side files, the journal of
/// the host's network, and the initramfs that all VMs of a kernel share.
fn is_kept(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    matches!(name, "vmd.log" | "vmd.db-wal" | "vmd.db-shm" | "host.jsonl" | "host.handles.json")
        || (path.starts_with("kernels") && name.starts_with("initramfs-"))
}
