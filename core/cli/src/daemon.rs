//! Reaching the daemon: connecting, starting it on demand, running its program.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use jsonrpsee::core::client::Client;
use vm_api::{API_VERSION, DaemonStatus, ErrorKind, rpc::DaemonClient};
use vm_types::{Layout, layout::SOCKET_PATH_MAX};

use crate::errors::exit_code;

/// How long a daemon may take until it listens.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long its socket may still appear after the one we started has ended: another `vm` may have started one.
const RIVAL_GRACE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(10);
/// The daemon's program.
const PROGRAM: &str = "vmd";

/// Why there is no daemon to talk to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// Nobody listens and it may not be started from here.
    #[error("no daemon listens on {}", socket.display())]
    NotRunning {
        /// Its socket.
        socket: PathBuf,
        /// The command that would start it.
        start: String,
    },
    /// The socket belongs to others.
    #[error("no permission to use {}", socket.display())]
    Forbidden {
        /// It.
        socket: PathBuf,
    },
    /// The socket is there but does not work.
    #[error("cannot talk to the daemon on {}", socket.display())]
    Connect {
        /// It.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The run directory's path is too long for sockets.
    #[error("the path {} is longer than a Unix socket's may be ({SOCKET_PATH_MAX} bytes)", socket.display())]
    PathTooLong {
        /// The longest one.
        socket: PathBuf,
    },
    /// Its interface is another one.
    #[error("the daemon speaks version {daemon} of the interface, this vm speaks {API_VERSION}")]
    Version {
        /// The daemon's.
        daemon: String,
    },
    /// Neither beside `vm` nor in PATH.
    #[error("{PROGRAM} is not installed")]
    NotInstalled,
    /// Its log or directories.
    #[error("cannot prepare {} for the daemon", path.display())]
    Prepare {
        /// What was to be made.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not run.
    #[error("cannot run {}", program.display())]
    Spawn {
        /// It.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended at once.
    #[error("the daemon ended at its start ({status}){log}")]
    Ended {
        /// How.
        status: String,
        /// The end of its log, on lines of its own.
        log: String,
        /// Where the rest of it is.
        log_file: PathBuf,
    },
    /// It runs but does not listen.
    #[error("the daemon did not listen within {} s{log}", START_DEADLINE.as_secs())]
    Slow {
        /// The end of its log, on lines of its own.
        log: String,
        /// Where the rest of it is.
        log_file: PathBuf,
    },
    /// It could not check the host.
    #[error("{PROGRAM} could not check the host ({status}){stderr}")]
    Check {
        /// How it ended.
        status: String,
        /// The end of what it said, on lines of its own.
        stderr: String,
    },
    /// It was told to end and did not.
    #[error("the daemon (process {pid}) did not end within {seconds} s")]
    DidNotStop {
        /// Its process.
        pid: u32,
        /// How long it was given.
        seconds: u64,
    },
}

impl DaemonError {
    /// The sort, for programs.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Forbidden { .. } => ErrorKind::PermissionDenied,
            Self::PathTooLong { .. } => ErrorKind::InvalidArgument,
            Self::Version { .. } => ErrorKind::Unsupported,
            Self::NotInstalled => ErrorKind::NotInstalled,
            Self::Prepare { source, .. } | Self::Spawn { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                ErrorKind::PermissionDenied
            }
            Self::NotRunning { .. }
            | Self::Connect { .. }
            | Self::Prepare { .. }
            | Self::Spawn { .. }
            | Self::Ended { .. }
            | Self::Slow { .. }
            | Self::Check { .. }
            | Self::DidNotStop { .. } => ErrorKind::HostFailure,
        }
    }

    /// The exit code: that of the sort, or 9 where the sort is none of its own.
    pub(crate) fn exit_code(&self) -> u8 {
        match self.kind() {
            ErrorKind::HostFailure => exit_code(ErrorKind::ShuttingDown),
            kind => exit_code(kind),
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotRunning { start, .. } => format!("start it: {start}"),
            Self::Forbidden { .. } => {
                "use sudo, or join the group that the daemon's config.toml names, and log in anew".to_owned()
            }
            Self::Connect { .. } => {
                "look at its log and restart it: vm daemon stop; vm daemon start".to_owned()
            }
            Self::PathTooLong { .. } => "choose a shorter --run-dir".to_owned(),
            Self::Version { .. } => {
                "install vm and vmd of one version, then: vm daemon stop; vm daemon start".to_owned()
            }
            Self::NotInstalled => format!("install {PROGRAM} beside vm or in a directory of PATH"),
            Self::Prepare { path, source } => place_hint(path, source),
            Self::Spawn { .. } => format!("check that {PROGRAM} is executable and made for this machine"),
            // On a full disk it could not write why.
            Self::Ended { log_file, .. } if is_full(log_file) => {
                format!("free some space on the filesystem of {}", log_file.display())
            }
            Self::Ended { log_file, .. } | Self::Slow { log_file, .. } => {
                format!("its log is {}; `vm doctor` checks the host", log_file.display())
            }
            Self::Check { .. } => "install vm and vmd of one version, and run this as root".to_owned(),
            Self::DidNotStop { pid, .. } => format!("end it yourself: sudo kill {pid}; VMs go on"),
        })
    }
}

