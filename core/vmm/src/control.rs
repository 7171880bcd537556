//! What drivers of VMMs that speak QMP do with it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use vm_types::{VmPaths, vm::VmmKind};

use crate::{
    ControlError, QmpError, VmmError,
    driver::CONTROL_TIMEOUT,
    qmp::{self, Qmp},
};

/// What virtio drives are counted in, in bytes (virtio 1.2, section 5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// Between two attempts to reach a VMM that is starting, from the first to the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(10));

/// Ends when QMP is answered on the VMM's control socket.
pub(crate) async fn wait_up(vmm: VmmKind, paths: &VmPaths, within: Duration) -> Result<(), VmmError> {
    let ask = |socket: PathBuf, left| async move { Qmp::connect(&socket, left).await.map(drop) };
    let passing = |error: &QmpError| error.is_nobody() || matches!(error, QmpError::HungUp { .. });
    wait_answer(vmm, paths.vmm_sock(), within, ask, passing).await
}

/// Ends when `ask`, which is told how long it may take, has had an answer on the VMM's control socket. Not listening yet, or gone
/// the moment it was reached, which are `passing`, may pass until the deadline.
pub(crate) async fn wait_answer<E: Into<ControlError>, F: Future<Output = Result<(), E>>>(
    vmm: VmmKind,
    socket: PathBuf,
    within: Duration,
    ask: impl Fn(PathBuf, Duration) -> F,
    passing: impl Fn(&E) -> bool,
) -> Result<(), VmmError> {
    let deadline = Instant::now() + within;
    let mut retry = RETRY.0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask(socket.clone(), left).await {
            Ok(()) => return Ok(()),
            Err(source) if left <= retry || !passing(&source) => {
                let (millis, source) = (within.as_millis(), source.into());
                return Err(VmmError::NotUp { vmm, socket, millis, source });
            }
            Err(_) => sleep(retry).await,
        }
        retry = (retry * 2).min(RETRY.1);
    }
}

/// Runs one command on a connection of its own.
pub(crate) async fn command(
    vmm: VmmKind,
    paths: &VmPaths,
    command: &str,
    operation: &'static str,
) -> Result<Value, VmmError> {
    exchange(&paths.vmm_sock(), command).await.map_err(|error| VmmError::Control {
        vmm,
        operation,
        source: error.into(),
    })
}

async fn exchange(socket: &Path, command: &str) -> Result<Value, QmpError> {
    Qmp::connect(socket, CONTROL_TIMEOUT).await?.execute(command).await
}

/// Ends the VMM. One that hangs up in answer has obeyed.
pub(crate) async fn quit(vmm: VmmKind, paths: &VmPaths) -> Result<(), VmmError> {
    let failed = |error: QmpError| VmmError::Control { vmm, operation: "end the VMM", source: error.into() };
    let mut qmp = Qmp::connect(&paths.vmm_sock(), CONTROL_TIMEOUT).await.map_err(failed)?;
    match qmp.execute("quit").await {
        Ok(_) | Err(QmpError::HungUp { .. }) => Ok(()),
        Err(source) => Err(failed(source)),
    }
}

/// As much as is needed of the answer to `query-status`
/// (<https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>, `StatusInfo`).
#[derive(Deserialize)]
struct Status {
    running: bool,
    status: String,
}

/// How the virtual CPUs do.
async fn status(vmm: VmmKind, paths: &VmPaths) -> Result<Status, VmmError> {
    const OPERATION: &str = "ask for the VM's status";
    let status = command(vmm, paths, "query-status", OPERATION).await?;
    Status::deserialize(&status).map_err(|_| VmmError::Control {
        vmm,
        operation: OPERATION,
        source: qmp::malformed("query-status", status.to_string().as_bytes()).into(),
    })
}

/// The name of a drive's backend.
pub(crate) fn drive_id(serial: &str) -> String {
    format!("drive-{serial}")
}

/// The size in bytes of a drive, as the guest sees it; `None` where there is no such drive.
async fn drive_size(qmp: &mut Qmp, id: &str) -> Result<Option<u64>, QmpError> {
    const COMMAND: &str = "query-block";
    let drives = qmp.execute(COMMAND).await?;
    let strange = || qmp::malformed(COMMAND, drives.to_string().as_bytes());
    let drive = drives.as_array().ok_or_else(strange)?.iter().find(|drive| drive["device"] == id);
    drive.map(|drive| drive["inserted"]["image"]["virtual-size"].as_u64().ok_or_else(strange)).transpose()
}

/// The optional interfaces of a VMM that speaks QMP.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QmpControls(pub(crate) VmmKind);

#[async_trait::async_trait]
impl crate::PowerButton for QmpControls {
    async fn press(&self, paths: &VmPaths) -> Result<(), VmmError> {
        command(self.0, paths, "system_powerdown", "press the power button").await.map(drop)
    }
}

#[async_trait::async_trait]
impl crate::Pause for QmpControls {
    async fn pause(&self, paths: &VmPaths) -> Result<(), VmmError> {
        command(self.0, paths, "stop", "pause the VM").await.map(drop)
    }
    async fn resume(&self, paths: &VmPaths) -> Result<(), VmmError> {
        command(self.0, paths, "cont", "resume the VM").await.map(drop)
    }
    async fn is_paused(&self, paths: &VmPaths) -> Result<bool, VmmError> {
        Ok(!status(self.0, paths).await?.running)
    }
    async fn is_out_of_room(&self, paths: &VmPaths) -> Result<bool, VmmError> {
        // Nothing else halts it so: by its defaults, which are left as they are, any other error is given to the guest
        // (qemu(1), `werror` and `rerror`).
        Ok(status(self.0, paths).await?.status == "io-error")
    }
}

#[async_trait::async_trait]
impl crate::Resize for QmpControls {
    async fn grow_disk(&self, paths: &VmPaths, serial: &str, size_bytes: u64) -> Result<(), VmmError> {
        let failed = |error: QmpError| VmmError::Control {
            vmm: self.0,
            operation: "grow a disk",
            source: error.into(),
        };
        let refused = |rule: String| VmmError::Growth { serial: serial.to_owned(), size_bytes, rule };
        if !size_bytes.is_multiple_of(SECTOR) {
            return Err(refused(format!("a size is a multiple of {SECTOR} bytes")));
        }
        let mut qmp = Qmp::connect(&paths.vmm_sock(), CONTROL_TIMEOUT).await.map_err(failed)?;
        let id = drive_id(serial);
        match drive_size(&mut qmp, &id).await.map_err(failed)? {
            None => Err(VmmError::NoDrive { vmm: self.0, serial: serial.to_owned() }),
            Some(now) if now > size_bytes => Err(refused(format!("it has {now} bytes and cannot shrink"))),
            Some(_) => {
                let arguments = json!({"device": id, "size": size_bytes});
                qmp.execute_with("block_resize", arguments).await.map(drop).map_err(failed)
            }
        }
    }
}
