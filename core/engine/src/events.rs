//! The event log: what happened, for people and for programs that follow it.
//!
//! ```text
//!   record ──> ring of the last 1,000 ──> list, follow (each follower has a place in the ring, and no buffer of its own)
//!      └─────> events.jsonl ── 1 MiB ──> events.jsonl.1
//! ```
//!
//! The file is for the next daemon: it begins with what is in there, and goes on counting. It is written in the caller's task, so
//! that an event outlives a daemon that is killed right after it, and never flushed to the device: that would cost each operation
//! more than the log is worth. Nothing depends on it. What cannot be written is kept for the next try and logged.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use tokio::sync::watch;
use vm_types::{Event, EventKind, OperationId, VmId, VmName};

/// Events in memory.
const KEPT: usize = 1000;

/// Bytes after which a file is put aside; there are two at most.
const FILE_BYTES: u64 = 1 << 20;

/// Bytes of a message; causes with a console's end fit.
const MESSAGE_BYTES: usize = 4096;

/// The log. Clones share it.
#[derive(Debug, Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    ring: Mutex<Ring>,
    /// The newest event's number, to wake followers.
    newest: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    events: VecDeque<Event>,
    newest: u64,
    /// The newest event that is not in the ring any more, or never was.
    lost: u64,
    disk: Disk,
}

impl EventLog {
    /// Opens the log at `path`, or begins one. What of it cannot be read is passed over.
    pub fn open(path: &Path) -> Self {
        let (events, newest) = read_back(path);
        let lost = events.front().map_or(newest, |first| first.sequence.saturating_sub(1));
        let disk = Disk {
            path: path.to_owned(),
            file: None,
            bytes: 0,
            written: newest,
            torn: false,
            failing: false,
        };
        let ring = Mutex::new(Ring { events, newest, lost, disk });
        Self { inner: Arc::new(Inner { ring, newest: watch::Sender::new(newest) }) }
    }

    /// Adds an event.
    pub fn record(
        &self,
        kind: EventKind,
        vm: Option<(&VmId, &VmName)>,
        operation: Option<OperationId>,
        message: impl Into<String>,
    ) {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let mut message: String = message.into();
        if message.len() > MESSAGE_BYTES {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES));
            message.push('…');
        }
        let newest = self.ring(|ring| {
            ring.newest += 1;
            ring.events.push_back(Event {
                sequence: ring.newest,
                at_ms: u64::try_from(at_ms).unwrap_or(u64::MAX),
                kind,
                vm: vm.map(|(id, _)| id.clone()),
                name: vm.map(|(_, name)| name.clone()),
                operation,
                message,
            });
            ring.disk.catch_up(&ring.events);
            if ring.events.len() > KEPT
                && let Some(oldest) = ring.events.pop_front()
            {
                ring.lost = oldest.sequence;
            }
            ring.newest
        });
        // Two that record at once may come here in either order.
        self.inner.newest.send_if_modified(|known| {
            let newer = newest > *known;
            *known = newest.max(*known);
            newer
        });
    }

    /// The last events after number `after`, 1,000 at most, oldest first.
    pub fn list(&self, after: u64) -> Vec<Event> {
        self.ring(|ring| ring.events.range(ring.index_after(after)..).cloned().collect())
    }

    /// The same, and then each event as it happens.
    pub fn follow(&self, after: u64) -> Follower {
        let lost = self.ring(|ring| ring.lost);
        // Who asks for all that is kept misses nothing of it.
        let told = if after == 0 { lost } else { after };
        Follower { log: self.clone(), newest: self.inner.newest.subscribe(), told }
    }

    /// Wakes whoever wants to look again whenever something has happened, whatever it was.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.inner.newest.subscribe()
    }

    fn ring<T>(&self, f: impl FnOnce(&mut Ring) -> T) -> T {
        // A panic in there would be one of the allocator's; the ring is whole between any two statements.
        f(&mut self.inner.ring.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Ring {
    fn index_after(&self, sequence: u64) -> usize {
        self.events.partition_point(|event| event.sequence <= sequence)
    }
}

/// Somebody's place in the log.
#[derive(Debug)]
pub struct Follower {
    log: EventLog,
    newest: watch::Receiver<u64>,
    /// The number of the last event that was handed out.
    told: u64,
}

impl Follower {
    /// The next event, as soon as there is one. A follower that falls so far behind that the log has forgotten what it would be
    /// told next gets one event of the kind [`EventKind::Missed`] instead, with the number of the last one missed, and goes on
    /// from there. Never ends. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        loop {
            self.newest.borrow_and_update();
            if let Some(event) = self.look() {
                self.told = event.sequence;
                return event;
            }
            // The sender lives in the log that we hold.
            if self.newest.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn look(&self) -> Option<Event> {
        self.log.ring(|ring| {
            if self.told < ring.lost {
                let at_ms = ring.events.front().map_or(0, |event| event.at_ms);
                return Some(Event {
                    sequence: ring.lost,
                    at_ms,
                    kind: EventKind::Missed,
                    vm: None,
                    name: None,
                    operation: None,
                    message: format!("{} events were missed", ring.lost - self.told),
                });
            }
            ring.events.get(ring.index_after(self.told)).cloned()
        })
    }
}

/// The newest file and what of the ring is in it.
#[derive(Debug)]
struct Disk {
    path: PathBuf,
    /// Opened with the first event.
    file: Option<File>,
    bytes: u64,
    /// The number of the last event in it.
    written: u64,
    /// It ends within a line.
    torn: bool,
    /// So that one full disk does not fill the daemon's own log too.
    failing: bool,
}

impl Disk {
    /// Writes what of the ring is not written yet.
    fn catch_up(&mut self, events: &VecDeque<Event>) {
        let first = events.partition_point(|event| event.sequence <= self.written);
        for event in events.range(first..) {
            match self.write(event) {
                Ok(()) => {
                    self.written = event.sequence;
                    self.failing = false;
                }
                Err(error) => {
                    if !self.failing {
                        tracing::warn!(path = %self.path.display(), %error, "events cannot be written down");
                    }
                    self.failing = true;
                    return;
                }
            }
        }
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        let mut line = if self.torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, event)?;
        line.push(b'\n');
        if self.file.is_some() && self.bytes + line.len() as u64 > FILE_BYTES {
            self.file = None;
            std::fs::rename(&self.path, aside(&self.path))?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let (file, bytes, torn) = open_to_append(&self.path)?;
                (self.bytes, self.torn) = (bytes, torn);
                if torn && line[0] != b'\n' {
                    line.insert(0, b'\n');
                }
                self.file.insert(file)
            }
        };
        // One call, so that a full disk is the only thing that can cut a line in two.
        if let Err(error) = file.write_all(&line) {
            self.file = None;
            return Err(error);
        }
        self.bytes += line.len() as u64;
        self.torn = false;
        Ok(())
    }
}

