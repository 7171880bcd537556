//! A carrier that answers yamux's pings itself, so that a full carrier never stops the session from reading.
//!
//! A `yamux::Connection` (0.14) that has read a ping reads on only when the pong is handed to its socket. With much to say
//! in both directions both ends can come to hold a pong each while neither's writes go on: each waits for the other to
//! read, for ever. Here pings never reach the connection, whose reads then depend on no write. The pong
//! waits for the next boundary between outgoing frames, and costs no buffer but its own.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A frame's header: version, type, flags (2 bytes), stream id (4), length (4); big endian.
/// <https://github.com/hashicorp/yamux/blob/master/spec.md#framing>
const HEADER: usize = 12;
const TYPE_DATA: u8 = 0;
const TYPE_PING: u8 = 2;
const FLAG_ACK: u8 = 2;

/// The carrier as the connection sees it.
#[derive(Debug)]
pub(crate) struct AnswersPings<S> {
    inner: S,
    read: Reading,
    written: Boundary,
    pong: Option<Pong>,
}

#[derive(Debug)]
enum Reading {
    /// Of a header, which is withheld until it is known not to be a ping's.
    Header { header: [u8; HEADER], filled: usize },
    /// The connection takes a header.
    Handing { header: [u8; HEADER], taken: usize },
    /// The connection reads a body of which so much is left.
    Body { left: u32 },
}

impl Reading {
    const START: Self = Self::Header { header: [0; HEADER], filled: 0 };
}

/// Where in a frame the connection's writes have come to.
#[derive(Debug, Default)]
struct Boundary {
    header: [u8; HEADER],
    filled: usize,
    left: usize,
}

/// An answer of which the first `written` bytes are out.
#[derive(Debug)]
struct Pong {
    frame: [u8; HEADER],
    written: usize,
}

fn length(header: &[u8; HEADER]) -> u32 {
    u32::from_be_bytes([header[8], header[9], header[10], header[11]])
}

impl Boundary {
    fn between_frames(&self) -> bool {
        self.filled == 0 && self.left == 0
    }

    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let count = self.left.min(bytes.len());
                self.left -= count;
                bytes = &bytes[count..];
                continue;
            }
            let count = (HEADER - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == HEADER {
                self.filled = 0;
                // Only data frames have a body; elsewhere the length is a number of its own.
                if self.header[1] == TYPE_DATA {
                    self.left = length(&self.header) as usize;
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AnswersPings<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self { inner, read: Reading::START, written: Boundary::default(), pong: None }
    }

    /// Writes the answer that waits, if one does and its turn has come.
    fn poll_pong(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(pong) = &mut self.pong
            && self.written.between_frames()
        {
            let rest = &pong.frame[pong.written..];
            match ready!(Pin::new(&mut self.inner).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => pong.written += count,
            }
            if pong.written == HEADER {
                self.pong = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for AnswersPings<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.read {
                Reading::Header { header, filled } => {
                    let mut rest = ReadBuf::new(&mut header[*filled..]);
                    ready!(Pin::new(&mut this.inner).poll_read(context, &mut rest))?;
                    let count = rest.filled().len();
                    if count == 0 {
                        let whole = *filled == 0;
                        return Poll::Ready(if whole {
                            Ok(())
                        } else {
                            Err(io::ErrorKind::UnexpectedEof.into())
                        });
                    }
                    *filled += count;
                    if *filled < HEADER {
                        continue;
                    }
                    if header[1] != TYPE_PING || header[3] & FLAG_ACK != 0 {
                        this.read = Reading::Handing { header: *header, taken: 0 };
                        continue;
                    }
                    // A peer has one ping under way at a time; further ones of a peer that does not wait are dropped.
                    if this.pong.is_none() {
                        let mut frame = [0; HEADER];
                        frame[1] = TYPE_PING;
                        frame[3] = FLAG_ACK;
                        frame[8..].copy_from_slice(&header[8..]);
                        this.pong = Some(Pong { frame, written: 0 });
                    }
                    this.read = Reading::START;
                    // Where it cannot leave now, this task is woken when it can, and flushes. So it also meets an error.
                    let _ = this.poll_pong(context);
                }
                Reading::Handing { header, taken } => {
                    let count = buffer.remaining().min(HEADER - *taken);
                    buffer.put_slice(&header[*taken..*taken + count]);
                    *taken += count;
                    if *taken == HEADER {
                        let left = if header[1] == TYPE_DATA { length(header) } else { 0 };
                        this.read = if left > 0 { Reading::Body { left } } else { Reading::START };
                    }
                    return Poll::Ready(Ok(()));
                }
                Reading::Body { left } => {
                    let limit = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.remaining());
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(limit));
                    ready!(Pin::new(&mut this.inner).poll_read(context, &mut part))?;
                    let count = part.filled().len();
                    buffer.advance(count);
                    *left -= u32::try_from(count).unwrap_or(*left);
                    if *left == 0 {
                        this.read = Reading::START;
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for AnswersPings<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_pong(context))?;
        let count = ready!(Pin::new(&mut this.inner).poll_write(context, bytes))?;
        this.written.pass(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_pong(context))?;
        Pin::new(&mut this.inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_pong(context))?;
        Pin::new(&mut this.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u8, length: u32, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, kind, 0, flags, 0, 0, 0, stream];
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(body);
        frame
    }

    #[tokio::test]
    async fn pings_are_answered_between_frames_and_all_else_passes() {
        let (near, mut far) = tokio::io::duplex(4096);
        let mut near = AnswersPings::new(near);
        // A body that looks like a ping, a window update whose length is no length, a pong: none is a ping.
        let ping = frame(TYPE_PING, 1, 0, 7, b"");
        let mut rest = frame(TYPE_DATA, 0, 1, 12, &ping);
        rest.extend(frame(1, 0, 1, 1 << 20, b""));
        rest.extend(frame(TYPE_PING, FLAG_ACK, 0, 9, b""));

        // The connection is in the midst of a frame when the ping comes.
        let out = frame(TYPE_DATA, 0, 3, 5, b"hello");
        near.write_all(&out[..14]).await.unwrap();
        far.write_all(&ping).await.unwrap();
        far.write_all(&rest).await.unwrap();
        let mut got = vec![0; rest.len()];
        near.read_exact(&mut got).await.unwrap();
        assert_eq!(got, rest);
        near.write_all(&out[14..]).await.unwrap();
        near.flush().await.unwrap();
        let expected = [out, frame(TYPE_PING, FLAG_ACK, 0, 7, b"")].concat();
        let mut got = vec![0; expected.len()];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(got, expected);

        // Between frames it leaves at once.
        far.write_all(&ping[..5]).await.unwrap();
        let reading = async {
            let mut rest = [0; 1];
            near.read(&mut rest).await.unwrap()
        };
        let peer = async {
            far.write_all(&ping[5..]).await.unwrap();
            let mut pong = [0; HEADER];
            far.read_exact(&mut pong).await.unwrap();
            assert_eq!(pong.as_slice(), frame(TYPE_PING, FLAG_ACK, 0, 7, b""));
            drop(far);
        };
        assert_eq!(tokio::join!(reading, peer).0, 0, "the end passes too");
    }
}
