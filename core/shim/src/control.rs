//! The guest agent's control service, spoken through a shim's `control.sock`.

use std::{io, path::PathBuf, time::Duration};

use tokio::{
    io::BufReader,
    net::UnixStream,
    time::{Instant, timeout},
};
use vm_types::{
    VmPaths,
    guest::{
        config::GuestConfig,
        control::{ENDED_NAMES, InitKind, Phase, Reply, Request, ShutdownKind, code},
    },
};

use crate::{
    client::{absent, ended},
    lines,
};

/// The longest reply in bytes; the guest is not trusted with more of the daemon's memory.
const REPLY_LIMIT: usize = 1024 * 1024;
/// The longest of its texts that goes further, in bytes.
const TEXT_LIMIT: usize = 1024;
/// How many warnings of one reply go further.
const WARNINGS_LIMIT: usize = 32;
/// Pause before a connection that a guest's restart ended is made again.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens on the socket: there is no shim, hence no VM.
    #[error("no shim listens on {}", socket.display())]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket could not be connected to.
    #[error("could not connect to {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection failed.
    #[error("could not talk to the guest's agent")]
    Talk {
        /// Why.
        source: io::Error,
    },
    /// The connection ended before the reply: the guest reset, powered off or was killed.
    #[error("the guest's agent went away before it answered")]
    Ended,
    /// No reply in time.
    #[error("the guest's agent did not answer {request} within {seconds} s")]
    TimedOut {
        /// The request's name.
        request: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// A former request was given up, so a reply could not be told from a late one to that.
    #[error("the connection to the guest's agent is out of step after an unanswered request")]
    OutOfStep,
    /// A reply that belongs to another request.
    #[error("the guest's agent gave an unexpected answer to {request}: {answer}")]
    Unexpected {
        /// The request's name.
        request: &'static str,
        /// The sort of reply.
        answer: &'static str,
    },
    /// An agent from before there was such a request.
    #[error("the guest's agent does not know how to {request}")]
    Unknown {
        /// The request's name.
        request: &'static str,
    },
    /// The agent said no.
    #[error("{message}")]
    Agent {
        /// Dotted, stable, e.g. `root.mount`.
        code: String,
        /// The agent's words on one line of at most 1 KiB, without control characters.
        message: String,
    },
}

impl ControlError {
    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotRunning { .. } => Some("the VM does not run; start it with `vm start`".into()),
            Self::Ended | Self::TimedOut { .. } => {
                Some("see the guest's console with `vm logs` for what it is doing".into())
            }
            Self::Unexpected { .. } => {
                Some("the guest runs an agent of another version; restart the VM".into())
            }
            Self::Unknown { .. } => {
                Some("the guest runs the agent of an older daemon; restart the VM".into())
            }
            Self::Agent { code, .. } if code == vm_types::guest::control::code::PROCESSES_STAY => {
                Some("end them in the command itself: even SIGKILL does not".into())
            }
            Self::Agent { .. } => Some("see the guest's console with `vm logs`".into()),
            Self::Connect { .. } | Self::Talk { .. } | Self::OutOfStep => None,
        }
    }
}

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentInfo {
    /// Its version.
    pub agent_version: String,
    /// The newest [`GuestConfig`] version it knows.
    pub config_version: u32,
    /// `uname -r`.
    pub kernel_release: String,
    /// PID 1.
    pub init: InitKind,
}

/// Processes that were left running, and then ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndedProcesses {
    /// How many.
    pub count: u64,
    /// The names of some, each once.
    pub names: Vec<String>,
}

/// One connection to the agent. Requests are answered in order, one at a time.
///
/// Each time limit covers waiting for the guest to come up as well. A request that timed out or whose future was
/// dropped makes the connection useless ([`ControlError::OutOfStep`]): connect again.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
    in_step: bool,
}

