//! Content digests: what blobs are named and verified by.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};

use crate::{
    OciError, ProgressSink,
    progress::Reporter,
    store::{Cancel, blocking},
};

/// How much is hashed at once.
const PIECE: usize = 256 << 10;

/// A SHA-256 digest, `sha256:` and 64 lower-case hexadecimal digits as text.
///
/// The image specification registers SHA-512 too; no registry in use serves images by it, and it is refused by name.
/// <https://github.com/opencontainers/image-spec/blob/v1.1.0/descriptor.md#digests>
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// A text that is no [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no digest: {rule}")]
pub struct DigestError {
    text: String,
    rule: &'static str,
}

impl DigestError {
    /// The rule that is broken, in words.
    pub fn rule(&self) -> &'static str {
        self.rule
    }
}

const RULE: &str = "it is written sha256: and 64 digits 0-9 and a-f";

impl Digest {
    /// The digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of a file, read on a thread of its own, which dropping the future ends.
    ///
    /// # Errors
    /// [`OciError::Read`].
    pub async fn of_file(path: &Path, progress: &ProgressSink) -> Result<Self, OciError> {
        let (path, progress) = (path.to_owned(), progress.clone());
        let cancel = Cancel::default();
        let cancelled = cancel.told();
        let digest = blocking(move || {
            let failed = |source| OciError::Read { path: path.clone(), source };
            let mut file = File::open(&path).map_err(failed)?;
            let size = file.metadata().map_err(failed)?.len();
            // Only what is known at the end is its digest.
            let reporter = Reporter::new(&progress, Self([0; 32]), size);
            reporter.expect(size);
            let (mut hasher, mut piece, mut done) = (Sha256::new(), vec![0; PIECE], 0);
            loop {
                match file.read(&mut piece).map_err(failed)? {
                    0 => return Ok(Self::finished(hasher)),
                    n => {
                        hasher.update(&piece[..n]);
                        done += n as u64;
                        reporter.at(done);
                    }
                }
                if cancelled.is() {
                    return Err(failed(io::ErrorKind::Interrupted.into()));
                }
            }
        })
        .await;
        drop(cancel);
        digest
    }

    /// The digits alone, the name of the blob's file.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// From the digits alone.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let bytes = hex.as_bytes();
        if bytes.len() != 64 {
            return None;
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
            *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
        }
        Some(Self(digest))
    }

    pub(crate) fn finished(hasher: Sha256) -> Self {
        Self(hasher.finalize().into())
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let failed = |rule| {
            let mut text = text.to_owned();
            text.truncate(text.char_indices().nth(100).map_or(text.len(), |(end, _)| end));
            Err(DigestError { text, rule })
        };
        match text.split_once(':') {
            Some(("sha256", hex)) => Self::from_hex(hex).map_or_else(|| failed(RULE), Ok),
            Some(("sha384" | "sha512" | "blake3", _)) => failed("only sha256 is in use"),
            _ => failed(RULE),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_and_prints_in_one_form_only() {
        let text = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let digest: Digest = text.parse().unwrap();
        assert_eq!((digest, digest.to_string()), (Digest::of(b"hello"), text.to_owned()));
        assert_eq!(digest.hex(), text[7..]);
        for bad in
            ["", "sha256:", "2cf2", &text.to_uppercase(), &text[..70], &format!("{text}0"), "sha256:../../x"]
        {
            assert!(bad.parse::<Digest>().unwrap_err().to_string().contains("64 digits"), "{bad}");
        }
        assert!("sha512:00".parse::<Digest>().unwrap_err().rule().contains("only sha256"));
    }
}
