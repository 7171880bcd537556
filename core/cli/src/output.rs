//! What goes to stdout: one JSON document with `--json`, text for people otherwise. Errors go to stderr.

use std::{
    io::{self, IsTerminal, Write},
    time::SystemTime,
};

use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::json;

use crate::errors::CliError;

/// How answers are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Output {
    /// As JSON.
    pub(crate) json: bool,
    /// With names only, and without progress.
    pub(crate) quiet: bool,
}

impl Output {
    /// Shows an answer.
    pub(crate) fn show<T: Serialize>(self, value: &T, text: impl FnOnce() -> String) -> Result<(), CliError> {
        if self.json {
            let mut document =
                serde_json::to_vec_pretty(value).map_err(|source| CliError::Answer { source })?;
            document.push(b'\n');
            self.raw(&document)
        } else {
            let mut text = text();
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            self.raw(text.as_bytes())
        }
    }

    /// Shows one JSON document of a stream of them, one a line.
    pub(crate) fn line<T: Serialize>(self, value: &T) -> Result<(), CliError> {
        let mut document = serde_json::to_vec(value).map_err(|source| CliError::Answer { source })?;
        document.push(b'\n');
        self.raw(&document)
    }

    /// Writes bytes as they are.
    pub(crate) fn raw(self, bytes: &[u8]) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|source| CliError::Output { source })
    }

    /// Says something about the work on stderr, unless quiet.
    pub(crate) fn note(self, text: &str) {
        if !self.quiet {
            self.warn(text);
        }
    }

    /// Shows a text of several lines on stderr, unless quiet.
    pub(crate) fn note_plain(self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{}", printable(text));
        }
    }

    /// Says something on stderr that must be said.
    pub(crate) fn warn(self, text: &str) {
        // Nobody is left to tell if this fails.
        let _ = writeln!(io::stderr(), "vm: {}", set_in(text));
    }

    /// Reports an error on stderr.
    pub(crate) fn error(self, error: &CliError, exit_code: u8) {
        if error.is_closed_output() {
            return;
        }
        let (message, hint, kind) = (error.message(), error.hint(), error.kind());
        self.problem(&message, hint.as_deref(), kind, exit_code);
    }

    /// As [`Self::error`], of its parts.
    pub(crate) fn problem(self, message: &str, hint: Option<&str>, kind: vm_api::ErrorKind, exit_code: u8) {
        if self.json {
            let document = json!({"error": {
                "kind": kind.word(),
                "message": message,
                "hint": hint,
                "code": kind.code(),
                "exit_code": exit_code,
            }});
            let _ = writeln!(io::stderr(), "{document}");
        } else {
            self.warn(&format!("error: {message}"));
            if let Some(hint) = hint {
                let _ = writeln!(io::stderr(), "  hint: {}", set_in(hint));
            }
        }
    }
}

/// Text of unknown origin (a console's tail, a guest's message) without what would drive the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// The same with its further lines set in by four at least, so that none of them looks like one of ours.
fn set_in(text: &str) -> String {
    let line = |line: &str| if line.starts_with("  ") { format!("  {line}") } else { format!("    {line}") };
    let text = printable(text);
    let (first, further) =
        text.split_once('\n').map_or((text.as_str(), None), |(first, rest)| (first, Some(rest)));
    let further = further.into_iter().flat_map(|rest| rest.split('\n')).map(line);
    std::iter::once(first.to_owned()).chain(further).collect::<Vec<_>>().join("\n")
}

/// Text of unknown origin for stdout: as it is, but [`printable`] where stdout is a terminal.
pub(crate) fn for_stdout(text: String) -> String {
    if io::stdout().is_terminal() { printable(&text) } else { text }
}

/// A table without lines, its head in capitals.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Lines of `name: value`, aligned; what has no value is left out.
pub(crate) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let facts: Vec<_> = facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let indent = format!("\n{:width$}", "");
    facts
        .iter()
        .map(|(name, value)| {
            format!("{:width$}{}\n", format!("{name}:"), value.trim_end().replace('\n', &indent))
        })
        .collect()
}

/// How long ago a time was (seconds since the Unix epoch), e.g. `3 hours ago`.
pub(crate) fn ago(unix_seconds: u64) -> String {
    format!("{} ago", span(now().saturating_sub(unix_seconds)))
}

/// How long something has lasted that began then (seconds since the Unix epoch), e.g. `3 hours`.
pub(crate) fn lasting(unix_seconds: u64) -> String {
    span(now().saturating_sub(unix_seconds))
}

/// How far ahead a time is (seconds since the Unix epoch), e.g. `in 3 hours`; `now` if it is over.
pub(crate) fn until(unix_seconds: u64) -> String {
    match unix_seconds.saturating_sub(now()) {
        0 => "now".to_owned(),
        seconds => format!("in {}", span(seconds)),
    }
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A length of time in one unit, cut off.
fn span(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_no_trailing_blanks_and_one_line_a_row() {
        let text = table(
            ["NAME", "STATE"],
            [["a".to_owned(), "running".to_owned()], ["long-name".to_owned(), String::new()]],
        );
        assert_eq!(text, "NAME        STATE\na           running\nlong-name\n");
    }

    #[test]
    fn facts_are_aligned_and_absent_ones_left_out() {
        let text =
            facts([("name", Some("a".to_owned())), ("address", None), ("cause", Some("x\ny\n".to_owned()))]);
        assert_eq!(text, "name:  a\ncause: x\n       y\n");
    }

    #[test]
    fn a_console_cannot_drive_the_terminal_through_an_error() {
        assert_eq!(printable("a\x1b[2Jb\r\n\tc\x07"), "a[2Jb\n\tc");
    }

    #[test]
    fn a_guest_that_says_goodbye_in_lines_forges_no_hint() {
        let said = set_in("lost the connection: x\nvm: error: y\r\n  hint: run this");
        assert_eq!(said, "lost the connection: x\n    vm: error: y\n    hint: run this");
    }

    #[test]
    fn times_are_told_in_one_unit() {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(ago(now - 3600), "1 hour ago");
        assert_eq!(ago(now - 200_000), "2 days ago");
        assert_eq!(ago(now + 100), "0 seconds ago");
        // Between minutes, so that a slow test does not matter.
        assert_eq!(until(now + 7170), "in 1 hour");
        assert_eq!(until(now - 5), "now");
    }
}
