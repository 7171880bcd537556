//! The seam to shims: the host's, and pretended ones.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use vm_host::process;
use vm_shim::ShimError;
use vm_types::{Handle, Observed, ProcessRef, VmPaths};

/// How long a shim may take to start its VMM: longer than it gives itself, so that it can say what went wrong.
const START: Duration = Duration::from_secs(120);
/// How long a killed shim and VMM may take to end.
const END: Duration = Duration::from_secs(30);

/// Applies `Effect::Shim`. All of it is idempotent.
#[async_trait]
pub trait Shims: Send + Sync + fmt::Debug {
    /// Starts a shim and its VMM.
    ///
    /// # Errors
    /// Nothing of it runs then.
    async fn apply(&self, run_dir: &Path, spec: &Path) -> Result<Handle, ShimError>;

    /// What runs of it.
    async fn observe(&self, run_dir: &Path) -> Observed;

    /// Ends both; returns when neither runs.
    ///
    /// # Errors
    /// A process that cannot be ended.
    async fn undo(&self, run_dir: &Path, handle: &Handle) -> Result<(), ShimError>;

    /// Whether both processes run and are this VM's: pid, start time and command line.
    fn verify(&self, paths: &VmPaths, shim: ProcessRef, vmm: ProcessRef) -> bool;

    /// Run directories of all shims of our user that run, also of other daemons.
    fn running(&self) -> Vec<PathBuf>;
}

/// The host's shims: another mode of the daemon's program.
#[derive(Debug)]
pub struct HostShims {
    program: PathBuf,
}

impl HostShims {
    /// With the program whose `shim` mode is started.
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }
}

#[async_trait]
impl Shims for HostShims {
    async fn apply(&self, run_dir: &Path, spec: &Path) -> Result<Handle, ShimError> {
        vm_shim::effect::apply(&self.program, run_dir, spec, START).await
    }

    async fn observe(&self, run_dir: &Path) -> Observed {
        vm_shim::effect::observe(run_dir).await
    }

    async fn undo(&self, run_dir: &Path, handle: &Handle) -> Result<(), ShimError> {
        vm_shim::effect::undo(run_dir, handle, END).await
    }

    fn verify(&self, paths: &VmPaths, shim: ProcessRef, vmm: ProcessRef) -> bool {
        vm_shim::verify(paths, shim, vmm).unwrap_or_else(|error| {
            // Pid and start time are enough to say that they are no others.
            tracing::warn!(%error, "a shim's specification cannot be read");
            process::alive(shim) && process::alive(vmm)
        })
    }

    fn running(&self) -> Vec<PathBuf> {
        let is_shim = |pid| process::command_line(pid).get(1).is_some_and(|mode| mode == "shim");
        let found = process::values_of("--run-dir").into_iter();
        found.filter(|(found, _)| is_shim(found.pid)).map(|(_, run_dir)| run_dir.into()).collect()
    }
}

/// Shims that are only written down, for tests.
#[derive(Debug, Default)]
pub struct FakeShims {
    running: Mutex<BTreeMap<PathBuf, (ProcessRef, ProcessRef)>>,
}

impl FakeShims {
    /// None runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends one as if it had died.
    pub fn die(&self, run_dir: &Path) {
        self.lock().remove(run_dir);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, (ProcessRef, ProcessRef)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Shims for FakeShims {
    async fn apply(&self, run_dir: &Path, _spec: &Path) -> Result<Handle, ShimError> {
        let mut running = self.lock();
        let number = running.len() as u64;
        // Beyond what Linux gives out, so that nobody is ever mistaken for it.
        let process = |pid| ProcessRef { pid, start_ticks: number };
        let (shim, vmm) =
            *running.entry(run_dir.to_owned()).or_insert_with(|| (process(u32::MAX - 1), process(u32::MAX)));
        Ok(Handle::Processes { shim, vmm, answered: false })
    }

    async fn observe(&self, run_dir: &Path) -> Observed {
        match self.lock().get(run_dir) {
            Some(&(shim, vmm)) => Observed::Present(Handle::Processes { shim, vmm, answered: false }),
            None => Observed::Absent,
        }
    }

    async fn undo(&self, run_dir: &Path, _handle: &Handle) -> Result<(), ShimError> {
        self.lock().remove(run_dir);
        Ok(())
    }

    fn verify(&self, paths: &VmPaths, shim: ProcessRef, vmm: ProcessRef) -> bool {
        self.lock().get(&paths.run) == Some(&(shim, vmm))
    }

    fn running(&self) -> Vec<PathBuf> {
        self.lock().keys().cloned().collect()
    }
}
