//! Wiring: the only place that names concrete drivers. Order: directories, lock, store, engine, socket; then serve until told to end.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use vm_disk::{DiskError, HostCow};
use vm_dns::DnsError;
use vm_engine::{Engine, EngineError, Parts, SubnetChoice, effects::Host};
use vm_host::{HostCommand, HostRunner, RunError, Runner};
use vm_net::HostNet;
use vm_plugin::{Compiler, Limits};
use vm_store::{Store, StoreError};
use vm_types::{Layout, layout::SOCKET_PATH_MAX, vm::VmmKind};
use vm_vmm::{Accelerator, FirecrackerDriver, Jailing, QemuDriver, Vmm, Vmms};

use crate::{
    config::{Config, DriverName, JailName},
    dns::NameService,
    plugins::{self, Facts, Manager, PluginsError, Setup},
    rpc::server::{self, Access, Context},
};

/// How long one component may take to compile. Languages that bring their own runtime take longest.
const COMPILE: Duration = Duration::from_secs(100);

/// How long the trial of a jail may take, which is some twenty system calls.
const JAIL_TRIAL: Duration = Duration::from_secs(20);

/// Why the daemon could not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("could not prepare {}", path.display())]
    Prepare { path: PathBuf, source: std::io::Error },
    #[error("{} holds other things than a daemon's ({example})", path.display())]
    NotOurs { path: PathBuf, example: String },
    #[error("another vmd{} already serves {}", holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), directory.display())]
    AlreadyServed { directory: PathBuf, holder: Option<u32> },
    #[error("the path {} is too long for a socket", path.display())]
    SocketPath { path: PathBuf },
    #[error("the configured group cannot be used")]
    Group { source: std::io::Error },
    #[error("could not find this program's own path")]
    OwnPath { source: std::io::Error },
    #[error("could not listen on {}", path.display())]
    Listen { path: PathBuf, source: std::io::Error },
    #[error("could not watch for signals")]
    Signals { source: std::io::Error },
    #[cfg(not(feature = "fake"))]
    #[error("this build has no fake VMM")]
    NoFake,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("plugins cannot be used")]
    Plugins(#[from] PluginsError),
    #[error("the name service cannot begin")]
    Names(#[from] DnsError),
}

/// What to do about a directory or file of the daemon's that cannot be made or written.
fn place_hint(path: &Path, source: &std::io::Error) -> String {
    use std::io::ErrorKind as E;
    let path = path.display();
    match source.kind() {
        E::ReadOnlyFilesystem => format!(
            "the filesystem of {path} is mounted read-only: mount it writable, \
             or name other directories with --run-dir and --state-dir"
        ),
        E::StorageFull | E::QuotaExceeded => format!("free some space on the filesystem of {path}"),
        E::PermissionDenied if !nix::unistd::geteuid().is_root() => {
            "run vmd as root, or name directories of your own with --run-dir and --state-dir".to_owned()
        }
        _ => format!("look at {path}, or name other directories with --run-dir and --state-dir"),
    }
}

impl DaemonError {
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Prepare { path, source } | Self::Listen { path, source } => Some(place_hint(path, source)),
            Self::AlreadyServed { .. } => Some(
                "use it, stop it with `vm daemon stop`, or name other directories for a second daemon".into(),
            ),
            Self::NotOurs { .. } => Some("name a directory that is empty, or not there yet".into()),
            Self::SocketPath { .. } => Some("name a shorter --run-dir".into()),
            Self::Group { .. } => Some("make the group, or take `group` out of the configuration".into()),
            Self::Store(error) => error.hint(),
            Self::Disk(error) => error.hint(),
            Self::Engine(error) => error.hint(),
            Self::Plugins(error) => error.hint(),
            Self::Names(_) => Some("look at network.resolvers in the configuration".into()),
            #[cfg(not(feature = "fake"))]
            Self::NoFake => Some("take vmm.fake out of the configuration".into()),
            Self::OwnPath { .. } | Self::Signals { .. } => None,
        }
    }
}

