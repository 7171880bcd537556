//! The daemon's side of a shim: starting it, asking it, reading what it left.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::Path,
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};
use vm_types::{
    ProcessRef, VmId, VmPaths,
    shim::{ExitRecord, ShimFailed, ShimReply, ShimRequest, ShimSpec, ShimStarted},
};

use crate::{error::ShimError, identity, lines, log};

/// How long a shim may take to answer a request; it does nothing that takes time.
const ANSWER: Duration = Duration::from_secs(10);
/// A VMM's metrics are the longest part of an answer.
const LINE_LIMIT: usize = 1 << 20;
const STDERR_LIMIT: u64 = 4 * 1024;

/// Variables by which a service manager knows its service; they are the daemon's and not a VM's.
const SERVICE_VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A shim's answer to [`ShimRequest::Status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimStatus {
    /// Whose shim it is.
    pub vm: VmId,
    /// The shim.
    pub shim: ProcessRef,
    /// The VMM.
    pub vmm: ProcessRef,
    /// Start of the VMM, seconds since the Unix epoch.
    pub started_at: u64,
    /// Whether the guest's agent has answered on the channel.
    pub guest_connected: bool,
    /// Connections to `ssh.sock` that are open now.
    pub ssh_connections: u32,
    /// When the last of them ended, seconds since the Unix epoch; `None` while one is open and before the first.
    pub ssh_idle_since: Option<u64>,
    /// Connections to `console.sock` that are open now.
    pub console_connections: u32,
    /// Since when nobody has been connected to `ssh.sock` or `console.sock`, from the VMM's start on, in seconds since the
    /// Unix epoch. `None` while somebody is, and from a shim that is too old to tell: neither is idle.
    pub idle_since: Option<u64>,
    /// What the VMM has told last of its counters, in its own terms; `None` of one that tells nothing.
    pub vmm_metrics: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FirstLine {
    Started(ShimStarted),
    Failed(ShimFailed),
}

/// A shim that has not said yet that it runs; killed, and its VMM with it, when nobody waits for that any longer.
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.start_kill();
        }
    }
}

/// Starts `vmd_program shim --spec SPEC --run-dir DIR` and returns when it has started the VMM. Both paths are absolute.
///
/// The shim makes itself independent of the daemon, which stays its parent only to reap it: a task of the current
/// runtime does that. Dropping the future before its end kills the shim.
///
/// # Errors
/// The program not running, the shim refusing, or no answer within `limit`, after which nothing of it is left running.
pub async fn launch(
    vmd_program: &Path,
    spec_path: &Path,
    run_dir: &Path,
    limit: Duration,
) -> Result<ShimStarted, ShimError> {
    let mut command = Command::new(vmd_program);
    command.arg("shim").arg("--spec").arg(spec_path).arg("--run-dir").arg(run_dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in SERVICE_VARIABLES {
        command.env_remove(variable);
    }
    let child =
        command.spawn().map_err(|source| ShimError::Spawn { program: vmd_program.to_owned(), source })?;
    let mut starting = Starting(Some(child));
    let answer = match &mut starting.0 {
        Some(child) => timeout(limit, first_line(child)).await,
        None => Ok(Err(ShimError::NoAnswer { stderr: String::new() })),
    };
    match answer {
        Ok(Ok(started)) => {
            if let Some(mut child) = starting.0.take() {
                tokio::spawn(async move { child.wait().await });
            }
            Ok(started)
        }
        failed => {
            if let Some(child) = &mut starting.0 {
                // Also waits, so that the VMM's death signal is on its way when the caller cleans up.
                let _ = child.kill().await;
            }
            failed.unwrap_or(Err(ShimError::StartTimedOut { seconds: limit.as_secs() }))
        }
    }
}

async fn first_line(child: &mut Child) -> Result<ShimStarted, ShimError> {
    if let Some(stdout) = child.stdout.take() {
        match lines::read_json(&mut BufReader::new(stdout), LINE_LIMIT).await {
            Ok(Some(FirstLine::Started(started))) => return Ok(started),
            Ok(Some(FirstLine::Failed(ShimFailed { error, hint }))) => {
                return Err(ShimError::Refused { error, hint });
            }
            // Its stderr says more than that the line is missing or cut.
            Ok(None) | Err(_) => {}
        }
    }
    let mut stderr = Vec::new();
    if let Some(pipe) = child.stderr.take() {
        let _ = pipe.take(STDERR_LIMIT).read_to_end(&mut stderr).await;
    }
    Err(ShimError::NoAnswer { stderr: String::from_utf8_lossy(&stderr).into_owned() })
}

/// Asks a shim who it is and how its VMM does.
///
/// # Errors
/// [`ShimError::NotRunning`] where no shim listens; a shim that does not answer or says something else.
pub async fn status(paths: &VmPaths) -> Result<ShimStatus, ShimError> {
    match request(paths, ShimRequest::Status).await? {
        Some(ShimReply::Status {
            vm,
            shim,
            vmm,
            started_at,
            guest_connected,
            ssh_connections,
            ssh_idle_since,
            console_connections,
            idle_since,
            vmm_metrics,
        }) => Ok(ShimStatus {
            vm,
            shim,
            vmm,
            started_at,
            guest_connected,
            ssh_connections,
            ssh_idle_since,
            console_connections,
            idle_since,
            vmm_metrics,
        }),
        Some(other) => Err(unexpected(paths, &other)),
        // It ended between taking the request and answering it.
        None => Err(ShimError::NotRunning { socket: paths.shim_sock() }),
    }
}

/// Asks a shim to kill its VMM. Both end soon after this returns, and an exit record is written.
///
/// # Errors
/// As [`status`].
pub async fn kill(paths: &VmPaths) -> Result<(), ShimError> {
    match request(paths, ShimRequest::Kill).await? {
        // No reply: the VMM's end was faster.
        Some(ShimReply::Killed) | None => Ok(()),
        Some(other) => Err(unexpected(paths, &other)),
    }
}

fn unexpected(paths: &VmPaths, reply: &ShimReply) -> ShimError {
    ShimError::Unexpected { socket: paths.shim_sock(), answer: format!("{reply:?}") }
}

/// One request; `None` where the shim ended instead of replying.
async fn request(paths: &VmPaths, request: ShimRequest) -> Result<Option<ShimReply>, ShimError> {
    let socket = paths.shim_sock();
    let talk = async {
        let stream = UnixStream::connect(&socket).await.map_err(|source| {
            if absent(&source) {
                ShimError::NotRunning { socket: socket.clone() }
            } else {
                ShimError::Talk { socket: socket.clone(), source }
            }
        })?;
        let mut stream = BufReader::new(stream);
        let reply = match lines::write_json(&mut stream, &request).await {
            Ok(()) => lines::read_json(&mut stream, LINE_LIMIT).await,
            Err(error) => Err(error),
        };
        match reply {
            Err(error) if ended(&error) => Ok(None),
            other => other.map_err(|source| ShimError::Talk { socket: socket.clone(), source }),
        }
    };
    timeout(ANSWER, talk)
        .await
        .unwrap_or_else(|_| Err(ShimError::TimedOut { socket: socket.clone(), seconds: ANSWER.as_secs() }))
}

/// Whether a failed connection means that nobody listens, or nobody any longer: a listener that goes resets those whom it has
/// not accepted.
pub(crate) fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

/// Whether a failed read or write means that the other end is gone.
pub(crate) fn ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
    )
}

