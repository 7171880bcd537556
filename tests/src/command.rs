//! Running a program to its end, or beside the test, with all it says kept.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::namespaces::{Namespaces, before_exec, default_signals};

/// How often a condition that nobody announces is looked at.
pub const LOOK: Duration = Duration::from_millis(10);
/// How much of a stream a failure shows.
const SHOWN: usize = 8000;

/// Waits until `condition` holds.
///
/// # Panics
/// It does not within `limit`; `what` says what was waited for.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::park_timeout(LOOK);
    }
}

/// What a failure shows besides the program's own output.
pub type Context = Arc<dyn Fn() -> String + Send + Sync>;

/// What a program gets as stdin.
#[derive(Debug, Clone, Default)]
pub enum Input {
    /// Nothing.
    #[default]
    Null,
    /// These bytes, then the end.
    Bytes(Vec<u8>),
    /// A pipe that stays open.
    Open,
    /// A terminal of this size for stdin, stdout and stderr; what is typed comes by [`Running::type_in`].
    Terminal {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
}

/// A program that runs.
pub struct Running {
    what: String,
    child: Child,
    started: Instant,
    stdout: Stream,
    stderr: Stream,
    typing: Option<File>,
    writer: Option<JoinHandle<()>>,
    context: Context,
}

#[derive(Clone, Default)]
struct Stream(Arc<Shared>);

#[derive(Default)]
struct Shared {
    kept: Mutex<Kept>,
    changed: Condvar,
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn follow(mut source: impl Read + Send + 'static) -> Self {
        let stream = Self::default();
        let sink = stream.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                // A terminal whose other end is closed says EIO.
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut kept = sink.lock();
                kept.bytes.extend_from_slice(&buffer[..count]);
                kept.ended = count == 0;
                drop(kept);
                sink.0.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        stream
    }

    fn ended() -> Self {
        let stream = Self::default();
        stream.lock().ended = true;
        stream
    }

    /// Waits until the content satisfies `condition` or `limit` is over; whether it does.
    fn wait(&self, limit: Duration, mut condition: impl FnMut(&[u8], bool) -> bool) -> bool {
        let changed = &self.0.changed;
        let waited =
            changed.wait_timeout_while(self.lock(), limit, |kept| !condition(&kept.bytes, kept.ended));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // What a panicking reader had appended is whole.
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// Starts `command` in `namespaces`.
    ///
    /// # Panics
    /// It cannot be started.
    #[track_caller]
    pub fn start(namespaces: &Namespaces, mut command: Command, input: Input, context: Context) -> Self {
        let what = describe(&command);
        let mut terminal = None;
        match &input {
            Input::Null => drop(command.stdin(Stdio::null())),
            Input::Bytes(_) | Input::Open => drop(command.stdin(Stdio::piped())),
            Input::Terminal { columns, rows } => {
                let size = Winsize { ws_row: *rows, ws_col: *columns, ws_xpixel: 0, ws_ypixel: 0 };
                let pty = openpty(&size, None).expect("a terminal can be made");
                let clone = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("a descriptor can be cloned"));
                command.stdin(clone(&pty.slave)).stdout(clone(&pty.slave)).stderr(pty.slave);
                before_exec(&mut command, take_terminal);
                terminal = Some(File::from(pty.master));
            }
        }
        if terminal.is_none() {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        before_exec(&mut command, default_signals);
        let started = Instant::now();
        let mut child = namespaces
            .spawn(&mut command)
            .unwrap_or_else(|error| panic!("{what} cannot be started: {error}"));
        // The command keeps the terminal's other end open until it is dropped.
        drop(command);
        let mut typing = None;
        let mut writer = None;
        let (stdout, stderr) = match (terminal, child.stdout.take(), child.stderr.take()) {
            (Some(master), ..) => {
                typing = master.try_clone().ok();
                (Stream::follow(master), Stream::ended())
            }
            (None, Some(stdout), Some(stderr)) => (Stream::follow(stdout), Stream::follow(stderr)),
            (None, ..) => (Stream::ended(), Stream::ended()),
        };
        if let Input::Bytes(bytes) = input
            && let Some(mut stdin) = child.stdin.take()
        {
            // A program that does not read all of its input is none of our errors.
            writer = Some(std::thread::spawn(move || drop(stdin.write_all(&bytes))));
        }
        Self { what, child, started, stdout, stderr, typing, writer, context }
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until its stdout (or terminal) has `text` in it.
    ///
    /// # Panics
    /// It has not within `limit`, or ends before.
    #[track_caller]
    pub fn expect(&self, text: &str, limit: Duration) -> &Self {
        let found = |bytes: &[u8]| contains(bytes, text.as_bytes());
        let waited = self.stdout.wait(limit, |bytes, ended| ended || found(bytes));
        let bytes = self.stdout.bytes();
        assert!(
            waited && found(&bytes),
            "{text:?} did not come within {limit:?} from {}",
            self.report("still running")
        );
        self
    }

    /// What it has written to stdout so far.
    pub fn stdout_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// What it has written to stderr so far.
    pub fn stderr_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes()).into_owned()
    }

