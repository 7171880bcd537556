//! One channel: what is sent on it, what comes back, how it ends.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nix::sys::signal::Signal;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig, client::Msg};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{
    GuestError,
    connection::Connection,
    ssh::{PACKET, signal_name},
};

/// Extended data that is stderr (RFC 4254, section 5.2).
const STDERR: u32 = 1;

/// An open channel; its drop closes it, upon which the agent ends what it does for it.
pub(crate) struct Open<'a> {
    reader: ChannelReadHalf,
    pub(crate) writer: Arc<ChannelWriteHalf<Msg>>,
    connection: &'a Connection,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let writer = Arc::clone(&self.writer);
        // Without a runtime there is no connection either.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { writer.close().await });
        }
    }
}

/// How the work on a channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With this status.
    Exited(u32),
    /// By this signal, by number; 0 if it is unknown here.
    Signalled(u32),
}

/// Who takes what the guest sends. While it waits, all of the connection does.
pub(crate) trait Sink: Send {
    /// Takes a piece of standard output.
    fn stdout(&mut self, data: Bytes) -> impl Future<Output = Result<(), GuestError>> + Send;
    /// Takes a piece of standard error.
    fn stderr(&mut self, data: &[u8]);
}

/// Keeps as much as a limit allows.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) bytes: Vec<u8>,
    pub(crate) more: bool,
}

impl Kept {
    pub(crate) fn add(&mut self, data: &[u8], limit: usize) {
        let room = limit.saturating_sub(self.bytes.len()).min(data.len());
        self.bytes.extend_from_slice(&data[..room]);
        self.more |= room < data.len();
    }
}

impl<'a> Open<'a> {
    pub(crate) async fn new(connection: &'a Connection) -> Result<Self, GuestError> {
        let (reader, writer) = connection.channel().await?.split();
        Ok(Self { reader, writer: Arc::new(writer), connection })
    }

    /// Of asking for something on the channel.
    pub(crate) fn begun(&self, result: Result<(), russh::Error>) -> Result<(), GuestError> {
        result.map_err(|source| {
            if self.connection.is_lost() { self.connection.lost() } else { GuestError::Begin { source } }
        })
    }

    /// Sends `input` and its end, and hands over what comes, until the channel is closed. `what` is what was asked for.
    pub(crate) async fn converse(
        &mut self,
        what: &'static str,
        input: impl AsyncRead + Send,
        sink: &mut impl Sink,
    ) -> Result<Ending, GuestError> {
        let send = send(&self.writer, input);
        tokio::pin!(send);
        let mut sending = true;
        let mut ending = None;
        loop {
            // Cancel-safe: `send` is pinned outside, and the queue keeps what was not taken.
            let message = tokio::select! {
                sent = &mut send, if sending => {
                    sending = false;
                    sent?;
                    continue;
                }
                message = self.reader.wait() => message,
            };
            match message {
                Some(ChannelMsg::Data { data }) => sink.stdout(data).await?,
                Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => sink.stderr(&data),
                Some(ChannelMsg::Failure) => return Err(GuestError::Refused { what }),
                Some(ChannelMsg::ExitStatus { exit_status }) => ending = Some(Ending::Exited(exit_status)),
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    ending = Some(Ending::Signalled(number_of(&signal_name)));
                }
                Some(ChannelMsg::Close) | None => return ending.ok_or_else(|| self.connection.lost()),
                Some(_) => {}
            }
        }
    }
}

/// Sends all and the end of it. A guest that takes no more says why by itself.
async fn send(writer: &ChannelWriteHalf<Msg>, input: impl AsyncRead) -> Result<(), GuestError> {
    tokio::pin!(input);
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PACKET);
        let length = input.read_buf(&mut buffer).await.map_err(|source| GuestError::Source { source })?;
        if length == 0 {
            let _ = writer.eof().await;
            return Ok(());
        }
        if writer.data_bytes(buffer.split().freeze()).await.is_err() {
            return Ok(());
        }
    }
}

/// A signal's number by its name on the wire (RFC 4254, section 6.10). The agent calls real-time ones `RT34@vmd`.
fn number_of(signal: &Sig) -> u32 {
    let name = signal_name(signal).split('@').next().unwrap_or_default();
    match name.strip_prefix("RT").and_then(|number| number.parse().ok()) {
        Some(number) => number,
        None => format!("SIG{name}").parse::<Signal>().map_or(0, |signal| (signal as i32).cast_unsigned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_their_numbers() {
        assert_eq!((number_of(&Sig::KILL), number_of(&Sig::USR1)), (9, 10));
        assert_eq!(number_of(&Sig::Custom("XCPU".into())), 24);
        assert_eq!(
            (number_of(&Sig::Custom("RT34@vmd".into())), number_of(&Sig::Custom("X@y".into()))),
            (34, 0)
        );
    }

    #[test]
    fn a_limit_keeps_the_beginning_and_tells_of_more() {
        let mut kept = Kept::default();
        kept.add(b"abc", 4);
        assert!(!kept.more);
        kept.add(b"d", 4);
        assert!(!kept.more);
        kept.add(b"ef", 4);
        assert_eq!((kept.bytes.as_slice(), kept.more), (b"abcd".as_slice(), true));
    }
}
