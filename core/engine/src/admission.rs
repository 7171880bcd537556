//! Admission: whether the host has room for one more VM that runs, one more disk, one more VM.
//!
//! ```text
//!   create, set --disk ──> disk, count ─┐                       ┌─ what VMs have: their cells
//!                                       ├─> Ledger: one look at ┤
//!   start, restart ──────> memory ──────┘                       └─ what operations were promised: Reservation
//! ```
//!
//! What VMs have is not kept here but looked up, so it cannot go wrong over a restart of the daemon, an adoption or a failed
//! stop. A [`Reservation`] bridges the time from the decision until the VM itself shows what was decided: the operation holds it
//! until then. Decisions are taken one at a time, and a promise is looked at before the VMs are, so nothing is seen by nobody.
//!
//! Memory is what guests were given, not what their VMMs take at the moment: a guest may want all of it at any time.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use vm_disk::{Backend, DiskError};
use vm_types::VmName;

use crate::{
    Engine, EngineError,
    vm::{cell::Cell, create::CreateRequest},
};

/// Least memory that is kept for the host where the configuration does not say, MiB.
const RESERVE_MIB: u64 = 512;

/// Room that is left on a disk beyond what a copy takes, for logs, journals and the database.
const MARGIN_BYTES: u64 = 64 << 20;

/// How many holders a hint names.
const NAMED: usize = 3;

/// What the configuration allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// How often the memory that is left to VMs may be promised; 1 is not at all over.
    pub memory_overcommit: f64,
    /// MiB kept for the host. Absent, 5 %, but at least 512 MiB, and never more than a quarter: page cache and the VMMs' own
    /// needs grow with the host, while a small one still is to run something.
    pub memory_reserve_mib: Option<u64>,
    /// Sum of all VMs' disk sizes in bytes.
    pub disk_quota_bytes: Option<u64>,
    /// Most VMs.
    pub vms: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_overcommit: 1.0, memory_reserve_mib: None, disk_quota_bytes: None, vms: None }
    }
}

impl Limits {
    /// MiB that VMs may have together on a host with so many.
    fn memory_mib(&self, host_mib: u64) -> u64 {
        let usual = (host_mib / 20).max(RESERVE_MIB).min(host_mib / 4);
        let left = host_mib.saturating_sub(self.memory_reserve_mib.unwrap_or(usual));
        // Both are far below 2^53, and the cast saturates.
        (left as f64 * self.memory_overcommit) as u64
    }
}

/// What one VM has, or was promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding {
    /// MiB, where it is up or on its way.
    pub memory_mib: u64,
    /// Size of its disk in bytes.
    pub disk_bytes: u64,
}

/// What all VMs have together, and may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Memory of VMs that are up or starting, MiB.
    pub memory_mib: u64,
    /// The most that may be, MiB.
    pub memory_limit_mib: u64,
    /// Sizes of all VMs' disks, bytes.
    pub disk_bytes: u64,
    /// The most that may be, bytes.
    pub disk_limit_bytes: Option<u64>,
}

/// Who decides. Clones are the same.
#[derive(Debug, Clone)]
pub struct Ledger {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limits: Limits,
    host: HostMemory,
    promises: Mutex<Promises>,
}

#[derive(Debug, Default)]
struct Promises {
    last: u64,
    open: BTreeMap<u64, (VmName, Holding)>,
}

/// A promise to one VM; dropped when the VM has what was promised, or will not have it.
#[derive(Debug)]
#[must_use = "what was promised is given to others when this is dropped"]
pub struct Reservation {
    ledger: Ledger,
    number: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.promises(|promises| promises.open.remove(&self.number));
    }
}

/// What all VMs have and were promised, by name.
type Holdings = BTreeMap<VmName, Holding>;

impl Ledger {
    /// One that keeps these limits on this host.
    pub fn new(limits: Limits) -> Self {
        Self::on(limits, HostMemory::default())
    }

    fn on(limits: Limits, host: HostMemory) -> Self {
        Self { inner: Arc::new(Inner { limits, host, promises: Mutex::default() }) }
    }

    /// Promises a VM its memory. What it has already counts once.
    ///
    /// # Errors
    /// [`EngineError::Admission`], or the host's memory cannot be read.
    pub fn memory(
        &self,
        name: &VmName,
        memory_mib: u64,
        vms: impl FnOnce() -> Holdings,
    ) -> Result<Reservation, EngineError> {
        let limit = self.inner.limits.memory_mib(self.inner.host.total_mib()?);
        self.promise(name, Holding { memory_mib, ..Default::default() }, vms, |vms| {
            check(MEMORY, name, memory_mib, limit, vms)
        })
    }

