//! Files of a guest.

use std::io::Cursor;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use vm_types::guest::{
    FILES_SUBSYSTEM,
    files::{
        Account, FileError, FileRequest, Found, PackOptions, PackReport, Seen, SeenDecoder, UnpackOptions,
        is_within,
    },
};

use crate::{
    Guest, GuestError, ROOT,
    channel::{Ending, Kept, Open, Sink},
};

/// The longest reason that is listened to, in bytes.
const REASON_LIMIT: usize = 64 << 10;
/// The most that a survey may send, in bytes: a few million entries. They are kept in memory.
const SURVEY_LIMIT: usize = 256 << 20;
/// Hexadecimal digits of a SHA-256 digest.
const DIGEST: usize = 64;
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

/// What becomes of what the guest sends.
trait Take: Send {
    fn take(&mut self, data: Bytes) -> impl Future<Output = Result<(), GuestError>> + Send;
}

/// It is written.
struct Written<'a, W> {
    to: &'a mut W,
    bytes: u64,
}

impl<W: AsyncWrite + Unpin + Send> Take for Written<'_, W> {
    async fn take(&mut self, data: Bytes) -> Result<(), GuestError> {
        self.bytes += data.len() as u64;
        self.to.write_all(&data).await.map_err(|source| GuestError::Sink { source })
    }
}

/// It is understood, piece by piece.
struct Understood<F>(F);

impl<F: FnMut(Bytes) -> Result<(), GuestError> + Send> Take for Understood<F> {
    async fn take(&mut self, data: Bytes) -> Result<(), GuestError> {
        (self.0)(data)
    }
}

/// There is nothing.
struct Nothing;

impl Take for Nothing {
    async fn take(&mut self, _: Bytes) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Standard output is taken, and the reason of a failure, or the report of a success, is kept.
struct Answer<'a, T> {
    take: &'a mut T,
    reason: Kept,
}