/// What to do about a directory or file of the daemon's that cannot be made or written.
fn place_hint(path: &Path, source: &io::Error) -> String {
    let path = path.display();
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => format!(
            "the filesystem of {path} is mounted read-only: mount it writable, \
             or choose other directories by --run-dir and --state-dir"
        ),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("free some space on the filesystem of {path}")
        }
        io::ErrorKind::PermissionDenied if !nix::unistd::geteuid().is_root() => {
            "run as root, or choose other directories by --run-dir and --state-dir".to_owned()
        }
        _ => format!("look at {path}, or choose other directories by --run-dir and --state-dir"),
    }
}

/// Connects to the daemon that is there; `None` where none is.
pub(crate) async fn connect(layout: &Layout) -> Result<Option<Client>, DaemonError> {
    let socket = layout.socket();
    if socket.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(DaemonError::PathTooLong { socket });
    }
    match vm_api::client::connect(&socket).await {
        Ok(client) => Ok(Some(client)),
        Err(source) => match source.kind() {
            // The others are of a daemon that ends just now.
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Ok(None),
            io::ErrorKind::PermissionDenied => Err(DaemonError::Forbidden { socket }),
            _ => Err(DaemonError::Connect { socket, source }),
        },
    }
}

/// Connects to the daemon, and starts it where it is not there, `may_start` is set and the caller is root.
pub(crate) async fn connect_or_start(layout: &Layout, may_start: bool) -> Result<Client, DaemonError> {
    if let Some(client) = connect(layout).await? {
        match check_version(layout, &client).await {
            // It ended meanwhile.
            Err(DaemonError::Connect { .. }) if !client.is_connected() => {}
            checked => return checked.map(|()| client),
        }
    }
    if !may_start || !nix::unistd::geteuid().is_root() {
        return Err(not_running(layout));
    }
    start(layout).await
}

/// Asks a daemon how it is.
pub(crate) async fn status(layout: &Layout, client: &Client) -> Result<DaemonStatus, DaemonError> {
    client.status().await.map_err(|error| DaemonError::Connect {
        socket: layout.socket(),
        source: io::Error::other(vm_api::client::problem(&error)),
    })
}

async fn check_version(layout: &Layout, client: &Client) -> Result<(), DaemonError> {
    let daemon = status(layout, client).await?.api_version;
    if major(&daemon) == major(API_VERSION) { Ok(()) } else { Err(DaemonError::Version { daemon }) }
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
}