    /// Promises a VM, which may be a new one, a disk of this size.
    ///
    /// # Errors
    /// [`EngineError::Admission`].
    pub fn disk(
        &self,
        name: &VmName,
        disk_bytes: u64,
        vms: impl FnOnce() -> Holdings,
    ) -> Result<Reservation, EngineError> {
        let limits = self.inner.limits;
        self.promise(name, Holding { disk_bytes, ..Default::default() }, vms, |vms| {
            if let Some(limit) = limits.vms
                && !vms.contains_key(name)
            {
                count(vms.len(), limit)?;
            }
            match limits.disk_quota_bytes {
                Some(limit) => check(DISK, name, disk_bytes, limit, vms),
                None => Ok(()),
            }
        })
    }

    /// What is taken, and may be.
    ///
    /// # Errors
    /// The host's memory cannot be read.
    pub fn totals(&self, vms: impl FnOnce() -> Holdings) -> Result<Totals, EngineError> {
        let vms = self.promises(|promises| promises.with(vms));
        Ok(Totals {
            memory_mib: vms.values().map(|held| held.memory_mib).sum(),
            memory_limit_mib: self.inner.limits.memory_mib(self.inner.host.total_mib()?),
            disk_bytes: vms.values().map(|held| held.disk_bytes).sum(),
            disk_limit_bytes: self.inner.limits.disk_quota_bytes,
        })
    }

    fn promise(
        &self,
        name: &VmName,
        wanted: Holding,
        vms: impl FnOnce() -> Holdings,
        check: impl FnOnce(&Holdings) -> Result<(), EngineError>,
    ) -> Result<Reservation, EngineError> {
        // From the look to the promise nobody else decides.
        self.promises(|promises| {
            check(&promises.with(vms))?;
            promises.last += 1;
            let number = promises.last;
            promises.open.insert(number, (name.clone(), wanted));
            Ok(Reservation { ledger: self.clone(), number })
        })
    }

