//! A world whose VMM and guests are fakes, and a daemon in it that can be ended and started in milliseconds. Everything but
//! the guest is real: taps, firewall, files, processes.

use std::{
    fs::{File, OpenOptions},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::runtime::Runtime;

use crate::{
    Snapshot, World,
    fixtures::{self, TINY},
    namespaces::{Network, Process, before_exec, default_signals},
    programs,
    rpc::Api,
    world::SHORT,
};

/// Between two looks at whether the daemon listens.
const LOOK: Duration = Duration::from_millis(2);
/// For a daemon on its way down: it waits for its operations.
const DOWN: Duration = Duration::from_secs(60);

/// A world with a fake VMM and the [`TINY`] image.
pub struct FakeWorld {
    // Dropped first: its tasks use the daemon's socket.
    runtime: Runtime,
    daemon: Option<Daemon>,
    world: World,
    before: Snapshot,
}

struct Daemon {
    child: Child,
    api: Api,
}

/// What a daemon that was started is.
#[derive(Debug)]
pub enum Started {
    /// It answers.
    Up,
    /// It ended before it did.
    Ended(ExitStatus),
}

impl FakeWorld {
    /// One with a flawless fake and, besides that, this configuration (all but `[vm]` and `[vmm]`).
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(config: &str) -> Self {
        Self::with_programs(programs::directory(), config)
    }

    /// The same with the `vmd` and `vm-fake-vmm` of a directory.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn with_programs(programs: PathBuf, config: &str) -> Self {
        let world = World::with_programs(programs, Network::Own);
        let fake = world.program("vm-fake-vmm");
        let agent = world.directory().join("agent");
        // Copied at each start of a VM; the fake's guest has no use for a true one.
        std::fs::write(&agent, b"no agent").expect("a file can be written");
        world.configure(&format!(
            "version = 1\nagent = \"{}\"\n[vm]\nimage = \"{TINY}\"\ndisk_mib = 64\nmemory_mib = 64\n\
             [vmm]\nfake = \"{}\"\n{config}\n",
            agent.display(),
            fake.display()
        ));
        fixtures::plant_tiny(&world.dirs().state);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let mut new = Self { runtime, daemon: None, before: Snapshot::empty(), world };
        // A daemon that came and went: what it leaves is what there was before.
        new.start("");
        new.terminate();
        new.before = Snapshot::take(&new.world);
        new
    }

    /// Installs a plugin with all that it asks for; from now on it is part of what was there before.
    ///
    /// # Panics
    /// It cannot be installed, or a daemon runs.
    #[track_caller]
    pub fn install(&mut self, directory: &str, config: &[&str]) {
        self.start("");
        let mut arguments = vec!["plugin", "install", directory, "--grant", "all"];
        for pair in config {
            arguments.extend(["--config", pair]);
        }
        self.world.vm(&arguments).run().exits(0);
        self.terminate();
        self.before = Snapshot::take(&self.world);
    }

    /// The world.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Runs a client's work.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Has a client work beside the test.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.spawn(work)
    }

    /// A connection to the daemon that runs.
    ///
    /// # Panics
    /// None does.
    pub fn api(&self) -> &Api {
        &self.daemon.as_ref().expect("a daemon was started").api
    }

    /// One more connection.
    ///
    /// # Panics
    /// No daemon listens.
    pub fn connect(&self) -> Api {
        let socket = self.world.dirs().socket();
        self.runtime.block_on(Api::connect(&socket)).expect("the daemon listens")
    }

    /// Does `work` with the daemon.
    pub fn ask<'a, T>(&'a self, work: impl AsyncFnOnce(&'a Api) -> T) -> T {
        self.runtime.block_on(work(self.api()))
    }

    /// Starts a daemon that has to come up.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn start(&mut self, failpoints: &str) {
        match self.try_start(failpoints) {
            Started::Up => {}
            Started::Ended(status) => panic!("the daemon ends with {status}{}", (self.world.context())()),
        }
    }

    /// Starts a daemon with these failpoints (see crate `fail`) and waits until it answers or has ended.
    ///
    /// # Panics
    /// One runs already, or this one does neither in time.
    #[track_caller]
    pub fn try_start(&mut self, failpoints: &str) -> Started {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let mut command = Command::new(self.world.program("vmd"));
        let dirs = self.world.dirs();
        command
            .arg("serve")
            .env("VMD_RUN_DIR", &dirs.run)
            .env("VMD_STATE_DIR", &dirs.state)
            .env("VMD_CONFIG_DIR", &dirs.config)
            .env("VMD_LOG", "info,vm_engine=debug")
            .env("LC_ALL", "C")
            .env_remove("DBUS_SYSTEM_BUS_ADDRESS")
            .env("FAILPOINTS", failpoints)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.log());
        before_exec(&mut command, default_signals);
        let mut child = self.world.namespaces().spawn(&mut command).expect("the daemon can be started");
        let deadline = Instant::now() + SHORT;
        // The socket of a daemon that was killed is there until the next one listens; nobody answers on it.
        loop {
            if let Some(status) = child.try_wait().expect("an own child can be waited for") {
                return Started::Ended(status);
            }
            if let Ok(api) = self.runtime.block_on(Api::connect(&dirs.socket())) {
                self.daemon = Some(Daemon { child, api });
                return Started::Up;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the daemon does not answer within {SHORT:?}{}", (self.world.context())());
            }
            std::thread::park_timeout(LOOK);
        }
    }

    fn log(&self) -> File {
        let path = self.world.dirs().log_file();
        OpenOptions::new().create(true).append(true).open(path).expect("the log can be opened")
    }

    /// What daemons have logged since byte `from`, and where that ends.
    pub fn logged(&self, from: usize) -> (String, usize) {
        let bytes = std::fs::read(self.world.dirs().log_file()).unwrap_or_default();
        let part = bytes.get(from..).unwrap_or_default();
        (String::from_utf8_lossy(part).into_owned(), bytes.len())
    }

    /// Kills the daemon.
    ///
    /// # Panics
    /// None runs.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon was started");
        let _ = daemon.child.kill();
        daemon.child.wait().expect("an own child can be waited for");
    }

    /// Tells the daemon to end, and waits until it has.
    ///
    /// # Panics
    /// None runs, or it does not end.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("a daemon was started");
        // It may have killed itself; an own child that was not waited for keeps its pid.
        kill(Pid::from_raw(daemon.child.id().cast_signed()), Signal::SIGTERM)
            .expect("an own child can be signalled");
        self.ended(&mut daemon.child)
    }

    /// Waits for the end of a daemon that ends by itself.
    ///
    /// # Panics
    /// None runs, or it does not end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("a daemon was started");
        self.ended(&mut daemon.child)
    }

    #[track_caller]
    fn ended(&self, child: &mut Child) -> ExitStatus {
        let deadline = Instant::now() + DOWN;
        loop {
            match child.try_wait().expect("an own child can be waited for") {
                Some(status) => return status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!("the daemon does not end within {DOWN:?}{}", (self.world.context())());
                }
                None => std::thread::park_timeout(LOOK),
            }
        }
    }

    /// Whether a daemon was started and not yet ended by the test.
    pub fn has_daemon(&self) -> bool {
        self.daemon.is_some()
    }

    /// The daemon's pid, for the test.
    ///
    /// # Panics
    /// None runs.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon was started").child.id()
    }

    /// The VMMs that run.
    pub fn vmms(&self) -> Vec<Process> {
        let program = self.world.program("vm-fake-vmm").to_string_lossy().into_owned();
        let mut all = self.world.namespaces().processes();
        all.retain(|process| process.arguments.starts_with(&program));
        all
    }

    /// The shims that run.
    pub fn shims(&self) -> Vec<Process> {
        let mut all = self.world.namespaces().processes();
        all.retain(|process| process.arguments.contains(" shim --spec "));
        all
    }

    /// How the world differs from what it was with no daemon and no VM.
    pub fn leaks(&self) -> Vec<String> {
        Snapshot::take(&self.world).difference(&self.before)
    }

    /// Checks that nothing is left, with the daemon's log if something is.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn leaves_nothing(&self) {
        Snapshot::take(&self.world).must_equal(&self.before, &(self.world.context())());
    }
}

impl Drop for FakeWorld {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.child.kill();
            let _ = daemon.child.wait();
        }
    }
}

/// Whether a process was ended by SIGKILL.
pub fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(Signal::SIGKILL as i32)
}
