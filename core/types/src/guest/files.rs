//! The agent's file service: the SSH subsystem [`super::FILES_SUBSYSTEM`], for root only, one operation a channel.
//!
//! The client sends a [`FileRequest`] as one line of JSON, then the content if there is any, then the end of its data.
//! The agent answers with the content on the standard output if there is any, and exit status 0; or with a [`FileError`] as
//! one line of JSON on the standard error and exit status 1. [`FileRequest::Pack`] has a [`PackReport`] as one line of JSON
//! on the standard error beside its exit status 0. A channel that is closed without an end of data is a client
//! that has gone: nothing half written stays.

use serde::{Deserialize, Serialize};

/// The longest line of a request, in bytes, its end included.
pub const REQUEST_LIMIT: usize = 64 << 10;

/// What to do. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum FileRequest {
    /// The content that follows becomes that of a file, whole or not at all. Directories above it are made; a link of its
    /// name is replaced, not followed.
    Write {
        /// The file.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Sends a file's content.
    Read {
        /// The file.
        path: String,
        /// At most so many bytes; all if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u64>,
    },
    /// The tar archive that follows is unpacked below a directory, which is made. Nothing is written outside of it; what
    /// was unpacked before an error stays.
    Unpack {
        /// The directory.
        directory: String,
        /// Owner of all that is made.
        uid: u32,
        /// Group of all that is made.
        gid: u32,
    },
    /// Sends a file, or a directory with all below it, as a tar archive in the PAX format (POSIX.1-2008, pax): a file under
    /// its own name, what is in a directory under names relative to it, after an entry `./` for itself. Names are sorted by
    /// their bytes, so the same files make the same archive. Owners are numbers, times have nanoseconds, extended attributes
    /// are `SCHILY.xattr.` records. Sockets are left out. No symbolic link is followed below `path`, nor is `path` if it is one.
    Pack {
        /// The file or directory.
        path: String,
        /// What is left out, and how.
        #[serde(flatten)]
        options: PackOptions,
    },
}

/// How [`FileRequest::Pack`] packs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PackOptions {
    /// Of what is mounted below the path only the directory that it is mounted on is packed, empty.
    pub one_filesystem: bool,
    /// Absolute paths that are left out with all that is below them. Of one that ends in a slash the directory stays, empty.
    pub exclude: Vec<String>,
    /// Holes of files are not sent: such files have the PAX sparse format 1.0 of GNU tar, which not every reader knows.
    pub sparse: bool,
    /// What the agent writes for this one VM (`/etc/machine-id`, `/etc/hostname`, its lines of `/etc/hosts`,
    /// `/etc/resolv.conf`, units) is left out or emptied, as it belongs in an image.
    pub generalize: bool,
}

/// What became of [`FileRequest::Pack`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackReport {
    /// Entries of the archive.
    pub entries: u64,
    /// What is not in it, or not as it was at any one time: the first of them.
    pub warnings: Vec<FileError>,
    /// How many warnings there are beyond these.
    pub more: u64,
}

/// Why it was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileError {
    /// Dotted, stable, e.g. [`code::NOT_FOUND`].
    pub code: String,
    /// For people; names the file.
    pub message: String,
}

/// Codes of [`FileError`].
pub mod code {
    /// There is no such file.
    pub const NOT_FOUND: &str = "file.not-found";
    /// A directory is where a file is meant.
    pub const IS_DIRECTORY: &str = "file.is-directory";
    /// Something else is where a directory is meant.
    pub const NOT_DIRECTORY: &str = "file.not-directory";
    /// A device, pipe or socket is where a file is meant.
    pub const NOT_REGULAR: &str = "file.not-regular";
    /// The guest's filesystem is full.
    pub const NO_SPACE: &str = "file.no-space";
    /// The guest's filesystem takes no writes, or not from root.
    pub const DENIED: &str = "file.denied";
    /// Anything else that the guest's kernel says.
    pub const FAILED: &str = "file.failed";
    /// A warning: the file changed while it was read.
    pub const CHANGED: &str = "file.changed";
    /// A warning: the file was there, and then no more.
    pub const VANISHED: &str = "file.vanished";
    /// A warning: an archive cannot have it.
    pub const LEFT_OUT: &str = "file.left-out";
    /// A member of the archive would be outside of the directory.
    pub const OUTSIDE: &str = "archive.outside";
    /// A member of the archive is of a kind that is not unpacked.
    pub const UNSUPPORTED: &str = "archive.unsupported";
    /// It is no tar archive, or one that is damaged.
    pub const MALFORMED: &str = "archive.malformed";
    /// The archive ends before its end mark.
    pub const TRUNCATED: &str = "archive.truncated";
    /// The client does not keep to the protocol.
    pub const REQUEST: &str = "request.malformed";
}