    fn promises<T>(&self, f: impl FnOnce(&mut Promises) -> T) -> T {
        // A panic under it leaves the map whole.
        f(&mut self.inner.promises.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Promises {
    /// `vms` with all promises: a VM that has what it was promised has it once.
    fn with(&self, vms: impl FnOnce() -> Holdings) -> Holdings {
        let mut all = vms();
        for (name, promised) in self.open.values() {
            let held = all.entry(name.clone()).or_default();
            held.memory_mib = held.memory_mib.max(promised.memory_mib);
            held.disk_bytes = held.disk_bytes.max(promised.disk_bytes);
        }
        all
    }
}

/// How one resource is looked up and spoken of.
struct Resource {
    what: &'static str,
    of: fn(&Holding) -> u64,
    show: fn(u64) -> String,
    /// What frees some, before the names of those who have most.
    free: &'static str,
    /// What would fit into less.
    less: &'static str,
    key: &'static str,
}

const MEMORY: Resource = Resource {
    what: "memory",
    of: |held| held.memory_mib,
    show: |mib| format!("{mib} MiB"),
    free: "stop one that is up",
    less: "--memory",
    key: "limits.memory_overcommit",
};

const DISK: Resource = Resource {
    what: "disk sizes",
    of: |held| held.disk_bytes,
    show: |bytes| format!("{} MiB", bytes.div_ceil(1 << 20)),
    free: "delete one",
    less: "--disk",
    key: "limits.disk_quota_mib",
};

fn check(
    resource: Resource,
    name: &VmName,
    wanted: u64,
    limit: u64,
    vms: &Holdings,
) -> Result<(), EngineError> {
    let Resource { what, of, show, free, less, key } = resource;
    let mut others: Vec<_> =
        vms.iter().filter(|(other, _)| *other != name).map(|(other, held)| (of(held), other)).collect();
    let in_use: u64 = others.iter().map(|(amount, _)| amount).sum();
    if in_use.saturating_add(wanted) <= limit {
        return Ok(());
    }
    let hint = if wanted > limit {
        format!("give it at most {} with {less}, or raise {key} in the configuration", show(limit))
    } else {
        others.retain(|(amount, _)| *amount > 0);
        others.sort_by_key(|(amount, _)| std::cmp::Reverse(*amount));
        let named: Vec<_> =
            others.iter().take(NAMED).map(|(amount, other)| format!("{other} {}", show(*amount))).collect();
        format!(
            "{free} ({} have most), give this one less with {less}, or raise {key} in the configuration",
            named.join(", ")
        )
    };
    Err(EngineError::Admission { what, wanted: show(wanted), in_use: show(in_use), limit: show(limit), hint })
}

fn count(vms: usize, limit: usize) -> Result<(), EngineError> {
    if vms < limit {
        return Ok(());
    }
    Err(EngineError::Admission {
        what: "VMs",
        wanted: "one more".into(),
        in_use: vms.to_string(),
        limit: limit.to_string(),
        hint: "delete one, `vm prune` deletes those that are off, or raise limits.vms in the configuration"
            .into(),
    })
}

impl Engine {
    /// Promises a VM the memory of its specification, to be held until it is shown as up, or will not be.
    ///
    /// # Errors
    /// [`EngineError::Admission`].
    pub(crate) fn admit_start(&self, cell: &Cell) -> Result<Reservation, EngineError> {
        let memory_mib = cell.with_record(|record| record.spec.memory_mib);
        self.inner.ledger.memory(cell.name(), memory_mib, || self.holdings())
    }

    /// Promises a VM more memory for one run than its specification has.
    ///
    /// # Errors
    /// [`EngineError::Admission`].
    pub(crate) fn admit_memory(&self, cell: &Cell, memory_mib: u64) -> Result<Reservation, EngineError> {
        self.inner.ledger.memory(cell.name(), memory_mib, || self.holdings())
    }

    /// Promises a VM that is asked for what it will have, as far as that is known before its image is, to be held until it is made
    /// and started.
    ///
    /// # Errors
    /// [`EngineError::Admission`].
    pub(crate) fn admit_request(
        &self,
        name: &VmName,
        request: &CreateRequest,
    ) -> Result<[Option<Reservation>; 2], EngineError> {
        let (ledger, settings) = (&self.inner.ledger, &self.inner.settings);
        let disk_bytes = request.disk_bytes.unwrap_or(settings.default_disk_bytes);
        let disk = ledger.disk(name, disk_bytes, || self.holdings())?;
        let memory_mib = request.memory_mib.unwrap_or(settings.default_memory_mib);
        let memory = request.start.then(|| ledger.memory(name, memory_mib, || self.holdings()));
        Ok([Some(disk), memory.transpose()?])
    }

    /// Promises a new VM its disk, to be held until others can find the VM, or it will not be. Nothing is made yet.
    ///
    /// # Errors
    /// [`EngineError::Admission`], or [`DiskError::NoSpace`] where the disk could not be made.
    pub(crate) fn admit_create(
        &self,
        name: &VmName,
        disk_bytes: u64,
        base: &Path,
    ) -> Result<Reservation, EngineError> {
        let reservation = self.inner.ledger.disk(name, disk_bytes, || self.holdings())?;
        let copied = match self.inner.host.cow.backend() {
            Backend::Reflink | Backend::DmSnapshot => 0,
            // An image that is not there is somebody else's to complain about.
            Backend::Copy => std::fs::metadata(base).map_or(0, |about| about.blocks() * 512),
        };
        enough_space(&self.inner.layout.state.join("vms"), copied)?;
        Ok(reservation)
    }

    /// Promises a VM a larger disk, to be held until its specification says so. Blocks are taken as the guest writes them.
    ///
    /// # Errors
    /// [`EngineError::Admission`].
    pub(crate) fn admit_growth(&self, cell: &Cell, disk_bytes: u64) -> Result<Reservation, EngineError> {
        self.inner.ledger.disk(cell.name(), disk_bytes, || self.holdings())
    }

    /// What VMs take of the host, and may take.
    ///
    /// # Errors
    /// The host's memory cannot be read.
    pub fn totals(&self) -> Result<Totals, EngineError> {
        self.inner.ledger.totals(|| self.holdings())
    }

    fn holdings(&self) -> Holdings {
        let cells = self.cells();
        cells
            .values()
            .map(|cell| {
                let memory_mib = cell.live().map_or(0, |live| live.memory_mib);
                let disk_bytes = cell.with_record(|record| record.spec.disk_bytes);
                (cell.name().clone(), Holding { memory_mib, disk_bytes })
            })
            .collect()
    }
}

fn enough_space(path: &Path, copied: u64) -> Result<(), EngineError> {
    let available_bytes = vm_disk::free_bytes(path)?;
    let needed_bytes = copied + MARGIN_BYTES;
    if available_bytes < needed_bytes {
        return Err(DiskError::NoSpace { path: path.into(), needed_bytes, available_bytes }.into());
    }
    Ok(())
}

/// Where the kernel tells how much memory this process and its children may have.
#[derive(Debug, Clone)]
struct HostMemory {
    proc: PathBuf,
    cgroups: PathBuf,
}

impl Default for HostMemory {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroups: "/sys/fs/cgroup".into() }
    }
}

impl HostMemory {
    /// MiB. Read anew each time: memory is plugged in, and limits are changed, while a daemon runs.
    fn total_mib(&self) -> Result<u64, EngineError> {
        let path = self.proc.join("meminfo");
        let read = std::fs::read_to_string(&path)
            .and_then(|text| mem_total_kib(&text).ok_or_else(|| io::Error::other("it has no MemTotal")));
        let total = read.map_err(|source| EngineError::File { action: "read", path, source })?;
        let total = total << 10;
        Ok(self.cgroup_limit().map_or(total, |limit| limit.min(total)) >> 20)
    }