impl ControlClient {
    /// Connects to `control.sock`, which succeeds as soon as there is a shim, whether or not the guest is up.
    ///
    /// # Errors
    /// [`ControlError::NotRunning`] where no shim listens; the connection failing.
    pub async fn connect(paths: &VmPaths) -> Result<Self, ControlError> {
        let socket = paths.control_sock();
        match UnixStream::connect(&socket).await {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream), in_step: true }),
            Err(error) if absent(&error) => Err(ControlError::NotRunning { socket }),
            Err(source) => Err(ControlError::Connect { socket, source }),
        }
    }

    /// Asks who is there.
    ///
    /// # Errors
    /// As every request: the connection failing or ending, no or a wrong reply, or [`ControlError::Agent`].
    pub async fn hello(&mut self, limit: Duration) -> Result<AgentInfo, ControlError> {
        match self.request("hello", &Request::Hello, limit).await? {
            Reply::Hello { agent_version, config_version, kernel_release, init } => {
                Ok(AgentInfo { agent_version, config_version, kernel_release, init })
            }
            other => Err(unexpected("hello", &other)),
        }
    }

    /// Waits until the guest has reached `phase`; returns warnings for people.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub async fn wait_ready(&mut self, phase: Phase, limit: Duration) -> Result<Vec<String>, ControlError> {
        match self.request("wait_ready", &Request::WaitReady { phase }, limit).await? {
            Reply::Ready { phase: reached, warnings } if reached == phase => Ok(warnings),
            other => Err(unexpected("wait_ready", &other)),
        }
    }

    /// Applies a configuration to the running guest; returns warnings for people.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub async fn apply(&mut self, config: GuestConfig, limit: Duration) -> Result<Vec<String>, ControlError> {
        match self.request("apply", &Request::Apply { config: Box::new(config) }, limit).await? {
            Reply::Applied { warnings } => Ok(warnings),
            other => Err(unexpected("apply", &other)),
        }
    }

    /// Begins an orderly shutdown with `grace` for processes, in whole milliseconds. The VMM's end, if it is to end,
    /// comes later. A guest that goes down before it can answer has obeyed as well.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub async fn shutdown(
        &mut self,
        kind: ShutdownKind,
        grace: Duration,
        limit: Duration,
    ) -> Result<(), ControlError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        match self.request("shutdown", &Request::Shutdown { kind, grace_ms }, limit).await {
            Ok(Reply::ShuttingDown) | Err(ControlError::Ended) => Ok(()),
            Ok(other) => Err(unexpected("shutdown", &other)),
            Err(error) => Err(error),
        }
    }

    /// Flushes the guest's filesystems.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub async fn sync(&mut self, limit: Duration) -> Result<(), ControlError> {
        match self.request("sync", &Request::Sync, limit).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected("sync", &other)),
        }
    }

    /// Grows the root filesystem to its drive's size, which is or is about to become `drive_bytes`; returns the
    /// filesystem's size in bytes. One that is as large already stays as it is.
    ///
    /// # Errors
    /// As [`Self::hello`].
    pub async fn grow_root(&mut self, drive_bytes: u64, limit: Duration) -> Result<u64, ControlError> {
        match self.request("grow_root", &Request::GrowRoot { drive_bytes }, limit).await? {
            Reply::Grown { bytes } => Ok(bytes),
            other => Err(unexpected("grow_root", &other)),
        }
    }

    /// Ends all processes of a guest whose init is the agent, but the agent's own, with `grace` between SIGTERM and SIGKILL, in
    /// whole milliseconds; returns when they are gone.
    ///
    /// # Errors
    /// As [`Self::hello`]; [`ControlError::Agent`] where another init runs ([`code::PROCESSES_INIT`]) or some are still there
    /// ([`code::PROCESSES_STAY`]).
    pub async fn end_processes(
        &mut self,
        grace: Duration,
        limit: Duration,
    ) -> Result<EndedProcesses, ControlError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        match self.request("end_processes", &Request::EndProcesses { grace_ms }, limit).await? {
            Reply::ProcessesEnded { count, names } => Ok(EndedProcesses { count, names }),
            other => Err(unexpected("end_processes", &other)),
        }
    }

    async fn request(
        &mut self,
        name: &'static str,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, ControlError> {
        // Set back only by a whole reply: neither a time-out nor a dropped future leaves a usable connection.
        if !std::mem::replace(&mut self.in_step, false) {
            return Err(ControlError::OutOfStep);
        }
        let talk = async {
            lines::write_json(&mut self.stream, request).await?;
            lines::read_json::<_, Reply>(&mut self.stream, REPLY_LIMIT).await
        };
        let reply = match timeout(limit, talk).await {
            Err(_) => return Err(ControlError::TimedOut { request: name, seconds: limit.as_secs() }),
            Ok(Ok(None)) => return Err(ControlError::Ended),
            Ok(Err(error)) if ended(&error) => return Err(ControlError::Ended),
            Ok(Err(source)) => return Err(ControlError::Talk { source: cleaned_error(source) }),
            Ok(Ok(Some(reply))) => cleaned(reply),
        };
        self.in_step = true;
        match reply {
            // What is sent here is well-formed, so this one is from before it.
            Reply::Error { code, .. } if code == code::REQUEST => {
                Err(ControlError::Unknown { request: name })
            }
            Reply::Error { code, message } => Err(ControlError::Agent { code, message }),
            reply => Ok(reply),
        }
    }
}

