//! What [`FileRequest::Survey`](super::FileRequest::Survey) sends: one record for each entry of a tree, and paths within trees.

use serde::{Deserialize, Serialize};

/// The longest path within a tree, and the longest target of a link, in bytes: what the kernel takes at once (`PATH_MAX`, its
/// NUL not counted).
pub const PATH_LIMIT: usize = 4095;

/// What a record has before its path: kind, mode, owner, group, size, two times, inode, length of the path.
const FIXED: usize = 1 + 3 * 4 + 8 + 2 * TIME + 8 + 4;
/// Seconds and nanoseconds.
const TIME: usize = 8 + 4;
/// Of a record's length, which stands before it.
const LENGTH: usize = 4;
const SECOND: i128 = 1_000_000_000;

/// Whether a path is one of an entry within a tree: names with single slashes between them, none of them empty, `.` or `..`.
pub fn is_within(path: &[u8]) -> bool {
    path.len() <= PATH_LIMIT
        && !path.contains(&0)
        && path.split(|byte| *byte == b'/').all(|name| !matches!(name, b"" | b"." | b".."))
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeenKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, pipe or socket, or a file that something is mounted on.
    Other,
}

/// One entry of a tree, as stat(2) has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Relative to the tree's top, see [`is_within`].
    pub path: Vec<u8>,
    /// What it is.
    pub kind: SeenKind,
    /// Permission bits, 12 of them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// In bytes; of files and links only.
    pub size: u64,
    /// When its content changed, in nanoseconds since 1970.
    pub mtime: i128,
    /// When anything about it changed, in nanoseconds since 1970.
    pub ctime: i128,
    /// Its number in its filesystem.
    pub inode: u64,
    /// Where a link leads.
    pub target: Option<Vec<u8>>,
}

/// A record that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SeenError {
    /// Its length is none that a record can have.
    #[error("a record of {length} bytes")]
    Length {
        /// In bytes.
        length: u32,
    },
    /// Its kind is unknown, or has a target where it can have none.
    #[error("a record of a kind that does not exist")]
    Kind,
    /// Its path leads out of the tree, or is none.
    #[error("a record with a path that is none within a tree")]
    Path,
    /// Its path does not come behind the one before.
    #[error("records that are not sorted by their paths")]
    Order,
    /// The last one is not whole.
    #[error("the end comes within a record")]
    Truncated,
}

impl Seen {
    /// Appends its record: numbers are little-endian, the target is what stands behind the path. What has a longer path or
    /// target than [`PATH_LIMIT`] has no record that can be read.
    pub fn encode(&self, to: &mut Vec<u8>) {
        let target = self.target.as_deref().unwrap_or_default();
        let number = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        to.extend_from_slice(&number(FIXED + self.path.len() + target.len()));
        to.push(match self.kind {
            SeenKind::File => b'f',
            SeenKind::Directory => b'd',
            SeenKind::Symlink => b'l',
            SeenKind::Other => b'o',
        });
        for part in [self.mode, self.uid, self.gid] {
            to.extend_from_slice(&part.to_le_bytes());
        }
        to.extend_from_slice(&self.size.to_le_bytes());
        for time in [self.mtime, self.ctime] {
            let seconds = i64::try_from(time.div_euclid(SECOND)).unwrap_or(i64::MAX);
            to.extend_from_slice(&seconds.to_le_bytes());
            // Less than a second, so it fits.
            to.extend_from_slice(&(time.rem_euclid(SECOND) as u32).to_le_bytes());
        }
        to.extend_from_slice(&self.inode.to_le_bytes());
        to.extend_from_slice(&number(self.path.len()));
        to.extend_from_slice(&self.path);
        to.extend_from_slice(target);
    }

