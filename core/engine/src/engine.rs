//! The engine's wiring: what it is given, what it keeps, how it comes up and goes down.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use ipnet::Ipv4Net;
use vm_host::Runner;
use vm_locks::{CreateVm, ImageOps, Initramfs, Lock, LockTable, Network};
use vm_store::Store;
use vm_types::{
    EventKind, InstanceId, Layout, OperationId, VmId, VmName,
    vm::{DiskLimits, VmRecord, VmmKind},
};
use vm_vmm::{Vmm, Vmms};

use crate::{
    admission::{Ledger, Limits},
    effects::{Host, Scope},
    error::EngineError,
    events::EventLog,
    flights::Flights,
    images::oci::{Content, Registries},
    keys,
    ops::Operations,
    ports::{Hooks, Importers, Names},
    reconcile::Recovery,
    taps::Taps,
    vm::cell::Cell,
    workspaces::Patches,
};

/// Which subnet the bridge gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubnetChoice {
    /// The first that clashes with nothing on the host; kept once chosen.
    Auto,
    /// This one.
    Fixed(Ipv4Net),
}

/// What the configuration decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Image of a VM that names none.
    pub default_image: String,
    /// Virtual CPUs of a VM that names none.
    pub default_cpus: u32,
    /// Memory in MiB of a VM that names none.
    pub default_memory_mib: u64,
    /// Root disk in bytes of a VM that names none.
    pub default_disk_bytes: u64,
    /// How fast a root disk may be used where nothing is asked for.
    pub default_disk_limits: DiskLimits,
    /// How long a guest may take until its agent answers.
    pub start_timeout: Duration,
    /// How long a guest gets to shut down.
    pub stop_grace: Duration,
    /// Bound of each console log in bytes.
    pub console_log_bytes: u64,
    /// The bridge's subnet.
    pub subnet: SubnetChoice,
    /// Guests' name servers; the host's own if empty.
    pub resolvers: Vec<IpAddr>,
    /// Taps that wait for a VM.
    pub tap_pool: usize,
    /// Group that may use the daemon.
    pub socket_group: Option<u32>,
    /// The guest agent's binary.
    pub agent: PathBuf,
    /// What VMs may take of the host.
    pub limits: Limits,
    /// How images are got.
    pub registries: Registries,
}

/// What the daemon hands to the engine.
#[derive(Debug)]
pub struct Parts {
    /// Directories.
    pub layout: Layout,
    /// Configuration.
    pub settings: Settings,
    /// The store.
    pub store: Store,
    /// Appliers of effects.
    pub host: Host,
    /// The VMM drivers.
    pub vmm: Vmms,
    /// Host commands.
    pub runner: Arc<dyn Runner>,
    /// Plugins.
    pub hooks: Arc<dyn Hooks>,
    /// Those of them that bring workspaces into guests.
    pub importers: Arc<dyn Importers>,
    /// The name service.
    pub names: Arc<dyn Names>,
}

/// The engine. Clones share it.
#[derive(Debug, Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) settings: Settings,
    pub(crate) store: Store,
    pub(crate) host: Host,
    pub(crate) vmm: Vmms,
    pub(crate) runner: Arc<dyn Runner>,
    pub(crate) hooks: Arc<dyn Hooks>,
    pub(crate) importers: Arc<dyn Importers>,
    pub(crate) names: Arc<dyn Names>,
    pub(crate) operations: Operations,
    pub(crate) events: EventLog,
    pub(crate) ledger: Ledger,
    pub(crate) instance: InstanceId,
    pub(crate) boot_id: String,
    /// `authorized_keys` line of the daemon's own key.
    pub(crate) client_public_key: String,
    pub(crate) cells: Mutex<HashMap<VmId, Arc<Cell>>>,
    /// Names and addresses are chosen under it.
    pub(crate) create: Lock<CreateVm, ()>,
    /// Images and kernels are put into the store and taken out of it under it.
    pub(crate) catalogue: Lock<ImageOps, ()>,
    /// The kernels' shared initramfs files are made under it.
    pub(crate) initramfs: Lock<Initramfs, ()>,
    /// The host's network is changed under it.
    pub(crate) network: Lock<Network, ()>,
    /// Images and kernels that are being acquired.
    pub(crate) flights: Flights,
    pub(crate) content: Content,
    pub(crate) patches: Arc<Patches>,
    pub(crate) host_scope: Scope,
    pub(crate) taps: Taps,
    /// What was found and done when the daemon came up.
    pub(crate) recovery: OnceLock<Recovery>,
}

