//! Runs git: the one place that does.
//!
//! Git acts as the person who asked, with that person's own configuration, since what git keeps, ignores and converts depends
//! on it; but with nothing of the daemon's environment, without hooks or a file system monitor, without taking a lock of
//! the repository's or fetching anything.

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::{OsStr, OsString},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            ffi::OsStrExt,
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use rustix::thread as own;

use crate::{Cancel, Identity, WorkspaceError};

/// How often a running git looks whether it was given up, in milliseconds.
const GLANCE: u16 = 100;
/// The most that is collected of an output, in bytes: the lists of a repository with millions of files.
const OUTPUT: usize = 1 << 30;
/// What is kept of the standard error, in bytes: its end.
const ERRORS: usize = 8 << 10;
/// Read and written at once, in bytes.
const PIECE: usize = 64 << 10;

/// What every git is told. What a repository's or a person's configuration says about these does not count.
const SETTINGS: [&str; 9] = [
    "core.fsmonitor=false",
    "core.hooksPath=/dev/null",
    "core.pager=cat",
    "core.alternateRefsCommand=true",
    "core.logAllRefUpdates=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "status.showStash=false",
    "submodule.recurse=false",
];

/// Why git did not do it.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// It is not installed.
    #[error("git is not installed")]
    NotInstalled,
    /// It could not be started or talked to.
    #[error("{command} could not be run")]
    Run {
        /// The command line, for people.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// What it said could not be passed on.
    #[error("the output of {command} could not be passed on")]
    Output {
        /// The command line, for people.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("{command} failed ({status}): {stderr}")]
    Failed {
        /// The command line, for people.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote to its standard error.
        stderr: String,
    },
    /// Nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
}

impl GitError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotInstalled => Some("install it on the host: apt-get install git".into()),
            Self::Failed { stderr, .. } => failed_hint(stderr).map(Into::into),
            Self::Run { .. } | Self::Output { .. } | Self::Cancelled => None,
        }
    }

    pub(crate) fn stderr(&self) -> &str {
        if let Self::Failed { stderr, .. } = self { stderr } else { "" }
    }
}

fn failed_hint(stderr: &str) -> Option<&'static str> {
    let said = |texts: &[&str]| texts.iter().any(|text| stderr.contains(text));
    if said(&["dubious ownership"]) {
        Some(
            "a repository belongs to somebody else: if you trust it, git config --global --add safe.directory PATH",
        )
    } else if said(&["No space left", "Disk quota exceeded"]) {
        Some("free space on the disks of the repository and of vmd's state directory")
    } else if said(&[
        "lazy fetching disabled",
        "missing blob",
        "unable to read",
        "bad tree object",
        "missing object",
    ]) {
        Some(
            "objects are missing: of a partial clone fetch them all (git fetch --refetch --no-filter), of any other see what \
             git fsck says; or use the importer copy",
        )
    } else if said(&["ermission denied", "insufficient permission"]) {
        Some(
            "git runs with your rights: make the repository's files readable for you, and writable where it gets a branch",
        )
    } else if said(&["cannot lock ref"]) {
        Some(
            "let another git that is at work there end; if none is, remove the file *.lock that one has left behind",
        )
    } else {
        None
    }
}

/// Git as one user, until the work is given up.
#[derive(Debug, Clone)]
pub struct Git {
    identity: Identity,
    home: Option<PathBuf>,
    cancel: Cancel,
}

/// A command of git's.
#[derive(Debug)]
pub struct GitCommand<'a> {
    git: &'a Git,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    input: Vec<u8>,
}

impl Git {
    /// Git as this user.
    pub fn new(identity: Identity, cancel: Cancel) -> Self {
        let home = identity.home();
        Self { identity, home, cancel }
    }

    /// A command that is run in a directory.
    pub fn at(&self, directory: &Path) -> GitCommand<'_> {
        let mut args = vec![OsString::from("-C"), directory.as_os_str().to_owned(), "--no-pager".into()];
        for setting in SETTINGS {
            args.extend(["-c".into(), setting.into()]);
        }
        GitCommand { git: self, args, env: Vec::new(), input: Vec::new() }
    }

    /// The same for a command that compares files with what git keeps. Whoever made the repository may have named a program in
    /// its configuration that git would run for that, as the user, who may never have run git in it. Only filters of the
    /// user's own and the host's configuration are run.
    ///
    /// # Errors
    /// The repository's configuration cannot be read.
    pub fn comparing(&self, directory: &Path) -> Result<GitCommand<'_>, GitError> {
        let asked = self.at(directory).args([
            "config",
            "--show-scope",
            "--name-only",
            "-z",
            "--get-regexp",
            r"^filter\.",
        ]);
        let said = asked.find()?.unwrap_or_default();
        let fields: Vec<&[u8]> = said.split(|byte| *byte == 0).collect();
        let foreign =
            fields.as_chunks::<2>().0.iter().filter(|[scope, _]| !matches!(*scope, b"global" | b"system"));
        let drivers: BTreeSet<&[u8]> = foreign.filter_map(|[_, key]| driver(key)).collect();
        let mut command = self.at(directory);
        let mut count = 0;
        for name in drivers {
            for (variable, value) in [("clean", ""), ("smudge", ""), ("process", ""), ("required", "false")] {
                // Unlike `-c`, this takes names with an equals sign in them.
                let key = [b"filter.", name, b".", variable.as_bytes()].concat();
                command = command
                    .env(format!("GIT_CONFIG_KEY_{count}"), OsStr::from_bytes(&key))
                    .env(format!("GIT_CONFIG_VALUE_{count}"), value);
                count += 1;
            }
        }
        Ok(if count > 0 { command.env("GIT_CONFIG_COUNT", count.to_string()) } else { command })
    }
}

