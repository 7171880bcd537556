//! Namespaces of a world: made by one process, entered by all others.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigHandler, Signal, signal},
};

use crate::programs;

/// Whether a world has a network of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// One of its own, with nothing but a loopback device.
    Own,
    /// The host's, to download with. No VM may be started in it.
    Host,
}

/// Held namespaces. Dropping them kills every process inside.
#[derive(Debug)]
pub struct Namespaces {
    holder: Child,
    mount: File,
    net: File,
    pid: File,
}

impl Namespaces {
    /// Makes new ones.
    ///
    /// # Panics
    /// Not being root, or the kernel having no namespaces.
    pub fn new(network: Network) -> Self {
        let mut command = Command::new(programs::world_holder());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut flags = CloneFlags::CLONE_NEWNS;
        if network == Network::Own {
            flags |= CloneFlags::CLONE_NEWNET;
        }
        before_exec(&mut command, move || unshare(flags).map_err(Into::into));
        let spawned = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWPID)?;
            command.spawn()
        });
        let mut holder =
            spawned.unwrap_or_else(|error| panic!("a test world needs root and namespaces: {error}"));
        let mut line = String::new();
        if let Some(stdout) = holder.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).expect("the world's holder says something");
        }
        assert_eq!(line, "ready\n", "the world's holder failed; what it said is above");
        let open = |kind: &str| {
            File::open(format!("/proc/{}/ns/{kind}", holder.id()))
                .expect("a namespace of a live process opens")
        };
        let (mount, net, pid) = (open("mnt"), open("net"), open("pid"));
        Self { holder, mount, net, pid }
    }

    /// Starts a command inside.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        // Descriptors of this process, open as long as `self` is: the closure outlives neither.
        let (mount, net) = (self.mount.try_clone()?, self.net.try_clone()?);
        before_exec(command, move || {
            setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?;
            setns(net.as_fd(), CloneFlags::CLONE_NEWNET)?;
            nix::unistd::chdir("/").map_err(Into::into)
        });
        in_thread(|| enter_pid(self.pid.as_fd()).and_then(|()| command.spawn()))
    }

    /// A path inside as it is reached from outside, also where something is mounted over it inside.
    pub fn path(&self, inside: &std::path::Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The mounts inside, as in proc_pid_mounts(5).
    ///
    /// # Panics
    /// The holder having died.
    pub fn mounts(&self) -> String {
        fs::read_to_string(format!("/proc/{}/mounts", self.holder.id())).expect("the holder lives")
    }

    /// All processes inside but the holder: pid outside, pid inside, arguments.
    pub fn processes(&self) -> Vec<Process> {
        let own = fs::read_link(format!("/proc/{}/ns/pid", self.holder.id())).ok();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|&pid| pid.unsigned_abs() != self.holder.id())
            .filter(|pid| own.is_some() && fs::read_link(format!("/proc/{pid}/ns/pid")).ok() == own)
            .filter_map(|pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
                // A zombie only waits for its parent, which may be the test.
                if status.lines().any(|line| line.starts_with("State:\tZ")) {
                    return None;
                }
                let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
                let inside = inside.split_whitespace().last()?.parse().ok()?;
                let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let arguments = String::from_utf8_lossy(&arguments).trim_end_matches('\0').replace('\0', " ");
                Some(Process { outside: pid, inside, arguments })
            })
            .collect()
    }
}

/// A process of a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid for the test.
    pub outside: i32,
    /// Its pid for the programs under test.
    pub inside: u32,
    /// Its arguments, with blanks between.
    pub arguments: String,
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// Which process namespace children are born in is a matter of the thread; so a thread of its own makes each.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| Err(io::Error::other("panicked")))
}

fn enter_pid(pid: BorrowedFd<'_>) -> io::Result<()> {
    setns(pid, CloneFlags::CLONE_NEWPID).map_err(Into::into)
}

/// Has a child do `work`, system calls only, before it becomes the command.
#[expect(unsafe_code, reason = "only between fork and exec can a child change its own namespaces")]
pub(crate) fn before_exec(
    command: &mut Command,
    work: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: what is passed here makes system calls and allocates nothing, so it is fit for a forked child.
    unsafe { command.pre_exec(work) };
}

/// Signals as a command typed in a terminal has them. A shell has its background jobs ignore SIGINT and SIGQUIT, and what is
/// ignored is inherited: by us where the tests run in such a job, and by what we start.
#[expect(unsafe_code, reason = "nix cannot know that a disposition is no handler")]
pub(crate) fn default_signals() -> io::Result<()> {
    for number in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGTERM] {
        // SAFETY: SIG_DFL runs no code of ours.
        unsafe { signal(number, SigHandler::SigDfl) }?;
    }
    Ok(())
}
