//! What a world looks like from outside the programs under test. Two snapshots that are equal mean that nothing was left.
//!
//! Looked at are the host's own records: `ip -j`, `nft -j`, `/proc/sys/net`, `/sys/block`, `/proc`, `/sys/fs/cgroup`, the mount
//! table and the file tree. That each kind of leftover shows is tested with one planted leak of each.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::World;

/// One process looks at all that has to be looked at from inside: a heading for each kind, then what a tool says of it.
const LOOK: &str = "
    set -e
    echo @link; ip -j link
    echo @address; ip -j address
    echo @route; ip -j route show table all
    echo @rule; ip -j rule
    echo @nft; nft -j list ruleset
    echo @sysctl; grep -rs '' /proc/sys/net/ipv4 /proc/sys/net/ipv6 || true";

/// One line for each thing there is, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Of nothing.
    pub fn empty() -> Self {
        Self(BTreeSet::new())
    }

    /// Looks at links, addresses, routes, rules, firewall, network settings, mounts, loop devices, processes, cgroups and files.
    ///
    /// # Panics
    /// A tool that is needed for looking failing.
    #[track_caller]
    pub fn take(world: &World) -> Self {
        let mut lines = BTreeSet::new();
        let said = world.tool("sh", &["-c", LOOK]).run().exits(0).text();
        let mut kind = "";
        for line in said.lines() {
            match line.strip_prefix('@') {
                Some(heading) => kind = heading,
                None if kind == "sysctl" => lines.extend(setting(line)),
                None => lines.extend(items(kind, line)),
            }
        }
        lines.extend(world.namespaces().mounts().lines().map(|line| format!("mount {line}")));
        let processes = world.namespaces().processes();
        lines.extend(processes.iter().map(|process| format!("process {}", process.arguments)));
        lines.extend(loops(world.directory()));
        if let Some(instance) = world.instance() {
            lines.extend(cgroups(&instance));
        }
        for (kind, directory) in [("run", &world.dirs().run), ("state", &world.dirs().state)] {
            files(kind, &world.namespaces().path(directory), Path::new(""), &mut lines);
        }
        Self(lines)
    }

    /// What is gone and what is new since `before`, one line each.
    pub fn difference(&self, before: &Self) -> Vec<String> {
        let gone = before.0.difference(&self.0).map(|line| format!("gone {line}"));
        gone.chain(self.0.difference(&before.0).map(|line| format!("new {line}"))).collect()
    }

    /// Panics with what differs, where something does.
    ///
    /// # Panics
    /// See above; `context` is shown too.
    #[track_caller]
    pub fn must_equal(&self, before: &Self, context: &str) {
        let difference = self.difference(before);
        assert!(difference.is_empty(), "the host is not as it was before: {difference:#?}\n{context}");
    }
}

/// What `ip -j` or `nft -j` says, a line an item.
fn items(kind: &str, said: &str) -> Vec<String> {
    let value: Value = serde_json::from_str(said).unwrap_or_else(|error| panic!("{error} in {said}"));
    let mut items = value.get("nftables").unwrap_or(&value).as_array().cloned().unwrap_or_default();
    items.retain(|item| item.get("metainfo").is_none());
    items.iter_mut().for_each(forget_lifetimes);
    if kind != "address" {
        return items.iter().map(|item| format!("{kind} {item}")).collect();
    }
    // The rest of an item is the link's, which has a line already.
    let addresses = |item: &Value| {
        let device = item["ifname"].as_str().unwrap_or_default().to_owned();
        let addresses = item["addr_info"].as_array().cloned().unwrap_or_default();
        addresses.into_iter().map(move |address| format!("address {device} {address}"))
    };
    items.iter().flat_map(addresses).collect()
}

/// `/proc/sys/net/ipv4/ip_forward:1`; none of a single device, which comes and goes with that.
fn setting(line: &str) -> Option<String> {
    let path = line.strip_prefix("/proc/sys/net/")?;
    let mut parts = path.split('/').skip(1);
    if matches!(parts.next(), Some("conf" | "neigh"))
        && !matches!(parts.next(), Some("all" | "default" | "lo"))
    {
        return None;
    }
    Some(format!("sysctl {path}"))
}

/// Counts and time that pass of themselves, and numbers that are never given twice.
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
        .map(|file| format!("loop {}", file.trim()))
        .collect()
}

/// The roots of the control group hierarchies, one of version 2 or several of version 1.
pub fn cgroup_roots() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    words.filter(|words| words[2].starts_with("cgroup")).map(|words| PathBuf::from(words[1])).collect()
}

/// Control groups with the daemon's instance in a name. They are the host's, whatever namespace they were made in.
fn cgroups(instance: &str) -> Vec<String> {
    fn search(directory: &Path, instance: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains("vm") && name.contains(instance) {
                found.push(format!("cgroup {}", entry.path().display()));
            }
            search(&entry.path(), instance, found);
        }
    }
    let mut found = Vec::new();
    for root in cgroup_roots() {
        search(&root, instance, &mut found);
    }
    found
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
        if !is_shelf(&path) {
            lines.insert(format!("{kind} {what} {}", path.display()));
        }
        if what == "directory" {
            files(kind, root, &path, lines);
        }
    }
}

/// A directory of a plugin's that VMs' own are in; what is in it counts.
fn is_shelf(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    matches!(parts[..], ["plugins", _, "vms" | "runs" | "kept"])
}

/// What a daemon may keep between two lives without owing it to a VM: its log, the database's side files, the journal of
/// the host's network, the log of events, what all VMs of a kernel share (the initramfs, the kernel unpacked for Firecracker), and
/// plugins' calls that failed.
fn is_kept(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    if matches!(parts[..], ["plugins", _, "calls"]) {
        return true;
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let own = ["vmd.log", "vmd.db-wal", "vmd.db-shm", "host.jsonl", "host.handles.json", "events.jsonl"];
    own.contains(&name)
        || (path.starts_with("kernels") && (name.starts_with("initramfs-") || name == "vmlinux"))
}
