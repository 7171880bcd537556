//! The file service (see [`vm_types::guest::files`]), which needs no program of the image.
//!
//! ```text
//!  channel ── inbound queue ── Input ──┐ a few pieces each way,
//!                                      ├─ worker thread: files, tar
//!  channel ◀─ client's window ─ Output ┘ so each side waits for the other
//! ```
//!
//! Files block, so a worker thread does the work. It sees a client that has gone as an error of reading, which is how
//! nothing half written stays.

#[cfg(test)]
mod copy_tests;
mod operations;
#[cfg(test)]
mod pack_tests;
#[cfg(test)]
mod tests;
mod tree;
#[cfg(test)]
mod tree_tests;

use std::{
    cell::Cell,
    io::{self, ErrorKind, Read},
};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use vm_archive::{Failure, Gone, Output};
use vm_types::guest::files::{FileError, FileRequest, REQUEST_LIMIT, code};

use super::process::{Wire, finish, hang_up};

/// Pieces, of an SSH packet at most, between the channel and the worker, each way: so many that neither has to wait for each of
/// the other's.
const PIECES: usize = 16;

/// From the client to the worker.
enum Piece {
    Data(Bytes),
    /// There is no more. Without this, the client has gone.
    End,
}

/// What the client sends, for the worker.
struct Input {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: Cell<bool>,
}

impl Input {
    /// Makes the next piece the current one; false at the end.
    fn advance(&mut self) -> io::Result<bool> {
        while self.current.is_empty() {
            if self.ended.get() {
                return Ok(false);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended.set(true),
                None => return Err(io::Error::new(ErrorKind::UnexpectedEof, Gone)),
            }
        }
        Ok(true)
    }

    /// The line with which every operation begins.
    fn request(&mut self) -> Result<FileRequest, Failure> {
        let mut line = Vec::new();
        loop {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return Err(Failure::new(code::REQUEST, "there is no request line")),
                Err(_) => return Err(Failure::Gone),
            }
            let end = self.current.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(self.current.len(), |end| end + 1);
            line.extend_from_slice(&self.current.split_to(length));
            if line.len() > REQUEST_LIMIT {
                return Err(Failure::new(code::REQUEST, "the request line is too long"));
            }
            if end.is_some() {
                return serde_json::from_slice(&line)
                    .map_err(|error| Failure::new(code::REQUEST, format!("not a request: {error}")));
            }
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || !self.advance()? {
            return Ok(0);
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

fn error(code: &str, message: String) -> Vec<u8> {
    serde_json::to_vec(&FileError { code: code.to_owned(), message }).unwrap_or_default()
}

/// Serves one channel to its end.
pub(super) async fn run(mut wire: Wire) {
    let (to_worker, pieces) = mpsc::channel(PIECES);
    let (output, mut from_worker) = mpsc::channel(PIECES);
    let input = Input { pieces, current: Bytes::new(), ended: Cell::new(false) };
    let mut worker = tokio::task::spawn_blocking(move || operations::serve(input, &Output(output)));
    let outcome = {
        let pump_in = async {
            while let Some(data) = wire.input.next().await {
                if to_worker.send(Piece::Data(data)).await.is_err() {
                    break;
                }
            }
            if wire.input.is_whole() {
                let _ = to_worker.send(Piece::End).await;
            }
            // The worker's last words come later; this channel must not end before.
            std::future::pending::<()>().await;
        };
        let pump_out = async {
            while let Some(data) = from_worker.recv().await {
                if wire.output.data_bytes(data).await.is_err() {
                    break;
                }
            }
            (&mut worker).await
        };
        // Cancel-safe: where one branch ends, the others are of no more use.
        tokio::select! {
            () = pump_in => None,
            outcome = pump_out => Some(outcome),
            () = hang_up(&mut wire.events) => None,
        }
    };
    // From here on a worker that has not ended learns that the client has gone.
    drop((to_worker, from_worker));
    let (mut line, status) = match outcome {
        Some(Ok(Ok(None))) => return finish(&wire, Some(0), None).await,
        Some(Ok(Ok(Some(answer)))) => (answer, 0),
        Some(Ok(Err(Failure::Told { code, message }))) => (error(code, message), 1),
        Some(Ok(Err(Failure::Gone))) | None => return,
        Some(Err(panic)) => (error(code::FAILED, panic.to_string()), 1),
    };
    line.push(b'\n');
    // Cancel-safe: a client that has gone needs no message.
    tokio::select! {
        _ = wire.output.extended_data_bytes(1, Bytes::from(line)) => {}
        () = hang_up(&mut wire.events) => return,
    }
    finish(&wire, Some(status), None).await;
}