/// The error of there being no daemon.
pub(crate) fn not_running(layout: &Layout) -> DaemonError {
    let mut start = String::from(if nix::unistd::geteuid().is_root() { "vm" } else { "sudo vm" });
    for (option, dir, default) in [
        ("--run-dir", &layout.run, DEFAULT_RUN),
        ("--state-dir", &layout.state, DEFAULT_STATE),
        ("--config-dir", &layout.config, DEFAULT_CONFIG),
    ] {
        if dir != Path::new(default) {
            let dir = dir.to_string_lossy();
            let quoted = shlex::try_quote(&dir).unwrap_or(std::borrow::Cow::Borrowed(&dir));
            start.push_str(&format!(" {option} {quoted}"));
        }
    }
    start.push_str(" daemon start");
    DaemonError::NotRunning { socket: layout.socket(), start }
}

/// Default of `--run-dir`.
pub(crate) const DEFAULT_RUN: &str = "/run/vmd";
/// Default of `--state-dir`.
pub(crate) const DEFAULT_STATE: &str = "/var/lib/vmd";
/// Default of `--config-dir`.
pub(crate) const DEFAULT_CONFIG: &str = "/etc/vmd";

/// The daemon's program: beside our own, else in PATH.
pub(crate) fn program() -> Result<PathBuf, DaemonError> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(PROGRAM)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)))
        .find(|candidate| candidate.is_file())
        .ok_or(DaemonError::NotInstalled)
}

/// The options that give a daemon these directories.
pub(crate) fn directory_options(layout: &Layout) -> Vec<OsString> {
    [("--run-dir", &layout.run), ("--state-dir", &layout.state), ("--config-dir", &layout.config)]
        .into_iter()
        .flat_map(|(option, dir)| [OsString::from(option), dir.clone().into_os_string()])
        .collect()
}

/// Starts a daemon in the background and waits until it listens.
async fn start(layout: &Layout) -> Result<Client, DaemonError> {
    let program = program()?;
    let (log, log_start) = open_log(layout)?;
    let child = spawn_detached(&program, layout, log)?;
    wait_until_it_listens(layout, child, log_start).await
}

fn open_log(layout: &Layout) -> Result<(File, u64), DaemonError> {
    let prepare = |path: &Path, source| DaemonError::Prepare { path: path.to_owned(), source };
    // The daemon settles owner and mode; until then nobody else needs to get in.
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(&layout.state)
        .map_err(|source| prepare(&layout.state, source))?;
    let path = layout.log_file();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(&path)
        .map_err(|source| prepare(&path, source))?;
    let length = log.metadata().map_err(|source| prepare(&path, source))?.len();
    Ok((log, length))
}

#[expect(unsafe_code, reason = "std has no stable way to start a child in a session of its own")]
fn spawn_detached(program: &Path, layout: &Layout, log: File) -> Result<Child, DaemonError> {
    let failed = |source| DaemonError::Spawn { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command
        .arg("serve")
        .args(directory_options(layout))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    // SAFETY: setsid(2) is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
    }
    command.spawn().map_err(failed)
}

