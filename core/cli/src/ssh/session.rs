//! One command or shell in the guest: its streams, its signals, its end.

use std::{
    future::pending,
    io::{self, Read, Write},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use nix::libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Pty, Sig, client::Msg};
use tokio::sync::mpsc;
use vm_guest::ssh;

use super::{
    SshError,
    client::Connection,
    escape::{Escape, Typed},
    sink::Sink,
};

/// Unwritten output beyond which no more is taken from the guest.
const BEHIND: usize = 1 << 20;
/// The same once a signal is to be delivered: russh handles one connection's packets in order, so a signal can
/// only leave while output is being taken.
const BEHIND_AFTER_SIGNAL: usize = 64 << 20;
/// A signal that comes again within this time, and had no effect, ends the session.
const IMPATIENCE: Duration = Duration::from_secs(2);
/// How long the guest's server may take to show that it is there, once a signal is to be delivered.
const SILENCE: Duration = Duration::from_secs(5);
/// For the packets that end the channel.
const GOODBYE_DEADLINE: Duration = Duration::from_millis(500);
/// Extended data that is stderr (RFC 4254, section 5.2).
const STDERR: u32 = 1;

/// What to run, and how.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// The command as one string; the login shell if absent.
    pub(crate) command: Option<Vec<u8>>,
    /// Variables to ask for.
    pub(crate) environment: Vec<(String, String)>,
    /// The terminal it gets.
    pub(crate) terminal: Option<Terminal>,
    /// Whether `~.` typed at the start of a line ends the session.
    pub(crate) escapes: bool,
}

/// A terminal in the guest.
#[derive(Debug, Clone)]
pub(crate) struct Terminal {
    /// `TERM`.
    pub(crate) term: String,
    /// Columns and rows.
    pub(crate) size: (u32, u32),
    /// Modes of the local one.
    pub(crate) modes: Vec<(Pty, u32)>,
}

/// The local ends of its streams.
pub(crate) struct Streams {
    /// Read to its end on a thread that outlives the session if it must.
    pub(crate) stdin: Box<dyn Read + Send>,
    /// Gets the command's output.
    pub(crate) stdout: Box<dyn Write + Send>,
    /// Gets what it writes to stderr.
    pub(crate) stderr: Box<dyn Write + Send>,
}

/// What happens around a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// `vm` received this signal.
    Signal(i32),
    /// The local terminal has this size now, columns and rows.
    Resized(u32, u32),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With this code.
    Exited(u32),
    /// By this signal, RFC 4254's name of it.
    Signalled(String),
    /// The command may run on: the reader of its output is gone.
    OutputClosed,
    /// The command may run on: it did not react to this signal number, or nothing in the guest does.
    Abandoned(i32),
    /// The command may run on: the user typed the escape.
    Left,
}

/// Runs a session to its end; all its output is written when this returns, unless a signal came meanwhile.
pub(crate) async fn run(
    connection: &Connection,
    mut request: Request,
    streams: Streams,
    events: &mut mpsc::Receiver<Event>,
) -> Result<Ending, SshError> {
    let local = |what| move |source| SshError::Local { what, source };
    let mut session = Session {
        stdout: Sink::new(streams.stdout).map_err(local("stdout"))?,
        stderr: Sink::new(streams.stderr).map_err(local("stderr"))?,
        limit: BEHIND,
        last_signal: None,
    };
    // Nothing runs yet, so a signal just ends the attempt. Cancel-safe: the connection is of no other use.
    let channel = tokio::select! {
        channel = connection.handle.channel_open_session() => channel,
        number = signalled(&mut request, events) => return Ok(Ending::Abandoned(number)),
    };
    let channel = channel.map_err(|source| SshError::Start { source })?;
    let (mut reader, writer) = channel.split();
    let writer = Arc::new(writer);
    let escapes = request.escapes;
    begin(&writer, request).await.map_err(|source| SshError::Start { source })?;
    let chunks = read_in_background(streams.stdin).map_err(local("stdin"))?;
    let mut pump = tokio::spawn(pump(chunks, Arc::clone(&writer), escapes));

    let ending = session.follow(&mut reader, &writer, &mut pump, events, connection).await;
    pump.abort();
    // From here on nobody takes output from the guest, so the connection's task is free to send this.
    drop(reader);
    let goodbye = async {
        if matches!(ending, Ok(Ending::OutputClosed)) {
            let _ = writer.signal(Sig::PIPE).await;
        }
        let _ = writer.close().await;
    };
    // A stuck guest is left as it is.
    let _ = tokio::time::timeout(GOODBYE_DEADLINE, goodbye).await;
    session.finish(ending, events).await
}