    /// The least limit in bytes of the daemon's memory cgroup and those above it, as far as they can be seen. A shim starts in the
    /// daemon's cgroup, so the VMs have it too.
    fn cgroup_limit(&self) -> Option<u64> {
        let own = std::fs::read_to_string(self.proc.join("self/cgroup")).ok()?;
        // proc(5), cgroups(7): `hierarchy:controllers:path`; hierarchy 0 without controllers is version 2.
        let limits = own.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            if controllers.split(',').any(|controller| controller == "memory") {
                least(&self.cgroups.join("memory"), path, "memory.limit_in_bytes")
            } else if hierarchy == "0" && controllers.is_empty() {
                least(&self.cgroups, path, "memory.max")
            } else {
                None
            }
        });
        limits.min()
    }
}

/// The least value of `file` in the cgroup `path` below `mount` and in all above it. In a container the path may be the host's
/// and not be there; what is above it is.
fn least(mount: &Path, path: &str, file: &str) -> Option<u64> {
    let path = Path::new(path.trim_start_matches('/'));
    let values = path.ancestors().filter_map(|cgroup| {
        let text = std::fs::read_to_string(mount.join(cgroup).join(file)).ok()?;
        // `max`, which is no number, is no limit.
        text.trim().parse::<u64>().ok()
    });
    values.min()
}