    /// Writes to its terminal, or to its open stdin.
    ///
    /// # Panics
    /// It has neither, or has ended.
    #[track_caller]
    pub fn type_in(&mut self, text: &str) {
        let result = match (&mut self.typing, &mut self.child.stdin) {
            (Some(terminal), _) => terminal.write_all(text.as_bytes()),
            (None, Some(stdin)) => stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()),
            (None, None) => panic!("{} has no stdin to write to", self.what),
        };
        result.unwrap_or_else(|error| panic!("{error} writing to {}", self.report("still running")));
    }

    /// Changes the size of its terminal.
    ///
    /// # Panics
    /// It has none.
    #[track_caller]
    pub fn resize(&self, columns: u16, rows: u16) {
        let terminal = self.typing.as_ref().expect("it has a terminal");
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size).expect("a terminal has a size");
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// It has ended.
    #[track_caller]
    pub fn signal(&mut self, signal: Signal) -> &mut Self {
        if let Ok(Some(status)) = self.child.try_wait() {
            panic!("cannot be signalled: {}", self.report(&status.to_string()));
        }
        kill(Pid::from_raw(self.pid()), signal).expect("an own child that was not reaped can be signalled");
        self
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end within `limit`; it is killed then.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Output {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => std::thread::park_timeout(LOOK),
                _ => {
                    let report = self.report("killed");
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    panic!("did not end within {limit:?}: {report}");
                }
            }
        };
        let took = self.started.elapsed();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        // A child that it left behind may keep a stream open.
        for stream in [&self.stdout, &self.stderr] {
            if self.typing.is_none() {
                assert!(
                    stream.wait(Duration::from_secs(60), |_, ended| ended),
                    "somebody keeps the output open of {}",
                    self.report(&status.to_string())
                );
            }
        }
        Output {
            report: self.report(&status.to_string()),
            status,
            took,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
        }
    }

    fn report(&self, status: &str) -> String {
        let mut text = format!("{}\n{status} after {:.1?}", self.what, self.started.elapsed());
        for (name, stream) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let bytes = stream.bytes();
            let shown = &bytes[bytes.len().saturating_sub(SHOWN)..];
            let _ = write!(text, "\n--- {name} ({} bytes)\n{}", bytes.len(), String::from_utf8_lossy(shown));
        }
        text + &(self.context)()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only its own child, and only one that was not reaped.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Output {
    /// How.
    pub status: ExitStatus,
    /// After what time.
    pub took: Duration,
    /// All of its stdout.
    pub stdout: Vec<u8>,
    /// All of its stderr.
    pub stderr: Vec<u8>,
    report: String,
}

impl Output {
    /// Its stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its stdout as JSON.
    ///
    /// # Panics
    /// It is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.report))
    }

    /// Its exit code has to be this.
    ///
    /// # Panics
    /// It is another.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(self.status.code() == Some(code), "exit code {code} expected: {}", self.report);
        self
    }

    /// Its stdout has to be exactly this.
    ///
    /// # Panics
    /// It is something else.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stdout == text.as_bytes(), "stdout {text:?} expected: {}", self.report);
        self
    }

    /// Its stdout has to contain this.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn tells(self, text: &str) -> Self {
        assert!(contains(&self.stdout, text.as_bytes()), "{text:?} expected in stdout: {}", self.report);
        self
    }

    /// Its stderr has to contain this.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(contains(&self.stderr, text.as_bytes()), "{text:?} expected in stderr: {}", self.report);
        self
    }

    /// Whatever has to hold.
    ///
    /// # Panics
    /// It does not; `what` names it.
    #[track_caller]
    pub fn must(self, what: &str, condition: impl FnOnce(&Self) -> bool) -> Self {
        assert!(condition(&self), "{what}: {}", self.report);
        self
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    part.is_empty() || bytes.windows(part.len()).any(|window| window == part)
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    format!("`{}`", words.join(" "))
}

fn take_terminal() -> std::io::Result<()> {
    nix::unistd::setsid()?;
    rustix::process::ioctl_tiocsctty(std::io::stdin()).map_err(Into::into)
}
