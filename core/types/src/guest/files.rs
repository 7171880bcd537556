//! The agent's file service: the SSH subsystem [`super::FILES_SUBSYSTEM`], for root only, one operation a channel.
//!
//! The client sends a [`FileRequest`] as one line of JSON, then the content if there is any, then the end of its data.
//! The agent answers with the content on the standard output if there is any, and exit status 0; or with a [`FileError`] as
//! one line of JSON on the standard error and exit status 1. [`FileRequest::Pack`] has a [`PackReport`] as one line of JSON
//! on the standard error beside its exit status 0. A channel that is closed without an end of data is a client
//! that has gone: nothing half written stays.
//!
//! [`FileRequest::Survey`], [`FileRequest::Digests`], [`FileRequest::Remove`] and [`PackOptions::selected`] are about entries
//! of a tree by their paths relative to its top. Those are bytes for which [`is_within`] holds, each with a NUL behind it, and
//! no symbolic link is followed on their way. The path of the top itself is followed.

mod seen;

use serde::{Deserialize, Serialize};

pub use seen::{PATH_LIMIT, Seen, SeenDecoder, SeenError, SeenKind, is_within};

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
        /// How.
        #[serde(flatten)]
        options: UnpackOptions,
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
    /// Sends the records ([`Seen::encode`]) of all that is below a directory, sorted by their paths' bytes, without the directory
    /// itself. What is mounted below it is not gone into. What vanishes meanwhile is left out. Where there is no such directory,
    /// there are no records.
    Survey {
        /// The directory.
        path: String,
    },
    /// Paths of files follow; their SHA-256 digests are sent in the same order, as 64 hexadecimal digits and a NUL, or `-` and a NUL
    /// for what is no regular file, or not there.
    Digests {
        /// The top.
        directory: String,
    },
    /// Paths follow; what they name is removed, in this order, directories only if nothing is in them by then: whoever wants
    /// them gone names what is in them first. What is not there is no error.
    Remove {
        /// The top.
        directory: String,
    },
    /// Tells what a path leads to as a [`Found`], on the standard error, or `null` if it leads to nothing.
    Find {
        /// The path.
        path: String,
        /// Whether to follow it if it is a symbolic link; on the way to it links are followed in any case.
        follow: bool,
    },
    /// Tells who a user is as an [`Account`], on the standard error.
    Account {
        /// As at a login: a name, a number, or either with `:GROUP`.
        user: String,
    },
}

/// The answer to [`FileRequest::Find`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The same place, without links on the way, and without one at its end if that was followed.
    pub path: String,
    /// What is there.
    pub kind: SeenKind,
    /// Permission bits, 12 of them.
    pub mode: u32,
    /// In bytes; of files only.
    pub size: u64,
}

/// The answer to [`FileRequest::Account`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Number.
    pub uid: u32,
    /// The number of the own group.
    pub gid: u32,
    /// The home directory.
    pub home: String,
}

/// How [`FileRequest::Unpack`] unpacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnpackOptions {
    /// What is in the archive belongs to whom the archive says; only what is made for it, such as the directory, to the user and
    /// group that are given.
    pub owners: bool,
    /// Extended attributes of the archive (`SCHILY.xattr.` records) are set.
    pub xattrs: bool,
    /// A directory of the archive that is there already gets mode, owner and time of the archive's, but for one behind a symbolic
    /// link, and the one that it is unpacked to.
    pub overlay: bool,
    /// Permission bits, 12 of them, of all that is in the archive; symbolic links have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
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
    /// `/etc/resolv.conf`, units) is left out or emptied, as it belongs in an image. So is, with a warning, what has a name
    /// that begins with `.wh.`, as these hide others in an image's layer.
    pub generalize: bool,
    /// Of a directory exactly those entries are packed whose paths follow the request, in that order, directories without what
    /// is in them. One that is not there is a warning of the report. Each file is one of its own, however many links it has,
    /// but with `links`.
    pub selected: bool,
    /// Of selected entries that are one file, all but the first are links to that.
    pub links: bool,
    /// What the path is called in the archive: a file instead of its own name, a directory instead of `./`. One name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What became of [`FileRequest::Pack`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackReport {
    /// Entries of the archive.
    pub entries: u64,
    /// Regular files among them.
    #[serde(default)]
    pub files: u64,
    /// The size of these together, in bytes.
    #[serde(default)]
    pub content: u64,
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
    use crate::ErrorKind;

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
    /// The image has no such user.
    pub const NO_USER: &str = "user.not-found";
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

    /// What sort of error a code is, on whichever side it came to pass.
    pub fn kind(code: &str) -> ErrorKind {
        match code {
            NOT_FOUND | NO_USER => ErrorKind::NotFound,
            NO_SPACE => ErrorKind::NoSpace,
            DENIED => ErrorKind::PermissionDenied,
            IS_DIRECTORY | NOT_DIRECTORY | NOT_REGULAR | REQUEST => ErrorKind::InvalidArgument,
            OUTSIDE | UNSUPPORTED | MALFORMED | TRUNCATED => ErrorKind::BadImage,
            _ => ErrorKind::HostFailure,
        }
    }
}