async fn wait_until_it_listens(
    layout: &Layout,
    mut child: Child,
    log_start: u64,
) -> Result<Client, DaemonError> {
    let mut deadline = Instant::now() + START_DEADLINE;
    let mut ended = None;
    loop {
        match connect(layout).await {
            Ok(Some(client)) => return check_version(layout, &client).await.map(|()| client),
            // Between its bind(2) and listen(2), or chmod(2), the socket refuses.
            Ok(None) | Err(DaemonError::Forbidden { .. } | DaemonError::Connect { .. }) => {}
            Err(error) => return Err(error),
        }
        if ended.is_none()
            && let Ok(Some(status)) = child.try_wait()
        {
            ended = Some(status);
            deadline = deadline.min(Instant::now() + RIVAL_GRACE);
        }
        if Instant::now() >= deadline {
            let (log, log_file) = (log_tail(layout, log_start), layout.log_file());
            return Err(match ended {
                Some(status) => DaemonError::Ended { status: status.to_string(), log, log_file },
                None => DaemonError::Slow { log, log_file },
            });
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether a file's filesystem has less than 64 KiB left for anybody.
fn is_full(file: &Path) -> bool {
    nix::sys::statvfs::statvfs(file)
        .is_ok_and(|about| about.blocks_available().saturating_mul(about.fragment_size()) < 64 << 10)
}

/// The last lines of the log from `start` on, each on a line of its own; empty where there are none.
fn log_tail(layout: &Layout, start: u64) -> String {
    const BYTES: u64 = 4096;
    const LINES: usize = 10;
    let read = || -> io::Result<String> {
        let mut file = File::open(layout.log_file())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.min(length).max(length.saturating_sub(BYTES))))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    tail_lines(&read().unwrap_or_default(), LINES)
}

/// The last `count` lines of a text, set off by a colon and line ends for the end of a message.
pub(crate) fn tail_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let tail = &lines[lines.len().saturating_sub(count)..];
    if tail.is_empty() { String::new() } else { format!(":\n  {}", tail.join("\n  ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dir: &Path) -> Layout {
        Layout { run: dir.join("run"), state: dir.join("state"), config: dir.join("config") }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_told_by_what_is_the_matter() {
        let hint = |kind: io::ErrorKind| {
            DaemonError::Prepare { path: "/var/lib/vmd".into(), source: kind.into() }.hint().unwrap()
        };
        let read_only = hint(io::ErrorKind::ReadOnlyFilesystem);
        assert!(read_only.contains("read-only") && !read_only.contains("root"), "{read_only}");
        assert!(hint(io::ErrorKind::StorageFull).contains("space"));
    }

    #[tokio::test]
    async fn a_daemon_that_ends_at_once_is_reported_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let program = dir.path().join("vmd");
        let text = dir.path().join("script");
        std::fs::write(&text, "#!/bin/sh\necho \"no such bridge: $1 $3\" >&2\nexit 3\n").unwrap();
        // By another process: a child forked meanwhile would keep the program open for writing, thus not to be run.
        let install = Command::new("install").arg(text).arg(&program).status().unwrap();
        assert!(install.success());
        let (log, start) = open_log(&layout).unwrap();
        let child = spawn_detached(&program, &layout, log).unwrap();
        let error = wait_until_it_listens(&layout, child, start).await.unwrap_err();
        let run = layout.run.display();
        assert!(
            matches!(&error, DaemonError::Ended { status, log, .. }
            if status.contains('3') && log.contains(&format!("no such bridge: serve {run}"))),
            "{error}"
        );
        assert_eq!(error.exit_code(), 9);
    }

    #[tokio::test]
    async fn a_daemon_that_ends_at_that_moment_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        std::fs::create_dir_all(&layout.run).unwrap();
        let listener = tokio::net::UnixListener::bind(layout.socket()).unwrap();
        // The connection is in the listener's queue, and never accepted.
        let (connected, ()) = tokio::join!(connect(&layout), async { drop(listener) });
        assert!(matches!(connected, Ok(None)), "{:?}", connected.err());
    }

    #[tokio::test]
    async fn a_daemon_that_ends_before_it_answers_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        std::fs::create_dir_all(&layout.run).unwrap();
        let listener = tokio::net::UnixListener::bind(layout.socket()).unwrap();
        // Closed with the request unread, which resets it, and with all of it read, which is an end of file.
        for request in [0, 4096] {
            let end = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.readable().await;
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut vec![0; request]).await;
            };
            let (connected, ()) = tokio::join!(connect(&layout), end);
            assert!(matches!(connected, Ok(None)), "{:?}", connected.err());
        }
    }

    #[tokio::test]
    async fn without_a_daemon_the_command_that_starts_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let error = connect_or_start(&layout, false).await.unwrap_err();
        let hint = error.hint().unwrap();
        assert!(hint.contains("vm --run-dir") && hint.ends_with("daemon start"), "{hint}");
        assert_eq!(error.exit_code(), 9);
    }

    #[tokio::test]
    async fn a_run_directory_too_deep_for_sockets_is_refused() {
        let layout = layout(Path::new(&format!("/{}", "d".repeat(110))));
        let error = connect(&layout).await.unwrap_err();
        assert!(matches!(error, DaemonError::PathTooLong { .. }));
    }

    #[test]
    fn versions_are_compared_by_their_major() {
        assert_eq!(major("1.0"), major("1.7"));
        assert_ne!(major("1.0"), major("10.0"));
    }
}