/// The number of the first signal. A terminal that is not asked for yet gets the sizes that come before.
async fn signalled(request: &mut Request, events: &mut mpsc::Receiver<Event>) -> i32 {
    loop {
        match next(events).await {
            Event::Signal(number) => return number,
            Event::Resized(columns, rows) => {
                if let Some(terminal) = &mut request.terminal {
                    terminal.size = (columns, rows);
                }
            }
        }
    }
}

async fn begin(writer: &ChannelWriteHalf<Msg>, request: Request) -> Result<(), russh::Error> {
    // Only the last request is answered; a variable or terminal that is refused is no reason to fail, as in OpenSSH.
    for (name, value) in request.environment {
        writer.set_env(false, name, value).await?;
    }
    if let Some(terminal) = request.terminal {
        let (columns, rows) = terminal.size;
        writer.request_pty(false, &terminal.term, columns, rows, 0, 0, &terminal.modes).await?;
    }
    match request.command {
        Some(command) => writer.exec(true, command).await,
        None => writer.request_shell(true).await,
    }
}

/// Reads a stream on a thread, which stays behind in a blocking read when the session is over.
fn read_in_background(mut stream: Box<dyn Read + Send>) -> io::Result<mpsc::Receiver<Bytes>> {
    const CHUNK: usize = 64 << 10;
    let (sender, chunks) = mpsc::channel(4);
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..count])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A stdin that cannot be read (closed, or a terminal that hung up) has ended for the guest.
                Ok(0) | Err(_) => return,
            }
        }
    })?;
    Ok(chunks)
}

/// Sends stdin and its end; true if the user typed the escape.
async fn pump(mut chunks: mpsc::Receiver<Bytes>, writer: Arc<ChannelWriteHalf<Msg>>, escapes: bool) -> bool {
    let mut escape = Escape::Start;
    while let Some(chunk) = chunks.recv().await {
        let chunk = if escapes {
            match escape.filter(&chunk) {
                Typed::Send(bytes) => Bytes::from(bytes),
                Typed::Leave => return true,
            }
        } else {
            chunk
        };
        if writer.data_bytes(chunk).await.is_err() {
            return false;
        }
    }
    let _ = writer.eof().await;
    false
}

struct Session {
    stdout: Sink,
    stderr: Sink,
    limit: usize,
    last_signal: Option<(i32, Instant)>,
}

