//! The fake as Firecracker: an API to be configured by, a guest without a power-off, a vsock device.
//!
//! Behaves as its documentation and sources say
//! (<https://github.com/firecracker-microvm/firecracker/tree/main/docs>): a socket that is there is not replaced, what cannot be
//! changed after the start is refused, a kernel that halts leaves the process as it is.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use vm_types::{
    guest::{CHANNEL_VSOCK_PORT, kernel_args},
    machine::Drive,
    shim::GuestEnd,
};

use super::{
    End, FakeBehaviour, guest,
    process::{World, leave, read_console},
};

/// What it says it is.
const VERSION: &str = "1.13.2";

type Answer = Result<Value, String>;

/// The process before and after its guest's start.
struct Process {
    id: String,
    given: Mutex<BTreeMap<String, Value>>,
    opened: Mutex<Opened>,
    world: OnceLock<Arc<World>>,
    /// The guest's kernel has halted: nothing in it answers any more.
    halted: AtomicBool,
    paused: watch::Sender<bool>,
    ending: mpsc::Sender<End>,
}

/// What is opened as soon as it is asked for, before the guest runs, as Firecracker does it.
#[derive(Default)]
struct Opened {
    vsock: Option<UnixListener>,
    metrics: Option<File>,
}

/// Plays Firecracker as far as its arguments and requests go. See [`super::run`].
pub(super) fn run(args: &[String]) -> ExitCode {
    if args.iter().any(|arg| arg == "--version") {
        println!("Firecracker v{VERSION}\n");
        return ExitCode::SUCCESS;
    }
    let value = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let (Some(socket), Some(id)) = (value("--api-sock"), value("--id")) else {
        eprintln!("fake Firecracker: --api-sock and --id are missing");
        return ExitCode::from(153);
    };
    if let Some(log) = value("--log-path")
        && let Err(error) = open_pipe(&log)
    {
        // It is made by whoever reads it.
        eprintln!("fake Firecracker: {log}: {error}");
        return ExitCode::FAILURE;
    }
    leave(live(PathBuf::from(socket), id))
}

async fn live(socket: PathBuf, id: String) -> io::Result<End> {
    let listener = UnixListener::bind(socket)?;
    let (ending, mut ended) = mpsc::channel(1);
    let process = Arc::new(Process {
        id,
        given: Mutex::default(),
        opened: Mutex::default(),
        world: OnceLock::new(),
        halted: AtomicBool::new(false),
        paused: watch::Sender::new(false),
        ending,
    });
    let api = process.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, api.clone()));
        }
    });
    let end = ended.recv().await.unwrap_or(End::Code(1));
    if let Some(world) = process.world.get() {
        match end {
            End::Guest(GuestEnd::PowerOff) => world.print(kernel_args::POWERED_OFF),
            End::Guest(GuestEnd::Panic) => world.print("Kernel panic - not syncing: asked for"),
            _ => {}
        }
        if let End::Guest(_) = end {
            world.print("reboot: Restarting system");
        }
        world.flush().await;
    }
    Ok(end)
}

/// Answers requests until the client hangs up.
async fn serve(stream: UnixStream, process: Arc<Process>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let (mut words, mut length) = (Vec::new(), 0);
        loop {
            let mut line = String::new();
            if read.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            match line.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse().map_err(io::Error::other)?;
                }
                Some(_) => {}
                None if line.trim_end().is_empty() => break,
                None => words = line.split(' ').map(str::to_owned).collect(),
            }
        }
        let mut body = vec![0; length];
        read.read_exact(&mut body).await?;
        let [method, path, _] = words.as_slice() else { return Err(io::ErrorKind::InvalidData.into()) };
        let body = serde_json::from_slice(&body).unwrap_or_default();
        let text = match process.answer(method, path, body) {
            Ok(Value::Null) => "HTTP/1.1 204 \r\nServer: fake\r\n\r\n".to_owned(),
            Ok(value) => response(200, &value),
            Err(fault) => response(400, &json!({"fault_message": fault})),
        };
        write.write_all(text.as_bytes()).await?;
    }
}