/// The file, its length, and whether its last line has no end.
fn open_to_append(path: &Path) -> io::Result<(File, u64, bool)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)?;
    let bytes = file.metadata()?.len();
    let mut last = [b'\n'];
    if bytes > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok((file, bytes, last[0] != b'\n'))
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The last events of both files and the highest number that was ever given as far as they tell.
fn read_back(path: &Path) -> (VecDeque<Event>, u64) {
    /// All that is needed of a line that is no event to this daemon.
    #[derive(Deserialize)]
    struct Numbered {
        sequence: u64,
    }
    let mut text = Vec::new();
    for path in [aside(path), path.to_owned()] {
        match std::fs::read(&path) {
            Ok(bytes) => {
                text.extend(bytes);
                text.push(b'\n');
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "older events cannot be read"),
        }
    }
    let mut events = VecDeque::new();
    let mut newest = 0;
    let lines: Vec<_> = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    for line in &lines[lines.len().saturating_sub(KEPT)..] {
        let number = match serde_json::from_slice::<Event>(line) {
            // In order, whatever somebody did to the file: followers find their place by it.
            Ok(event) if event.sequence > newest => {
                let number = event.sequence;
                events.push_back(event);
                number
            }
            Ok(event) => event.sequence,
            // A line cut short had a number too, and somebody may have been told of it.
            Err(_) => serde_json::from_slice::<Numbered>(line).map_or(newest + 1, |line| line.sequence),
        };
        newest = newest.max(number);
    }
    (events, newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (tempfile::TempDir, EventLog) {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(&dir.path().join("events.jsonl"));
        (dir, log)
    }

    fn reopen(dir: &tempfile::TempDir) -> EventLog {
        EventLog::open(&dir.path().join("events.jsonl"))
    }

    fn record(log: &EventLog, message: impl Into<String>) {
        log.record(EventKind::VmStarted, None, None, message);
    }

    fn messages(events: &[Event]) -> Vec<&str> {
        events.iter().map(|event| event.message.as_str()).collect()
    }

    #[test]
    fn the_next_daemon_knows_them_and_counts_on() {
        let (dir, log) = log();
        let (id, name): (VmId, VmName) = ("00112233aabb".parse().unwrap(), "web".parse().unwrap());
        log.record(EventKind::VmCreated, Some((&id, &name)), Some(OperationId(7)), "made");
        record(&log, "up");
        let before = log.list(0);
        drop(log);
        let log = reopen(&dir);
        assert_eq!(log.list(0), before);
        record(&log, "third");
        assert_eq!(log.list(2)[0].sequence, 3);
        assert_eq!(before[0].name.as_ref(), Some(&name));
    }

    #[test]
    fn a_line_cut_short_costs_that_event_only_and_its_number_is_not_given_again() {
        let (dir, log) = log();
        for message in ["one", "two", "three"] {
            record(&log, message);
        }
        drop(log);
        let path = dir.path().join("events.jsonl");
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let log = reopen(&dir);
        assert_eq!(messages(&log.list(0)), ["one", "two"]);
        record(&log, "four");
        drop(log);
        let log = reopen(&dir);
        assert_eq!(messages(&log.list(0)), ["one", "two", "four"]);
        assert_eq!(log.list(0)[2].sequence, 4);
    }

    #[test]
    fn an_event_that_only_a_newer_daemon_knows_is_told_by_its_message() {
        let (dir, log) = log();
        record(&log, "one");
        drop(log);
        let line = r#"{"sequence":9,"at_ms":1,"kind":"vm_teleported","message":"gone"}"#;
        let path = dir.path().join("events.jsonl");
        let mut text = std::fs::read_to_string(&path).unwrap();
        text += line;
        text.push('\n');
        std::fs::write(&path, text).unwrap();
        let log = reopen(&dir);
        record(&log, "ten");
        assert_eq!(messages(&log.list(0)), ["one", "gone", "ten"]);
        assert_eq!(log.list(0)[1].kind, EventKind::Other);
        assert_eq!(log.list(0)[2].sequence, 10);
    }

    #[test]
    fn two_files_are_bounded_and_the_ring_spans_both() {
        let (dir, log) = log();
        let text = "x".repeat(2000);
        for _ in 0..1200 {
            record(&log, text.as_str());
        }
        let mut sizes: Vec<u64> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        sizes.sort_unstable();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|bytes| *bytes <= FILE_BYTES), "{sizes:?}");
        let kept = log.list(0);
        assert_eq!((kept.len(), kept.last().unwrap().sequence), (KEPT, 1200));
        drop(log);
        let again = reopen(&dir).list(0);
        assert_eq!(again.last().unwrap().sequence, 1200);
        assert!(again.len() > 500, "the file put aside counts too: {}", again.len());
    }

    #[test]
    fn what_could_not_be_written_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("not-yet/events.jsonl");
        let log = EventLog::open(&path);
        record(&log, "one");
        assert_eq!(messages(&log.list(0)), ["one"]);
        std::fs::create_dir(dir.path().join("not-yet")).unwrap();
        record(&log, "two");
        assert_eq!(messages(&EventLog::open(&path).list(0)), ["one", "two"]);
    }

    #[test]
    fn a_huge_message_is_cut_at_a_character() {
        let (_dir, log) = log();
        record(&log, "é".repeat(MESSAGE_BYTES));
        let message = &log.list(0)[0].message;
        assert!(message.len() < MESSAGE_BYTES + 4 && message.ends_with("é…"));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_follower_gets_backlog_and_live_events_once_and_in_order() {
        let (_dir, log) = log();
        for number in 0..200 {
            record(&log, number.to_string());
        }
        let mut follower = log.follow(100);
        let writer = tokio::task::spawn_blocking(move || {
            for number in 200..800 {
                record(&log, number.to_string());
            }
        });
        for expected in 101..=800 {
            let event = follower.next().await;
            assert_eq!((event.sequence, event.message), (expected, (expected - 1).to_string()));
        }
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_follower_that_is_far_behind_is_told_so_and_goes_on() {
        let (_dir, log) = log();
        record(&log, "first");
        let mut follower = log.follow(0);
        assert_eq!(follower.next().await.message, "first");
        for _ in 0..KEPT + 10 {
            record(&log, "many");
        }
        let gap = follower.next().await;
        assert_eq!((gap.kind, gap.message.as_str()), (EventKind::Missed, "10 events were missed"));
        assert_eq!(follower.next().await.sequence, gap.sequence + 1);
        // Nothing is missed by whoever wants what there is.
        assert_ne!(log.follow(0).next().await.kind, EventKind::Missed);
        assert_eq!(log.follow(5).next().await.kind, EventKind::Missed);
    }
}
