//! Control groups of VMMs: `Effect::Cgroup`, and what of it this host has room for.
//!
//! In the unified hierarchy (cgroups(7), version 2) a group lies at its root, since a group that has processes, such as the
//! daemon's own, can have none below it that has limits; and only what is switched on there already is limited. In hierarchies
//! of version 1 it lies below the daemon's own group, whose limits so hold for it too.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::{AccessFlags, access};
use tokio::time::{Instant, sleep};
use vm_types::{Cgroup, Effect, InstanceId, Observed, VmId};

use crate::EngineError;

/// How long the last process of a group may take to leave it after it was killed.
const LEAVE: Duration = Duration::from_secs(10);
/// Pause between attempts to remove a group, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// The period of a processor limit in microseconds, which is the kernel's own choice.
const PERIOD: u64 = 100_000;

/// What a VMM may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    /// Processors that it may keep busy.
    pub(crate) cpus: u64,
    /// Processes and threads.
    pub(crate) tasks: u64,
}

/// Something that can be limited here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Controller {
    name: &'static str,
    /// Where groups are made.
    parent: PathBuf,
    unified: bool,
}

const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// The group for a VMM; empty where this host has no place for it.
pub(crate) fn group(name: &str, limits: Limits) -> Vec<Cgroup> {
    let mut groups: Vec<Cgroup> = Vec::new();
    for controller in controllers() {
        let path = controller.parent.join(name);
        let mut settings = controller.settings(limits);
        match groups.iter_mut().find(|group| group.path == path) {
            Some(group) => group.settings.append(&mut settings),
            None => groups.push(Cgroup { path, settings }),
        }
    }
    groups
}

/// What the group of a VM's VMM is called.
pub(crate) fn name(instance: &InstanceId, vm: &str) -> String {
    format!("vmd-{instance}-{vm}")
}

/// What VMMs can be limited in here, of `memory`, `cpu` and `pids`.
pub fn limitable() -> Vec<&'static str> {
    controllers().iter().map(|controller| controller.name).collect()
}

/// Those of this host in which the daemon may make groups.
fn controllers() -> Vec<Controller> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut found = places(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
    found.retain(|controller| {
        let enabled = || {
            let on = fs::read_to_string(controller.parent.join("cgroup.subtree_control")).unwrap_or_default();
            on.split_ascii_whitespace().any(|name| name == controller.name)
        };
        access(&controller.parent, AccessFlags::W_OK).is_ok() && (!controller.unified || enabled())
    });
    found
}

/// Where each controller's groups would be, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)) and `/proc/self/cgroup`.
fn places(mounts: &str, own: &str) -> Vec<Controller> {
    let mut found: Vec<Controller> = Vec::new();
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let (&[_, _, _, root, point, ..], &[kind, _, options, ..]) = (&left[..], &right[..]) else {
            continue;
        };
        for name in CONTROLLERS {
            let controller = match kind {
                "cgroup" if options.split(',').any(|option| option == name) => {
                    let below = own_group(own, name).and_then(|own| Path::new(own).strip_prefix(root).ok());
                    // A group outside of what is mounted has no directory here.
                    let below = below.filter(|below| !below.to_string_lossy().contains(".."));
                    let parent = Path::new(point).join(below.unwrap_or(Path::new("")));
                    Controller { name, parent, unified: false }
                }
                "cgroup2" => Controller { name, parent: point.into(), unified: true },
                _ => continue,
            };
            // A controller is in one hierarchy only, and on a host with both kinds it is mostly the older one.
            match found.iter_mut().find(|found| found.name == name) {
                Some(known) if known.unified => *known = controller,
                Some(_) => {}
                None => found.push(controller),
            }
        }
    }
    found
}

/// The group of this process in the hierarchy of version 1 that has a controller: `4:cpu,cpuacct:/path`.
fn own_group<'a>(own: &'a str, controller: &str) -> Option<&'a str> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        names.split(',').any(|name| name == controller).then_some(path)
    })
}