impl Session {
    async fn follow(
        &mut self,
        reader: &mut ChannelReadHalf,
        writer: &Arc<ChannelWriteHalf<Msg>>,
        pump: &mut tokio::task::JoinHandle<bool>,
        events: &mut mpsc::Receiver<Event>,
        connection: &Connection,
    ) -> Result<Ending, SshError> {
        let mut ending = None;
        let mut pumping = true;
        // The signal's number if nothing answers. Signals that come meanwhile do not begin it anew.
        let mut silence: Pin<Box<dyn Future<Output = Option<i32>> + Send + '_>> = Box::pin(pending());
        let mut asked = false;
        loop {
            if self.stdout.broken() {
                return Ok(Ending::OutputClosed);
            }
            let room = self.stdout.behind() < self.limit && self.stderr.behind() < self.limit;
            // Every branch is cancel-safe: queues keep what was not taken, and a notification not taken is kept too.
            tokio::select! {
                message = reader.wait(), if room => match message {
                    Some(ChannelMsg::Data { data }) => self.stdout.send(data),
                    Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => self.stderr.send(data),
                    Some(ChannelMsg::Failure) => return Err(SshError::StartRefused),
                    Some(ChannelMsg::ExitStatus { exit_status }) => ending = Some(Ending::Exited(exit_status)),
                    Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                        ending = Some(Ending::Signalled(ssh::signal_name(&signal_name).to_owned()));
                    }
                    Some(ChannelMsg::Close) | None => return ending.ok_or_else(|| connection.lost()),
                    Some(_) => {}
                },
                left = &mut *pump, if pumping => {
                    pumping = false;
                    if left.unwrap_or(false) {
                        return Ok(Ending::Left);
                    }
                }
                () = self.stdout.changed() => {}
                () = self.stderr.changed() => {}
                silent = &mut silence, if asked => match silent {
                    Some(number) => return Ok(Ending::Abandoned(number)),
                    None => asked = false,
                },
                event = next(events) => match event {
                    Event::Signal(number) => {
                        if self.repeated(number) {
                            return Ok(Ending::Abandoned(number));
                        }
                        self.limit = BEHIND_AFTER_SIGNAL;
                        if !asked {
                            asked = true;
                            silence = Box::pin(async move {
                                let answer = tokio::time::timeout(SILENCE, connection.handle.send_ping());
                                answer.await.is_err().then_some(number)
                            });
                        }
                        if let Some(signal) = ssh_signal(number) {
                            let writer = Arc::clone(writer);
                            in_background(async move { writer.signal(signal).await });
                        }
                    }
                    Event::Resized(columns, rows) => {
                        let writer = Arc::clone(writer);
                        in_background(async move { writer.window_change(columns, rows, 0, 0).await });
                    }
                },
            }
        }
    }

    /// Writes what is left where the session is over for the guest, however it came to that, and judges how writing went.
    async fn finish(
        &mut self,
        ending: Result<Ending, SshError>,
        events: &mut mpsc::Receiver<Event>,
    ) -> Result<Ending, SshError> {
        match ending {
            Ok(ending @ (Ending::Exited(_) | Ending::Signalled(_))) => {
                Ok(self.write_rest(events).await?.unwrap_or(ending))
            }
            // What came before the connection broke belongs to the user; the break is what there is to tell.
            Err(error) => {
                let _ = self.write_rest(events).await;
                Err(error)
            }
            // The thread has ended already; it knows why.
            Ok(Ending::OutputClosed) => written("stdout", self.stdout.finish().await)
                .map(|closed| closed.unwrap_or(Ending::OutputClosed)),
            Ok(ending @ (Ending::Abandoned(_) | Ending::Left)) => Ok(ending),
        }
    }

    /// Waits until all is written: `None`. The command has ended, so now the first signal ends the session.
    async fn write_rest(&mut self, events: &mut mpsc::Receiver<Event>) -> Result<Option<Ending>, SshError> {
        let write = async {
            let (stdout, stderr) = tokio::join!(self.stdout.finish(), self.stderr.finish());
            let closed = written("stdout", stdout)?;
            // A stderr nobody reads is no loss to anybody.
            written("stderr", stderr)?;
            Ok(closed)
        };
        tokio::pin!(write);
        loop {
            // Cancel-safe: `write` is pinned outside, and an unread event stays in its queue.
            tokio::select! {
                closed = &mut write => return closed,
                event = next(events) => if let Event::Signal(number) = event {
                    return Ok(Some(Ending::Abandoned(number)));
                },
            }
        }
    }

    fn repeated(&mut self, number: i32) -> bool {
        let now = Instant::now();
        let last = self.last_signal.replace((number, now));
        last.is_some_and(|(signal, at)| signal == number && now.duration_since(at) < IMPATIENCE)
    }
}

/// What the end of an output stream means: a reader that left, or a failure such as a full disk.
fn written(what: &'static str, result: io::Result<()>) -> Result<Option<Ending>, SshError> {
    match result {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Some(Ending::OutputClosed)),
        Err(source) => Err(SshError::Write { what, source }),
    }
}

/// The next event, never if there can be none. Cancel-safe.
async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
    match events.recv().await {
        Some(event) => event,
        None => pending().await,
    }
}

/// Sends without waiting: the connection may be stuck, and a second signal must still be seen.
fn in_background(send: impl Future<Output = Result<(), russh::Error>> + Send + 'static) {
    tokio::spawn(send);
}

fn ssh_signal(number: i32) -> Option<Sig> {
    match number {
        SIGINT => Some(Sig::INT),
        SIGTERM => Some(Sig::TERM),
        SIGHUP => Some(Sig::HUP),
        SIGQUIT => Some(Sig::QUIT),
        _ => None,
    }
}