/// The name in `filter.NAME.VARIABLE`, if there is one.
fn driver(key: &[u8]) -> Option<&[u8]> {
    let rest = key.strip_prefix(b"filter.")?;
    let end = rest.iter().rposition(|byte| *byte == b'.')?;
    Some(&rest[..end])
}

impl GitCommand<'_> {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets what it reads.
    #[must_use]
    pub fn input(mut self, input: Vec<u8>) -> Self {
        self.input = input;
        self
    }

    /// Runs it; its standard output.
    ///
    /// # Errors
    /// Any end but exit status 0, and more output than a gibibyte.
    pub fn output(self) -> Result<Vec<u8>, GitError> {
        let mut collected = Vec::new();
        self.run(&mut |piece| {
            if collected.len() + piece.len() > OUTPUT {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
            collected.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(collected)
    }

    /// Runs it; its standard output without the last end of line.
    ///
    /// # Errors
    /// As [`Self::output`].
    pub fn line(self) -> Result<Vec<u8>, GitError> {
        let mut output = self.output()?;
        output.pop_if(|last| *last == b'\n');
        Ok(output)
    }

    /// Runs a command that says by exit status 1 that there is no such thing; otherwise as [`Self::line`].
    ///
    /// # Errors
    /// Any other end than exit status 0 and 1.
    pub fn find(self) -> Result<Option<Vec<u8>>, GitError> {
        match self.line() {
            Ok(line) => Ok(Some(line)),
            Err(GitError::Failed { status, .. }) if status.code() == Some(1) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs it and passes its standard output on as it comes.
    ///
    /// # Errors
    /// As [`Self::output`], and `to`'s.
    pub fn stream(self, to: &mut dyn Write) -> Result<(), GitError> {
        self.run(&mut |piece| to.write_all(piece))
    }

    fn display(&self) -> String {
        // What stands before is the same always.
        let told = self.args.iter().skip(3 + 2 * SETTINGS.len());
        told.fold(String::from("git"), |line, arg| line + " " + &crate::text::shown(arg.as_encoded_bytes()))
    }

    fn run(self, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), GitError> {
        if self.git.cancel.is_cancelled() {
            return Err(GitError::Cancelled);
        }
        let line = self.display();
        tracing::debug!(command = %line, uid = self.git.identity.uid, "git");
        let child = self.command().spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => GitError::NotInstalled,
            _ => GitError::Run { command: line.clone(), source },
        })?;
        let mut running = Running(child);
        let outcome = running.converse(&self.input, sink, &self.git.cancel);
        match outcome {
            Ok((status, _)) if status.success() => Ok(()),
            Ok((status, stderr)) => {
                let stderr = String::from_utf8_lossy(&stderr).trim_end().to_owned();
                Err(GitError::Failed { command: line, status, stderr })
            }
            Err(Ended::Cancelled) => Err(GitError::Cancelled),
            Err(Ended::Sink(source)) => Err(GitError::Output { command: line, source }),
            Err(Ended::Pipe(source)) => Err(GitError::Run { command: line, source }),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("git");
        command.args(&self.args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()));
        command.env("HOME", self.git.home.as_deref().unwrap_or(Path::new("/nonexistent")));
        for (name, value) in [
            ("LC_ALL", "C"),
            // A repository stays as it is, also its index, which git status would otherwise bring up to date.
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            // No protocol has this name. What a configuration says of a single one beats `protocol.allow`; this beats both.
            ("GIT_ALLOW_PROTOCOL", "none"),
        ] {
            command.env(name, value);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(if self.input.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).current_dir("/");
        if !self.git.identity.is_own() {
            become_user(&mut command, &self.git.identity);
        }
        command
    }
}

/// Has the command run with all rights of a user and none else. `Command::uid` would drop the user's other groups.
fn become_user(command: &mut Command, identity: &Identity) {
    let groups = identity.rustix_groups();
    let gid = rustix::process::Gid::from_raw(identity.gid);
    let uid = rustix::process::Uid::from_raw(identity.uid);
    let take = move || -> io::Result<()> {
        own::set_thread_groups(&groups)?;
        own::set_thread_res_gid(gid, gid, gid)?;
        own::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    #[expect(unsafe_code, reason = "nothing safe sets a child's groups")]
    // SAFETY: between fork and exec the closure makes three system calls, on memory made before; it neither allocates nor
    // takes a lock. The child has one thread, so what it sets holds for all of it.
    unsafe {
        command.pre_exec(take);
    }
}

/// A git that has not ended; dropped, it is killed with all that it has started.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // It is not reaped, so the group's number is not anybody else's.
            let _ = killpg(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL);
            let _ = self.0.wait();
        }
    }
}

enum Ended {
    Cancelled,
    Sink(io::Error),
    Pipe(io::Error),
}

impl Running {
    /// Writes, reads and waits to the end; how it ended, and the end of what it said on its standard error.
    fn converse(
        &mut self,
        mut input: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
        cancel: &Cancel,
    ) -> Result<(ExitStatus, Vec<u8>), Ended> {
        let (mut stdin, mut stdout, mut stderr) =
            (self.0.stdin.take(), self.0.stdout.take(), self.0.stderr.take());
        for pipe in [
            stdin.as_ref().map(AsFd::as_fd),
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
        ]
        .into_iter()
        .flatten()
        {
            rustix::io::ioctl_fionbio(pipe, true).map_err(|errno| Ended::Pipe(errno.into()))?;
        }
        let mut piece = vec![0; PIECE];
        let mut errors = VecDeque::new();
        while stdout.is_some() || stderr.is_some() || stdin.is_some() {
            if cancel.is_cancelled() {
                return Err(Ended::Cancelled);
            }
            let [writes, reads, complains] = ready(
                stdin.as_ref().map(AsFd::as_fd),
                stdout.as_ref().map(AsFd::as_fd),
                stderr.as_ref().map(AsFd::as_fd),
            )
            .map_err(Ended::Pipe)?;
            if reads {
                match again(stdout.as_mut().map(|pipe| pipe.read(&mut piece))).map_err(Ended::Pipe)? {
                    Some(0) => stdout = None,
                    Some(length) => sink(&piece[..length]).map_err(Ended::Sink)?,
                    None => {}
                }
            }
            if complains {
                match again(stderr.as_mut().map(|pipe| pipe.read(&mut piece))).map_err(Ended::Pipe)? {
                    Some(0) => stderr = None,
                    Some(length) => {
                        errors.extend(&piece[..length]);
                        errors.drain(..errors.len().saturating_sub(ERRORS));
                    }
                    None => {}
                }
            }
            if writes {
                let part = &input[..input.len().min(PIECE)];
                match again(stdin.as_mut().map(|pipe| pipe.write(part))) {
                    Ok(written) => input = &input[written.unwrap_or(0)..],
                    // A git that does not read all of its input shows that in its exit status.
                    Err(_) => input = &[],
                }
                if input.is_empty() {
                    stdin = None;
                }
            }
        }
        // It has closed its outputs, which it does by ending.
        let status = loop {
            if let Some(status) = self.0.try_wait().map_err(Ended::Pipe)? {
                break status;
            }
            if cancel.is_cancelled() {
                return Err(Ended::Cancelled);
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        tracing::trace!(code = status.code(), signal = status.signal(), "git ended");
        Ok((status, errors.into()))
    }
}

/// What came of it; `None` where it is to be tried again.
fn again(outcome: Option<io::Result<usize>>) -> io::Result<Option<usize>> {
    match outcome {
        None => Ok(None),
        Some(Ok(length)) => Ok(Some(length)),
        Some(Err(error))
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
        {
            Ok(None)
        }
        Some(Err(error)) => Err(error),
    }
}

/// Waits until one of them can be written to or read from, a glance's time at most.
fn ready(
    writes: Option<BorrowedFd<'_>>,
    reads: Option<BorrowedFd<'_>>,
    complains: Option<BorrowedFd<'_>>,
) -> io::Result<[bool; 3]> {
    let wanted = [(writes, PollFlags::POLLOUT), (reads, PollFlags::POLLIN), (complains, PollFlags::POLLIN)];
    let mut fds: Vec<PollFd<'_>> =
        wanted.iter().filter_map(|(fd, flags)| fd.map(|fd| PollFd::new(fd, *flags))).collect();
    match poll(&mut fds, GLANCE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut answers = fds.iter().map(|fd| fd.any().unwrap_or(false));
    Ok(wanted.map(|(fd, _)| fd.is_some() && answers.next().unwrap_or(false)))
}

/// What [`GitError`] is as an error of the workspace, where the sink was the one who asked.
pub(crate) fn passed_on(doing: &'static str) -> impl Fn(GitError) -> WorkspaceError {
    move |error| match error {
        GitError::Output { source, .. } => WorkspaceError::Output { source },
        error => WorkspaceError::git(doing)(error),
    }
}
