//! Errors as text, where they leave the program that has them as values.

use std::error::Error;

/// An error's message with those of its causes, on one line as far as the messages are. A cause that an outer message ends with
/// already (a transparent one, say) is not repeated.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("could not read the list")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Wrapped(Outer);

    #[test]
    fn every_cause_is_told_once() {
        let error = Wrapped(Outer(std::io::Error::other("disk on fire")));
        assert_eq!(chain(&error), "could not read the list: disk on fire");
    }
}
