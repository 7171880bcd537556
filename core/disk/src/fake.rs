//! Disks in memory, with faults on demand.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use vm_types::{Effect, Handle, InstanceId, Observed, VmId};

use crate::{
    Backend, Cow, DiskError, Fill,
    cow::{CowDisk, Snapshot, check_size},
    dm::vm_of_device,
};

/// What stands at a path of the pretended filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Disk {
        size_bytes: u64,
    },
    /// Of this name.
    Device {
        name: String,
        size_bytes: u64,
    },
    Foreign,
}

/// What of either effect is kept here, under its path.
struct Wanted<'a> {
    path: &'a Path,
    base: &'a Path,
    /// What it cannot be without.
    delta: Option<&'a Path>,
    entry: Entry,
}

impl Entry {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Disk { size_bytes } | Self::Device { size_bytes, .. } => *size_bytes,
            Self::Foreign => 0,
        }
    }

    fn is_as(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl<'a> Wanted<'a> {
    fn of(effect: &'a Effect) -> Result<Self, DiskError> {
        if let Some(disk) = Snapshot::of(effect) {
            let entry = Entry::Device { name: disk.name.to_owned(), size_bytes: disk.size_bytes };
            return Ok(Self { path: disk.node, base: disk.base, delta: Some(disk.delta), entry });
        }
        let disk = CowDisk::of(effect)?;
        let entry = Entry::Disk { size_bytes: disk.size_bytes };
        Ok(Self { path: disk.path, base: disk.base, delta: None, entry })
    }

    fn foreign(&self) -> DiskError {
        DiskError::Foreign { path: self.path.to_owned(), what: "somebody else's".to_owned() }
    }
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<PathBuf, Entry>,
    bases: BTreeMap<PathBuf, u64>,
    applies: usize,
    fail_apply: Option<usize>,
    fail_undo: bool,
    fills: BTreeMap<PathBuf, Fill>,
}

/// Keeps disks in memory under the same rules as [`crate::HostCow`].
#[derive(Debug, Default)]
pub struct FakeCow {
    backend: Option<Backend>,
    state: Mutex<State>,
}

impl FakeCow {
    /// No disks; any base exists and is of no size, unless [`FakeCow::set_base`] says otherwise.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`FakeCow::new`]; new disks are asked for as `backend` makes them.
    pub fn with(backend: Backend) -> Self {
        Self { backend: Some(backend), ..Self::default() }
    }

    /// Gives a base its size in bytes.
    pub fn set_base(&self, base: impl Into<PathBuf>, size_bytes: u64) {
        self.lock().bases.insert(base.into(), size_bytes);
    }

    /// Makes the `nth` apply from now on fail, counting from 1.
    pub fn fail_apply(&self, nth: usize) {
        let mut state = self.lock();
        state.fail_apply = Some(state.applies + nth);
    }

    /// Makes every undo fail, or none.
    pub fn fail_undo(&self, fail: bool) {
        self.lock().fail_undo = fail;
    }

    /// Says how full the differences of the device with this node are.
    pub fn set_fill(&self, node: impl Into<PathBuf>, fill: Fill) {
        self.lock().fills.insert(node.into(), fill);
    }

    /// Puts something of somebody else's at a path.
    pub fn put_foreign(&self, path: impl Into<PathBuf>) {
        self.lock().entries.insert(path.into(), Entry::Foreign);
    }

    /// The disks there are, and the nodes of devices.
    pub fn disks(&self) -> Vec<PathBuf> {
        let state = self.lock();
        let disks = state.entries.iter().filter(|(_, entry)| **entry != Entry::Foreign);
        disks.map(|(path, _)| path.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Cow for FakeCow {
    fn backend(&self) -> Backend {
        self.backend.unwrap_or(Backend::Copy)
    }

    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        let wanted = Wanted::of(effect)?;
        Ok(match self.lock().entries.get(wanted.path) {
            None => Observed::Absent,
            Some(there) if !there.is_as(&wanted.entry) => Observed::Foreign("somebody else's".to_owned()),
            Some(there) if there.size_bytes() >= wanted.entry.size_bytes() => Observed::Present(Handle::None),
            Some(there) => Observed::Foreign(format!("a disk of {} bytes", there.size_bytes())),
        })
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError> {
        let wanted = Wanted::of(effect)?;
        let present = self.observe(effect).await?;
        let mut state = self.lock();
        state.applies += 1;
        if state.fail_apply == Some(state.applies) {
            return Err(DiskError::Injected { effect: effect.id() });
        }
        match present {
            Observed::Present(handle) => return Ok(handle),
            Observed::Foreign(what) => return Err(DiskError::Foreign { path: wanted.path.to_owned(), what }),
            Observed::Absent => {}
        }
        let base_bytes = state.bases.get(wanted.base).copied().unwrap_or(0);
        check_size(wanted.entry.size_bytes(), base_bytes)?;
        if let Some(delta) = wanted.delta.filter(|delta| !state.entries.contains_key(*delta)) {
            let source = std::io::ErrorKind::NotFound.into();
            return Err(DiskError::Io { action: "open", path: delta.to_owned(), source });
        }
        state.entries.insert(wanted.path.to_owned(), wanted.entry);
        Ok(Handle::None)
    }

    async fn grow(&self, effect: &Effect, size: u64) -> Result<(), DiskError> {
        let wanted = Wanted::of(effect)?;
        match self.lock().entries.get_mut(wanted.path) {
            Some(Entry::Disk { size_bytes } | Entry::Device { size_bytes, .. }) => {
                *size_bytes = size.max(*size_bytes);
                Ok(())
            }
            Some(Entry::Foreign) => Err(wanted.foreign()),
            None => {
                let source = std::io::ErrorKind::NotFound.into();
                Err(DiskError::Io { action: "grow", path: wanted.path.to_owned(), source })
            }
        }
    }

    async fn undo(&self, effect: &Effect, _handle: &Handle) -> Result<(), DiskError> {
        let wanted = Wanted::of(effect)?;
        let mut state = self.lock();
        if state.fail_undo {
            return Err(DiskError::Injected { effect: effect.id() });
        }
        if state.entries.get(wanted.path) == Some(&Entry::Foreign) {
            return Err(wanted.foreign());
        }
        state.entries.remove(wanted.path);
        Ok(())
    }

    async fn fill(&self, effect: &Effect) -> Result<Option<Fill>, DiskError> {
        let wanted = Wanted::of(effect)?;
        let state = self.lock();
        Ok(match state.entries.get(wanted.path) {
            Some(Entry::Device { .. }) => state.fills.get(wanted.path).copied(),
            _ => None,
        })
    }

    async fn found(&self, instance: &InstanceId) -> Result<Vec<VmId>, DiskError> {
        let state = self.lock();
        let named = state.entries.values().filter_map(|entry| match entry {
            Entry::Device { name, .. } => vm_of_device(instance, name),
            _ => None,
        });
        Ok(named.collect())
    }
}
