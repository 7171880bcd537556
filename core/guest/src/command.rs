//! Commands in a guest.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use tokio::io::AsyncRead;
use vm_types::guest::{EXEC_ALONE_ENV, EXEC_ARGV_ENV, EXEC_CWD_ENV};

use crate::{
    Guest, GuestError, ROOT,
    channel::{Ending, Kept, Open, Sink},
};

/// The longest command line that is sent, in bytes, quoting included: it must fit into one SSH packet (RFC 4253, section
/// 6.1; russh takes up to 256 KiB).
const LINE_LIMIT: usize = 192 << 10;

/// A command to be run without any shell.
#[derive(Debug, Clone)]
pub struct Command<I = tokio::io::Empty> {
    /// The program, found by the guest's `PATH` or by its absolute path, and its arguments.
    pub argv: Vec<String>,
    /// Variables beside those of the guest's configuration.
    pub env: BTreeMap<String, String>,
    /// The directory it runs in; `/` if absent.
    pub cwd: Option<String>,
    /// The guest's user; root if absent.
    pub user: Option<String>,
    /// What it reads from its standard input; nothing if absent.
    pub stdin: Option<I>,
    /// How long it may take; for ever if absent.
    pub time_limit: Option<Duration>,
    /// It is over when the command itself ends, whatever else still writes that it has left running.
    pub alone: bool,
}

impl Command {
    /// A command as root in `/` with nothing to read.
    pub fn new(argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: BTreeMap::new(),
            cwd: None,
            user: None,
            stdin: None,
            time_limit: None,
            alone: false,
        }
    }

    /// The same with something to read.
    pub fn with_stdin<I: AsyncRead + Send>(self, stdin: I) -> Command<I> {
        let Self { argv, env, cwd, user, stdin: _, time_limit, alone } = self;
        Command { argv, env, cwd, user, stdin: Some(stdin), time_limit, alone }
    }
}

/// How a command ended and what it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; none where a signal ended it. One that could not be started has the shell's: 127 where it was not found,
    /// 126 otherwise, and standard error says why.
    pub code: Option<i32>,
    /// The signal that ended it, by number; 0 if that is unknown here.
    pub signal: Option<u32>,
    /// What it wrote, up to the limit.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error, up to the limit.
    pub stderr: Vec<u8>,
    /// Whether it wrote more than that to either.
    pub truncated: bool,
}

/// How a command ended, see [`Output`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<u32>,
}

/// Hands over what comes, of both streams.
struct Passed<F>(F);

impl<F: FnMut(&[u8]) + Send> Sink for Passed<F> {
    async fn stdout(&mut self, data: Bytes) -> Result<(), GuestError> {
        (self.0)(&data);
        Ok(())
    }

    fn stderr(&mut self, data: &[u8]) {
        (self.0)(data);
    }
}

struct Collected {
    limit: usize,
    stdout: Kept,
    stderr: Kept,
}

impl Sink for Collected {
    async fn stdout(&mut self, data: Bytes) -> Result<(), GuestError> {
        self.stdout.add(&data, self.limit);
        Ok(())
    }

    fn stderr(&mut self, data: &[u8]) {
        self.stderr.add(data, self.limit);
    }
}

impl Guest {
    /// Runs a command to its end; that it failed is no error. At most `output_limit` bytes each are kept of what it writes to
    /// standard output and standard error; it can write on. Dropping the future ends the command with its process group.
    ///
    /// # Errors
    /// A command that cannot be sent, an unknown user, a guest that is lost, a time limit that was not kept.
    pub async fn run<I: AsyncRead + Send>(
        &self,
        command: Command<I>,
        output_limit: usize,
    ) -> Result<Output, GuestError> {
        let line = line(&command)?;
        let mut sink = Collected { limit: output_limit, stdout: Kept::default(), stderr: Kept::default() };
        let Ended { code, signal } = self.run_in_time(line, command, &mut sink).await?;
        let truncated = sink.stdout.more || sink.stderr.more;
        Ok(Output { code, signal, stdout: sink.stdout.bytes, stderr: sink.stderr.bytes, truncated })
    }

