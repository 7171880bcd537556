//! Newtypes for every identifier, each checked when it is made.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A value that does not fit the form of the identifier it should become.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a valid {what}: {rule}")]
pub struct InvalidId {
    /// What it should have been, e.g. `VM name`.
    pub what: &'static str,
    /// The offending text.
    pub value: String,
    /// The rule it breaks, in words.
    pub rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(value: String) -> Result<Self, InvalidId> {
                let check: fn(&str) -> bool = $check;
                if check(&value) {
                    Ok(Self(value))
                } else {
                    Err(InvalidId { what: $what, value, rule: $rule })
                }
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(value: &str) -> Result<Self, InvalidId> {
                Self::try_from(value.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn lower_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// One label of a DNS name in lower case (RFC 1123, section 2.1).
fn dns_label(text: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&b| edge(b) || b == b'-')
        && edge(bytes[0])
        && edge(bytes[bytes.len() - 1])
}

text_id!(
    /// A VM for its whole life, never reused: 12 lower-case hexadecimal digits.
    VmId,
    "VM id",
    "12 lower-case hexadecimal digits",
    |text| lower_hex(text, 12)
);
text_id!(
    /// What people call a VM; also its host name, so it is one lower-case DNS label.
    VmName,
    "VM name",
    "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
    dns_label
);
text_id!(
    /// One daemon's directories; part of every name it gives to things on the host.
    /// 4 lower-case hexadecimal digits.
    InstanceId,
    "instance id",
    "4 lower-case hexadecimal digits",
    |text| lower_hex(text, 4)
);
text_id!(
    /// Content address of an image: `sha256:` and 64 lower-case hexadecimal digits.
    ImageDigest,
    "image digest",
    "sha256: and 64 lower-case hexadecimal digits",
    |text| text.strip_prefix("sha256:").is_some_and(|hex| lower_hex(hex, 64))
);
text_id!(
    /// A kernel in the catalogue: the first 12 hexadecimal digits of the SHA-256 of its boot file.
    KernelId,
    "kernel id",
    "12 lower-case hexadecimal digits",
    |text| lower_hex(text, 12)
);

impl ImageDigest {
    /// The 64 hexadecimal digits, fit for a file name.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first 12 digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

/// A long operation of one daemon's life; counts up from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct OperationId(pub u64);

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "é", "a b", &"x".repeat(64)] {
            let error = bad.parse::<VmName>().unwrap_err();
            assert!(error.to_string().contains("1 to 63"), "{error}");
        }
    }

    #[test]
    fn ids_refuse_bad_text_in_json_too() {
        assert!(serde_json::from_str::<VmId>("\"0123456789ab\"").is_ok());
        assert!(serde_json::from_str::<VmId>("\"../../../etc\"").is_err());
        assert!("sha256:xyz".parse::<ImageDigest>().is_err());
    }
}
