//! What can be asked of a Firecracker that runs.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Value, json};
use vm_host::{HttpClient, HttpError};
use vm_types::{VmPaths, shim::ShimSpec, vm::VmmKind};

use super::requests::drive_id;
use crate::{
    ControlError, Pause, PowerButton, Resize, VmmError,
    control::{SECTOR, wait_answer},
    driver::CONTROL_TIMEOUT,
};

const KIND: VmmKind = VmmKind::Firecracker;

/// The optional interfaces of Firecracker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Controls;

/// Ends when the API is answered on the VMM's control socket.
pub(super) async fn wait_up(paths: &VmPaths, within: Duration) -> Result<(), VmmError> {
    let ask = |socket: PathBuf, left| async move {
        HttpClient::connect(&socket, left).await?.request("GET", "/version", None).await.map(drop)
    };
    let passing = |error: &HttpError| error.is_nobody() || matches!(error, HttpError::Broken { .. });
    wait_answer(KIND, paths.api_sock(), within, ask, passing).await
}

/// Makes one request on a connection of its own.
async fn ask(
    paths: &VmPaths,
    operation: &'static str,
    method: &str,
    path: &str,
    body: Option<Value>,
) -> Result<Value, VmmError> {
    let failed = |error: HttpError| VmmError::Control { vmm: KIND, operation, source: error.into() };
    let mut client = HttpClient::connect(&paths.api_sock(), CONTROL_TIMEOUT).await.map_err(failed)?;
    client.request(method, path, body.as_ref()).await.map_err(failed)
}

fn strange(operation: &'static str, request: &'static str, lacks: &'static str) -> VmmError {
    VmmError::Control { vmm: KIND, operation, source: ControlError::Strange { request, lacks } }
}

#[async_trait]
impl PowerButton for Controls {
    async fn press(&self, paths: &VmPaths) -> Result<(), VmmError> {
        let body = json!({"action_type": "SendCtrlAltDel"});
        ask(paths, "press Control-Alt-Delete", "PUT", "/actions", Some(body)).await.map(drop)
    }
}

#[async_trait]
impl Pause for Controls {
    async fn pause(&self, paths: &VmPaths) -> Result<(), VmmError> {
        ask(paths, "pause the VM", "PATCH", "/vm", Some(json!({"state": "Paused"}))).await.map(drop)
    }
    async fn resume(&self, paths: &VmPaths) -> Result<(), VmmError> {
        ask(paths, "resume the VM", "PATCH", "/vm", Some(json!({"state": "Resumed"}))).await.map(drop)
    }
    async fn is_paused(&self, paths: &VmPaths) -> Result<bool, VmmError> {
        const OPERATION: &str = "ask for the VM's state";
        let about = ask(paths, OPERATION, "GET", "/", None).await?;
        match about["state"].as_str() {
            Some(state) => Ok(state == "Paused"),
            None => Err(strange(OPERATION, "GET /", "state")),
        }
    }
}

#[async_trait]
impl Resize for Controls {
    async fn grow_disk(&self, paths: &VmPaths, serial: &str, size_bytes: u64) -> Result<(), VmmError> {
        const OPERATION: &str = "grow a disk";
        let refused = |rule: String| VmmError::Growth { serial: serial.to_owned(), size_bytes, rule };
        if !size_bytes.is_multiple_of(SECTOR) {
            return Err(refused(format!("a size is a multiple of {SECTOR} bytes")));
        }
        let image = image(paths, serial)?;
        let failed = |source| VmmError::Image { path: image.clone(), source };
        let now = size(&image).map_err(failed)?;
        if now > size_bytes {
            return Err(refused(format!("it has {now} bytes and cannot shrink")));
        }
        lengthen(&image, now, size_bytes).map_err(failed)?;
        // It looks at its image anew where it is given it again.
        let id = drive_id(serial);
        let body = json!({"drive_id": id, "path_on_host": image});
        ask(paths, OPERATION, "PATCH", &format!("/drives/{id}"), Some(body)).await.map(drop)
    }
}

/// Where a drive of the machine that runs has its image. Firecracker would tell, but a guest may have taken it over, and then it would have
/// us write to a file of its choice.
fn image(paths: &VmPaths, serial: &str) -> Result<PathBuf, VmmError> {
    let path = paths.shim_spec();
    let spec: Option<ShimSpec> =
        vm_host::files::read_json(&path).map_err(|source| VmmError::Machine { path, source })?;
    let drives = spec.and_then(|spec| spec.machine).map(|machine| machine.drives).unwrap_or_default();
    let drive = drives.into_iter().find(|drive| drive.serial == serial);
    drive.map(|drive| drive.path).ok_or_else(|| VmmError::NoDrive { vmm: KIND, serial: serial.to_owned() })
}

/// Of an image file or block device, in bytes.
fn size(image: &Path) -> io::Result<u64> {
    File::open(image)?.seek(SeekFrom::End(0))
}

/// A block device has to have the size already.
fn lengthen(image: &Path, now: u64, wanted: u64) -> io::Result<()> {
    if now == wanted {
        return Ok(());
    }
    let file = OpenOptions::new().write(true).open(image)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("the block device has {now} bytes and not {wanted}")));
    }
    file.set_len(wanted)
}