fn unexpected(request: &'static str, reply: &Reply) -> ControlError {
    let answer = match reply {
        Reply::Hello { .. } => "hello",
        Reply::Ready { phase: Phase::Agent, .. } => "agent ready",
        Reply::Ready { phase: Phase::Init, .. } => "init ready",
        Reply::Applied { .. } => "applied",
        Reply::ShuttingDown => "shutting down",
        Reply::Done => "done",
        Reply::Grown { .. } => "grown",
        Reply::ProcessesEnded { .. } => "processes ended",
        Reply::Error { .. } => "error",
    };
    ControlError::Unexpected { request, answer }
}

/// A reply whose texts can go into errors, logs and terminals. Whoever is root in the guest writes them.
fn cleaned(reply: Reply) -> Reply {
    match reply {
        Reply::Hello { agent_version, config_version, kernel_release, init } => Reply::Hello {
            agent_version: clean(&agent_version),
            config_version,
            kernel_release: clean(&kernel_release),
            init,
        },
        Reply::Ready { phase, warnings } => Reply::Ready { phase, warnings: clean_all(&warnings) },
        Reply::Applied { warnings } => Reply::Applied { warnings: clean_all(&warnings) },
        Reply::ProcessesEnded { count, names } => Reply::ProcessesEnded {
            count,
            names: names.iter().take(ENDED_NAMES).map(|name| clean(name)).collect(),
        },
        Reply::Error { code, message } => Reply::Error { code: clean(&code), message: clean(&message) },
        reply @ (Reply::ShuttingDown | Reply::Done | Reply::Grown { .. }) => reply,
    }
}

/// Errors of parsing quote what they could not parse.
fn cleaned_error(error: io::Error) -> io::Error {
    if error.get_ref().is_none() {
        return error;
    }
    io::Error::new(error.kind(), clean(&error.to_string()))
}

/// One line of at most [`TEXT_LIMIT`] bytes without control characters.
fn clean(text: &str) -> String {
    const CUT: &str = " […]";
    let mut kept = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !kept.is_empty() {
            kept.push(' ');
        }
        kept.push_str(word);
        if kept.len() > TEXT_LIMIT {
            kept.truncate(kept.floor_char_boundary(TEXT_LIMIT - CUT.len()));
            kept.push_str(CUT);
            break;
        }
    }
    kept
}

fn clean_all(warnings: &[String]) -> Vec<String> {
    let mut kept: Vec<_> = warnings.iter().take(WARNINGS_LIMIT).map(|warning| clean(warning)).collect();
    if let left @ 1.. = warnings.len() - kept.len() {
        kept.push(format!("and {left} more warnings"));
    }
    kept
}

