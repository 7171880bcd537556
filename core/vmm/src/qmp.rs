//! A client of the QEMU Machine Protocol (<https://www.qemu.org/docs/master/interop/qmp-spec.html>), as much of it
//! as a driver needs: greeting, capabilities, commands with ids, time-outs. Events are skipped.
//!
//! QEMU serves one client of a socket at a time and lets others wait, so a client connects, says what it has to
//! say and goes. The crate `qapi` would bring the whole generated schema for half a dozen commands.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

/// No reply we ask for comes near it; a VMM that a guest has taken over could send without end.
const LINE_LIMIT: u64 = 1 << 20;

/// A failed exchange with a control socket.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody could be reached.
    #[error("could not connect to {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke during {during}")]
    Io {
        /// The command, or `greeting`.
        during: String,
        /// Why.
        source: io::Error,
    },
    /// The VMM closed the connection, most likely because it ended.
    #[error("the VMM hung up during {during}")]
    HungUp {
        /// The command, or `greeting`.
        during: String,
    },
    /// No answer came in time.
    #[error("no answer to {during} within {millis} ms")]
    TimedOut {
        /// The command, or `greeting`.
        during: String,
        /// The limit.
        millis: u128,
    },
    /// What came is no QMP.
    #[error("an answer to {during} is not understood: {line:?}")]
    Malformed {
        /// The command, or `greeting`.
        during: String,
        /// The beginning of what came.
        line: String,
    },
    /// The VMM said no.
    #[error("{command} was refused: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QMP's error class.
        class: String,
        /// QMP's description.
        description: String,
    },
}

impl QmpError {
    /// Whether nobody listens: the VMM is not up yet, gone, or going at this moment (`ECONNRESET`).
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Connect { source, .. }
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset))
    }

    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Connect { .. } if self.is_nobody() => "the VMM has ended; start the VM again".to_owned(),
            Self::Connect { socket, .. } => format!("check the permissions of {}", socket.display()),
            Self::Io { .. } | Self::HungUp { .. } => "the VMM has ended; see its log for why".to_owned(),
            Self::TimedOut { .. } => {
                "the VMM is stuck or another client holds its control socket; a forced stop ends it"
                    .to_owned()
            }
            Self::Malformed { .. } | Self::Refused { .. } => {
                "the VMM's version may not fit; see what doctor says of it".to_owned()
            }
        })
    }
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    // A field that is there with the value null is not an absent one.
    #[serde(default, rename = "return", deserialize_with = "present")]
    result: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// A connection in command mode. After an error other than [`QmpError::Refused`] it is good for nothing but being dropped.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    limit: Duration,
    next_id: u64,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation. Each step and each later command may take `limit`.
    ///
    /// # Errors
    /// Every variant of [`QmpError`].
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self, QmpError> {
        let failed = |source| QmpError::Connect { socket: socket.to_owned(), source };
        let connecting = async { UnixStream::connect(socket).await.map_err(failed) };
        let stream = limited(limit, "connecting", connecting).await?;
        let (reader, writer) = stream.into_split();
        let mut qmp = Self { reader: BufReader::new(reader), writer, limit, next_id: 1 };
        let greeting = limited(limit, "greeting", qmp.message("greeting")).await?;
        if greeting.greeting.is_none() {
            return Err(malformed("greeting", b"something else"));
        }
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    /// Runs a command without arguments and returns its value.
    ///
    /// # Errors
    /// Every variant of [`QmpError`] but `Connect`.
    pub async fn execute(&mut self, command: &str) -> Result<Value, QmpError> {
        self.execute_with(command, json!({})).await
    }

    /// Runs a command with arguments, an object, and returns its value.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn execute_with(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        limited(self.limit, command, self.exchange(command, arguments)).await
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await.map_err(|source| broken(command, source))?;
        loop {
            let message = self.message(command).await?;
            if message.event.is_some() || message.id != Some(id) {
                continue;
            }
            return match (message.result, message.error) {
                (Some(value), None) => Ok(value),
                (_, Some(Refusal { class, desc })) => {
                    Err(QmpError::Refused { command: command.to_owned(), class, description: desc })
                }
                (None, None) => Err(malformed(command, b"neither return nor error")),
            };
        }
    }

    async fn message(&mut self, during: &str) -> Result<Message, QmpError> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(LINE_LIMIT).read_until(b'\n', &mut line).await;
        read.map_err(|source| broken(during, source))?;
        if line.is_empty() {
            return Err(QmpError::HungUp { during: during.to_owned() });
        }
        serde_json::from_slice(&line).map_err(|_| malformed(during, &line))
    }
}

async fn limited<T>(
    limit: Duration,
    during: &str,
    work: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, QmpError> {
    timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(QmpError::TimedOut { during: during.to_owned(), millis: limit.as_millis() }))
}

pub(crate) fn malformed(during: &str, line: &[u8]) -> QmpError {
    let start = String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned();
    QmpError::Malformed { during: during.to_owned(), line: start }
}

fn broken(during: &str, source: io::Error) -> QmpError {
    match source.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            QmpError::HungUp { during: during.to_owned() }
        }
        _ => QmpError::Io { during: during.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncBufReadExt, net::UnixListener};

    use super::*;

    /// Serves one client with these lines, the first at once, each further one after a line of the client's.
    async fn served(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("q");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let mut asked = BufReader::new(read).lines();
            for line in lines {
                write.write_all(line.as_bytes()).await.unwrap();
                asked.next_line().await.unwrap();
            }
        });
        (dir, socket)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn events_and_foreign_replies_are_passed_over() {
        let (_dir, socket) = served(&[
            GREETING,
            "{\"event\": \"RESUME\", \"timestamp\": {}}\r\n{\"return\": {}, \"id\": 1}\r\n",
            "{\"return\": 5, \"id\": 77}\r\n{\"event\": \"STOP\"}\r\n{\"return\": null, \"id\": 2}\r\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 3}\r\n",
        ])
        .await;
        let mut qmp = Qmp::connect(&socket, PATIENCE).await.unwrap();
        assert_eq!(qmp.execute("stop").await.unwrap(), Value::Null);
        let error = qmp.execute("cont").await.unwrap_err();
        assert_eq!(error.to_string(), "cont was refused: no (GenericError)");
    }

    #[tokio::test]
    async fn a_silent_peer_times_out_and_a_closing_one_is_told_apart() {
        let (_dir, socket) = served(&[""]).await;
        let error = Qmp::connect(&socket, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
        let (_dir, socket) = served(&[GREETING]).await;
        let error = Qmp::connect(&socket, PATIENCE).await.unwrap_err();
        assert!(matches!(error, QmpError::HungUp { .. }), "{error}");
    }

    #[tokio::test]
    async fn another_protocol_and_an_absent_socket_are_told_apart() {
        let (dir, socket) = served(&["SSH-2.0-x\r\n"]).await;
        let error = Qmp::connect(&socket, PATIENCE).await.unwrap_err();
        assert!(matches!(error, QmpError::Malformed { .. }), "{error}");
        let error = Qmp::connect(&dir.path().join("none"), PATIENCE).await.unwrap_err();
        assert!(error.is_nobody(), "{error}");
        assert!(error.hint().is_some());
    }
}