fn mem_total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> VmName {
        text.parse().unwrap()
    }

    /// A host with so much memory, in a cgroup as given by the lines of `self/cgroup` and files.
    fn host(mib: u64, own: &str, files: &[(&str, &str)]) -> (tempfile::TempDir, HostMemory) {
        let dir = tempfile::tempdir().unwrap();
        let host = HostMemory { proc: dir.path().join("proc"), cgroups: dir.path().join("cgroup") };
        std::fs::create_dir_all(host.proc.join("self")).unwrap();
        std::fs::write(host.proc.join("meminfo"), format!("MemTotal: {} kB\nMemFree: 1 kB\n", mib << 10))
            .unwrap();
        std::fs::write(host.proc.join("self/cgroup"), own).unwrap();
        for (path, text) in files {
            let path = host.cgroups.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        (dir, host)
    }

    fn ledger(host_mib: u64, limits: Limits) -> (tempfile::TempDir, Ledger) {
        let (dir, host) = host(host_mib, "", &[]);
        (dir, Ledger::on(limits, host))
    }

    fn none() -> Holdings {
        Holdings::new()
    }

    #[test]
    fn the_host_keeps_some_and_the_rest_may_be_promised_more_than_once() {
        let limits = Limits::default();
        assert_eq!(limits.memory_mib(8 << 10), (8 << 10) - 512);
        assert_eq!(limits.memory_mib(1000 << 10), 950 << 10);
        assert_eq!(limits.memory_mib(1024), 768);
        let twice = Limits { memory_overcommit: 2.0, memory_reserve_mib: Some(1000), ..limits };
        assert_eq!(twice.memory_mib(3000), 4000);
        assert_eq!(twice.memory_mib(500), 0);
    }

    #[test]
    fn a_refusal_says_who_has_the_memory() {
        let (_dir, ledger) = ledger(4096, Limits { memory_reserve_mib: Some(96), ..Limits::default() });
        let held = |mib| Holding { memory_mib: mib, disk_bytes: 1 };
        let vms =
            || Holdings::from([(name("db"), held(2500)), (name("web"), held(1000)), (name("off"), held(0))]);
        let _fits = ledger.memory(&name("new"), 500, vms).unwrap();
        let error = ledger.memory(&name("more"), 64, vms).unwrap_err();
        assert!(error.to_string().contains("4000 MiB of 4000 MiB"), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("db 2500 MiB, web 1000 MiB, new 500 MiB have most"), "{hint}");
        assert!(!hint.contains("off"), "{hint}");
        let hint = ledger.memory(&name("huge"), 5000, vms).unwrap_err().hint().unwrap();
        assert!(hint.contains("at most 4000 MiB"), "{hint}");
    }

    #[test]
    fn what_a_vm_has_and_was_promised_counts_once() {
        let (_dir, ledger) = ledger(4096, Limits { memory_reserve_mib: Some(0), ..Limits::default() });
        let up = || Holdings::from([(name("web"), Holding { memory_mib: 3000, disk_bytes: 0 })]);
        // A restart promises it anew while it is up, here with more.
        let restart = ledger.memory(&name("web"), 4000, up).unwrap();
        assert_eq!(ledger.totals(up).unwrap().memory_mib, 4000);
        assert!(ledger.memory(&name("db"), 97, up).is_err());
        drop(restart);
        assert_eq!(ledger.totals(up).unwrap().memory_mib, 3000);
        let _fits = ledger.memory(&name("db"), 97, up).unwrap();
    }

    #[test]
    fn of_many_that_come_at_once_only_those_are_let_in_that_fit() {
        let (_dir, ledger) = ledger(4096, Limits { memory_reserve_mib: Some(0), ..Limits::default() });
        let admitted: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..32)
                .map(|number| {
                    let ledger = ledger.clone();
                    scope.spawn(move || ledger.memory(&name(&format!("vm-{number}")), 512, none))
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        assert_eq!(admitted.len(), 8);
        assert_eq!(ledger.totals(none).unwrap().memory_mib, 4096);
        drop(admitted);
        assert_eq!(ledger.totals(none).unwrap().memory_mib, 0);
    }

    #[test]
    fn disks_and_vms_are_counted_where_there_is_a_limit() {
        let limits = Limits { disk_quota_bytes: Some(10 << 30), vms: Some(2), ..Limits::default() };
        let (_dir, ledger) = ledger(4096, limits);
        let vms = || Holdings::from([(name("db"), Holding { memory_mib: 0, disk_bytes: 6 << 30 })]);
        let error = ledger.disk(&name("web"), 5 << 30, vms).unwrap_err();
        assert!(error.hint().unwrap().contains("db 6144 MiB"), "{:?}", error.hint());
        let web = ledger.disk(&name("web"), 4 << 30, vms).unwrap();
        let error = ledger.disk(&name("third"), 0, vms).unwrap_err();
        assert!(error.to_string().contains("limit of VMs"), "{error}");
        // One that is there may grow, as far as the quota goes.
        assert!(ledger.disk(&name("db"), 7 << 30, vms).is_err());
        drop(web);
        let _grown = ledger.disk(&name("db"), 10 << 30, vms).unwrap();
        let (_dir, unlimited) = self::ledger(4096, Limits::default());
        let _fits = unlimited.disk(&name("web"), u64::MAX, vms).unwrap();
    }

    #[test]
    fn a_cgroup_with_less_than_the_host_counts() {
        let check = |own: &str, files: &[(&str, &str)], mib: u64| {
            let (_dir, host) = host(8192, own, files);
            assert_eq!(host.total_mib().unwrap(), mib, "{own} {files:?}");
        };
        check(
            "0::/a.slice/vmd.service\n",
            &[("a.slice/vmd.service/memory.max", "max\n"), ("a.slice/memory.max", "2147483648\n")],
            2048,
        );
        check("0::/vmd\n", &[("vmd/memory.max", "max\n")], 8192);
        check(
            "5:cpu,memory:/x/y\n0::/\n",
            &[
                ("memory/x/memory.limit_in_bytes", "1073741824\n"),
                ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ],
            1024,
        );
        check("4:memory:/elsewhere\n", &[("memory/memory.limit_in_bytes", "536870912\n")], 512);
        check("", &[], 8192);
    }

    #[test]
    fn a_disk_that_could_not_be_copied_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        enough_space(dir.path(), 0).unwrap();
        let error = enough_space(dir.path(), 1 << 60).unwrap_err();
        assert!(
            matches!(&error, EngineError::Disk(error) if matches!(**error, DiskError::NoSpace { .. })),
            "{error}"
        );
    }
}
