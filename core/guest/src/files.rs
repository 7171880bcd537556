//! Files of a guest.

use std::io::Cursor;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use vm_types::guest::{
    FILES_SUBSYSTEM,
    files::{FileError, FileRequest, PackOptions, PackReport},
};

use crate::{
    Guest, GuestError, ROOT,
    channel::{Ending, Kept, Open, Sink},
};

/// The longest reason that is listened to, in bytes.
const REASON_LIMIT: usize = 64 << 10;
/// How much of a compressed archive is read at once, in bytes.
const BUFFER: usize = 64 << 10;

/// The beginning of a file, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// As much as the limit allows.
    pub bytes: Vec<u8>,
    /// Whether the file has more.
    pub more: bool,
}

/// What a guest has packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Of the archive.
    pub bytes: u64,
    /// What is in it, and what is not.
    pub report: PackReport,
}

/// Standard output goes to a writer, and the reason of a failure, or the report of a success, is kept.
struct Answer<'a, W> {
    to: &'a mut W,
    written: u64,
    reason: Kept,
}

impl<W: AsyncWrite + Unpin + Send> Sink for Answer<'_, W> {
    async fn stdout(&mut self, data: Bytes) -> Result<(), GuestError> {
        self.written += data.len() as u64;
        self.to.write_all(&data).await.map_err(|source| GuestError::Sink { source })
    }

    fn stderr(&mut self, data: &[u8]) {
        self.reason.add(data, REASON_LIMIT);
    }
}

impl Guest {
    /// Writes a file, whole or not at all, however this ends. Directories above it are made; a link of that name is replaced,
    /// not followed.
    ///
    /// # Errors
    /// What the guest says, an unreadable source, a guest that is lost.
    pub async fn write_file(
        &self,
        path: &str,
        content: impl AsyncRead + Send,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<(), GuestError> {
        let request = FileRequest::Write { path: path.to_owned(), mode, uid, gid };
        self.files(&request, content, &mut tokio::io::sink()).await.map(drop)
    }

    /// Reads at most `limit` bytes of a regular file.
    ///
    /// # Errors
    /// What the guest says, a guest that is lost.
    pub async fn read_file(&self, path: &str, limit: usize) -> Result<Content, GuestError> {
        // One more, which tells whether there is one more.
        let ask = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
        let request = FileRequest::Read { path: path.to_owned(), limit: Some(ask) };
        let mut bytes = Cursor::new(Vec::new());
        self.files(&request, tokio::io::empty(), &mut bytes).await?;
        let mut bytes = bytes.into_inner();
        let more = bytes.len() > limit;
        bytes.truncate(limit);
        Ok(Content { bytes, more })
    }

    /// Writes all of a regular file to `to`, and returns how many bytes. While `to` takes nothing, all that is done as root in
    /// this guest waits.
    ///
    /// # Errors
    /// What the guest says, a sink that fails, a guest that is lost; then `to` may have got a part.
    pub async fn read_to(&self, path: &str, to: impl AsyncWrite + Send) -> Result<u64, GuestError> {
        tokio::pin!(to);
        let request = FileRequest::Read { path: path.to_owned(), limit: None };
        let written = self.files(&request, tokio::io::empty(), &mut to).await?.0;
        to.flush().await.map_err(|source| GuestError::Sink { source })?;
        Ok(written)
    }

    /// Writes a file, or a directory with all below it, to `to` as a plain tar archive, see [`FileRequest::Pack`]. While `to`
    /// takes nothing, all that is done as root in this guest waits.
    ///
    /// # Errors
    /// What the guest says, a sink that fails, a guest that is lost; then `to` may have got a part, without an end mark.
    pub async fn pack(
        &self,
        path: &str,
        options: PackOptions,
        to: impl AsyncWrite + Send,
    ) -> Result<Packed, GuestError> {
        tokio::pin!(to);
        let request = FileRequest::Pack { path: path.to_owned(), options };
        let (bytes, report) = self.files(&request, tokio::io::empty(), &mut to).await?;
        to.flush().await.map_err(|source| GuestError::Sink { source })?;
        match serde_json::from_slice(&report) {
            Ok(report) => Ok(Packed { bytes, report }),
            Err(_) => Err(GuestError::Answer { answer: String::from_utf8_lossy(&report).into_owned() }),
        }
    }

    /// Unpacks a tar archive, plain, with gzip or with zstd, below a directory of the guest, which is made. All that is made
    /// belongs to `uid` and `gid`. Nothing is written outside of the directory.
    ///
    /// # Errors
    /// What the guest says, an archive that cannot be read or decompressed, a guest that is lost; then a part may be there, but
    /// no half file.
    pub async fn unpack(
        &self,
        archive: impl AsyncRead + Send,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), GuestError> {
        let request = FileRequest::Unpack { directory: directory.to_owned(), uid, gid };
        tokio::pin!(archive);
        let mut magic = Vec::with_capacity(4);
        (&mut archive)
            .take(4)
            .read_to_end(&mut magic)
            .await
            .map_err(|source| GuestError::Source { source })?;
        let archive = BufReader::with_capacity(BUFFER, Cursor::new(magic.clone()).chain(archive));
        let sink = &mut tokio::io::sink();
        // Decompressed here: the host's processor is the faster one, and the agent the smaller.
        match magic.as_slice() {
            // RFC 1952, section 2.3.1; members follow each other.
            [0x1f, 0x8b, ..] => {
                let mut decoder = GzipDecoder::new(archive);
                decoder.multiple_members(true);
                self.files(&request, decoder, sink).await
            }
            // RFC 8878, section 3.1.1; frames too.
            [0x28, 0xb5, 0x2f, 0xfd] => {
                let mut decoder = ZstdDecoder::new(archive);
                decoder.multiple_members(true);
                self.files(&request, decoder, sink).await
            }
            _ => self.files(&request, archive, sink).await,
        }
        .map(drop)
    }

    /// One operation of the file service; returns how many bytes came, and what was said beside them.
    async fn files<W: AsyncWrite + Unpin + Send>(
        &self,
        request: &FileRequest,
        content: impl AsyncRead + Send,
        to: &mut W,
    ) -> Result<(u64, Vec<u8>), GuestError> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| GuestError::Source { source: error.into() })?;
        line.push(b'\n');
        let connection = self.connection(ROOT).await?;
        let mut channel = Open::new(&connection).await?;
        channel.begun(channel.writer.request_subsystem(true, FILES_SUBSYSTEM).await)?;
        let mut answer = Answer { to, written: 0, reason: Kept::default() };
        let input = Cursor::new(line).chain(content);
        match channel.converse("to handle files", input, &mut answer).await? {
            Ending::Exited(0) => Ok((answer.written, answer.reason.bytes)),
            _ => Err(match serde_json::from_slice::<FileError>(&answer.reason.bytes) {
                Ok(FileError { code, message }) => GuestError::File { code, message },
                Err(_) => {
                    GuestError::Answer { answer: String::from_utf8_lossy(&answer.reason.bytes).into_owned() }
                }
            }),
        }
    }
}
