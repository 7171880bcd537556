//! Errors as clients meet them: a stable kind with a stable code, a message and a hint.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use vm_types::ErrorKind;

/// An error with all a person or program needs of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// The sort.
    pub kind: ErrorKind,
    /// What went wrong, causes included, without the hint.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Problem {
    /// One without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

#[derive(Serialize, Deserialize)]
struct ErrorData {
    kind: ErrorKind,
    hint: Option<String>,
}

impl From<Problem> for jsonrpsee::types::ErrorObjectOwned {
    fn from(problem: Problem) -> Self {
        let data = ErrorData { kind: problem.kind, hint: problem.hint };
        Self::owned(problem.kind.code(), problem.message, Some(data))
    }
}

impl From<&jsonrpsee::types::ErrorObjectOwned> for Problem {
    /// Reads an error of any JSON-RPC server; one of an unknown code becomes [`ErrorKind::Internal`].
    fn from(object: &jsonrpsee::types::ErrorObjectOwned) -> Self {
        let data = object.data().and_then(|raw| serde_json::from_str::<ErrorData>(raw.get()).ok());
        let kind = match (&data, object.code()) {
            (Some(data), _) => data.kind,
            // JSON-RPC 2.0, section 5.1: invalid params.
            (None, -32602) => ErrorKind::InvalidArgument,
            // Method not found: an older daemon.
            (None, -32601) => ErrorKind::Unsupported,
            (None, _) => ErrorKind::Internal,
        };
        let message = match (&data, object.data()) {
            (None, Some(raw)) => format!("{}: {}", object.message(), raw.get()),
            _ => object.message().to_owned(),
        };
        Self { kind, message, hint: data.and_then(|data| data.hint) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_words_match_the_json() {
        let mut codes: Vec<_> = ErrorKind::ALL.iter().map(|kind| kind.code()).collect();
        codes.dedup();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        for kind in ErrorKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.word());
        }
    }

    #[test]
    fn a_problem_survives_the_wire() {
        let problem = Problem::new(ErrorKind::InUse, "image is in use by a").hint("delete VM a first");
        let object = jsonrpsee::types::ErrorObjectOwned::from(problem.clone());
        assert_eq!(Problem::from(&object), problem);
    }
}
