//! Sessions against a real SSH server of the same library, on a socket pair, that runs real commands of this host.

use std::{
    io::{self, Cursor, Read, Write},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nix::{
    libc::{SIGINT, SIGTERM},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use russh::{
    Channel, ChannelId, ChannelMsg, Sig,
    keys::{Algorithm, PrivateKey, ssh_key::LineEnding},
    server::{self, Auth, ChannelOpenHandle, Handle, Msg, Session, VerifiedPublicKey},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
};

use super::{
    SshError,
    client::Connection,
    session::{Ending, Event, Request, Streams, Terminal, run},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs commands by `sh -c`.
struct Shell {
    client_key: russh::keys::PublicKey,
    seen: Arc<Mutex<Vec<String>>>,
}

impl server::Handler for Shell {
    type Error = russh::Error;

    async fn auth_publickey(
        &mut self,
        _user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, russh::Error> {
        let known = key.public_key.key_data() == self.client_key.key_data();
        Ok(if known { Auth::Accept } else { Auth::reject() })
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        reply.accept().await;
        tokio::spawn(serve(channel, session.handle(), Arc::clone(&self.seen)));
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        command: &[u8],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        if command == b"refuse" { session.channel_failure(id) } else { session.channel_success(id) }
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        session.channel_success(id)
    }
}

async fn serve(channel: Channel<Msg>, handle: Handle, seen: Arc<Mutex<Vec<String>>>) {
    let id = channel.id();
    let (mut reader, writer) = channel.split();
    let see = |what: String| seen.lock().unwrap().push(what);
    let command = loop {
        match reader.wait().await {
            Some(ChannelMsg::Exec { command, .. }) => break String::from_utf8(command).unwrap(),
            Some(ChannelMsg::RequestShell { .. }) => break "sh".to_owned(),
            Some(ChannelMsg::SetEnv { variable_name, variable_value, .. }) => {
                see(format!("env {variable_name}={variable_value}"));
            }
            Some(ChannelMsg::RequestPty { term, col_width, row_height, .. }) => {
                see(format!("pty {term} {col_width}x{row_height}"));
            }
            Some(_) => {}
            None => return,
        }
    };
    if command == "disconnect" {
        handle
            .disconnect(russh::Disconnect::ByApplication, "going down".to_owned(), String::new())
            .await
            .unwrap();
        return;
    }
    let mut child = tokio::process::Command::new("sh")
        .args(["-c", &command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    let mut stdin = child.stdin.take();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (mut to_out, mut to_err) = (writer.make_writer(), writer.make_writer_ext(Some(1)));
    let output = tokio::spawn(async move {
        tokio::join!(tokio::io::copy(&mut out, &mut to_out), tokio::io::copy(&mut err, &mut to_err))
    });
    // Unbounded: russh handles a connection's packets in order, so the input of `cat` must not hold up its output.
    let (data, mut chunks) = mpsc::unbounded_channel::<bytes::Bytes>();
    let mut data = Some(data);
    let input = tokio::spawn(async move {
        while let Some(chunk) = chunks.recv().await {
            if stdin.as_mut().unwrap().write_all(&chunk).await.is_err() {
                break;
            }
        }
        drop(stdin);
    });
    let seen_by_reader = Arc::clone(&seen);
    let reading = tokio::spawn(async move {
        while let Some(message) = reader.wait().await {
            match message {
                ChannelMsg::Data { data: chunk } => {
                    if let Some(data) = &data {
                        let _ = data.send(chunk);
                    }
                }
                ChannelMsg::Eof => data = None,
                ChannelMsg::Signal { signal } => {
                    seen_by_reader.lock().unwrap().push(format!("signal {signal:?}"));
                    let signal = match signal {
                        Sig::INT => Signal::SIGINT,
                        Sig::TERM => Signal::SIGTERM,
                        _ => continue,
                    };
                    let _ = kill(pid, signal);
                }
                ChannelMsg::WindowChange { col_width, row_height, .. } => {
                    seen_by_reader.lock().unwrap().push(format!("size {col_width}x{row_height}"));
                }
                ChannelMsg::Close => break,
                _ => {}
            }
        }
        seen_by_reader.lock().unwrap().push("closed".to_owned());
        let _ = kill(pid, Signal::SIGKILL);
    });
    let status = child.wait().await.unwrap();
    input.abort();
    let _ = output.await.unwrap();
    writer.eof().await.unwrap_or_default();
    if let Some(code) = status.code() {
        let _ = handle.exit_status_request(id, u32::try_from(code).unwrap()).await;
    } else {
        let name = match status.signal() {
            Some(SIGINT) => Sig::INT,
            Some(SIGTERM) => Sig::TERM,
            other => Sig::Custom(format!("{other:?}")),
        };
        let _ = handle.exit_signal_request(id, name, false, String::new(), String::new()).await;
    }
    let _ = handle.close(id).await;
    reading.await.unwrap();
}

struct Guest {
    dir: tempfile::TempDir,
    host_key: String,
    near: Option<UnixStream>,
    seen: Arc<Mutex<Vec<String>>>,
    /// Makes the guest vanish without a goodbye.
    disconnect: Arc<tokio::sync::Notify>,
    /// Makes it stand still.
    freeze: Arc<tokio::sync::Notify>,
}

impl Guest {
    fn new() -> Self {
        let make_key = || PrivateKey::random(&mut russh::keys::key::safe_rng(), Algorithm::Ed25519).unwrap();
        let (host_key, client_key) = (make_key(), make_key());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), client_key.to_openssh(LineEnding::LF).unwrap().as_bytes())
            .unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shell = Shell { client_key: client_key.public_key().clone(), seen: Arc::clone(&seen) };
        let (near, mut one) = UnixStream::pair().unwrap();
        let (mut other, far) = UnixStream::pair().unwrap();
        let freeze = Arc::new(tokio::sync::Notify::new());
        let frozen = Arc::clone(&freeze);
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut one, &mut other) => {}
                // Both ends stay open.
                () = frozen.notified() => std::future::pending().await,
            }
        });
        let config = server::Config {
            keys: vec![host_key.clone()],
            window_size: 2 << 20,
            auth_rejection_time: Duration::ZERO,
            ..server::Config::default()
        };
        let disconnect = Arc::new(tokio::sync::Notify::new());
        let vanish = Arc::clone(&disconnect);
        let cable = far.into_std().unwrap();
        let far = UnixStream::from_std(cable.try_clone().unwrap()).unwrap();
        tokio::spawn(async move {
            vanish.notified().await;
            cable.shutdown(std::net::Shutdown::Both).unwrap();
        });
        tokio::spawn(async move {
            if let Ok(session) = server::run_stream(Arc::new(config), far, shell).await {
                let _ = session.await;
            }
        });
        let host_key = host_key.public_key().to_openssh().unwrap();
        Self { dir, host_key, near: Some(near), seen, disconnect, freeze }
    }

    fn client_key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    async fn connect(&mut self) -> Result<Connection, SshError> {
        Connection::over(self.near.take().unwrap(), &self.host_key, &self.client_key(), "root").await
    }

    async fn saw(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.lock().unwrap().iter().any(|seen| seen == what) {
            assert!(Instant::now() < deadline, "{what} was never seen: {:?}", self.seen.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A buffer that can be looked at.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    async fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.text().contains(text) {
            assert!(Instant::now() < deadline, "{text} never came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn request(command: &str) -> Request {
    Request { command: Some(command.into()), environment: Vec::new(), terminal: None, escapes: false }
}

struct Ran {
    ending: Result<Ending, SshError>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

async fn run_with(guest: &mut Guest, request: Request, stdin: impl Read + Send + 'static) -> Ran {
    let connection = guest.connect().await.unwrap();
    let (stdout, stderr) = (Buffer::default(), Buffer::default());
    let streams = Streams {
        stdin: Box::new(stdin),
        stdout: Box::new(stdout.clone()),
        stderr: Box::new(stderr.clone()),
    };
    let (_events, mut receiver) = mpsc::channel(1);
    let session = run(&connection, request, streams, &mut receiver);
    let ending = tokio::time::timeout(PATIENCE, session).await.expect("the session ends");
    connection.close().await;
    let take = |buffer: &Buffer| std::mem::take(&mut *buffer.0.lock().unwrap());
    Ran { ending, stdout: take(&stdout), stderr: take(&stderr) }
}

/// A stdin that stays open and silent, as a terminal nobody types at.
fn silence() -> impl Read + Send + 'static {
    struct Silence;
    impl Read for Silence {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            loop {
                std::thread::park();
            }
        }
    }
    Silence
}

#[tokio::test]
async fn output_errors_and_exit_code_are_those_of_the_command() {
    let mut guest = Guest::new();
    let ran = run_with(&mut guest, request("echo out; echo err >&2; exit 42"), io::empty()).await;
    assert_eq!(ran.ending.unwrap(), Ending::Exited(42));
    assert_eq!((ran.stdout.as_slice(), ran.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
}

#[tokio::test]
async fn a_command_that_ends_does_not_wait_for_stdin() {
    let mut guest = Guest::new();
    let ran = run_with(&mut guest, request("echo done"), silence()).await;
    assert_eq!(ran.ending.unwrap(), Ending::Exited(0));
    assert_eq!(ran.stdout, b"done\n");
}

#[tokio::test]
async fn megabytes_pass_both_ways_unchanged() {
    let mut guest = Guest::new();
    let sent: Vec<u8> = (0..10_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let began = Instant::now();
    let ran = run_with(&mut guest, request("cat"), Cursor::new(sent.clone())).await;
    assert_eq!(ran.ending.unwrap(), Ending::Exited(0));
    assert!(ran.stdout == sent, "{} of {} bytes came back", ran.stdout.len(), sent.len());
    println!("{} MiB both ways in {:?}", sent.len() >> 20, began.elapsed());
}

#[tokio::test]
async fn a_shell_takes_its_commands_from_stdin() {
    let mut guest = Guest::new();
    let shell = Request { command: None, ..request("") };
    let ran = run_with(&mut guest, shell, Cursor::new("echo $((6*7))\nexit 7\n")).await;
    assert_eq!(ran.ending.unwrap(), Ending::Exited(7));
    assert_eq!(ran.stdout, b"42\n");
}

#[tokio::test]
async fn variables_and_a_terminal_are_asked_for() {
    let mut guest = Guest::new();
    let terminal = Terminal { term: "xterm".to_owned(), size: (132, 43), modes: Vec::new() };
    let environment = vec![("A".to_owned(), "1 2".to_owned())];
    let request = Request { environment, terminal: Some(terminal), ..request("true") };
    run_with(&mut guest, request, io::empty()).await.ending.unwrap();
    guest.saw("env A=1 2").await;
    guest.saw("pty xterm 132x43").await;
}

#[tokio::test]
async fn another_host_key_is_refused() {
    let mut guest = Guest::new();
    guest.host_key = Guest::new().host_key;
    assert!(matches!(guest.connect().await, Err(SshError::HostKey)));
}

#[tokio::test]
async fn another_client_key_is_refused() {
    let mut guest = Guest::new();
    std::fs::copy(Guest::new().client_key(), guest.client_key()).unwrap();
    let error = guest.connect().await.err().unwrap();
    assert!(matches!(&error, SshError::LoginRefused { user } if user == "root"), "{error:?}");
}

#[tokio::test]
async fn a_refused_command_and_a_lost_connection_are_told_apart() {
    let ran = run_with(&mut Guest::new(), request("refuse"), silence()).await;
    assert!(matches!(ran.ending, Err(SshError::StartRefused)), "{:?}", ran.ending);
    let ran = run_with(&mut Guest::new(), request("disconnect"), silence()).await;
    let error = ran.ending.unwrap_err();
    assert!(matches!(&error, SshError::Lost { reason } if reason == ": going down"), "{error:?}");
}

/// A session under way, with its events.
struct Live {
    task: tokio::task::JoinHandle<Result<Ending, SshError>>,
    events: mpsc::Sender<Event>,
}

impl Live {
    async fn start(
        guest: &mut Guest,
        command: &str,
        stdin: Box<dyn Read + Send>,
        stdout: Box<dyn Write + Send>,
    ) -> Self {
        Self::with(guest, request(command), stdin, stdout).await
    }

    async fn with(
        guest: &mut Guest,
        request: Request,
        stdin: Box<dyn Read + Send>,
        stdout: Box<dyn Write + Send>,
    ) -> Self {
        let connection = guest.connect().await.unwrap();
        let (events, mut receiver) = mpsc::channel(4);
        let task = tokio::spawn(async move {
            let streams = Streams { stdin, stdout, stderr: Box::new(io::sink()) };
            let ending = run(&connection, request, streams, &mut receiver).await;
            connection.close().await;
            ending
        });
        Self { task, events }
    }

    async fn end(self) -> Ending {
        tokio::time::timeout(PATIENCE, self.task).await.expect("the session ends").unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_signal_reaches_the_command() {
    let mut guest = Guest::new();
    let out = Buffer::default();
    let live = Live::start(
        &mut guest,
        "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done",
        Box::new(silence()),
        Box::new(out.clone()),
    )
    .await;
    out.wait_for("ready").await;
    live.events.send(Event::Signal(SIGINT)).await.unwrap();
    live.events.send(Event::Resized(90, 30)).await.unwrap();
    guest.saw("size 90x30").await;
    assert_eq!(live.end().await, Ending::Exited(9));
    assert_eq!(out.text(), "ready\ncaught\n");
}

#[tokio::test]
async fn death_by_a_signal_is_reported_as_such() {
    let mut guest = Guest::new();
    let out = Buffer::default();
    let live =
        Live::start(&mut guest, "echo ready; exec sleep 1000", Box::new(silence()), Box::new(out.clone()))
            .await;
    out.wait_for("ready").await;
    live.events.send(Event::Signal(SIGTERM)).await.unwrap();
    assert_eq!(live.end().await, Ending::Signalled("TERM".to_owned()));
}

#[tokio::test]
async fn one_signal_is_enough_where_the_guest_stands_still() {
    let mut guest = Guest::new();
    let out = Buffer::default();
    let live =
        Live::start(&mut guest, "echo ready; exec sleep 1000", Box::new(silence()), Box::new(out.clone()))
            .await;
    out.wait_for("ready").await;
    guest.freeze.notify_one();
    live.events.send(Event::Signal(SIGTERM)).await.unwrap();
    assert_eq!(live.end().await, Ending::Abandoned(SIGTERM));
}

#[tokio::test]
async fn signals_that_keep_coming_do_not_hold_up_the_end() {
    let mut guest = Guest::new();
    let out = Buffer::default();
    let live =
        Live::start(&mut guest, "echo ready; exec sleep 1000", Box::new(silence()), Box::new(out.clone()))
            .await;
    out.wait_for("ready").await;
    guest.freeze.notify_one();
    let events = live.events.clone();
    let supervisor = tokio::spawn(async move {
        // Never the same one twice, which would be a wish of its own.
        for number in [SIGTERM, SIGINT].into_iter().cycle() {
            if events.send(Event::Signal(number)).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    assert_eq!(live.end().await, Ending::Abandoned(SIGTERM), "the first of them counts");
    supervisor.await.unwrap();
}

#[tokio::test]
async fn a_guest_that_stands_still_before_the_command_can_be_left() {
    let mut guest = Guest::new();
    let connection = guest.connect().await.unwrap();
    guest.freeze.notify_one();
    tokio::task::yield_now().await;
    let (events, mut receiver) = mpsc::channel(2);
    events.send(Event::Resized(90, 30)).await.unwrap();
    events.send(Event::Signal(SIGTERM)).await.unwrap();
    let streams =
        Streams { stdin: Box::new(silence()), stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let session = run(&connection, request("true"), streams, &mut receiver);
    let ending = tokio::time::timeout(PATIENCE, session).await.expect("the session ends");
    assert_eq!(ending.unwrap(), Ending::Abandoned(SIGTERM));
}

#[tokio::test]
async fn a_signal_without_effect_leaves_at_the_second() {
    let mut guest = Guest::new();
    let out = Buffer::default();
    let live = Live::start(
        &mut guest,
        "trap '' INT; echo ready; exec sleep 1000",
        Box::new(silence()),
        Box::new(out.clone()),
    )
    .await;
    out.wait_for("ready").await;
    live.events.send(Event::Signal(SIGINT)).await.unwrap();
    live.events.send(Event::Signal(SIGINT)).await.unwrap();
    assert_eq!(live.end().await, Ending::Abandoned(SIGINT));
    guest.saw("closed").await;
}

#[tokio::test]
async fn a_reader_that_leaves_ends_an_endless_command() {
    let mut guest = Guest::new();
    let (reader, writer) = io::pipe().unwrap();
    let live = Live::start(&mut guest, "yes", Box::new(silence()), Box::new(writer)).await;
    tokio::task::spawn_blocking(move || (&reader).read_exact(&mut [0; 100_000]).unwrap()).await.unwrap();
    assert_eq!(live.end().await, Ending::OutputClosed);
    guest.saw("closed").await;
}

#[tokio::test]
async fn a_reader_that_stalls_slows_the_command_and_still_lets_signals_through() {
    let mut guest = Guest::new();
    let (mut reader, writer) = io::pipe().unwrap();
    let live = Live::start(
        &mut guest,
        "trap 'exit 5' INT; while :; do head -c 1000000 /dev/zero; done",
        Box::new(silence()),
        Box::new(writer),
    )
    .await;
    tokio::task::spawn_blocking({
        let mut reader = reader.try_clone().unwrap();
        move || reader.read_exact(&mut [0; 1000]).unwrap()
    })
    .await
    .unwrap();
    live.events.send(Event::Signal(SIGINT)).await.unwrap();
    guest.saw("signal INT").await;
    let rest = tokio::task::spawn_blocking(move || io::copy(&mut reader, &mut io::sink()).unwrap());
    assert_eq!(live.end().await, Ending::Exited(5));
    assert!(rest.await.unwrap() < 100 << 20);
}

#[tokio::test]
async fn the_escape_leaves_a_hung_session() {
    let mut guest = Guest::new();
    let (keys, mut typed) = io::pipe().unwrap();
    let request = Request { escapes: true, ..request("exec sleep 1000") };
    let live = Live::with(&mut guest, request, Box::new(keys), Box::new(io::sink())).await;
    typed.write_all(b"ls\r~.").unwrap();
    assert_eq!(live.end().await, Ending::Left);
}

#[tokio::test]
async fn a_guest_that_vanishes_is_a_lost_connection() {
    let mut guest = Guest::new();
    let (near, mut far) = UnixStream::pair().unwrap();
    let mut real = guest.near.replace(near).unwrap();
    // Stands between the two until half a megabyte has come from the guest.
    let between = tokio::spawn(async move {
        let (mut from_guest, mut to_guest) = real.split();
        let (mut from_us, mut to_us) = far.split();
        let mut limited = (&mut from_guest).take(512 << 10);
        tokio::select! {
            _ = tokio::io::copy(&mut limited, &mut to_us) => {}
            _ = tokio::io::copy(&mut from_us, &mut to_guest) => {}
        }
    });
    let ran = run_with(&mut guest, request("yes"), silence()).await;
    between.await.unwrap();
    assert!(matches!(ran.ending, Err(SshError::Lost { .. })), "{:?}", ran.ending);
    assert!(ran.stdout.len() > 100_000, "what had come is written: {}", ran.stdout.len());
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_not_a_reader_that_left() {
    let full = || Box::new(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    // Both while the command runs and when all there is to write is left to its end.
    for command in ["yes", "echo one line"] {
        let mut guest = Guest::new();
        let live = Live::start(&mut guest, command, Box::new(silence()), full()).await;
        let error = tokio::time::timeout(PATIENCE, live.task).await.unwrap().unwrap().unwrap_err();
        let SshError::Write { what: "stdout", source } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    }
}

/// A stdout that tells of its first write and keeps it until the gate is dropped.
struct Gated {
    reached: Arc<tokio::sync::Notify>,
    gate: std::sync::mpsc::Receiver<()>,
    inner: Buffer,
}

impl Write for Gated {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reached.notify_one();
        let _ = self.gate.recv();
        self.inner.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_a_guest_said_before_it_vanished_is_written_unless_the_user_has_enough() {
    for enough in [false, true] {
        let mut guest = Guest::new();
        let reached = Arc::new(tokio::sync::Notify::new());
        let (open, gate) = std::sync::mpsc::channel();
        let out = Buffer::default();
        let stdout = Gated { reached: Arc::clone(&reached), gate, inner: out.clone() };
        let command = "echo last words; exec sleep 1000";
        let mut live = Live::start(&mut guest, command, Box::new(silence()), Box::new(stdout)).await;
        tokio::time::timeout(PATIENCE, reached.notified()).await.unwrap();
        guest.disconnect.notify_one();
        // Longer than the goodbye to a guest that is gone: only the writing is left.
        let soon = Duration::from_secs(2);
        assert!(tokio::time::timeout(soon, &mut live.task).await.is_err(), "output is left behind");
        if enough {
            live.events.send(Event::Signal(SIGINT)).await.unwrap();
        } else {
            open.send(()).unwrap();
        }
        let error = tokio::time::timeout(PATIENCE, live.task).await.unwrap().unwrap().unwrap_err();
        assert!(matches!(&error, SshError::Lost { .. }), "{error:?}");
        assert_eq!(out.text(), if enough { "" } else { "last words\n" });
    }
}
