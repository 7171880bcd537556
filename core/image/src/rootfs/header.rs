//! One tar header block, and the records of PAX headers.
//!
//! Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual 1.35, appendix
//! "Tar Internals" (base-256 numbers, old GNU sparse headers, PAX sparse formats 0.0 to 1.0).

/// Size of every block.
pub(super) const BLOCK: usize = 512;

/// Offsets and lengths of what is no hole.
pub(super) type Segments = Vec<(u64, u64)>;

/// A header block whose check sum is right.
pub(super) struct Header<'a>(pub(super) &'a [u8; BLOCK]);

impl<'a> Header<'a> {
    /// Checks the sum: all bytes, the sum's own field taken as blanks.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Result<Self, String> {
        let sum: i64 = block
            .iter()
            .enumerate()
            .map(|(i, &b)| i64::from(if (148..156).contains(&i) { b' ' } else { b }))
            .sum();
        // Some historic tars summed signed bytes.
        let signed: i64 = block
            .iter()
            .enumerate()
            .map(|(i, &b)| i64::from(if (148..156).contains(&i) { b' ' as i8 } else { b as i8 }))
            .sum();
        match number(&block[148..156]) {
            Some(stored) if stored == sum || stored == signed => Ok(Self(block)),
            _ => Err("a header's check sum is wrong".into()),
        }
    }

    /// Type flag.
    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    fn is_gnu(&self) -> bool {
        &self.0[257..265] == b"ustar  \0"
    }

    /// Name with the ustar prefix where there is one.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let ustar = &self.0[257..262] == b"ustar" && !self.is_gnu();
        // star puts times behind a shorter prefix and marks that at the block's end.
        let prefix_end = if &self.0[508..512] == b"tar\0" { 476 } else { 500 };
        let prefix = if ustar { text(&self.0[345..prefix_end]) } else { &[] };
        if prefix.is_empty() { name.to_vec() } else { [prefix, name].join(&b'/') }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Option<i64> {
        number(&self.0[100..108])
    }

    pub(super) fn uid(&self) -> Option<i64> {
        number(&self.0[108..116])
    }

    pub(super) fn gid(&self) -> Option<i64> {
        number(&self.0[116..124])
    }

    pub(super) fn size(&self) -> Option<i64> {
        number(&self.0[124..136])
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        number(&self.0[136..148])
    }

    pub(super) fn device(&self) -> Option<(i64, i64)> {
        Some((number(&self.0[329..337])?, number(&self.0[337..345])?))
    }

    /// Old GNU sparse header: its four segments, whether more follow in further blocks, and the file's full size.
    pub(super) fn gnu_sparse(&self) -> Option<(Segments, bool, u64)> {
        let segments = sparse_segments(&self.0[386..482])?;
        Some((segments, self.0[482] != 0, number(&self.0[483..495])?.try_into().ok()?))
    }
}

/// The 21 segments of a block that continues an old GNU sparse header, and whether another follows.
pub(super) fn gnu_sparse_continued(block: &[u8; BLOCK]) -> Option<(Segments, bool)> {
    Some((sparse_segments(&block[..504])?, block[504] != 0))
}

fn sparse_segments(bytes: &[u8]) -> Option<Segments> {
    let mut segments = Vec::new();
    for pair in bytes.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let (offset, length) = (number(&pair[..12])?, number(&pair[12..])?);
        segments.push((offset.try_into().ok()?, length.try_into().ok()?));
    }
    Some(segments)
}

/// A field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

/// A numeric field: octal digits between blanks or NULs (none is 0), or base-256 in two's complement, marked by the
/// first bit.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        // The second bit is the sign; the marker bit is none of the number.
        let negative = field[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (i, &byte) in field.iter().enumerate() {
            let byte = if i == 0 && !negative { byte & 0x7f } else { byte };
            value = (value << 8) | i128::from(byte);
            if !(-(1 << 100)..1 << 100).contains(&value) {
                return None;
            }
        }
        return value.try_into().ok();
    }
    let digits = std::str::from_utf8(text(field)).ok()?.trim_matches(' ');
    if digits.is_empty() { Some(0) } else { i64::from_str_radix(digits, 8).ok() }
}

/// Splits a PAX header into its records `LENGTH KEY=VALUE\n`. A value may hold any byte, newlines too (file capabilities
/// do), so only the length tells where it ends.
pub(super) fn pax_records(mut data: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !data.is_empty() && data[0] != 0 {
        let blank = data.iter().position(|&b| b == b' ')?;
        let length: usize = std::str::from_utf8(&data[..blank]).ok()?.parse().ok()?;
        let record = data.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&b| b == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        data = &data[length..];
    }
    Some(records)
}

/// A PAX time: decimal seconds, perhaps negative, perhaps with a fraction; as seconds (rounded down) and nanoseconds.
pub(super) fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let value = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let negative = whole.starts_with('-');
    let seconds: i64 = if whole.is_empty() || whole == "-" { 0 } else { whole.parse().ok()? };
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // What is finer is cut off.
    let nanos: u32 = format!("{:0<9}", &fraction[..fraction.len().min(9)]).parse().ok()?;
    if negative && nanos > 0 {
        Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos))
    } else {
        Some((seconds, nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_every_form() {
        assert_eq!(number(b"0000755\0"), Some(0o755));
        assert_eq!(number(b"   755 \0"), Some(0o755));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\0\x10\0"), Some(4096));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(b"99999999"), None);
        assert_eq!(number(b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
    }

    #[test]
    fn pax_values_may_hold_newlines() {
        let data = b"16 a=one\ntwo\nxyz9 b=cde\n";
        assert_eq!(pax_records(&data[..]), None, "lengths that do not fit are refused");
        let data = b"13 a=one\ntwo\n8 b=cde\n";
        assert_eq!(pax_records(data).unwrap(), [(&b"a"[..], &b"one\ntwo"[..]), (b"b", b"cde")]);
        assert_eq!(pax_records(b"99 a=b\n"), None);
        assert_eq!(pax_records(b"2 a=b\n"), None);
    }

    #[test]
    fn times_before_the_epoch_round_down() {
        assert_eq!(pax_time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"-0.5"), Some((-1, 500_000_000)));
        assert_eq!(pax_time(b"12.0000000059"), Some((12, 5)));
        for text in [&b"1.x"[..], b"1.000000000x", b"1.-5", b"x"] {
            assert_eq!(pax_time(text), None, "{}", text.escape_ascii());
        }
    }
}