/// Serves until SIGTERM, SIGINT or `daemon.stop`.
pub(crate) async fn serve(layout: Layout, config: Config) -> Result<(), DaemonError> {
    raise_file_limit();
    let longest = layout.longest_socket();
    if longest.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(DaemonError::SocketPath { path: longest });
    }
    let group = config.group_id().map_err(|source| DaemonError::Group { source })?;
    prepare(&layout.run, &["vmd.pid", "vmd.sock", "vms"])?;
    prepare(&layout.state, &["vmd.lock", "vmd.db", "vmd.log"])?;
    let _state_lock = lock(&layout.lock_file(), &layout.state).await?;
    let _run_lock = lock(&layout.run.join("vmd.pid"), &layout.run).await?;

    let own = std::env::current_exe().map_err(|source| DaemonError::OwnPath { source })?;
    let runner: Arc<dyn Runner> = Arc::new(HostRunner);
    let store = Store::open(&layout.database())?;
    let Drivers { vmm, why, .. } = drivers(&config, &runner).await?;
    tracing::info!(vmm = %vmm.preferred(), %why, "runs VMs");
    for path in [layout.images(), layout.state.join("vms")] {
        prepare(&path, &[])?;
    }
    let host = Host::new(
        Arc::new(HostNet::new(runner.clone())),
        Arc::new(HostCow::probe(config.disk.backend, &layout.images(), &layout.state.join("vms"))?),
        Arc::new(vm_engine::effects::HostShims::new(own)),
        [layout.run.clone(), layout.state.clone()],
        runner.clone(),
    );
    let registries =
        config.images.registries(layout.registry_logins()).map_err(vm_engine::EngineError::from)?;
    let settings = config.settings(group, registries);
    let names = NameService::new(config.resolvers(), host.names.clone()).await?;
    let plugins = plugins(&layout, &config, &store, &vmm, &runner).await?;
    // Before VMs that are up are taken over: guests are told the domains.
    names.follow(plugins.clone()).await;
    let parts = Parts {
        layout: layout.clone(),
        settings,
        store,
        host,
        vmm,
        runner,
        hooks: plugins.clone(),
        importers: plugins.clone(),
        names: Arc::new(names.clone()),
    };
    let engine = Engine::start(parts).await?;
    names.attach(engine.clone(), config.names.listen).await;

    let mut terminate = signal(SignalKind::terminate()).map_err(|source| DaemonError::Signals { source })?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|source| DaemonError::Signals { source })?;
    // A closed terminal is no reason to end.
    let _hangup = signal(SignalKind::hangup()).map_err(|source| DaemonError::Signals { source })?;
    let stop = CancellationToken::new();
    let socket = layout.socket();
    let listen = |source| DaemonError::Listen { path: socket.clone(), source };
    let listener = server::bind(&socket, group).map_err(listen)?;
    let access = Access::new(group);
    let close = CancellationToken::new();
    let context = Context {
        engine: engine.clone(),
        plugins,
        names: names.clone(),
        config: Arc::new(config),
        stop: stop.clone(),
        started_at: vm_host::clock::unix_seconds(),
    };
    let serving = tokio::spawn(server::serve(listener, context, access, close.clone()));
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    // Cancel-safe: three arms that only wait.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = stop.cancelled() => {}
    }
    tracing::info!("going down; VMs go on");
    // No new connections, then the end of all operations, which those who watch them are still told of.
    stop.cancel();
    engine.end_operations().await;
    close.cancel();
    let _ = serving.await;
    engine.shut_down().await;
    names.stop().await;
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// The plugins, loaded.
async fn plugins(
    layout: &Layout,
    config: &Config,
    store: &Store,
    vmm: &Vmms,
    runner: &Arc<dyn Runner>,
) -> Result<Arc<Manager>, PluginsError> {
    let subnet = match config.subnet() {
        SubnetChoice::Auto => None,
        SubnetChoice::Fixed(subnet) => Some(subnet),
    };
    let vmm = vmm.preferred().to_string();
    let compiler =
        Compiler::Process { runner: runner.clone(), program: compiler(), args: Vec::new(), timeout: COMPILE };
    Manager::open(Setup {
        dir: layout.plugins(),
        store: store.clone(),
        facts: Facts::new(store.clone(), &vmm, subnet),
        client_key: layout.client_key(),
        compiler,
        limits: Limits::default(),
        bundled: plugins::bundled::directory(config.plugins.bundled.as_deref()),
        trust: config.plugins.trust(),
    })
    .await
}

/// The program that compiles plugins: beside this one, which has no compiler in it.
pub(crate) fn compiler() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("vm-plugin-compile")
}

/// The VMM drivers of a configuration.
pub(crate) struct Drivers {
    pub(crate) vmm: Vmms,
    /// Why the preferred one is that.
    pub(crate) why: String,
    /// How VMMs are locked in; `None` where they are not to be.
    pub(crate) jailing: Option<Jailing>,
}

/// Looks at this host for them.
pub(crate) async fn drivers(config: &Config, runner: &Arc<dyn Runner>) -> Result<Drivers, DaemonError> {
    #[cfg(feature = "fake")]
    if let Some(program) = &config.vmm.fake {
        let fake = vm_vmm::FakeDriver::new(program.clone(), Vec::new());
        return Ok(Drivers { vmm: Vmms::only(fake), why: "as configured".to_owned(), jailing: None });
    }
    #[cfg(not(feature = "fake"))]
    if config.vmm.fake.is_some() {
        return Err(DaemonError::NoFake);
    }
    let accelerator = config.vmm.accelerator.map(Into::into);
    let jailing = jailing(config, &**runner).await;
    let firecracker = FirecrackerDriver::new(runner.clone(), config.vmm.firecracker.clone());
    let firecracker: Arc<dyn Vmm> = Arc::new(firecracker.jailed(jailing.clone()));
    let qemu = QemuDriver::new(runner.clone(), config.vmm.qemu.clone(), accelerator);
    let qemu: Arc<dyn Vmm> = Arc::new(qemu.jailed(jailing.clone()));
    let (first, why) = match config.vmm.driver {
        DriverName::Firecracker => (VmmKind::Firecracker, "as configured".to_owned()),
        DriverName::Qemu => (VmmKind::Qemu, "as configured".to_owned()),
        DriverName::Auto if accelerator == Some(Accelerator::Tcg) => {
            (VmmKind::Qemu, "software emulation is configured".to_owned())
        }
        DriverName::Auto => match firecracker.availability().await {
            Ok(found) => (VmmKind::Firecracker, format!("it is installed, and {}", found.reason)),
            Err(error) => (VmmKind::Qemu, vm_types::report::chain(&error)),
        },
    };
    let vmm = match first {
        VmmKind::Firecracker => Vmms::new(firecracker, [qemu]),
        _ => Vmms::new(qemu, [firecracker]),
    };
    Ok(Drivers { vmm, why, jailing })
}

