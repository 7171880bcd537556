//! The one seam through which host commands are run.

use std::{
    collections::VecDeque, ffi::OsString, io, path::PathBuf, process::Stdio, sync::Arc, time::Duration,
};

use async_trait::async_trait;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

/// Receives each line a command writes to stderr, for progress.
pub type LineSink = Arc<dyn Fn(&str) + Send + Sync>;

/// A command of the host.
#[derive(Clone)]
pub struct HostCommand {
    /// Program name, looked up in PATH, or an absolute path.
    pub program: OsString,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Bytes for its stdin; `/dev/null` if absent.
    pub stdin: Option<Vec<u8>>,
    /// File that gets its stdout; collected in memory (1 MiB at most) if absent.
    pub stdout_file: Option<PathBuf>,
    /// Working directory.
    pub directory: Option<PathBuf>,
    /// Killed after this long.
    pub timeout: Duration,
    /// Added to the environment.
    pub env: Vec<(OsString, OsString)>,
    /// Gets stderr line by line.
    pub on_stderr_line: Option<LineSink>,
}

impl HostCommand {
    /// A command with no arguments yet and a time-out of one minute.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            stdin: None,
            stdout_file: None,
            directory: None,
            timeout: Duration::from_secs(60),
            env: Vec::new(),
            on_stderr_line: None,
        }
    }
    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }
    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
    /// Sets stdin.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }
    /// Sets the time-out.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
    /// The command line for people.
    pub fn display(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for arg in &self.args {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }
}

/// What a command that exited with 0 said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunOutput {
    /// Its stdout, where it was collected.
    pub stdout: Vec<u8>,
    /// The end of its stderr, 64 lines at most.
    pub stderr_tail: String,
}

/// A command that did not exit with 0.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The program is not installed.
    #[error("{program} is not installed")]
    NotInstalled {
        /// Its name.
        program: String,
    },
    /// It could not be started or talked to.
    #[error("could not run {command}")]
    Io {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("{command} failed ({status}): {stderr_tail}")]
    Failed {
        /// The command line.
        command: String,
        /// Its exit status, for people.
        status: String,
        /// The end of what it wrote to stderr.
        stderr_tail: String,
    },
    /// It did not end in time and was killed.
    #[error("{command} did not end within {seconds} s: {stderr_tail}")]
    TimedOut {
        /// The command line.
        command: String,
        /// The limit.
        seconds: u64,
        /// The end of what it wrote to stderr.
        stderr_tail: String,
    },
}

/// Runs host commands. A test puts its own in place to see or refuse them.
#[async_trait]
pub trait Runner: Send + Sync + std::fmt::Debug {
    /// Runs a command to its end. Dropping the future kills the command's whole process group.
    ///
    /// # Errors
    /// Any outcome but exit status 0.
    async fn run(&self, command: HostCommand) -> Result<RunOutput, RunError>;
}

/// Runs them for real.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostRunner;

const STDOUT_LIMIT: u64 = 1 << 20;
const STDERR_LINES: usize = 64;

/// Kills a process group when dropped, so that a cancelled command leaves no children behind.
struct GroupGuard(Option<nix::unistd::Pid>);

