//! Durations as people write them: `90s`, `30m`, `2h`, `1h 30m`, `7d`. Whole seconds, for the daemon counts in them.

use std::time::Duration;

/// A text that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DurationError {
    /// Not numbers with units.
    #[error("{0:?} is not a duration; write for example 90s, 30m, 2h or 7d")]
    Malformed(String),
    /// A month where a minute is more likely meant.
    #[error("{0}: M is a month; write m for minutes, or months")]
    Month(String),
    /// Less than a second, or a part of one.
    #[error("{0} is not a whole number of seconds; 1s is the least")]
    Fraction(String),
    /// Zero.
    #[error("{text} is too short; {instead}")]
    Zero {
        /// It.
        text: String,
        /// What to do to have none.
        instead: &'static str,
    },
    /// Longer than anything that is meant to end.
    #[error("{0} is too long; 100 years is the most")]
    TooLong(String),
}

/// 100 years of 365.25 days.
const LONGEST: u64 = 36_525 * 86_400;

/// Seconds of a duration that is not zero.
pub(crate) fn seconds(text: &str) -> Result<u64, DurationError> {
    parse(text, "1s is the least, and without the option there is none")
}

/// Seconds of a duration that is not zero, or 0 for `never`.
pub(crate) fn seconds_or_never(text: &str) -> Result<u64, DurationError> {
    if text.eq_ignore_ascii_case("never") {
        return Ok(0);
    }
    parse(text, "1s is the least; write never for none")
}

fn parse(text: &str, instead: &'static str) -> Result<u64, DurationError> {
    let text = text.trim();
    if text.chars().all(|c| c == '0') && !text.is_empty() {
        return Err(DurationError::Zero { text: text.to_owned(), instead });
    }
    if text.split(|c: char| !c.is_ascii_alphabetic()).any(|unit| unit == "M") {
        return Err(DurationError::Month(text.to_owned()));
    }
    let duration = humantime::parse_duration(text).map_err(|error| match error {
        humantime::DurationError::NumberOverflow => DurationError::TooLong(text.to_owned()),
        _ => DurationError::Malformed(text.to_owned()),
    })?;
    match (duration.as_secs(), duration.subsec_nanos()) {
        (0, 0) => Err(DurationError::Zero { text: text.to_owned(), instead }),
        (_, 1..) => Err(DurationError::Fraction(text.to_owned())),
        (seconds, 0) if seconds > LONGEST => Err(DurationError::TooLong(text.to_owned())),
        (seconds, 0) => Ok(seconds),
    }
}

/// Seconds for people, exactly, e.g. `1h 30m`.
pub(crate) fn human(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_as_in_other_tools() {
        for (text, seconds) in [
            ("90s", 90),
            ("30m", 1800),
            ("30min", 1800),
            ("2h", 7200),
            ("1h30m", 5400),
            ("1h 30m", 5400),
            ("7d", 604_800),
            ("1day", 86_400),
            ("2w", 1_209_600),
        ] {
            assert_eq!(super::seconds(text), Ok(seconds), "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for seconds in [1, 59, 3600, 5400, 86_399, 604_800] {
            assert_eq!(super::seconds(&human(seconds)), Ok(seconds));
        }
        assert_eq!(human(5400), "1h 30m");
    }

    #[test]
    fn what_is_no_duration_is_refused_with_what_would_be() {
        for text in ["", "h", "2", "-2h", "2x", "never", "2 hours ago", "1e3s", "2h,"] {
            assert!(
                matches!(seconds(text), Err(DurationError::Malformed(_))),
                "{text:?}: {:?}",
                seconds(text)
            );
        }
        for text in ["0", "0s", "0h 0m"] {
            let error = seconds(text).unwrap_err();
            assert!(
                error.to_string().contains("too short") && !error.to_string().contains("never"),
                "{error}"
            );
            let error = seconds_or_never(text).unwrap_err();
            assert!(error.to_string().contains("write never"), "{error}");
        }
        assert!(matches!(seconds("500ms"), Err(DurationError::Fraction(_))));
        assert!(matches!(seconds("1s 1ns"), Err(DurationError::Fraction(_))));
        assert!(matches!(seconds("30M"), Err(DurationError::Month(_))));
        assert!(matches!(seconds("200years"), Err(DurationError::TooLong(_))));
        assert!(matches!(seconds("99999999999999999999999h"), Err(DurationError::TooLong(_))));
        assert!(matches!(seconds("9999999999999999h"), Err(DurationError::TooLong(_))));
    }

    #[test]
    fn never_is_zero_only_where_it_can_be_said() {
        assert_eq!(seconds_or_never("never"), Ok(0));
        assert_eq!(seconds_or_never("2h"), Ok(7200));
    }
}