impl Engine {
    /// Brings the engine up: reads what should be and what is, adopts VMs that live, undoes what is half done.
    ///
    /// # Errors
    /// The store, the directories or the daemon's own key. A single VM that cannot be recovered is shown as failed and stops nothing.
    pub async fn start(parts: Parts) -> Result<Self, EngineError> {
        let Parts { layout, settings, store, host, vmm, runner, hooks, importers, names } = parts;
        for (dir, mode) in [
            (layout.images(), 0o700),
            (layout.kernels(), 0o700),
            (layout.journals(), 0o700),
            (layout.state.join("vms"), 0o711),
            (layout.run.join("vms"), 0o711),
        ] {
            make_directory(&dir, mode)?;
        }
        // Users whose workspaces are worked on pass through the second to directories of their own.
        for (path, mode) in [(layout.scratch(), 0o700), (layout.workspace_scratch(), 0o711)] {
            if path.exists() {
                let empty = |source| EngineError::File { action: "empty", path: path.clone(), source };
                std::fs::remove_dir_all(&path).map_err(empty)?;
            }
            make_directory(&path, mode)?;
        }

        let fresh = keys::random_hex(2)?;
        let instance = store.meta().get_or_set(vm_store::meta::INSTANCE_ID, &fresh).await?;
        let instance = instance.parse().map_err(|error| EngineError::InvalidArgument {
            message: format!("the database's instance id is damaged: {error}"),
            hint: "restore the database from a backup".into(),
        })?;
        let boot_id = vm_host::process::boot_id().map_err(|source| EngineError::File {
            action: "read",
            path: "/proc/sys/kernel/random/boot_id".into(),
            source,
        })?;
        let client_public_key = keys::client(&layout.client_key(), settings.socket_group)?;
        let host_scope = Scope::host(&host, &layout, &boot_id)?;
        let events = EventLog::open(&layout.events());
        let ledger = Ledger::new(settings.limits);
        let content = Content::open(&layout.content(), settings.registries.clone())?;
        let engine = Self {
            inner: Arc::new(Inner {
                layout,
                settings,
                store,
                host,
                vmm,
                runner,
                hooks,
                importers,
                names,
                operations: Operations::default(),
                events,
                ledger,
                instance,
                boot_id,
                client_public_key,
                cells: Mutex::default(),
                create: Lock::new("names and addresses", ()),
                catalogue: Lock::new("catalogue", ()),
                initramfs: Lock::new("initramfs", ()),
                network: Lock::new("network", ()),
                flights: Flights::default(),
                content,
                patches: Arc::default(),
                host_scope,
                taps: Taps::new(),
                recovery: OnceLock::new(),
            }),
        };
        let recovering = engine.clone();
        let recovery =
            engine.locks().root("recovery", async move |mut ctx| recovering.recover(&mut ctx).await).await?;
        let _ = engine.inner.recovery.set(recovery);
        engine.watch_policies();
        engine.watch_disks();
        engine.inner.events.record(EventKind::DaemonStarted, None, None, "the daemon is up");
        Ok(engine)
    }

    /// Ends all operations, each of which unwinds what it has begun, and takes no more; followers of events are told.
    pub async fn end_operations(&self) {
        self.inner.events.record(EventKind::DaemonStopping, None, None, "the daemon goes down; VMs go on");
        self.operations().shut_down().await;
    }

    /// Takes the bridge down if no VM is up. VMs are left alone. To be called after [`Self::end_operations`].
    pub async fn shut_down(&self) {
        let engine = self.clone();
        let released =
            self.locks().root("shutdown", async move |mut ctx| engine.release_network(&mut ctx).await).await;
        if let Err(error) = released {
            tracing::warn!(error = %error.chain(), "the network could not be taken down");
        }
    }

    /// The table of all locks that are held or waited for.
    pub fn locks(&self) -> &LockTable {
        self.operations().locks()
    }

    /// Tells of something that happened to a VM.
    pub(crate) fn event(
        &self,
        kind: EventKind,
        cell: &Cell,
        operation: Option<OperationId>,
        message: String,
    ) {
        self.inner.events.record(kind, Some((cell.id(), cell.name())), operation, message);
    }

