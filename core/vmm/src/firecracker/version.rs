//! Versions and what came with them.

use std::fmt;

/// A released version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The oldest one that is supported.
    pub const OLDEST: Self = Self(1, 7, 0);
    /// The first one that describes its devices by ACPI; before it only the kernel's command line did.
    pub const ACPI: Self = Self(1, 8, 0);
    /// The first one that itself tells the kernel that there is no PCI.
    pub const SAYS_NO_PCI: Self = Self(1, 13, 0);

    /// Of a text that has it behind a `v`, be it `Firecracker v1.13.2` or `v1.14.0-dev`.
    pub fn find(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().filter_map(|word| word.strip_prefix('v')).find_map(Self::parse)
    }

    /// Of `1.13.2`; what follows on a `-` makes no difference.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('-').next()?.split('.').map(str::parse);
        let version = Self(numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        numbers.next().is_none().then_some(version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(major, minor, patch) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_firecracker_prints() {
        let printed = "Firecracker v1.13.2\n\n2026-11-23T10:42:04 [anonymous-instance:main] Firecracker exiting \
                       successfully. exit_code=0\n";
        assert_eq!(Version::find(printed), Some(Version(1, 13, 2)));
        assert_eq!(Version::find("Firecracker v1.14.0-dev\n"), Some(Version(1, 14, 0)));
        assert_eq!(Version::find("very odd v1 v1.2 v1.2.3.4"), None);
        assert!(Version(1, 10, 0) > Version(1, 9, 9));
        assert_eq!(Version(1, 7, 0).to_string(), "1.7.0");
    }
}
