//! A guest's last words: how it ended, as its kernel says on the console.

use tokio::sync::watch;
use vm_types::shim::{GuestEnd, LastWords};

/// The longest part of a line that is looked at, in bytes.
const LINE: usize = 512;
/// How many lines may follow on the last words: drivers report that they go down, too. More than that, and they were none, but
/// something that only showed them.
const AFTERWARDS: u8 = 64;

/// Listens to the console.
pub(crate) struct Listener {
    words: LastWords,
    line: Vec<u8>,
    left: u8,
    said: watch::Sender<Option<GuestEnd>>,
}

impl Listener {
    pub(crate) fn new(words: LastWords) -> (Self, watch::Receiver<Option<GuestEnd>>) {
        let (said, heard) = watch::channel(None);
        (Self { words, line: Vec::new(), left: 0, said }, heard)
    }

    /// Takes the next part of the console's output.
    pub(crate) fn hear(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            // Of a long line the end counts: a program may have left the cursor behind words of its own.
            self.line.extend_from_slice(&part[part.len().saturating_sub(LINE)..]);
            self.line.drain(..self.line.len().saturating_sub(LINE));
            if part.ends_with(b"\n") || part.ends_with(b"\r") {
                self.judge();
                self.line.clear();
            }
        }
    }

    fn judge(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.trim();
        let says = |texts: &[String]| texts.iter().any(|text| line.contains(text.as_str()));
        let before = *self.said.borrow();
        let now = match before {
            _ if line.is_empty() => before,
            _ if says(&self.words.panic) => Some(GuestEnd::Panic),
            // What follows from a panic that has just been.
            Some(GuestEnd::Panic) if says(&self.words.reboot) || says(&self.words.power_off) => before,
            _ if says(&self.words.power_off) => Some(GuestEnd::PowerOff),
            // A reset may be the way in which a machine is switched off.
            None if says(&self.words.reboot) => Some(GuestEnd::Reboot),
            _ if self.left > 0 => {
                self.left -= 1;
                return;
            }
            _ => None,
        };
        if now.is_some() {
            self.left = AFTERWARDS;
        }
        if now != before {
            self.said.send_replace(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(parts: &[&str]) -> Option<GuestEnd> {
        let words = LastWords {
            power_off: vec![
                "reboot: Power off not".into(),
                "reboot: System halted".into(),
                "agent: off".into(),
            ],
            reboot: vec!["reboot: Restarting".into()],
            panic: vec!["Kernel panic".into()],
            paused: None,
        };
        let (mut listener, heard) = Listener::new(words);
        for part in parts {
            listener.hear(part.as_bytes());
        }
        *heard.borrow()
    }

    #[test]
    fn what_a_kernel_says_last_tells_how_it_ended() {
        assert_eq!(heard(&["[    2.5] reboot: System ", "halted\r\n"]), Some(GuestEnd::PowerOff));
        assert_eq!(heard(&["a\n[ 2.5] reboot: Restarting system\n", "\r\n"]), Some(GuestEnd::Reboot));
        let panic = "[1] Kernel panic - not syncing: no\n[1] CPU: 0\n[1] reboot: Restarting system\n";
        assert_eq!(heard(&[panic]), Some(GuestEnd::Panic));
        assert_eq!(heard(&["agent: off\nreboot: Restarting system\n"]), Some(GuestEnd::PowerOff));
        assert_eq!(heard(&["reboot: System halted"]), None, "the line may go on");
        assert_eq!(heard(&["login: "]), None);
    }

    #[test]
    fn words_that_much_follows_on_were_not_the_last() {
        let old = "reboot: System halted\n";
        assert_eq!(heard(&[old, &"line\n".repeat(10)]), Some(GuestEnd::PowerOff));
        assert_eq!(heard(&[old, &"line\n".repeat(100)]), None);
        assert_eq!(
            heard(&[old, &"line\n".repeat(100), "reboot: Restarting system\n"]),
            Some(GuestEnd::Reboot)
        );
        // A panic that was only shown is no panic when the machine is switched off later.
        let shown = "Kernel panic - not syncing: of last week\n";
        assert_eq!(heard(&[shown, &"line\n".repeat(100), old]), Some(GuestEnd::PowerOff));
        // However long a line is, it costs no more than a little memory.
        assert_eq!(heard(&[&".".repeat(5000), "[1] reboot: System halted\n"]), Some(GuestEnd::PowerOff));
        assert_eq!(heard(&[&"x".repeat(1 << 20), "\n", old]), Some(GuestEnd::PowerOff));
    }
}