/// All shims of a run directory: one, or none.
pub fn find(run_dir: &Path) -> Vec<ProcessRef> {
    let mut found = vm_host::process::find_by_arguments("--run-dir", run_dir);
    found.retain(|&process| identity::is_shim_of(process, run_dir));
    found
}

/// What the shim was told that runs, or ran last; `None` where there is no such file. After `vm set`, its machine is the one
/// that was started, not the one that is wanted.
///
/// # Errors
/// A specification that cannot be read or understood.
pub fn spec(paths: &VmPaths) -> Result<Option<ShimSpec>, ShimError> {
    let path = paths.shim_spec();
    vm_host::files::read_json(&path).map_err(|source| ShimError::Read { path, source })
}

/// How the last VMM ended; `None` while one runs, where none ever ran, and where its shim was killed.
///
/// # Errors
/// A record that cannot be read or understood.
pub fn exit_record(paths: &VmPaths) -> Result<Option<ExitRecord>, ShimError> {
    let path = paths.exit_record();
    vm_host::files::read_json(&path).map_err(|source| ShimError::Read { path, source })
}

/// The newest bytes of the console log, at most `max_bytes`, across both its files. They are the guest's: untrusted.
///
/// # Errors
/// Reading the log; one that is not there is empty.
pub fn console_tail(paths: &VmPaths, max_bytes: u64) -> Result<Vec<u8>, ShimError> {
    let path = paths.console_log();
    let failed = |source| ShimError::Read { path: path.clone(), source };
    loop {
        let newer = open(&path).map_err(failed)?;
        let older = open(&log::older(&path)).map_err(failed)?;
        let inode = |file: &Option<File>| {
            file.as_ref().map(File::metadata).transpose().map(|m| m.map(|m| (m.dev(), m.ino())))
        };
        let rotated = newer.is_some() && inode(&newer).map_err(failed)? == inode(&older).map_err(failed)?;
        if rotated {
            // The log was rotated between the two: the newer file has become the older one.
            continue;
        }
        let last = tail(newer, max_bytes).map_err(failed)?;
        let mut bytes = tail(older, max_bytes - last.len() as u64).map_err(failed)?;
        bytes.extend_from_slice(&last);
        return Ok(bytes);
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn tail(file: Option<File>, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut file) = file {
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(max_bytes)))?;
        file.take(max_bytes).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}
