//! A session with a running VM, shared by `run` and `ssh`: streams, terminal, signals, and what to say if the VM dies.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::{self, IsTerminal, Write},
    os::unix::ffi::OsStrExt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use jsonrpsee::core::client::Client;
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use vm_api::{
    ErrorKind, EventKind, VmId, VmState,
    rpc::{EventsClient, VmClient},
};

use crate::{
    context::Context,
    daemon::tail_lines,
    errors::{CliError, EXIT_OUTPUT_CLOSED, signalled},
    interrupts::Interrupts,
    ssh::{
        SshError,
        client::Connection,
        session::{self, Ending, Event, Request, Streams, Terminal},
        terminal::{self, RawMode},
    },
    stdio::Descriptor,
};

/// Captured output of each stream at most, with `--json`.
const CAPTURE_LIMIT: usize = 64 << 20;
/// How long the daemon may take to notice that a VM has ended.
const NOTICE_DEADLINE: Duration = Duration::from_secs(5);
const NOTICE_RETRY: Duration = Duration::from_millis(100);
/// How much of a dead VM's console is shown.
const CONSOLE_BYTES: u64 = 4096;
const CONSOLE_LINES: usize = 12;

/// What to run in the VM.
#[derive(Debug)]
pub(crate) struct Session {
    /// Name or id of the VM.
    pub(crate) vm: String,
    /// The guest's user.
    pub(crate) user: String,
    /// The command as one string; the login shell if absent.
    pub(crate) command: Option<Vec<u8>>,
    /// Variables of its environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Whether it gets a terminal.
    pub(crate) terminal: bool,
}

/// How it went.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The exit code to pass on.
    pub(crate) code: u8,
    /// With `--json`, the command's output and end.
    pub(crate) report: Option<Value>,
}

impl Session {
    /// Runs it to its end.
    pub(crate) async fn run(
        self,
        context: &Context,
        client: &Client,
        interrupts: &mut Interrupts,
    ) -> Result<Finished, CliError> {
        let access = client.access(self.vm.clone()).await?;
        let name = access.name.to_string();
        let end = async {
            // Until the session stands, a signal just ends the attempt.
            let connection = tokio::select! {
                connection = Connection::open(&access, &self.user) => connection?,
                signal = interrupts.next() => {
                    return Err(CliError::Interrupted { signal, what: "interrupted".to_owned() });
                }
            };
            let captured = context.output.json.then(Captured::default);
            let ending = self.attach(&connection, captured.as_ref(), interrupts).await;
            connection.close().await;
            Ok((ending?, captured))
        }
        .await;
        match end {
            Ok((ending, captured)) => {
                let code = exit_code(&ending);
                let report = captured.map(|captured| captured.report(&name, &ending, code));
                Ok(Finished { code, report })
            }
            Err(CliError::Ssh(error)) if died_perhaps(&error) => Err(explain(client, &name, error).await),
            Err(error) => Err(error),
        }
    }

    async fn attach(
        self,
        connection: &Connection,
        captured: Option<&Captured>,
        interrupts: &mut Interrupts,
    ) -> Result<Ending, CliError> {
        let local = |what| move |source| SshError::Local { what, source };
        let stdin_is_terminal = io::stdin().is_terminal();
        let stdin = Descriptor::of(io::stdin()).map_err(local("stdin"))?;
        let (stdout, stderr): (Box<dyn Write + Send>, Box<dyn Write + Send>) = match captured {
            Some(captured) => (Box::new(captured.stdout.clone()), Box::new(captured.stderr.clone())),
            None => (
                Box::new(Descriptor::of(io::stdout()).map_err(local("stdout"))?),
                Box::new(Descriptor::of(io::stderr()).map_err(local("stderr"))?),
            ),
        };
        let raw = self.terminal && stdin_is_terminal;
        let request = Request {
            command: self.command,
            environment: self.environment,
            terminal: self.terminal.then(|| Terminal {
                term: std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned()),
                size: terminal::size(),
                modes: terminal::modes(),
            }),
            escapes: raw,
        };
        let mut raw = if raw { Some(RawMode::enter().map_err(local("the terminal"))?) } else { None };
        let (sender, mut events) = mpsc::channel(16);
        let streams = Streams { stdin: Box::new(stdin), stdout, stderr };
        let session = session::run(connection, request, streams, &mut events);
        tokio::pin!(session);
        loop {
            // Cancel-safe: the session is pinned outside, unread signals are kept by their queues. An event that finds
            // its queue full is one of many that nobody has looked at yet.
            tokio::select! {
                ending = &mut session => return Ok(ending?),
                signal = interrupts.next() => {
                    let _ = sender.try_send(Event::Signal(signal));
                }
                () = changed(&mut raw) => {
                    let (columns, rows) = terminal::size();
                    let _ = sender.try_send(Event::Resized(columns, rows));
                }
            }
        }
    }
}

async fn changed(raw: &mut Option<RawMode>) {
    match raw {
        Some(raw) => raw.changed().await,
        None => std::future::pending().await,
    }
}

