//! What an operation has to say beside its progress, such as the output of commands in a guest: a text that goes on until its
//! end, of which the last is kept for those who come late.

use tokio::sync::watch;

/// Bytes that are kept. Up to twice as many are, so that not each piece moves them all.
const KEPT: usize = 1 << 20;

/// The text, as far as it is kept.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Bytes that are no longer kept.
    gone: u64,
    bytes: Vec<u8>,
    ended: bool,
}

impl Said {
    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > 2 * KEPT {
            let surplus = self.bytes.len() - KEPT;
            self.bytes.drain(..surplus);
            self.gone += surplus as u64;
        }
    }

    pub(super) fn end(&mut self) {
        self.ended = true;
    }
}

/// A piece of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Bytes before it that are no longer kept.
    pub lost: u64,
    /// The piece.
    pub bytes: Vec<u8>,
}

/// Reads the text, from as far back as it is kept.
#[derive(Debug)]
pub struct Listener {
    receiver: watch::Receiver<Said>,
    at: u64,
}

impl Listener {
    pub(super) fn new(receiver: watch::Receiver<Said>) -> Self {
        Self { receiver, at: 0 }
    }

    /// The next piece; `None` when there will be no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Piece> {
        loop {
            {
                let said = self.receiver.borrow_and_update();
                let lost = said.gone.saturating_sub(self.at);
                let from = usize::try_from((self.at + lost).saturating_sub(said.gone)).unwrap_or(usize::MAX);
                let bytes = said.bytes.get(from..).unwrap_or_default().to_vec();
                self.at += lost + bytes.len() as u64;
                if lost > 0 || !bytes.is_empty() {
                    return Some(Piece { lost, bytes });
                }
                if said.ended {
                    return None;
                }
            }
            self.receiver.changed().await.ok()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_is_heard_and_what_is_lost_is_counted() {
        let said = watch::Sender::new(Said::default());
        let mut listener = Listener::new(said.subscribe());
        said.send_modify(|said| said.say(b"one "));
        said.send_modify(|said| said.say(b"two"));
        assert_eq!(listener.next().await, Some(Piece { lost: 0, bytes: b"one two".to_vec() }));
        said.send_modify(|said| said.say(&vec![b'x'; 3 * KEPT]));
        said.send_modify(Said::end);
        assert_eq!(listener.next().await, Some(Piece { lost: 2 * KEPT as u64, bytes: vec![b'x'; KEPT] }));
        assert_eq!(listener.next().await, None);
        let mut late = Listener::new(said.subscribe());
        let piece = late.next().await.unwrap();
        assert_eq!((piece.lost, piece.bytes.len()), (2 * KEPT as u64 + 7, KEPT));
        assert_eq!(late.next().await, None);
    }
}