    /// Of a record without its length.
    fn decode(record: &[u8]) -> Result<Self, SeenError> {
        let mut rest = record;
        let kind = match take::<1>(&mut rest)? {
            [b'f'] => SeenKind::File,
            [b'd'] => SeenKind::Directory,
            [b'l'] => SeenKind::Symlink,
            [b'o'] => SeenKind::Other,
            _ => return Err(SeenError::Kind),
        };
        let [mode, uid, gid] = [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?].map(u32::from_le_bytes);
        let size = u64::from_le_bytes(take(&mut rest)?);
        let mut time = || -> Result<i128, SeenError> {
            let seconds = i64::from_le_bytes(take(&mut rest)?);
            Ok(i128::from(seconds) * SECOND + i128::from(u32::from_le_bytes(take(&mut rest)?)))
        };
        let (mtime, ctime) = (time()?, time()?);
        let inode = u64::from_le_bytes(take(&mut rest)?);
        let length = u32::from_le_bytes(take(&mut rest)?);
        let (path, target) = usize::try_from(length)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(SeenError::Path)?;
        if !is_within(path) {
            return Err(SeenError::Path);
        }
        let target = match (kind, target) {
            (SeenKind::Symlink, target) => Some(target.to_vec()),
            (_, []) => None,
            _ => return Err(SeenError::Kind),
        };
        Ok(Self {
            path: path.to_vec(),
            kind,
            mode: mode & 0o7777,
            uid,
            gid,
            size,
            mtime,
            ctime,
            inode,
            target,
        })
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> Result<[u8; N], SeenError> {
    let (part, rest) = from.split_first_chunk().ok_or(SeenError::Truncated)?;
    *from = rest;
    Ok(*part)
}

/// Reads records as they come, in pieces of any size, from somebody who need not mean well: each path is within the tree and
/// comes behind the one before it. Keeps no more than one record.
#[derive(Debug, Default)]
pub struct SeenDecoder {
    /// The beginning of a record.
    begun: Vec<u8>,
    last: Option<Vec<u8>>,
}

impl SeenDecoder {
    /// Takes a piece, and hands over the entries whose records it ends.
    ///
    /// # Errors
    /// What is no record; nothing more is to be decoded then.
    pub fn push(&mut self, mut piece: &[u8], mut each: impl FnMut(Seen)) -> Result<(), SeenError> {
        while !piece.is_empty() {
            let wanted = match self.begun.first_chunk::<LENGTH>() {
                None => LENGTH,
                Some(length) => {
                    let length = u32::from_le_bytes(*length);
                    let record = usize::try_from(length).unwrap_or(usize::MAX);
                    if !(FIXED..=FIXED + 2 * PATH_LIMIT).contains(&record) {
                        return Err(SeenError::Length { length });
                    }
                    LENGTH + record
                }
            };
            let part = piece.len().min(wanted - self.begun.len());
            self.begun.extend_from_slice(&piece[..part]);
            piece = &piece[part..];
            if wanted > LENGTH && self.begun.len() == wanted {
                let seen = Seen::decode(&self.begun[LENGTH..])?;
                self.begun.clear();
                match &mut self.last {
                    Some(last) if *last >= seen.path => return Err(SeenError::Order),
                    Some(last) => last.clone_from(&seen.path),
                    None => self.last = Some(seen.path.clone()),
                }
                each(seen);
            }
        }
        Ok(())
    }

    /// There is no more.
    ///
    /// # Errors
    /// A record is not whole.
    pub fn finish(self) -> Result<(), SeenError> {
        if self.begun.is_empty() { Ok(()) } else { Err(SeenError::Truncated) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(path: &[u8]) -> Seen {
        Seen {
            path: path.to_vec(),
            kind: SeenKind::File,
            mode: 0o4755,
            uid: 1,
            gid: u32::MAX,
            size: u64::MAX,
            mtime: -1,
            ctime: 1_700_000_000_123_456_789,
            inode: 7,
            target: None,
        }
    }

    fn some() -> Vec<Seen> {
        let link = Seen { kind: SeenKind::Symlink, target: Some(b"../\xff".to_vec()), ..seen(b"a/\xfe\n") };
        let empty = Seen { kind: SeenKind::Symlink, target: Some(Vec::new()), ..seen(b"a/0") };
        vec![seen(b"a"), empty, link, Seen { kind: SeenKind::Directory, ..seen(&[b'n'; PATH_LIMIT]) }]
    }

    fn encoded(all: &[Seen]) -> Vec<u8> {
        let mut bytes = Vec::new();
        all.iter().for_each(|seen| seen.encode(&mut bytes));
        bytes
    }

    fn decoded(pieces: &[&[u8]]) -> Result<Vec<Seen>, SeenError> {
        let mut all = Vec::new();
        let mut decoder = SeenDecoder::default();
        for piece in pieces {
            decoder.push(piece, |seen| all.push(seen))?;
        }
        decoder.finish().map(|()| all)
    }

    #[test]
    fn entries_come_through_in_pieces_of_any_size() {
        let bytes = encoded(&some());
        for size in [1, 2, 3, 5, 70, bytes.len()] {
            assert!(decoded(&bytes.chunks(size).collect::<Vec<_>>()) == Ok(some()), "{size}");
        }
        assert_eq!(decoded(&[]), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let bytes = encoded(&some());
        for cut in 1..encoded(&some()[..1]).len() {
            assert_eq!(decoded(&[&bytes[..cut]]), Err(SeenError::Truncated), "{cut}");
        }
        assert_eq!(decoded(&[&[0xff; 4], b"x"]), Err(SeenError::Length { length: u32::MAX }));
        assert_eq!(decoded(&[&[1, 0, 0, 0], b"x"]), Err(SeenError::Length { length: 1 }));
        let mut strange = encoded(&some()[..1]);
        strange[LENGTH] = b'x';
        assert_eq!(decoded(&[&strange]), Err(SeenError::Kind));
        let targeted = Seen { target: Some(b"x".to_vec()), ..seen(b"a") };
        assert_eq!(decoded(&[&encoded(&[targeted])]), Err(SeenError::Kind));
        let mut outside = encoded(&some()[..1]);
        outside[LENGTH + FIXED - 4] = 2;
        assert_eq!(decoded(&[&outside]), Err(SeenError::Path));
    }

    #[test]
    fn paths_stay_within_and_in_their_order() {
        for path in [&b"/a"[..], b"", b"a/", b"a//b", b".", b"..", b"a/../b", b"a/.", b"a\0b", &[b'a'; 4096]]
        {
            assert!(!is_within(path));
            assert_eq!(decoded(&[&encoded(&[seen(path)])]), Err(SeenError::Path), "{path:?}");
        }
        for path in [&b"a"[..], b"...", b"..a", b"-", b"a/.b", b"\xff", b"a\nb"] {
            assert!(is_within(path), "{path:?}");
        }
        assert_eq!(decoded(&[&encoded(&[seen(b"b"), seen(b"a")])]), Err(SeenError::Order));
        assert_eq!(decoded(&[&encoded(&[seen(b"b"), seen(b"b")])]), Err(SeenError::Order));
    }
}
