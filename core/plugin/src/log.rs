//! The recent messages of a plugin, with those that come. Clones share them, so that they outlive a plugin that is replaced.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::broadcast;

use crate::{call::LogLine, hook::Hook};

/// Messages that are kept.
const MOST: usize = 500;

/// Messages that a slow reader may be behind.
const BEHIND: usize = 256;

/// A message with where and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// When the call had ended, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The hook.
    pub hook: Hook,
    /// The message.
    pub line: LogLine,
}

/// One plugin's messages.
#[derive(Debug, Clone)]
pub struct Log(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    recent: Mutex<VecDeque<Logged>>,
    news: broadcast::Sender<Logged>,
}

impl Default for Log {
    fn default() -> Self {
        Self(Arc::new(Inner { recent: Mutex::default(), news: broadcast::Sender::new(BEHIND) }))
    }
}

impl Log {
    pub(crate) fn add(&self, hook: Hook, lines: &[LogLine]) {
        if lines.is_empty() {
            return;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let mut recent = self.0.recent.lock().unwrap_or_else(PoisonError::into_inner);
        for line in lines {
            let logged = Logged { at_ms, hook, line: line.clone() };
            // Nobody listening is fine.
            let _ = self.0.news.send(logged.clone());
            recent.push_back(logged);
        }
        let excess = recent.len().saturating_sub(MOST);
        recent.drain(..excess);
    }

    /// The last messages, oldest first.
    pub fn lines(&self) -> Vec<Logged> {
        self.0.recent.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// The last messages and all that come after them, none twice.
    pub fn follow(&self) -> (Vec<Logged>, broadcast::Receiver<Logged>) {
        let recent = self.0.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (recent.iter().cloned().collect(), self.0.news.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::LogLevel;

    fn line(number: usize) -> LogLine {
        LogLine { level: LogLevel::Info, message: number.to_string() }
    }

    #[test]
    fn the_last_ones_are_kept_and_a_reader_misses_none() {
        let log = Log::default();
        log.add(Hook::Doctor, &(0..MOST + 3).map(line).collect::<Vec<_>>());
        let (before, mut news) = log.clone().follow();
        assert_eq!((before.len(), &*before[0].line.message), (MOST, "3"));
        log.add(Hook::Cleanup, &[line(7)]);
        let next = news.try_recv().unwrap();
        assert_eq!((next.hook, next.line), (Hook::Cleanup, line(7)));
        assert!(news.try_recv().is_err(), "what was there before does not come again");
    }
}
