//! Packs and unpacks tar archives of trees that others may change meanwhile, or have made with bad intentions.
//!
//! ```text
//!  tree ── pack ── Output ──▶ pieces for the wire          archive ── unpack ──▶ tree
//! ```
//!
//! Used by the agent in the guest and by `vm cp` on the host. Everything goes by descriptors; nothing outside of the tree is read
//! or written. All of it blocks.

#[cfg(test)]
mod bench;
mod draft;
#[cfg(test)]
mod generated;
pub mod look;
mod pack;
pub mod pax;
pub mod read;
#[cfg(test)]
mod tests;
mod unpack;
mod wire;

use std::io::{self, Read, Write};

use bytes::Bytes;
use nix::errno::Errno;
use tokio::sync::mpsc;
use vm_types::guest::files::code;

pub use draft::{Draft, is_draft};
pub use pack::{Replaced, pack, pack_selected};
pub use unpack::{Unpacking, unpack};

/// Bytes read or sent at once: an SSH packet.
pub const CHUNK: usize = 32 << 10;

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// With what is to be told.
    #[error("{message}")]
    Told {
        /// One of [`code`].
        code: &'static str,
        /// For people; names the file.
        message: String,
    },
    /// Nobody is left to be told.
    #[error("the other end has gone")]
    Gone,
}

impl Failure {
    /// With what is to be told.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self::Told { code, message: message.into() }
    }

    /// Of an error with a file.
    pub fn of(path: &str, error: &io::Error) -> Self {
        if error.get_ref().is_some_and(|inner| inner.is::<Gone>()) {
            return Self::Gone;
        }
        if error.get_ref().is_some_and(|inner| inner.is::<read::Truncated>()) {
            return Self::new(code::TRUNCATED, format!("{path}: {error}"));
        }
        let code = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => code::NOT_FOUND,
            Some(Errno::EISDIR) => code::IS_DIRECTORY,
            Some(Errno::ENOTDIR | Errno::ELOOP) => code::NOT_DIRECTORY,
            Some(Errno::ENOSPC | Errno::EDQUOT) => code::NO_SPACE,
            Some(Errno::EROFS | Errno::EACCES | Errno::EPERM) => code::DENIED,
            _ => code::FAILED,
        };
        // Without the number behind the kernel's words.
        let why = match error.raw_os_error() {
            Some(number) => Errno::from_raw(number).desc().to_owned(),
            None => error.to_string(),
        };
        Self::new(code, format!("{path}: {why}"))
    }
}

/// Marks the error of reading on after the other end has gone.
#[derive(Debug, thiserror::Error)]
#[error("the other end has gone")]
pub struct Gone;

/// Where an archive goes, in pieces of a few packets at most.
#[derive(Debug)]
pub struct Output(pub mpsc::Sender<Bytes>);

impl Output {
    /// Waits until there is room for the piece.
    ///
    /// # Errors
    /// The receiver has gone.
    pub fn send(&self, data: Bytes) -> Result<(), Failure> {
        self.0.blocking_send(data).map_err(|_| Failure::Gone)
    }
}

/// Copies in pieces that are larger than `io::copy`'s on the stack.
///
/// # Errors
/// Of reading or writing.
pub fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    copy_by(&mut vec![0; CHUNK], from, to)
}

/// [`copy`] by way of a given buffer.
fn copy_by(buffer: &mut [u8], from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut all = 0;
    loop {
        match from.read(buffer) {
            Ok(0) => return Ok(all),
            Ok(length) => {
                to.write_all(&buffer[..length])?;
                all += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
