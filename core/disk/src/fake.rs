//! Disks in memory, with faults on demand.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use vm_types::{Effect, Handle, Observed};

use crate::{Backend, Cow, DiskError, cow::CowDisk};

/// What stands at a path of the pretended filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Disk { size_bytes: u64 },
    Foreign,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<PathBuf, Entry>,
    bases: BTreeMap<PathBuf, u64>,
    applies: usize,
    fail_apply: Option<usize>,
    fail_undo: bool,
}

/// Keeps disks in memory under the same rules as [`crate::HostCow`].
#[derive(Debug, Default)]
pub struct FakeCow {
    state: Mutex<State>,
}

impl FakeCow {
    /// No disks; any base exists and is of no size, unless [`FakeCow::set_base`] says otherwise.
    pub fn new() -> Self {
        Self::default()
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

    /// Puts something of somebody else's at a path.
    pub fn put_foreign(&self, path: impl Into<PathBuf>) {
        self.lock().entries.insert(path.into(), Entry::Foreign);
    }

    /// The disks there are.
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
        Backend::Copy
    }

    async fn observe(&self, effect: &Effect) -> Result<Observed, DiskError> {
        let disk = CowDisk::of(effect)?;
        Ok(match self.lock().entries.get(disk.path) {
            None => Observed::Absent,
            Some(Entry::Disk { size_bytes }) if *size_bytes >= disk.size_bytes => {
                Observed::Present(Handle::None)
            }
            Some(Entry::Disk { size_bytes }) => Observed::Foreign(format!("a disk of {size_bytes} bytes")),
            Some(Entry::Foreign) => Observed::Foreign("somebody else's".to_owned()),
        })
    }

    async fn apply(&self, effect: &Effect) -> Result<Handle, DiskError> {
        let disk = CowDisk::of(effect)?;
        let present = self.observe(effect).await?;
        let mut state = self.lock();
        state.applies += 1;
        if state.fail_apply == Some(state.applies) {
            return Err(DiskError::Injected { effect: effect.id() });
        }
        match present {
            Observed::Present(handle) => return Ok(handle),
            Observed::Foreign(what) => return Err(DiskError::Foreign { path: disk.path.to_owned(), what }),
            Observed::Absent => {}
        }
        let base_bytes = state.bases.get(disk.base).copied().unwrap_or(0);
        disk.check_size(base_bytes)?;
        state.entries.insert(disk.path.to_owned(), Entry::Disk { size_bytes: disk.size_bytes });
        Ok(Handle::None)
    }

    async fn grow(&self, effect: &Effect, size: u64) -> Result<(), DiskError> {
        let disk = CowDisk::of(effect)?;
        match self.lock().entries.get_mut(disk.path) {
            Some(Entry::Disk { size_bytes }) => *size_bytes = size.max(*size_bytes),
            Some(Entry::Foreign) => {
                let what = "somebody else's".to_owned();
                return Err(DiskError::Foreign { path: disk.path.to_owned(), what });
            }
            None => {
                let source = std::io::ErrorKind::NotFound.into();
                return Err(DiskError::Io { action: "grow", path: disk.path.to_owned(), source });
            }
        }
        Ok(())
    }

    async fn undo(&self, effect: &Effect, _handle: &Handle) -> Result<(), DiskError> {
        let disk = CowDisk::of(effect)?;
        let mut state = self.lock();
        if state.fail_undo {
            return Err(DiskError::Injected { effect: effect.id() });
        }
        if state.entries.get(disk.path) == Some(&Entry::Foreign) {
            let what = "somebody else's".to_owned();
            return Err(DiskError::Foreign { path: disk.path.to_owned(), what });
        }
        state.entries.remove(disk.path);
        Ok(())
    }
}