fn response(status: u16, body: &Value) -> String {
    let body = body.to_string();
    format!("HTTP/1.1 {status} \r\nServer: fake\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

impl Process {
    fn answer(self: &Arc<Self>, method: &str, path: &str, body: Value) -> Answer {
        let started = self.world.get();
        match (method, path) {
            ("GET", "/version") => Ok(json!({"firecracker_version": VERSION})),
            ("GET", "/") => {
                let state = match (started, *self.paused.borrow()) {
                    (None, _) => "Not started",
                    (Some(_), true) => "Paused",
                    (Some(_), false) => "Running",
                };
                Ok(json!({"id": self.id, "state": state, "vmm_version": VERSION, "app_name": "Firecracker"}))
            }
            ("GET", "/vm/config") => Ok(json!({"drives": self.drives()})),
            ("PUT", "/actions") => match (body["action_type"].as_str(), started) {
                (Some("InstanceStart"), None) => self.start(),
                (Some("SendCtrlAltDel"), Some(_)) => {
                    let _ = self.ending.try_send(End::Guest(GuestEnd::Reboot));
                    Ok(Value::Null)
                }
                _ => Err("The requested operation is not supported in this state.".to_owned()),
            },
            ("PATCH", "/vm") => {
                let world =
                    started.ok_or("The requested operation is not supported before starting the microVM.")?;
                let paused = body["state"] == "Paused";
                self.paused.send_replace(paused);
                world.paused.send_replace(paused);
                Ok(Value::Null)
            }
            ("PATCH", path) if path.starts_with("/drives/") => {
                if !self.given().contains_key(path) {
                    return Err("Drive config error: Invalid block device ID!".to_owned());
                }
                std::fs::metadata(body["path_on_host"].as_str().unwrap_or_default())
                    .map(|_| Value::Null)
                    .map_err(|error| format!("Drive update (patch): device error: {error}"))
            }
            ("PUT", _) if started.is_some() => {
                Err("The requested operation is not supported after starting the microVM.".to_owned())
            }
            ("PUT", "/metrics") => {
                let pipe = open_pipe(body["metrics_path"].as_str().unwrap_or_default());
                let pipe = pipe.map_err(|error| {
                    format!("Cannot initialize metrics system due to bad user input: {error}")
                })?;
                self.opened().metrics = Some(pipe);
                Ok(Value::Null)
            }
            ("PUT", "/vsock") => {
                let listener = UnixListener::bind(body["uds_path"].as_str().unwrap_or_default());
                let listener = listener
                    .map_err(|error| format!("Cannot create backend for vsock device: UnixBind({error})"))?;
                self.opened().vsock = Some(listener);
                Ok(Value::Null)
            }
            ("PUT", path) => {
                self.given().insert(path.to_owned(), body);
                Ok(Value::Null)
            }
            _ => Err(format!("Invalid request method and/or path: {method} {path}.")),
        }
    }

    fn given(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Value>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drives(&self) -> Vec<Value> {
        self.given()
            .iter()
            .filter(|(path, _)| path.starts_with("/drives/"))
            .map(|(_, body)| body.clone())
            .collect()
    }

    fn start(self: &Arc<Self>) -> Answer {
        let file = |path: &Value| path.as_str().is_some_and(|path| Path::new(path).is_file());
        let source = self.given().get("/boot-source").cloned().unwrap_or_default();
        if !file(&source["kernel_image_path"]) {
            return Err("Cannot start microvm without kernel configuration.".to_owned());
        }
        let drives: Vec<Drive> = self.drives().iter().filter_map(drive).collect();
        if let Some(missing) = drives.iter().find(|drive| !drive.path.exists()) {
            return Err(format!("Unable to open {}", missing.path.display()));
        }
        let vm = self.id.parse().map_err(|error: vm_types::id::InvalidId| error.to_string())?;
        let Opened { vsock: listener, metrics } = std::mem::take(&mut *self.opened());
        let (world, mut ended) = World::new(vm, FakeBehaviour::default(), drives);
        let ending = self.ending.clone();
        tokio::spawn(async move {
            if let Some(end) = ended.recv().await {
                let _ = ending.send(end).await;
            }
        });
        if let Some(listener) = listener {
            tokio::spawn(offer(listener, self.clone(), world.clone()));
        }
        let process = self.clone();
        tokio::spawn(read_console(world.clone(), move |world, end| process.typed(world, end)));
        world.print(&format!("fake guest {} booting", world.vm));
        let _ = self.world.set(world);
        if let Some(mut pipe) = metrics {
            let told = pipe.write_all(b"{\"vcpu\": {\"failures\": 0}}\n");
            told.map_err(|error| format!("Failed to write metrics: {error}"))?;
        }
        Ok(Value::Null)
    }

    fn typed(&self, world: &World, end: GuestEnd) {
        match end {
            GuestEnd::PowerOff => {
                self.halted.store(true, Ordering::Relaxed);
                world.print("reboot: System halted");
            }
            GuestEnd::Reboot | GuestEnd::Panic => world.end(End::Guest(end)),
        }
    }
}

/// As Firecracker opens what it tells something through.
fn open_pipe(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NONBLOCK).open(path)
}

fn drive(body: &Value) -> Option<Drive> {
    Some(Drive {
        serial: body["drive_id"].as_str()?.to_owned(),
        path: body["path_on_host"].as_str()?.into(),
        read_only: body["is_read_only"] == true,
        limits: vm_types::vm::DiskLimits::default(),
    })
}

/// The vsock device's host end: one stream to the agent for each connection that asks for it.
async fn offer(listener: UnixListener, process: Arc<Process>, world: Arc<World>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (process, world) = (process.clone(), world.clone());
        tokio::spawn(async move {
            let mut stream = BufReader::with_capacity(1, stream);
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            world.running().await;
            if process.halted.load(Ordering::Relaxed) {
                // Nobody answers, and nobody hangs up.
                std::future::pending::<()>().await;
            }
            if line.trim_end() != format!("CONNECT {CHANNEL_VSOCK_PORT}") {
                return Ok(());
            }
            stream.write_all(b"OK 1073741824\n").await?;
            guest::serve(stream.into_inner(), world).await
        });
    }
}