/// The exit code of `vm` for the end of its command.
fn exit_code(ending: &Ending) -> u8 {
    match ending {
        // A server may send any 32 bits; wait(2) leaves eight of them.
        Ending::Exited(status) => (status & 0xff) as u8,
        Ending::Signalled(word) => signal_number(word).map_or(u8::MAX, signalled),
        Ending::OutputClosed => EXIT_OUTPUT_CLOSED,
        Ending::Abandoned(number) => signalled(*number),
        Ending::Left => signalled(nix::libc::SIGHUP),
    }
}

/// The number of a signal that a server names: as RFC 4254 does, by its number, or as `RT34@vmd`, as the agent does with
/// signals that have no name. Others' private names (`NAME@DOMAIN`) count where the name does.
fn signal_number(word: &str) -> Option<i32> {
    let name = word.split_once('@').map_or(word, |(name, _)| name);
    let named = || format!("SIG{name}").parse::<Signal>().ok().map(|signal| signal as i32);
    let numbered = || name.strip_prefix("RT").unwrap_or(name).parse().ok();
    named().or_else(numbered).filter(|number| (1..=64).contains(number))
}

fn died_perhaps(error: &SshError) -> bool {
    matches!(
        error,
        SshError::Lost { .. }
            | SshError::Connect { .. }
            | SshError::Handshake { .. }
            | SshError::Login { .. }
            | SshError::Start { .. }
    )
}

/// Says what became of the VM whose connection was lost; the error itself if the VM runs on.
async fn explain(client: &Client, name: &str, error: SshError) -> CliError {
    let deadline = Instant::now() + NOTICE_DEADLINE;
    loop {
        let what = match VmClient::get(client, name.to_owned()).await {
            Ok(vm) => match vm.state {
                // Its cause has the console's tail already.
                VmState::Failed { cause, .. } => {
                    let what = format!("failed ({})", cause.trim());
                    return CliError::VmLost { name: name.to_owned(), what, console: String::new() };
                }
                VmState::Stopped { last_exit: Some(exit) } => match last_change(client, &vm.id).await {
                    Some(EventKind::VmRebooted) => "rebooted".to_owned(),
                    // How it ended is told once it is off.
                    Some(EventKind::VmStarted) if Instant::now() < deadline => {
                        tokio::time::sleep(NOTICE_RETRY).await;
                        continue;
                    }
                    _ => format!("stopped (its VMM ended with {exit})"),
                },
                // Stopping, the daemon is just finding out how it ended.
                VmState::Running { .. } | VmState::Paused { .. } | VmState::Stopping { .. }
                    if Instant::now() < deadline =>
                {
                    tokio::time::sleep(NOTICE_RETRY).await;
                    continue;
                }
                VmState::Running { .. } | VmState::Paused { .. } => return error.into(),
                VmState::Starting { .. } => match last_change(client, &vm.id).await {
                    Some(EventKind::VmRebooted) => "rebooted".to_owned(),
                    // By its user, or its policy.
                    _ => "was restarted".to_owned(),
                },
                state => format!("is {}", state.word()),
            },
            Err(answer) => match vm_api::client::problem(&answer).kind {
                ErrorKind::NotFound => "was deleted".to_owned(),
                // The daemon is gone as well: all we know is that the connection is.
                _ => return error.into(),
            },
        };
        let console = client.console(name.to_owned(), CONSOLE_BYTES).await;
        let console = console.map(|chunk| tail_lines(&chunk.text, CONSOLE_LINES)).unwrap_or_default();
        let console = if console.is_empty() { console } else { format!("; its console ended{console}") };
        return CliError::VmLost { name: name.to_owned(), what, console };
    }
}

/// How the VM came up or went off last.
async fn last_change(client: &Client, vm: &VmId) -> Option<EventKind> {
    let events = EventsClient::list(client, 0).await.ok()?;
    events.iter().rev().filter(|event| event.vm.as_ref() == Some(vm)).map(|event| event.kind).find(|kind| {
        matches!(
            kind,
            EventKind::VmStarted
                | EventKind::VmStopped
                | EventKind::VmPoweredOff
                | EventKind::VmRebooted
                | EventKind::VmFailed
        )
    })
}

/// `--env` values: `NAME=VALUE`, or `NAME` for our own value of it; one that we do not have is left out.
pub(crate) fn environment(given: &[String]) -> Result<Vec<(String, String)>, CliError> {
    let mut environment = BTreeMap::new();
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text.as_str(), std::env::var_os(text)),
        };
        let usage = |message: String| CliError::Usage { message, hint: "write --env NAME=VALUE".to_owned() };
        if name.is_empty() {
            return Err(usage(format!("{text:?} names no variable")));
        }
        let Some(value) = value else { continue };
        let value = value.into_string().map_err(|_| usage(format!("the value of {name} is not UTF-8")))?;
        environment.insert(name.to_owned(), value);
    }
    Ok(environment.into_iter().collect())
}

