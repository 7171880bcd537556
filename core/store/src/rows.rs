//! Reading columns into checked types, shared by the tables.

use std::str::FromStr;

use rusqlite::{ErrorCode, ffi};
use serde::{Serialize, de::DeserializeOwned};

use crate::StoreError;

/// Attaches what was being done to a failed statement.
pub(crate) fn doing(action: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Query { action, source }
}

/// Reads text that was checked when it was written.
pub(crate) fn parse<T>(what: &'static str, value: String) -> Result<T, StoreError>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    value.parse().map_err(|error| StoreError::BadValue { what, value, source: Box::new(error) })
}

/// Reads a column of JSON.
pub(crate) fn from_json<T: DeserializeOwned>(what: &'static str, text: String) -> Result<T, StoreError> {
    serde_json::from_str(&text).map_err(|source| StoreError::BadValue {
        what,
        value: text,
        source: Box::new(source),
    })
}

/// Writes one.
pub(crate) fn to_json<T: Serialize>(what: &'static str, value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|source| StoreError::Encode { what, source })
}

/// SQLite integers are signed; sizes and times are below 2⁶³.
pub(crate) fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The other way; a negative number can only have been put there by hand.
pub(crate) fn to_u64(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// Whether a statement broke a UNIQUE rule of `column`, e.g. `vms.name`.
pub(crate) fn breaks_unique(error: &rusqlite::Error, column: &str) -> bool {
    matches!(
        error,
        rusqlite::Error::SqliteFailure(ffi::Error { code: ErrorCode::ConstraintViolation, extended_code }, Some(text))
            if matches!(*extended_code, ffi::SQLITE_CONSTRAINT_UNIQUE | ffi::SQLITE_CONSTRAINT_PRIMARYKEY)
                && text.split([' ', ',']).any(|word| word == column)
    )
}

/// `prefix` made into the smallest text that is greater than everything that begins with it. For
/// lower-case hexadecimal digits 'g' sorts right behind.
pub(crate) fn beyond(prefix: &str) -> String {
    format!("{prefix}g")
}

/// Whether the text can be the beginning of an id in hexadecimal digits.
pub(crate) fn is_hex_prefix(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