    /// What was found and done when the daemon came up.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.inner.recovery.get()
    }

    /// Long operations.
    pub fn operations(&self) -> &Operations {
        &self.inner.operations
    }

    /// What happened.
    pub fn events(&self) -> &EventLog {
        &self.inner.events
    }

    /// Directories.
    pub fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    /// What runs a VM that asks for no VMM.
    pub fn preferred_vmm(&self) -> VmmKind {
        self.inner.vmm.preferred()
    }

    /// The driver of the VMM that runs a VM, or else of the one that would.
    pub(crate) fn vmm_of(&self, cell: &Cell) -> Result<&dyn Vmm, EngineError> {
        let kind = match cell.live() {
            Some(live) => live.driver,
            None => cell.with_record(|record| record.spec.vmm).unwrap_or_else(|| self.preferred_vmm()),
        };
        Ok(self.inner.vmm.get(kind)?)
    }

    /// The host's boot the daemon lives in.
    pub fn boot_id(&self) -> &str {
        &self.inner.boot_id
    }

    /// The subnet that was chosen for the bridge, once one was.
    ///
    /// # Errors
    /// The store.
    pub async fn chosen_subnet(&self) -> Result<Option<Ipv4Net>, EngineError> {
        Ok(self.inner.store.meta().get(vm_store::meta::SUBNET).await?.and_then(|text| text.parse().ok()))
    }

    /// The daemon's instance id.
    pub fn instance(&self) -> &InstanceId {
        &self.inner.instance
    }

    /// The VM with this name or id.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn find(&self, name_or_id: &str) -> Result<Arc<Cell>, EngineError> {
        let cells = self.cells();
        // Names first: one may look like another VM's id.
        let by_name = cells.values().find(|cell| cell.name().as_str() == name_or_id).cloned();
        let by_id = || cells.get(&name_or_id.parse::<VmId>().ok()?).cloned();
        by_name.or_else(by_id).ok_or_else(|| EngineError::NotFound {
            what: "VM",
            name: name_or_id.to_owned(),
            hint: match nearest(name_or_id, cells.values().map(|cell| cell.name())) {
                Some(near) => format!("did you mean {near}? `vm ls` lists all VMs"),
                None => "`vm ls` lists all VMs".into(),
            },
        })
    }

    /// The VM with this id.
    pub fn by_id(&self, id: &VmId) -> Option<Arc<Cell>> {
        self.cells().get(id).cloned()
    }

    /// What `look` finds in the VMs' names and addresses, in no order. Quick: it is asked for each question of the name service.
    pub fn each_address<T>(&self, look: impl Fn(&str, Option<Ipv4Addr>) -> Option<T>) -> Vec<T> {
        self.cells()
            .values()
            .filter_map(|cell| look(cell.name().as_str(), cell.with_record(|record| record.address)))
            .collect()
    }

    /// All VMs, by name.
    pub fn all(&self) -> Vec<Arc<Cell>> {
        let mut cells: Vec<_> = self.cells().values().cloned().collect();
        cells.sort_by(|a, b| a.name().cmp(b.name()));
        cells
    }

    pub(crate) fn cells(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Arc<Cell>>> {
        // The map is whole between any two statements; a panic elsewhere leaves nothing to repair.
        self.inner.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a VM's journal; nobody finds the VM before it is published.
    pub(crate) fn new_cell(&self, record: VmRecord) -> Result<Arc<Cell>, EngineError> {
        let scope = Scope::vm(
            &self.inner.host,
            &self.inner.layout,
            &record.id,
            Some(&record.spec.name),
            &self.inner.boot_id,
        )?;
        Ok(Arc::new(Cell::new(record, scope, self.inner.layout.clone())))
    }

    pub(crate) fn publish(&self, cell: &Arc<Cell>) {
        self.cells().insert(cell.id().clone(), cell.clone());
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), EngineError> {
    use std::os::unix::fs::DirBuilderExt;
    let file = |source| EngineError::File { action: "create", path: path.into(), source };
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(file)
}

/// A name that differs from the asked one by little: a swapped, missing or wrong letter or two.
fn nearest<'a>(asked: &str, names: impl Iterator<Item = &'a VmName>) -> Option<&'a VmName> {
    names
        .map(|name| (distance(asked, name.as_str()), name))
        .filter(|(distance, _)| *distance <= 2)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_is_recognised_and_a_stranger_is_not() {
        let names: Vec<VmName> = ["web", "database"].iter().map(|n| n.parse().unwrap()).collect();
        assert_eq!(nearest("databse", names.iter()).map(VmName::as_str), Some("database"));
        assert_eq!(nearest("cache", names.iter()), None);
    }
}