/// How VMMs are locked in, and whether this host lets them be; `None` where they are not to be.
async fn jailing(config: &Config, runner: &dyn Runner) -> Option<Jailing> {
    let required = match config.vmm.jail {
        JailName::Off => return None,
        JailName::Auto => false,
        JailName::On => true,
    };
    let users = config.jail_users();
    // This very program, also where its file has been replaced.
    let trial = HostCommand::new("/proc/self/exe").args(["jail", "--try-out"]).arg(users.first.to_string());
    let obstacle = match runner.run(trial.timeout(JAIL_TRIAL)).await {
        Ok(_) => None,
        // That the host is busy is no reason to run VMs unlocked; what is in the way then fails their starts.
        Err(RunError::TimedOut { .. }) => None,
        Err(RunError::Failed { stderr_tail, .. }) => {
            Some(stderr_tail.trim().trim_start_matches("vmd: ").to_owned())
        }
        Err(error) => Some(vm_types::report::chain(&error)),
    };
    if let Some(obstacle) = &obstacle {
        tracing::warn!(%obstacle, "VMMs cannot be locked in");
    }
    Some(Jailing { users, required, obstacle })
}

/// Makes a directory of the daemon's; one that is there must be empty or have one of the daemon's `marks` in it, so that a
/// mistyped path costs nobody their files. Mode 0711: who may use a socket or key inside decides that file's own mode.
fn prepare(path: &Path, marks: &[&str]) -> Result<(), DaemonError> {
    let failed = |source| DaemonError::Prepare { path: path.into(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(failed)?;
    if !marks.is_empty() && !marks.iter().any(|mark| path.join(mark).exists()) {
        let mut entries = std::fs::read_dir(path).map_err(failed)?.flatten();
        if let Some(entry) = entries.next() {
            let example = entry.file_name().to_string_lossy().into_owned();
            return Err(DaemonError::NotOurs { path: path.into(), example });
        }
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)).map_err(failed)
}

/// A few descriptors for each VM and connection add up to more than the usual soft limit.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// How long the lock of a daemon that is dead is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Takes the lock that keeps a second daemon away; held until dropped. The kernel holds it a moment longer than a killed
/// daemon lives where that had just forked a child, which keeps copies of all descriptors until it runs its program.
async fn lock(path: &Path, directory: &Path) -> Result<Flock<File>, DaemonError> {
    let failed = |source| DaemonError::Prepare { path: path.into(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let give_up = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // What is there is overwritten and not cut first, so that a full disk has room for it.
                let text = format!("{}\n", std::process::id());
                lock.rewind().map_err(failed)?;
                lock.write_all(text.as_bytes()).map_err(failed)?;
                lock.set_len(text.len() as u64).map_err(failed)?;
                return Ok(lock);
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(failed)?;
        let holder = text.trim().parse().ok();
        let lives = holder.is_some_and(|pid| vm_host::process::identify(pid).is_some());
        if lives || tokio::time::Instant::now() > give_up {
            return Err(DaemonError::AlreadyServed { directory: directory.into(), holder });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_lock_that_a_dead_daemon_left_for_a_moment_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmd.lock");
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        std::fs::write(&path, format!("{}\n", dead.id())).unwrap();
        let left = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let (taken, ()) = tokio::join!(lock(&path, dir.path()), async { drop(left) });
        let _taken = taken.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_told_by_what_is_the_matter() {
        let hint = |kind: std::io::ErrorKind| {
            DaemonError::Prepare { path: "/var/lib/vmd".into(), source: kind.into() }.hint().unwrap()
        };
        let read_only = hint(std::io::ErrorKind::ReadOnlyFilesystem);
        assert!(read_only.contains("read-only") && !read_only.contains("root"), "{read_only}");
        assert!(hint(std::io::ErrorKind::StorageFull).contains("space"));
    }

    #[tokio::test]
    async fn the_lock_of_a_daemon_that_lives_is_refused_and_its_holder_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmd.lock");
        let _taken = lock(&path, dir.path()).await.unwrap();
        let error = lock(&path, dir.path()).await.unwrap_err();
        let own = std::process::id();
        assert!(
            matches!(&error, DaemonError::AlreadyServed { holder: Some(pid), .. } if *pid == own),
            "{error}"
        );
    }
}
