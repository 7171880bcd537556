//! A host of its own for one test: namespaces, directories, a daemon, and `vm`.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;
use vm_types::{Layout, VmPaths};

use crate::{
    Output, Running, Snapshot,
    command::{Context, Input, wait_until},
    fixtures,
    namespaces::{Namespaces, Network},
    programs,
};

/// A VM that is emulated boots in about 5 s on an idle machine; this is for a busy one.
pub const BOOT: Duration = Duration::from_secs(180);
/// For whatever needs no boot.
pub const SHORT: Duration = Duration::from_secs(60);
/// How many worlds there are at once; each has one VM at a time that works.
const WORLDS: usize = 2;

/// A daemon's directories.
pub type Dirs = Layout;

/// A host of its own. Dropping it ends all processes in it and removes its files.
pub struct World {
    // In the order in which they are dropped: processes, then their files, then the place for another world.
    namespaces: Namespaces,
    directory: TempDir,
    dirs: Dirs,
    programs: PathBuf,
    before: Option<Snapshot>,
    instance: OnceLock<String>,
    _place: Place,
}

impl World {
    /// One with the images and the kernel of the seed and an empty configuration.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn new() -> Self {
        Self::with_config("")
    }

    /// One with this `config.toml`.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn with_config(config: &str) -> Self {
        Self::with_seed(&fixtures::seed(), config)
    }

    /// One with the images and kernels of another seed.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn with_seed(seed: &Path, config: &str) -> Self {
        let mut world = Self::empty(Network::Own);
        world.configure(config);
        fixtures::plant(seed, &world.dirs.state);
        // A daemon that came and went: what it leaves is what there was before.
        world.vm(&["daemon", "start"]).run().exits(0);
        if !config.contains("bundled") {
            world.wait_for_bundled_plugins();
        }
        world.vm(&["daemon", "stop"]).run().exits(0);
        world.before = Some(Snapshot::take(&world));
        world
    }

    /// A daemon answers before it has compiled them where that takes long.
    #[track_caller]
    fn wait_for_bundled_plugins(&self) {
        let list = fs::read_to_string(self.program("plugins/default.toml")).unwrap_or_default();
        // Nothing else in it is quoted.
        let names: Vec<_> = list.split('"').skip(1).step_by(2).collect();
        wait_until("the plugins that come with the daemon are installed", BOOT, || {
            let installed = self.vm(&["plugin", "ls", "-q"]).run().exits(0).text();
            names.iter().all(|name| installed.lines().any(|line| line == *name))
        });
    }

    /// One without images.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn empty(network: Network) -> Self {
        Self::with_programs(programs::directory(), network)
    }

    pub(crate) fn with_programs(programs: PathBuf, network: Network) -> Self {
        let place = Place::take();
        let base = fixtures::cache().join("worlds");
        fs::create_dir_all(&base).expect("the cache directory can be written to");
        let directory =
            tempfile::Builder::new().prefix("w").tempdir_in(&base).expect("a directory can be made");
        let dirs = Dirs {
            run: directory.path().join("run"),
            state: directory.path().join("state"),
            config: directory.path().join("config"),
        };
        fs::create_dir_all(&dirs.config).expect("a directory can be made");
        let namespaces = Namespaces::new(network);
        Self { namespaces, directory, dirs, programs, before: None, instance: OnceLock::new(), _place: place }
    }

    /// Directories for one more daemon, with the same images.
    ///
    /// # Panics
    /// They cannot be made.
    pub fn second_dirs(&self) -> Dirs {
        let base = self.directory.path().join("second");
        let dirs = Dirs { run: base.join("run"), state: base.join("state"), config: base.join("config") };
        fs::create_dir_all(&dirs.config).expect("a directory can be made");
        fixtures::plant(&fixtures::seed(), &dirs.state);
        dirs
    }

    /// Replaces `config.toml`, for the next daemon.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn configure(&self, config: &str) {
        fs::write(self.dirs.config_file(), config).expect("the configuration can be written");
    }

    /// The namespaces.
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// The directory that all of this world's files are in.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The daemon's directories.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// What is in each name that this world's daemon gives to things on the host; `None` before its first life.
    pub fn instance(&self) -> Option<String> {
        if self.instance.get().is_none()
            && self.dirs.database().exists()
            && let Some(found) = fixtures::instance(&self.dirs.state)
        {
            return Some(self.instance.get_or_init(|| found).clone());
        }
        self.instance.get().cloned()
    }

    /// A program under test.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// `vm`, to be run.
    pub fn vm(&self, arguments: &[&str]) -> Invocation<'_> {
        self.vm_at(&self.dirs, arguments)
    }

    /// `vm` for the daemon of other directories.
    pub fn vm_at(&self, dirs: &Dirs, arguments: &[&str]) -> Invocation<'_> {
        let mut command = self.command(&self.program("vm"));
        for (name, dir) in directories(dirs) {
            command.env(name, dir);
        }
        command.args(arguments);
        Invocation { world: self, command, input: Input::Null, limit: BOOT }
    }

    /// `vmd` itself, with this world's directories.
    pub fn vmd(&self, arguments: &[&str]) -> Invocation<'_> {
        let mut command = self.command(&self.program("vmd"));
        for (name, dir) in directories(&self.dirs) {
            command.env(name, dir);
        }
        command.args(arguments);
        Invocation { world: self, command, input: Input::Null, limit: SHORT }
    }

    /// A tool of the host, run inside.
    pub fn tool(&self, name: &str, arguments: &[&str]) -> Invocation<'_> {
        let mut command = self.command(Path::new(name));
        command.args(arguments);
        Invocation { world: self, command, input: Input::Null, limit: SHORT }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for name in ["VMD_RUN_DIR", "VMD_STATE_DIR", "VMD_CONFIG_DIR", "DBUS_SYSTEM_BUS_ADDRESS"] {
            command.env_remove(name);
        }
        command.env("LC_ALL", "C").env("VMD_LOG", "info,vm_engine=debug");
        command
    }

    /// `vm … --json`, as JSON.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn ask(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        self.vm(&arguments).run().exits(0).json()
    }

    /// A VM's state word.
    ///
    /// # Panics
    /// There is no such VM.
    #[track_caller]
    pub fn state(&self, vm: &str) -> String {
        self.ask(&["show", vm])["state"].as_str().unwrap_or_default().to_owned()
    }

    /// A VM's files.
    ///
    /// # Panics
    /// There is no such VM.
    #[track_caller]
    pub fn paths(&self, vm: &str) -> VmPaths {
        let id = self.ask(&["show", vm])["id"].as_str().unwrap_or_default().to_owned();
        self.dirs.vm(&id.parse().expect("a VM has an id"))
    }

    /// All VMs' names.
    ///
    /// # Panics
    /// They cannot be listed.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        self.vm(&["ls", "-q"]).run().exits(0).text().lines().map(str::to_owned).collect()
    }

    /// The pid, outside, of a running VM's VMM.
    ///
    /// # Panics
    /// It is not running.
    #[track_caller]
    pub fn vmm_pid(&self, vm: &str) -> i32 {
        let shown = self.ask(&["show", vm]);
        self.outside(shown["pid"].as_u64().unwrap_or_else(|| panic!("{vm} is not running: {shown}")))
    }

    /// The pid, outside, of the daemon.
    ///
    /// # Panics
    /// It is not running.
    #[track_caller]
    pub fn daemon_pid(&self) -> i32 {
        self.outside(self.ask(&["daemon", "status"])["pid"].as_u64().expect("the daemon has a pid"))
    }

    /// The same, without asking it.
    ///
    /// # Panics
    /// It is not running.
    #[track_caller]
    pub fn daemon_process(&self) -> i32 {
        let processes = self.namespaces.processes();
        let serves = |arguments: &str| {
            arguments.starts_with(&*self.program("vmd").to_string_lossy()) && arguments.contains(" serve ")
        };
        let found = processes.iter().find(|process| serves(&process.arguments));
        found.unwrap_or_else(|| panic!("no daemon among {processes:?}")).outside
    }

    #[track_caller]
    fn outside(&self, pid: u64) -> i32 {
        let processes = self.namespaces.processes();
        let found = processes.iter().find(|process| u64::from(process.inside) == pid);
        found.unwrap_or_else(|| panic!("no process {pid} among {processes:?}")).outside
    }

    /// Kills a process of this world (pid outside) and waits until it is gone.
    ///
    /// # Panics
    /// It is not there, or does not go.
    #[track_caller]
    pub fn kill(&self, pid: i32) {
        let inside = |pid| self.namespaces.processes().iter().any(|process| process.outside == pid);
        assert!(inside(pid), "no process {pid} in this world");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a process of this world can be killed");
        wait_until("a killed process is gone", SHORT, || !inside(pid));
    }

    /// Waits until a VM's state word is this.
    ///
    /// # Panics
    /// It does not become so.
    #[track_caller]
    pub fn wait_for_state(&self, vm: &str, word: &str) -> Value {
        let mut last = Value::Null;
        // A guest that goes down takes as long as one that comes up.
        let deadline = std::time::Instant::now() + BOOT;
        while last["state"] != word {
            assert!(
                std::time::Instant::now() < deadline,
                "{vm} does not become {word} but is {last}{}",
                (self.context())()
            );
            last = self.ask(&["show", vm]);
        }
        last
    }

    /// Deletes all VMs, ends the daemon, and checks that nothing is left.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn leaves_nothing(self) {
        let names = self.names();
        if !names.is_empty() {
            let mut arguments = vec!["delete", "--force"];
            arguments.extend(names.iter().map(String::as_str));
            self.vm(&arguments).run().exits(0);
        }
        self.vm(&["daemon", "stop"]).run().exits(0);
        let before = self.before.clone().expect("a world with a seed has a snapshot");
        Snapshot::take(&self).must_equal(&before, &(self.context())());
    }

    /// The daemon's log's end, for failures.
    pub fn context(&self) -> Context {
        let log = self.namespaces.path(&self.dirs.log_file());
        Arc::new(move || {
            let text =
                fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            format!("\n--- daemon's log\n{tail}\n---")
        })
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

fn directories(dirs: &Dirs) -> [(&'static str, &Path); 3] {
    [("VMD_RUN_DIR", &dirs.run), ("VMD_STATE_DIR", &dirs.state), ("VMD_CONFIG_DIR", &dirs.config)]
}

/// A program about to be run.
pub struct Invocation<'a> {
    world: &'a World,
    command: Command,
    input: Input,
    limit: Duration,
}

impl Invocation<'_> {
    /// With this stdin.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// With a stdin that stays open.
    #[must_use]
    pub fn open_stdin(mut self) -> Self {
        self.input = Input::Open;
        self
    }

    /// On a terminal of this size.
    #[must_use]
    pub fn terminal(mut self, columns: u16, rows: u16) -> Self {
        self.input = Input::Terminal { columns, rows };
        self.command.env("TERM", "xterm");
        self
    }

    /// With this variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// With this time limit.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// It cannot be started.
    #[track_caller]
    pub fn start(self) -> Running {
        Running::start(&self.world.namespaces, self.command, self.input, self.world.context())
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// It does not end in time.
    #[track_caller]
    pub fn run(self) -> Output {
        let limit = self.limit;
        self.start().finish(limit)
    }
}

impl Output {
    /// It has to have been ended by this signal.
    ///
    /// # Panics
    /// It was not.
    #[track_caller]
    pub fn dies_of(self, signal: Signal) -> Self {
        self.must("ended by a signal", |output| output.status.signal() == Some(signal as i32))
    }
}

/// One of the [`WORLDS`].
struct Place;

static TAKEN: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Place {
    fn take() -> Self {
        let taken = TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = TAKEN.1.wait_while(taken, |taken| *taken >= WORLDS);
        *free.unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        TAKEN.1.notify_one();
    }
}