impl Drop for GroupGuard {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // The leader is unreaped while this guard is armed, so the group id cannot have been reused.
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

#[async_trait]
impl Runner for HostRunner {
    async fn run(&self, command: HostCommand) -> Result<RunOutput, RunError> {
        let line = command.display();
        tracing::debug!(command = %line, "host command");
        let failed = |source: io::Error| RunError::Io { command: line.clone(), source };
        let mut builder = tokio::process::Command::new(&command.program);
        builder
            .args(&command.args)
            .envs(command.env.iter().map(|(k, v)| (k, v)))
            .stdin(if command.stdin.is_some() { Stdio::piped() } else { Stdio::null() })
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        match &command.stdout_file {
            Some(path) => builder.stdout(std::fs::File::create(path).map_err(failed)?),
            None => builder.stdout(Stdio::piped()),
        };
        if let Some(directory) = &command.directory {
            builder.current_dir(directory);
        }
        let mut child = builder.spawn().map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                RunError::NotInstalled { program: command.program.to_string_lossy().into_owned() }
            } else {
                failed(source)
            }
        })?;
        let mut guard = GroupGuard(child.id().map(|pid| nix::unistd::Pid::from_raw(pid as i32)));

        let mut tail = VecDeque::new();
        let work = async {
            let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
            let feed = async {
                if let (Some(mut pipe), Some(bytes)) = (stdin, &command.stdin) {
                    // A program that does not read all of its input shows that in its exit status.
                    let _ = pipe.write_all(bytes).await;
                }
            };
            let collect = async {
                let mut bytes = Vec::new();
                if let Some(mut pipe) = stdout {
                    (&mut pipe).take(STDOUT_LIMIT).read_to_end(&mut bytes).await?;
                    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
                }
                io::Result::Ok(bytes)
            };
            let listen = async {
                let Some(pipe) = stderr else { return };
                let mut lines = BufReader::new(pipe).split(b'\n');
                while let Ok(Some(bytes)) = lines.next_segment().await {
                    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                    if let Some(sink) = &command.on_stderr_line {
                        sink(&text);
                    }
                    if tail.len() == STDERR_LINES {
                        tail.pop_front();
                    }
                    tail.push_back(text);
                }
            };
            let ((), stdout, ()) = tokio::join!(feed, collect, listen);
            let status = child.wait().await?;
            io::Result::Ok((stdout?, status))
        };
        let outcome = tokio::time::timeout(command.timeout, work).await;
        let stderr_tail = tail.into_iter().collect::<Vec<_>>().join("\n");
        match outcome {
            Ok(Ok((stdout, status))) => {
                guard.0 = None;
                if status.success() {
                    Ok(RunOutput { stdout, stderr_tail })
                } else {
                    Err(RunError::Failed { command: line, status: status.to_string(), stderr_tail })
                }
            }
            Ok(Err(source)) => Err(failed(source)),
            Err(_) => {
                Err(RunError::TimedOut { command: line, seconds: command.timeout.as_secs(), stderr_tail })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_carries_status_and_stderr() {
        let error =
            HostRunner.run(HostCommand::new("sh").args(["-c", "echo why >&2; exit 3"])).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("why"), "{text}");
    }

    #[tokio::test]
    async fn a_missing_program_is_told_apart() {
        let error = HostRunner.run(HostCommand::new("no-such-program-here")).await.unwrap_err();
        assert!(matches!(error, RunError::NotInstalled { .. }), "{error}");
    }

    #[tokio::test]
    async fn input_and_output_pass_through() {
        let output = HostRunner.run(HostCommand::new("cat").stdin("hello")).await.unwrap();
        assert_eq!(output.stdout, b"hello");
    }

    #[tokio::test]
    async fn a_timeout_kills_the_children_too() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // The grandchild says that it is there and holds the fifo open for writing; its end is seen as end-of-file.
        let script = format!("(echo there; exec sleep 1000) >{} & wait", fifo.display());
        // On a busy machine it may be killed before it is there, which shows nothing.
        for limit in [300, 3_000, 30_000] {
            let limit = Duration::from_millis(limit);
            let mut reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&fifo).unwrap();
            let command = HostCommand::new("sh").args(["-c", &script]).timeout(limit);
            let error = HostRunner.run(command).await.unwrap_err();
            assert!(matches!(error, RunError::TimedOut { .. }), "{error}");
            let mut said = Vec::new();
            let read = tokio::time::timeout(Duration::from_secs(60), reader.read_to_end(&mut said)).await;
            read.expect("a child of the killed command still runs").unwrap();
            if said == b"there\n" {
                return;
            }
        }
        panic!("the command never got to run");
    }
}