impl<T: Take> Sink for Answer<'_, T> {
    async fn stdout(&mut self, data: Bytes) -> Result<(), GuestError> {
        self.take.take(data).await
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
        self.files(&request, content, &mut Nothing).await.map(drop)
    }

    /// Reads at most `limit` bytes of a regular file.
    ///
    /// # Errors
    /// What the guest says, a guest that is lost.
    pub async fn read_file(&self, path: &str, limit: usize) -> Result<Content, GuestError> {
        // One more, which tells whether there is one more.
        let ask = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
        let request = FileRequest::Read { path: path.to_owned(), limit: Some(ask) };
        let mut bytes = Vec::new();
        let mut written = Written { to: &mut bytes, bytes: 0 };
        self.files(&request, tokio::io::empty(), &mut written).await?;
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
        let mut written = Written { to: &mut to, bytes: 0 };
        self.files(&request, tokio::io::empty(), &mut written).await?;
        let bytes = written.bytes;
        to.flush().await.map_err(|source| GuestError::Sink { source })?;
        Ok(bytes)
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
        let request = FileRequest::Pack { path: path.to_owned(), options };
        self.packed(&request, tokio::io::empty(), to).await
    }

    /// Writes those entries of a directory that `paths` name, relative to it, to `to` as a plain tar archive, in this order and
    /// without what is in directories. What is not there is a warning of the report. Otherwise as [`Guest::pack`].
    ///
    /// # Errors
    /// As [`Guest::pack`], and a path that is none within a directory.
    pub async fn pack_selected(
        &self,
        directory: &str,
        paths: &[Vec<u8>],
        to: impl AsyncWrite + Send,
    ) -> Result<Packed, GuestError> {
        self.pack_selected_as(directory, paths, PackOptions::default(), to).await
    }

    /// As [`Guest::pack_selected`], in another way: sparse, with links, or generalized.
    ///
    /// # Errors
    /// As [`Guest::pack_selected`].
    pub async fn pack_selected_as(
        &self,
        directory: &str,
        paths: &[Vec<u8>],
        options: PackOptions,
        to: impl AsyncWrite + Send,
    ) -> Result<Packed, GuestError> {
        let options = PackOptions { selected: true, ..options };
        let request = FileRequest::Pack { path: directory.to_owned(), options };
        let paths = listed(paths)?;
        self.packed(&request, paths.as_slice(), to).await
    }

    async fn packed(
        &self,
        request: &FileRequest,
        content: impl AsyncRead + Send,
        to: impl AsyncWrite + Send,
    ) -> Result<Packed, GuestError> {
        tokio::pin!(to);
        let mut written = Written { to: &mut to, bytes: 0 };
        let report = self.asked(request, content, &mut written).await?;
        let bytes = written.bytes;
        to.flush().await.map_err(|source| GuestError::Sink { source })?;
        Ok(Packed { bytes, report })
    }

    /// All that is below a directory, sorted by path; nothing if there is no such directory. No link is followed below it, and
    /// what is mounted there is not gone into.
    ///
    /// # Errors
    /// What the guest says, more than a list may have, a list that is none, a guest that is lost.
    pub async fn survey(&self, path: &str) -> Result<Vec<Seen>, GuestError> {
        let request = FileRequest::Survey { path: path.to_owned() };
        let (mut found, mut decoder, mut bytes) = (Vec::new(), SeenDecoder::default(), 0);
        let mut take = Understood(|data: Bytes| {
            bytes += data.len();
            if bytes > SURVEY_LIMIT {
                return Err(GuestError::TooMany { path: path.to_owned() });
            }
            decoder.push(&data, |seen| found.push(seen)).map_err(|source| GuestError::Survey { source })
        });
        self.files(&request, tokio::io::empty(), &mut take).await?;
        decoder.finish().map_err(|source| GuestError::Survey { source })?;
        Ok(found)
    }

    /// The SHA-256 digests of files below a directory, in the order of `paths`, which are relative to it; nothing for what is no
    /// regular file, is not there or is behind a link.
    ///
    /// # Errors
    /// What the guest says, a path that is none within a directory, an answer that does not fit, a guest that is lost.
    pub async fn digests(
        &self,
        directory: &str,
        paths: &[Vec<u8>],
    ) -> Result<Vec<Option<[u8; 32]>>, GuestError> {
        let request = FileRequest::Digests { directory: directory.to_owned() };
        let asked = listed(paths)?;
        let (mut answers, mut text) = (Vec::with_capacity(paths.len()), Vec::new());
        let wrong = |text: &[u8]| GuestError::Answer { answer: text.escape_ascii().to_string() };
        let mut take = Understood(|data: Bytes| {
            for byte in data {
                if byte == 0 {
                    answers.push(digest(&text).ok_or_else(|| wrong(&text))?);
                    text.clear();
                } else {
                    text.push(byte);
                }
                if answers.len() > paths.len() || text.len() > DIGEST {
                    return Err(wrong(&text));
                }
            }
            Ok(())
        });
        self.files(&request, asked.as_slice(), &mut take).await?;
        if answers.len() == paths.len() && text.is_empty() { Ok(answers) } else { Err(wrong(&text)) }
    }

    /// Removes what `paths` name, relative to a directory, in this order; directories only if nothing is in them by then. What
    /// is not there is no error.
    ///
    /// # Errors
    /// What the guest says, a path that is none within a directory, a guest that is lost; then a part may be removed.
    pub async fn remove(&self, directory: &str, paths: &[Vec<u8>]) -> Result<(), GuestError> {
        let request = FileRequest::Remove { directory: directory.to_owned() };
        self.files(&request, listed(paths)?.as_slice(), &mut Nothing).await.map(drop)
    }

    /// What a path leads to, if to anything; with `follow` also through it where it is a symbolic link.
    ///
    /// # Errors
    /// What the guest says, a guest that is lost.
    pub async fn find(&self, path: &str, follow: bool) -> Result<Option<Found>, GuestError> {
        let request = FileRequest::Find { path: path.to_owned(), follow };
        self.asked(&request, tokio::io::empty(), &mut Nothing).await
    }

    /// Who a user of the guest is; named as at a login.
    ///
    /// # Errors
    /// No such user, a guest that is lost.
    pub async fn account(&self, user: &str) -> Result<Account, GuestError> {
        let request = FileRequest::Account { user: user.to_owned() };
        self.asked(&request, tokio::io::empty(), &mut Nothing).await
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
        tokio::pin!(archive);
        let mut magic = Vec::with_capacity(4);
        (&mut archive)
            .take(4)
            .read_to_end(&mut magic)
            .await
            .map_err(|source| GuestError::Source { source })?;
        let archive = BufReader::with_capacity(BUFFER, Cursor::new(magic.clone()).chain(archive));
        // Decompressed here: the host's processor is the faster one, and the agent the smaller.
        match magic.as_slice() {
            // RFC 1952, section 2.3.1; members follow each other.
            [0x1f, 0x8b, ..] => {
                let mut decoder = GzipDecoder::new(archive);
                decoder.multiple_members(true);
                self.unpack_tar(decoder, directory, uid, gid).await
            }
            // RFC 8878, section 3.1.1; frames too.
            [0x28, 0xb5, 0x2f, 0xfd] => {
                let mut decoder = ZstdDecoder::new(archive);
                decoder.multiple_members(true);
                self.unpack_tar(decoder, directory, uid, gid).await
            }
            _ => self.unpack_tar(archive, directory, uid, gid).await,
        }
    }

    /// As [`Guest::unpack`], of an archive that is known to be a plain one, whatever it begins with.
    ///
    /// # Errors
    /// As [`Guest::unpack`].
    pub async fn unpack_tar(
        &self,
        archive: impl AsyncRead + Send,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), GuestError> {
        self.unpack_tar_as(archive, directory, (uid, gid), UnpackOptions::default()).await
    }

    /// As [`Guest::unpack_tar`], in another way: with owners and attributes of the archive's, over what is there, or with other
    /// modes. An agent from before there were such ways unpacks without them.
    ///
    /// # Errors
    /// As [`Guest::unpack`].
    pub async fn unpack_tar_as(
        &self,
        archive: impl AsyncRead + Send,
        directory: &str,
        (uid, gid): (u32, u32),
        options: UnpackOptions,
    ) -> Result<(), GuestError> {
        let request = FileRequest::Unpack { directory: directory.to_owned(), uid, gid, options };
        self.files(&request, archive, &mut Nothing).await.map(drop)
    }

    /// One operation whose answer is JSON beside what it sends.
    async fn asked<A: DeserializeOwned>(
        &self,
        request: &FileRequest,
        content: impl AsyncRead + Send,
        take: &mut impl Take,
    ) -> Result<A, GuestError> {
        let answer = self.files(request, content, take).await?;
        let strange = || GuestError::Answer { answer: String::from_utf8_lossy(&answer).into_owned() };
        serde_json::from_slice(&answer).map_err(|_| strange())
    }

    /// One operation of the file service; returns what was said beside what it sends.
    async fn files(
        &self,
        request: &FileRequest,
        content: impl AsyncRead + Send,
        take: &mut impl Take,
    ) -> Result<Vec<u8>, GuestError> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| GuestError::Source { source: error.into() })?;
        line.push(b'\n');
        let connection = self.connection(ROOT).await?;
        let mut channel = Open::new(&connection).await?;
        channel.begun(channel.writer.request_subsystem(true, FILES_SUBSYSTEM).await)?;
        let mut answer = Answer { take, reason: Kept::default() };
        let input = Cursor::new(line).chain(content);
        match channel.converse("to handle files", input, &mut answer).await? {
            Ending::Exited(0) => Ok(answer.reason.bytes),
            _ => Err(match serde_json::from_slice::<FileError>(&answer.reason.bytes) {
                Ok(FileError { code, message }) => GuestError::File { code, message },
                Err(_) => {
                    GuestError::Answer { answer: String::from_utf8_lossy(&answer.reason.bytes).into_owned() }
                }
            }),
        }
    }
}

/// Paths as the agent takes them.
fn listed(paths: &[Vec<u8>]) -> Result<Vec<u8>, GuestError> {
    let mut listed = Vec::with_capacity(paths.iter().map(|path| path.len() + 1).sum());
    for path in paths {
        if !is_within(path) {
            return Err(GuestError::Path { path: path.escape_ascii().to_string() });
        }
        listed.extend_from_slice(path);
        listed.push(0);
    }
    Ok(listed)
}

/// One answer about a file, `None` if it is no such answer.
fn digest(text: &[u8]) -> Option<Option<[u8; 32]>> {
    if text == b"-" {
        return Some(None);
    }
    let mut digest = [0; DIGEST / 2];
    if text.len() != DIGEST || !text.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, digits) in digest.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Some(digest))
}