impl Controller {
    fn settings(&self, limits: Limits) -> Vec<(String, String)> {
        let quota = limits.cpus * PERIOD;
        let settings = match (self.name, self.unified) {
            ("memory", true) => vec![("memory.max", limits.memory_bytes.to_string())],
            ("memory", false) => vec![("memory.limit_in_bytes", limits.memory_bytes.to_string())],
            ("cpu", true) => vec![("cpu.max", format!("{quota} {PERIOD}"))],
            ("cpu", false) => {
                vec![("cpu.cfs_period_us", PERIOD.to_string()), ("cpu.cfs_quota_us", quota.to_string())]
            }
            _ => vec![("pids.max", limits.tasks.to_string())],
        };
        settings.into_iter().map(|(file, value)| (file.to_owned(), value)).collect()
    }
}

/// Makes a group with its settings; one that is there gets them anew. A setting that the kernel refuses is left out, and the others
/// hold: a quota of version 1 cannot be more than that of the group above it, which then is the limit all the same.
///
/// # Errors
/// A directory that cannot be made.
pub(super) fn make(groups: &[Cgroup]) -> Result<(), EngineError> {
    for Cgroup { path, settings } in groups {
        match fs::create_dir(path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(EngineError::File { action: "create", path: path.clone(), source });
            }
            _ => {}
        }
        for (file, value) in settings {
            let path = path.join(file);
            // Not created: a file that is not there is a limit that is not kept.
            let written = fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
            if let Err(error) = written {
                tracing::warn!(setting = %path.display(), value, %error, "a limit of a VMM is refused, and left out");
            }
        }
    }
    Ok(())
}

/// There as soon as one of its directories is.
pub(super) fn observe(groups: &[Cgroup]) -> Observed {
    match groups.iter().any(|group| group.path.is_dir()) {
        true => Observed::Present(vm_types::Handle::None),
        false => Observed::Absent,
    }
}

/// Groups of a daemon's VMMs that are there and in which nothing is.
pub(crate) fn empty(instance: &InstanceId) -> Vec<Effect> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let places = places(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
    let parents: BTreeSet<_> = places.into_iter().map(|controller| controller.parent).collect();
    empty_below(parents, instance)
}

fn empty_below(parents: impl IntoIterator<Item = PathBuf>, instance: &InstanceId) -> Vec<Effect> {
    let mut found: BTreeMap<VmId, Vec<Cgroup>> = BTreeMap::new();
    let prefix = name(instance, "");
    for entry in parents.into_iter().filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten() {
        let id = entry.file_name().to_str().and_then(|name| name.strip_prefix(&prefix)?.parse().ok());
        if let Some(id) = id.filter(|_| is_empty(&entry.path())) {
            found.entry(id).or_default().push(Cgroup { path: entry.path(), settings: Vec::new() });
        }
    }
    let effect = |(id, groups): (VmId, _)| Effect::Cgroup { name: name(instance, id.as_str()), groups };
    found.into_iter().map(effect).collect()
}

/// Whether a group has neither processes nor groups below it. What cannot be looked at is not said to be empty.
fn is_empty(group: &Path) -> bool {
    let no_process = fs::read(group.join("cgroup.procs")).is_ok_and(|processes| processes.is_empty());
    let below = |entry: io::Result<fs::DirEntry>| {
        !entry.is_ok_and(|it| it.file_type().is_ok_and(|kind| !kind.is_dir()))
    };
    no_process && fs::read_dir(group).is_ok_and(|mut entries| !entries.any(below))
}