    /// Runs a command to its end, and hands over what it writes to standard output and standard error as it comes. Otherwise as
    /// [`Guest::run`].
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub async fn stream<I: AsyncRead + Send>(
        &self,
        command: Command<I>,
        each: impl FnMut(&[u8]) + Send,
    ) -> Result<Ended, GuestError> {
        let line = line(&command)?;
        self.run_in_time(line, command, &mut Passed(each)).await
    }

    async fn run_in_time<I: AsyncRead + Send>(
        &self,
        line: String,
        command: Command<I>,
        sink: &mut impl Sink,
    ) -> Result<Ended, GuestError> {
        let limit = command.time_limit;
        let run = self.run_line(line, command, sink);
        match limit {
            None => run.await,
            Some(limit) => {
                tokio::time::timeout(limit, run).await.map_err(|_| GuestError::TimeLimit { limit })?
            }
        }
    }

    async fn run_line<I: AsyncRead + Send>(
        &self,
        line: String,
        command: Command<I>,
        sink: &mut impl Sink,
    ) -> Result<Ended, GuestError> {
        let connection = self.connection(command.user.as_deref().unwrap_or(ROOT)).await?;
        let mut channel = Open::new(&connection).await?;
        let cwd = command.cwd.unwrap_or_else(|| "/".to_owned());
        let own = [(EXEC_ARGV_ENV.to_owned(), "1".to_owned()), (EXEC_CWD_ENV.to_owned(), cwd)];
        let alone = command.alone.then(|| (EXEC_ALONE_ENV.to_owned(), "1".to_owned()));
        for (name, value) in command.env.into_iter().chain(own).chain(alone) {
            channel.begun(channel.writer.set_env(false, name, value).await)?;
        }
        channel.begun(channel.writer.exec(true, line).await)?;
        let what = "to run a command";
        let ending = match command.stdin {
            Some(stdin) => channel.converse(what, stdin, sink).await?,
            None => channel.converse(what, tokio::io::empty(), sink).await?,
        };
        Ok(match ending {
            Ending::Exited(status) => Ended { code: Some(status.cast_signed()), signal: None },
            Ending::Signalled(signal) => Ended { code: None, signal: Some(signal) },
        })
    }
}

/// The command line as the agent splits it again, if it and the variables are such as can be.
fn line<I>(command: &Command<I>) -> Result<String, GuestError> {
    let wrong = |reason| GuestError::Command { reason };
    if command.argv.first().is_none_or(String::is_empty) {
        return Err(wrong("it is empty"));
    }
    for (name, value) in &command.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(wrong("a variable has a name or a value that no variable can have"));
        }
        if name.len() + value.len() > LINE_LIMIT {
            return Err(wrong("a variable is too long"));
        }
    }
    let line = shlex::try_join(command.argv.iter().map(String::as_str))
        .map_err(|_| wrong("an argument has a NUL byte in it"))?;
    if line.len() > LINE_LIMIT {
        return Err(wrong(
            "its arguments are too long; hand over what is long as standard input or as a file",
        ));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_sent_is_refused_before() {
        let reason = |command: &Command| line(command).unwrap_err().to_string();
        assert!(reason(&Command::new([""; 0])).contains("empty"));
        assert!(reason(&Command::new(["a", "b\0"])).contains("NUL"));
        assert!(reason(&Command::new(["a".to_owned(), "x".repeat(LINE_LIMIT)])).contains("too long"));
        let mut command = Command::new(["a"]);
        command.env.insert("A=B".into(), String::new());
        assert!(reason(&command).contains("variable"));
        assert_eq!(line(&Command::new(["echo", "a b", "$x"])).unwrap(), "echo 'a b' '$x'");
    }
}