/// A command's words as one string that a POSIX shell, or the agent, splits into the same words.
pub(crate) fn quote(words: &[OsString]) -> Vec<u8> {
    shlex::bytes::Quoter::new()
        .allow_nul(true)
        .join(words.iter().map(|word| word.as_bytes()))
        .expect("only a NUL is refused, and that is allowed here (the kernel hands none over in an argument)")
}

/// A command's words joined by blanks, for the user's shell to make of them what it will.
pub(crate) fn join(words: &[OsString]) -> Vec<u8> {
    words.join(OsStr::new(" ")).as_bytes().to_vec()
}

#[derive(Debug, Clone, Default)]
struct Captured {
    stdout: Capture,
    stderr: Capture,
}

/// Keeps what is written to it, up to a limit.
#[derive(Debug, Clone, Default)]
struct Capture(Arc<Mutex<(Vec<u8>, bool)>>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = (CAPTURE_LIMIT - kept.0.len()).min(bytes.len());
        kept.0.extend_from_slice(&bytes[..room]);
        kept.1 |= room < bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Captured {
    fn report(self, vm: &str, ending: &Ending, code: u8) -> Value {
        let mut report = Map::new();
        report.insert("vm".to_owned(), json!(vm));
        report.insert("exit_code".to_owned(), json!(code));
        if let Ending::Signalled(word) = ending {
            report.insert("signal".to_owned(), json!(word));
        }
        self.stdout.report("stdout", &mut report);
        self.stderr.report("stderr", &mut report);
        Value::Object(report)
    }
}

impl Capture {
    /// As text, or in Base64 under another name where it is no UTF-8.
    fn report(self, name: &str, report: &mut Map<String, Value>) {
        let (bytes, truncated) = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        match String::from_utf8(bytes) {
            Ok(text) => report.insert(name.to_owned(), json!(text)),
            Err(error) => {
                report.insert(format!("{name}_base64"), json!(BASE64_STANDARD.encode(error.as_bytes())))
            }
        };
        if truncated {
            report.insert(format!("{name}_truncated"), json!(true));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_quoted_command_splits_into_the_same_words() {
        let command = words(&["sh", "-c", "echo \"$HOME\" 'a b'; exit 3", "", "ü*?~!", "a\nb\t"]);
        let split = shlex::bytes::split(&quote(&command)).unwrap();
        let split: Vec<_> = split.iter().map(|word| OsStr::from_bytes(word).to_owned()).collect();
        assert_eq!(split, command);
    }

    #[test]
    fn a_shell_splits_it_alike() {
        let command = words(&["printf", "%s\n", "it's", "$HOME", "a  b", "\\"]);
        let line = OsString::from(OsStr::from_bytes(&quote(&command)));
        let shell = std::process::Command::new("sh").arg("-c").arg(line).output().unwrap();
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), "it's\n$HOME\na  b\n\\\n");
    }

    #[test]
    fn words_for_a_shell_are_joined_only() {
        assert_eq!(join(&words(&["echo", "$HOME", "|", "cat"])), b"echo $HOME | cat");
    }

    #[test]
    fn ends_become_exit_codes() {
        assert_eq!(exit_code(&Ending::Exited(0)), 0);
        assert_eq!(exit_code(&Ending::Exited(255)), 255);
        assert_eq!(exit_code(&Ending::Signalled("TERM".to_owned())), 143);
        assert_eq!(exit_code(&Ending::Signalled("KILL".to_owned())), 137);
        assert_eq!(exit_code(&Ending::Signalled("BUS".to_owned())), 135);
        assert_eq!(exit_code(&Ending::Signalled("RT34@vmd".to_owned())), 162);
        assert_eq!(exit_code(&Ending::Signalled("WINCH@openssh.com".to_owned())), 156);
        assert_eq!(exit_code(&Ending::Signalled("9".to_owned())), 137);
        for none in ["NONESUCH", "0", "-9", "RT", "RT65@vmd", "", "@vmd"] {
            assert_eq!(exit_code(&Ending::Signalled(none.to_owned())), 255, "{none}");
        }
        assert_eq!(exit_code(&Ending::OutputClosed), 141);
        assert_eq!(exit_code(&Ending::Abandoned(2)), 130);
    }

    #[test]
    fn the_environment_is_given_or_inherited() {
        let given = ["A=1", "A=2=3", "E=", "PATH", "SURELY_NOT_SET_ANYWHERE"].map(str::to_owned);
        let environment = environment(&given).unwrap();
        let path = std::env::var("PATH").unwrap();
        let expected = [("A", "2=3"), ("E", ""), ("PATH", path.as_str())];
        assert_eq!(environment, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(super::environment(&["=x".to_owned()]).is_err());
    }

    #[test]
    fn captured_output_that_is_no_text_is_base64() {
        let captured = Captured::default();
        captured.stdout.clone().write_all(b"\xff\x00").unwrap();
        captured.stderr.clone().write_all(b"text").unwrap();
        let report = captured.report("a", &Ending::Exited(3), 3);
        assert_eq!(report, json!({"vm": "a", "exit_code": 3, "stdout_base64": "/wA=", "stderr": "text"}));
    }
}