/// Removes a group, waiting for processes that have been killed to leave it.
///
/// # Errors
/// Somebody staying in it.
pub(super) async fn remove(groups: &[Cgroup]) -> Result<(), EngineError> {
    let deadline = Instant::now() + LEAVE;
    for Cgroup { path, .. } in groups {
        let mut pause = PAUSE.0;
        loop {
            match fs::remove_dir(path) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
                Err(source) => {
                    return Err(EngineError::File { action: "remove", path: path.clone(), source });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { memory_bytes: 1 << 30, cpus: 3, tasks: 100 };

    fn place<'a>(found: &'a [Controller], name: &str) -> Option<(&'a str, bool)> {
        let found = found.iter().find(|found| found.name == name)?;
        Some((found.parent.to_str().unwrap(), found.unified))
    }

    #[test]
    fn groups_of_the_first_version_lie_below_the_daemons_own() {
        let mounts = "30 24 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
                      31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      32 24 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = "4:memory:/system.slice/vmd.service\n2:cpu,cpuacct:/\n0::/system.slice\n";
        let found = places(mounts, own);
        assert_eq!(place(&found, "memory"), Some(("/sys/fs/cgroup/memory/system.slice/vmd.service", false)));
        assert_eq!(place(&found, "cpu"), Some(("/sys/fs/cgroup/cpu,cpuacct/", false)));
        assert_eq!(place(&found, "pids"), Some(("/sys/fs/cgroup/unified", true)));
    }

    #[test]
    fn a_group_that_is_not_mounted_is_not_looked_for_outside() {
        let mounts = "30 24 0:26 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let found = places(mounts, "4:memory:/docker/x/y\n");
        assert_eq!(place(&found, "memory"), Some(("/sys/fs/cgroup/memory/y", false)));
        for own in ["4:memory:/../elsewhere\n", "4:memory:/other\n", ""] {
            let found = places(mounts, own);
            assert_eq!(place(&found, "memory"), Some(("/sys/fs/cgroup/memory/", false)), "{own}");
        }
    }

    #[test]
    fn the_kernel_is_told_limits_in_the_words_of_its_version() {
        let settings = |name, unified| Controller { name, parent: "/".into(), unified }.settings(LIMITS);
        let pair = |file: &str, value: &str| (file.to_owned(), value.to_owned());
        assert_eq!(settings("memory", true), [pair("memory.max", "1073741824")]);
        assert_eq!(settings("memory", false), [pair("memory.limit_in_bytes", "1073741824")]);
        assert_eq!(settings("cpu", true), [pair("cpu.max", "300000 100000")]);
        assert_eq!(settings("cpu", false)[1], pair("cpu.cfs_quota_us", "300000"));
        assert_eq!(settings("pids", true), [pair("pids.max", "100")]);
    }

    #[tokio::test]
    async fn a_group_can_be_removed_also_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let groups = [Cgroup { path: dir.path().join("group"), settings: Vec::new() }];
        make(&groups).unwrap();
        assert_eq!(observe(&groups), Observed::Present(vm_types::Handle::None));
        remove(&groups).await.unwrap();
        assert_eq!(observe(&groups), Observed::Absent);
        remove(&groups).await.unwrap();
        let nowhere = [Cgroup { path: dir.path().join("no/group"), settings: Vec::new() }];
        let error = make(&nowhere).unwrap_err();
        assert!(matches!(&error, EngineError::File { action: "create", .. }), "{error}");
    }

    #[test]
    fn a_limit_that_is_refused_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let setting = |file: &str| (file.to_owned(), "12345".to_owned());
        // A directory cannot be written to, as little as a file that is not there.
        fs::create_dir(dir.path().join("cpu.cfs_quota_us")).unwrap();
        fs::write(dir.path().join("pids.max"), "max").unwrap();
        let settings = vec![setting("cpu.cfs_quota_us"), setting("memory.max"), setting("pids.max")];
        make(&[Cgroup { path: dir.path().into(), settings }]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("pids.max")).unwrap(), "12345");
        assert!(!dir.path().join("memory.max").exists());
    }

    #[test]
    fn empty_groups_of_one_daemon_are_found_in_all_hierarchies() {
        let dir = tempfile::tempdir().unwrap();
        let instance: InstanceId = "3f2a".parse().unwrap();
        let group = |hierarchy: &str, name: &str, processes: &str| {
            let path = dir.path().join(hierarchy).join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), processes).unwrap();
            path
        };
        let memory = group("memory", "vmd-3f2a-00000000000a", "");
        let cpu = group("cpu", "vmd-3f2a-00000000000a", "");
        group("cpu", "vmd-3f2a-00000000000b", "17\n");
        group("cpu", "vmd-3f2b-00000000000c", "");
        group("cpu", "vmd-3f2a-operators-own", "");
        fs::create_dir(group("cpu", "vmd-3f2a-00000000000d", "").join("below")).unwrap();
        fs::create_dir(dir.path().join("cpu/vmd-3f2a-00000000000e")).unwrap();
        let parents = ["cpu", "gone", "memory"].map(|name| dir.path().join(name));
        let found = empty_below(parents, &instance);
        let [Effect::Cgroup { name, groups }] = &found[..] else { panic!("{found:?}") };
        assert_eq!(name, "vmd-3f2a-00000000000a");
        let paths: Vec<_> = groups.iter().map(|group| &group.path).collect();
        assert_eq!(paths, [&cpu, &memory]);
    }
}