/// Connects to the agent of a guest that may still be booting, and asks who it is. A connection that ends meanwhile
/// (a guest that resets while it boots) is made again.
///
/// # Errors
/// [`ControlError::NotRunning`] at once where there is no shim or when the VMM has ended; [`ControlError::TimedOut`]
/// where nobody has answered within `limit`; whatever the agent refuses.
pub async fn connect_control(
    paths: &VmPaths,
    limit: Duration,
) -> Result<(ControlClient, AgentInfo), ControlError> {
    let deadline = Instant::now() + limit;
    loop {
        let mut client = ControlClient::connect(paths).await?;
        match client.hello(deadline.saturating_duration_since(Instant::now())).await {
            Ok(agent) => return Ok((client, agent)),
            Err(ControlError::Ended) if Instant::now() < deadline => tokio::time::sleep(PAUSE).await,
            Err(ControlError::Ended | ControlError::TimedOut { .. }) => {
                return Err(ControlError::TimedOut { request: "hello", seconds: limit.as_secs() });
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_guest_are_short_single_lines() {
        assert_eq!(clean("no\x1b[2J \u{9b}31m\r\n such\tthing\0"), "no [2J 31m such thing");
        for long in ["é".repeat(2000), "é ".repeat(2000)] {
            let cut = clean(&long);
            assert!(cut.len() <= TEXT_LIMIT && cut.len() > TEXT_LIMIT - 8, "{}", cut.len());
            assert!(cut.ends_with("é […]") || cut.ends_with("é  […]"), "{cut}");
        }
        let Reply::Applied { warnings } = cleaned(Reply::Applied { warnings: vec!["a\n".to_owned(); 40] })
        else {
            panic!("another reply");
        };
        assert_eq!((warnings.len(), warnings[0].as_str()), (33, "a"));
        assert_eq!(warnings[32], "and 8 more warnings");
    }

    #[tokio::test]
    async fn a_shim_that_ends_at_that_moment_is_not_running() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { run: dir.path().to_owned(), state: dir.path().to_owned() };
        let listener = tokio::net::UnixListener::bind(paths.control_sock()).unwrap();
        // The connection is in the listener's queue, and never accepted.
        let (connected, ()) = tokio::join!(ControlClient::connect(&paths), async { drop(listener) });
        assert!(matches!(connected, Err(ControlError::NotRunning { .. })), "{connected:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_parsed_does_not_drive_the_terminal() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut client = ControlClient { stream: BufReader::new(near), in_step: true };
        tokio::io::AsyncWriteExt::write_all(&mut far, b"{\"reply\":\"x\\u001b[2J\"}\n").await.unwrap();
        let Err(ControlError::Talk { source }) = client.sync(Duration::from_secs(60)).await else {
            panic!("it was understood");
        };
        assert!(!source.to_string().contains('\x1b'), "{source:?}");
    }

    #[tokio::test]
    async fn an_agent_from_before_a_request_is_told_from_one_that_refuses() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut client = ControlClient { stream: BufReader::new(near), in_step: true };
        let limit = Duration::from_secs(60);
        for (code, message) in [(code::REQUEST, "unknown variant"), (code::PROCESSES_INIT, "no\x1b[2J")] {
            let reply = Reply::Error { code: code.to_owned(), message: message.to_owned() };
            lines::write_json(&mut far, &reply).await.unwrap();
        }
        let error = client.end_processes(Duration::ZERO, limit).await.unwrap_err();
        assert!(matches!(error, ControlError::Unknown { request: "end_processes" }), "{error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("older")), "{error:?}");
        let error = client.end_processes(Duration::ZERO, limit).await.unwrap_err();
        assert!(matches!(&error, ControlError::Agent { message, .. } if message == "no [2J"), "{error:?}");
        let reply = Reply::ProcessesEnded { count: 40, names: vec!["a\n".to_owned(); 40] };
        lines::write_json(&mut far, &reply).await.unwrap();
        let left = client.end_processes(Duration::ZERO, limit).await.unwrap();
        assert_eq!((left.count, left.names.len(), left.names[0].as_str()), (40, ENDED_NAMES, "a"));
    }

    #[tokio::test]
    async fn a_reply_to_something_else_is_named_not_quoted() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut client = ControlClient { stream: BufReader::new(near), in_step: true };
        let reply = Reply::Applied { warnings: vec!["secret".to_owned()] };
        lines::write_json(&mut far, &reply).await.unwrap();
        let error = client.sync(Duration::from_secs(60)).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest's agent gave an unexpected answer to sync: applied");
    }
}
