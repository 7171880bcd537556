//! Image references: what a user writes to name an image.
//!
//! ```text
//!   debian:bookworm     a distribution's suite, built on this host
//!   toolchain           an image of the store by its name, tag `latest`
//!   team/toolchain:v2   the same, with a path and a tag
//! ```

use std::{fmt, str::FromStr};

use crate::ImageError;

/// A checked reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `debian:SUITE`.
    Debian {
        /// E.g. `bookworm`.
        suite: Suite,
    },
    /// An image that was given this name when it was imported.
    Named {
        /// Lower-case path, e.g. `team/toolchain`.
        name: String,
        /// Tag; `latest` where none was given.
        tag: String,
    },
}

/// The name of a distribution's suite, safe to be put into a command line and a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Suite(String);

impl Suite {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Suite {
    type Err = ImageError;
    fn from_str(text: &str) -> Result<Self, ImageError> {
        let well_formed = (1..=32).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(ImageError::InvalidReference {
                reference: text.to_owned(),
                rule: "a suite is 1 to 32 of a-z, 0-9 and '-' and begins with a letter",
            })
        }
    }
}

/// The longest tag (OCI distribution specification 1.1, "Pulling manifests").
const TAG_MAX: usize = 128;
/// The longest name, as registries have it.
const NAME_MAX: usize = 255;

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let invalid = |rule| ImageError::InvalidReference { reference: text.to_owned(), rule };
        if text.is_empty() {
            return Err(invalid("it is empty"));
        }
        if text.contains('@') {
            return Err(invalid("references by digest are not supported"));
        }
        // A colon before a slash belongs to a registry's port.
        let (name, tag) = match text.rsplit_once(':') {
            Some((_, tag)) if tag.contains('/') => {
                return Err(invalid("a registry's address cannot be used yet"));
            }
            Some((name, tag)) => (name, Some(tag)),
            None => (text, None),
        };
        if name == "debian" {
            let tag = tag.ok_or_else(|| invalid("name a suite, e.g. debian:bookworm"))?;
            return match tag.parse() {
                Ok(suite) => Ok(Self::Debian { suite }),
                Err(ImageError::InvalidReference { rule, .. }) => Err(invalid(rule)),
                Err(other) => Err(other),
            };
        }
        if name.len() > NAME_MAX {
            return Err(invalid("a name has at most 255 characters"));
        }
        if !name.split('/').all(is_component) {
            return Err(invalid(
                "a name is made of a-z and 0-9, with '.', '_', '-' between them and '/' between parts",
            ));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(invalid(
                "a tag is 1 to 128 of letters, digits, '_', '.' and '-' and begins with no '.' or '-'",
            ));
        }
        Ok(Self::Named { name: name.to_owned(), tag: tag.unwrap_or("latest").to_owned() })
    }
}

fn is_component(text: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.first().is_some_and(|&b| edge(b))
        && bytes.last().is_some_and(|&b| edge(b))
        && bytes.iter().all(|&b| edge(b) || matches!(b, b'.' | b'_' | b'-'))
        && !text.contains("..")
}

fn is_tag(text: &str) -> bool {
    (1..=TAG_MAX).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian { suite } => write!(f, "debian:{suite}"),
            Self::Named { name, tag } => write!(f, "{name}:{tag}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_read_and_print() {
        for (text, printed) in [
            ("debian:bookworm", "debian:bookworm"),
            ("toolchain", "toolchain:latest"),
            ("team/tool_chain:v2.0-rc1", "team/tool_chain:v2.0-rc1"),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), printed);
        }
        assert!(matches!("debian:sid".parse(), Ok(Reference::Debian { suite }) if suite.as_str() == "sid"));
    }

    #[test]
    fn bad_references_say_which_rule_they_break() {
        for (text, part) in [
            ("", "empty"),
            ("debian", "name a suite"),
            ("debian:", "a suite is"),
            ("debian:../x", "registry"),
            ("debian:-x", "a suite is"),
            ("debian:Bookworm", "a suite is"),
            ("Upper", "a name is"),
            ("a//b", "a name is"),
            ("../etc", "a name is"),
            ("a..b", "a name is"),
            ("host:5000/x", "registry"),
            ("x:", "a tag is"),
            ("x:.y", "a tag is"),
            ("x@sha256:00", "digest"),
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert!(error.hint().is_some());
        }
    }
}
