//! Bundles: a root filesystem in one file, with how its commands run and, where it needs one of its own, its kernel.
//!
//! ```text
//!   NAME.tar.zst
//!   ├─ vm-bundle.json    what is in it, first: format, platform, digests and sizes, how commands run
//!   ├─ kernel            bzImage or vmlinux ┐
//!   ├─ modules.tar       its modules        ├ each may be absent
//!   ├─ kernel.config     its configuration  ┘
//!   └─ rootfs.ext4       or rootfs.tar
//! ```
//!
//! A bundle is identified by the digest of its `vm-bundle.json`, which has the digests of all else: [`describe`] reads that much,
//! [`unpack`] the rest, in one pass, and verifies it. [`write`] makes one. What a bundle has beside what it says is refused, and so is
//! what it lacks; nothing of it is kept then.

mod read;
mod write;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vm_types::{ImageDigest, image::ImageConfig};

pub use self::{
    read::{Unpacked, Want, describe, unpack},
    write::{Contents, write},
};

/// The name of what says what is in a bundle.
pub const METADATA: &str = "vm-bundle.json";
/// The format that is written, and read.
pub const FORMAT: u32 = 1;

/// Of the metadata, in bytes.
const METADATA_MAX: u64 = 1 << 20;
const KERNEL_MAX: u64 = 512 << 20;
const CONFIG_MAX: u64 = 4 << 20;
const MODULES_MAX: u64 = 4 << 30;
const ROOTFS_MAX: u64 = 1 << 40;

/// What a bundle says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// [`FORMAT`].
    pub format: u32,
    /// What its maker calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it runs on, `linux/amd64` or `linux/arm64`.
    pub platform: String,
    /// What is in it besides.
    pub parts: BTreeMap<Part, Member>,
    /// How commands run in it.
    #[serde(default)]
    pub config: ImageConfig,
}

/// A part of a bundle; its name in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// bzImage or vmlinux.
    #[serde(rename = "kernel")]
    Kernel,
    /// A tar archive with the kernel's modules, plain or compressed.
    #[serde(rename = "modules.tar")]
    Modules,
    /// The kernel's build configuration.
    #[serde(rename = "kernel.config")]
    KernelConfig,
    /// The root filesystem as an ext4 filesystem.
    #[serde(rename = "rootfs.ext4")]
    Ext4,
    /// The root filesystem as a tar archive, plain or compressed.
    #[serde(rename = "rootfs.tar")]
    Tar,
}

/// What a part must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// SHA-256 of it.
    pub digest: ImageDigest,
    /// In bytes.
    pub size: u64,
}

impl Part {
    /// All there are, in the order in which they are written.
    const ALL: [Self; 5] = [Self::Kernel, Self::Modules, Self::KernelConfig, Self::Ext4, Self::Tar];

    /// Its name in the archive.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Modules => "modules.tar",
            Self::KernelConfig => "kernel.config",
            Self::Ext4 => "rootfs.ext4",
            Self::Tar => "rootfs.tar",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }

    fn is_rootfs(self) -> bool {
        matches!(self, Self::Ext4 | Self::Tar)
    }

    /// In bytes.
    fn most(self) -> u64 {
        match self {
            Self::Kernel => KERNEL_MAX,
            Self::Modules => MODULES_MAX,
            Self::KernelConfig => CONFIG_MAX,
            Self::Ext4 | Self::Tar => ROOTFS_MAX,
        }
    }
}

/// Linux on this host's processor.
fn host_platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

impl Metadata {
    /// Reads it; an error says in words why it cannot be used here.
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let unreadable = |error: serde_json::Error| format!("{METADATA} cannot be understood: {error}");
        // A later format may say more than is known here.
        let Version { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if format != FORMAT {
            return Err(format!("it is of format {format}; {FORMAT} is supported"));
        }
        let metadata: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        let has = |part| metadata.parts.contains_key(&part);
        if metadata.platform != host_platform() {
            let (found, host) = (&metadata.platform, host_platform());
            return Err(format!("it is for {found:?}; this host is {host}"));
        }
        if has(Part::Ext4) && has(Part::Tar) {
            return Err("it has two root filesystems".into());
        }
        if !has(Part::Kernel) && (has(Part::Modules) || has(Part::KernelConfig)) {
            return Err("it has a part of a kernel and no kernel".into());
        }
        if metadata.parts.is_empty() {
            return Err("there is nothing in it".into());
        }
        match metadata.parts.iter().find(|(part, member)| member.size > part.most()) {
            Some((part, member)) => {
                Err(format!("{} has {} bytes; the most is {}", part.name(), member.size, part.most()))
            }
            None => Ok(metadata),
        }
    }

    /// Whether it has a root filesystem.
    pub fn has_rootfs(&self) -> bool {
        self.parts.keys().any(|part| part.is_rootfs())
    }

    /// Whether it has a kernel.
    pub fn has_kernel(&self) -> bool {
        self.parts.contains_key(&Part::Kernel)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn metadata() -> Value {
        let member = json!({ "digest": format!("sha256:{}", "0".repeat(64)), "size": 1 });
        json!({ "format": 1, "platform": host_platform(), "parts": { "rootfs.tar": member, "kernel": member } })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut value = metadata();
        change(&mut value);
        Metadata::parse(value.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn metadata_that_cannot_be_used_says_why() {
        assert!(Metadata::parse(metadata().to_string().as_bytes()).unwrap().has_rootfs());
        let member = metadata()["parts"]["kernel"].clone();
        let later = refused(|m| *m = json!({ "format": 2, "news": true }));
        assert!(later.contains("format 2; 1 is supported"), "{later}");
        let unknown = refused(|m| m["parts"]["../../etc/passwd"] = member.clone());
        assert!(unknown.contains("passwd"), "{unknown}");
        assert!(refused(|m| m["platform"] = "linux/s390x".into()).contains("s390x"));
        assert!(refused(|m| m["parts"]["rootfs.ext4"] = member.clone()).contains("two root filesystems"));
        assert!(refused(|m| m["parts"] = json!({ "modules.tar": member })).contains("no kernel"));
        assert!(refused(|m| m["parts"] = json!({})).contains("nothing"));
        assert!(refused(|m| m["parts"]["kernel"]["size"] = (1_u64 << 40).into()).contains("the most"));
        assert!(refused(|m| m["parts"]["kernel"]["size"] = (-1).into()).contains("understood"));
        assert!(refused(|m| m["parts"]["kernel"]["digest"] = "sha256:00".into()).contains("understood"));
        assert!(refused(|m| m["kernel"] = "x".into()).contains("unknown field"));
        assert!(Metadata::parse(b"[]").is_err());
    }

    #[test]
    fn parts_are_written_by_their_names() {
        for part in Part::ALL {
            assert_eq!(serde_json::to_value(part).unwrap(), part.name());
            assert_eq!(Part::named(part.name()), Some(part));
        }
    }
}
