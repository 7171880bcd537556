//! Paths and digests as texts: for people, and in files.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

/// A path for people: on one line, and without what would drive a terminal.
pub(crate) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    if text.chars().any(char::is_control) {
        text.chars()
            .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
            .collect()
    } else {
        text.into_owned()
    }
}

/// The path whose bytes these are.
pub(crate) fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

/// The bytes of 64 hexadecimal digits.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u32> = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<_>>()?;
    let mut bytes = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    Some(bytes)
}

/// Bytes as a text that gives them back: those of UTF-8 as they are, others and `%` as `%` and two hexadecimal digits.
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '%' { text.push_str("%25") } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            text.push('%');
            text.push_str(&hex(&[*byte]));
        }
    }
    text
}

/// What [`encode`] was given.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        if first == b'%' {
            let (digits, behind) = behind.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = behind;
        } else {
            bytes.push(first);
            rest = behind;
        }
    }
    Some(bytes)
}

/// For fields of bytes that are text nearly always.
pub(crate) mod bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::encode(bytes))
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        super::decode(&text).ok_or_else(|| D::Error::custom("a text that stands for no bytes"))
    }
}

/// The same, where there may be none.
pub(crate) mod optional_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::ref_option, reason = "serde calls it with this type")]
    pub(crate) fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => to.serialize_some(&super::encode(bytes)),
            None => to.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Option<Vec<u8>>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| {
                super::decode(&text).ok_or_else(|| D::Error::custom("a text that stands for no bytes"))
            })
            .transpose()
    }
}

/// For digests.
pub(crate) mod digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::ref_option, reason = "serde calls it with this type")]
    pub(crate) fn serialize<S: Serializer>(digest: &Option<[u8; 32]>, to: S) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => to.serialize_some(&super::hex(digest)),
            None => to.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Option<[u8; 32]>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| super::from_hex(&text).ok_or_else(|| D::Error::custom("no SHA-256")))
            .transpose()
    }
}

/// For times, whose nanoseconds are more than numbers of JSON reliably are: seconds and nanoseconds.
pub(crate) mod nanos {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    const SECOND: i128 = 1_000_000_000;

    pub(crate) fn serialize<S: Serializer>(nanos: &i128, to: S) -> Result<S::Ok, S::Error> {
        let seconds = i64::try_from(nanos.div_euclid(SECOND)).unwrap_or(i64::MAX);
        // Less than a second, so it fits.
        (seconds, nanos.rem_euclid(SECOND) as u32).serialize(to)
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<i128, D::Error> {
        let (seconds, nanos) = <(i64, u32)>::deserialize(from)?;
        Ok(i128::from(seconds) * SECOND + i128::from(nanos))
    }
}

/// For maps by path.
pub(crate) mod by_path {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(crate) fn serialize<T: Serialize, S: Serializer>(
        map: &BTreeMap<Vec<u8>, T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_map(map.iter().map(|(path, value)| (super::encode(path), value)))
    }

    pub(crate) fn deserialize<'d, T: Deserialize<'d>, D: Deserializer<'d>>(
        from: D,
    ) -> Result<BTreeMap<Vec<u8>, T>, D::Error> {
        let map = BTreeMap::<String, T>::deserialize(from)?;
        let decoded = map.into_iter().map(|(text, value)| Some((super::decode(&text)?, value)));
        decoded.collect::<Option<_>>().ok_or_else(|| D::Error::custom("a text that stands for no path"))
    }
}

/// For paths of the host.
pub(crate) mod os_path {
    use std::{
        os::unix::ffi::OsStrExt,
        path::{Path, PathBuf},
    };

    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        super::bytes::serialize(path.as_os_str().as_bytes(), to)
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(super::path(&super::bytes::deserialize(from)?).to_owned())
    }
}

/// For a guest's tree: its records, as the guest sent them, in base64.
pub(crate) mod seen {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use vm_types::guest::files::{Seen, SeenDecoder};

    pub(crate) fn serialize<S: Serializer>(tree: &[Seen], to: S) -> Result<S::Ok, S::Error> {
        let mut records = Vec::new();
        for seen in tree {
            seen.encode(&mut records);
        }
        to.serialize_str(&STANDARD.encode(records))
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<Seen>, D::Error> {
        let records = STANDARD.decode(String::deserialize(from)?).map_err(D::Error::custom)?;
        let (mut tree, mut decoder) = (Vec::new(), SeenDecoder::default());
        decoder.push(&records, |seen| tree.push(seen)).map_err(D::Error::custom)?;
        decoder.finish().map_err(D::Error::custom)?;
        Ok(tree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_come_back() {
        for bytes in [&b"a b/\xc3\xa9"[..], b"\xff\xfe%", b"", b"100%25\n", b"\xe2\x82"] {
            assert_eq!(decode(&encode(bytes)).as_deref(), Some(bytes), "{}", encode(bytes));
        }
        assert_eq!(decode("%2"), None);
        assert_eq!(decode("%zz"), None);
    }

    #[test]
    fn names_do_not_drive_a_terminal() {
        assert_eq!(shown(b"a\x1b[2Jb\n\xff"), "a\\u{1b}[2Jb\\n\u{fffd}");
    }
}
