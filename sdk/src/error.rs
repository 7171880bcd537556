//! Building errors, and making errors of other kinds into ours.

use core::fmt::Display;

use crate::{Error, Result};

impl Error {
    /// An error: `code` is for programs, dotted lower-case words like `disk.too-small`; `message` says what failed, with the
    /// value at fault.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), hint: None, retryable: false }
    }

    /// What people can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same call may succeed later with nothing changed.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }
}

/// For `?` on what has no code of its own.
pub trait OrRefuse<T> {
    /// An error with this code and message in place of what went wrong. The cause, if there is one, follows the message.
    ///
    /// # Errors
    /// The one described, if there is no value.
    fn or_refuse(self, code: &str, message: impl Display) -> Result<T>;
}

impl<T> OrRefuse<T> for Option<T> {
    fn or_refuse(self, code: &str, message: impl Display) -> Result<T> {
        self.ok_or_else(|| Error::new(code, message.to_string()))
    }
}

impl<T, E: Display> OrRefuse<T> for core::result::Result<T, E> {
    fn or_refuse(self, code: &str, message: impl Display) -> Result<T> {
        self.map_err(|cause| Error::new(code, format!("{message}: {cause}")))
    }
}

macro_rules! from {
    ($($type:ty: $code:literal),+ $(,)?) => { $(
        impl From<$type> for Error {
            fn from(error: $type) -> Self {
                Self::new($code, error.to_string())
            }
        }
    )+ };
}

from! {
    serde_json::Error: "bad.json",
    core::str::Utf8Error: "bad.text",
    std::string::FromUtf8Error: "bad.text",
    core::num::ParseIntError: "bad.number",
    core::num::TryFromIntError: "bad.number",
    std::net::AddrParseError: "bad.address",
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> Result<u16> {
        let (_, port) =
            text.split_once(':').or_refuse("address.no-port", format_args!("{text:?} has no port"))?;
        Ok(port.parse::<u16>()?)
    }

    #[test]
    fn what_went_wrong_reaches_people() {
        assert_eq!(port("192.0.2.1:80").unwrap(), 80);
        let error = port("192.0.2.1").unwrap_err();
        assert_eq!(
            (error.code.as_str(), error.message.as_str()),
            ("address.no-port", "\"192.0.2.1\" has no port")
        );
        assert_eq!(port("a:x").unwrap_err().code, "bad.number");
        let error = "x".parse::<u8>().or_refuse("limit", "the limit is no number").unwrap_err();
        assert!(error.message.starts_with("the limit is no number: invalid"), "{}", error.message);
        let error = Error::new("a.b", "c").with_hint("d").retryable();
        assert!(error.retryable && error.hint.as_deref() == Some("d"));
    }
}
