//! Sizes as people write them: `512M`, `2G`, `1.5GiB`; units are powers of 1024.

const UNITS: [(&str, u32); 5] = [("b", 0), ("k", 10), ("m", 20), ("g", 30), ("t", 40)];
const MIB: u64 = 1 << 20;

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    /// Not a number with a unit.
    #[error("{0:?} is not a size; write for example 512M or 2G")]
    Malformed(String),
    /// More than 64 bits hold.
    #[error("{0} is too large")]
    TooLarge(String),
    /// Zero, or less than one MiB where whole MiB are wanted.
    #[error("{0} is too small")]
    TooSmall(String),
}

/// Bytes of a size; a bare number counts in units of `1 << bare_shift`.
fn parse(text: &str, bare_shift: Option<u32>) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = if unit.is_empty() {
        bare_shift.ok_or_else(malformed)?
    } else {
        UNITS
            .iter()
            .find(|(letter, shift)| {
                unit.strip_prefix(letter)
                    .is_some_and(|rest| rest.is_empty() || (*shift > 0 && (rest == "b" || rest == "ib")))
            })
            .ok_or_else(malformed)?
            .1
    };
    let bytes = if let Some((whole, fraction)) = number.split_once('.') {
        // Sizes with a fraction are small enough for exact arithmetic in tens of millionths.
        if whole.is_empty() || fraction.is_empty() || fraction.len() > 6 || fraction.contains('.') {
            return Err(malformed());
        }
        let whole: u128 = whole.parse().map_err(|_| malformed())?;
        let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(6));
        let fraction: u128 = fraction.parse().map_err(|_| malformed())?;
        whole
            .checked_mul(scale)
            .and_then(|n| n.checked_add(fraction))
            .and_then(|n| n.checked_mul(1 << shift))
            .map(|n| n / scale)
    } else {
        if number.is_empty() {
            return Err(malformed());
        }
        number.parse::<u128>().ok().and_then(|n| n.checked_mul(1 << shift))
    };
    let bytes = bytes
        .and_then(|n| u64::try_from(n).ok())
        .filter(|n| i64::try_from(*n).is_ok())
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))?;
    if bytes == 0 { Err(SizeError::TooSmall(text.to_owned())) } else { Ok(bytes) }
}

/// Memory in MiB; a bare number is MiB.
pub(crate) fn memory_mib(text: &str) -> Result<u64, SizeError> {
    match parse(text, Some(20))? {
        bytes if bytes < MIB => Err(SizeError::TooSmall(text.to_owned())),
        bytes => Ok(bytes / MIB),
    }
}

/// Bytes; the unit is required, for a bare number of a disk is more often a mistake than meant.
pub(crate) fn disk_bytes(text: &str) -> Result<u64, SizeError> {
    parse(text, None)
}

/// Bytes; a bare number is bytes.
pub(crate) fn bytes(text: &str) -> Result<u64, SizeError> {
    parse(text, Some(0))
}

/// A number of bytes for people, e.g. `1.4G`.
pub(crate) fn human(bytes: u64) -> String {
    let Some((letter, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0) else {
        return "0".to_owned();
    };
    if *shift == 0 {
        return format!("{bytes}B");
    }
    let tenths = (u128::from(bytes) * 10 + (1_u128 << (shift - 1))) >> shift;
    let letter = letter.to_ascii_uppercase();
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole}{letter}"),
        (100.., _) => format!("{}{letter}", (tenths + 5) / 10),
        (whole, tenth) => format!("{whole}.{tenth}{letter}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary_and_case_does_not_matter() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("2g", 2 << 30),
            ("2GiB", 2 << 30),
            ("2gb", 2 << 30),
            ("1.5G", 3 << 29),
            ("1T", 1 << 40),
            ("4096b", 4096),
            ("8K", 8192),
        ] {
            assert_eq!(disk_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn memory_counts_in_mib() {
        assert_eq!(memory_mib("512"), Ok(512));
        assert_eq!(memory_mib("1.5G"), Ok(1536));
        assert_eq!(memory_mib("1K"), Err(SizeError::TooSmall("1K".to_owned())));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1G", "1X", "1Gi", "1..5G", ".5G", "1.G", "1 G B", "10", "1bb"] {
            assert!(
                matches!(disk_bytes(text), Err(SizeError::Malformed(_))),
                "{text:?}: {:?}",
                disk_bytes(text)
            );
        }
        assert!(matches!(disk_bytes("99999999T"), Err(SizeError::TooLarge(_))));
        assert!(matches!(
            disk_bytes("99999999999999999999999999999999999999999G"),
            Err(SizeError::TooLarge(_))
        ));
        assert!(matches!(disk_bytes("0G"), Err(SizeError::TooSmall(_))));
    }

    #[test]
    fn sizes_for_people_are_short() {
        for (bytes, text) in [
            (0, "0"),
            (512, "512B"),
            (1 << 30, "1G"),
            (3 << 29, "1.5G"),
            (150_400 << 10, "147M"),
            (1500, "1.5K"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
