//! What can go wrong, one variant per failed operation, each with a hint where there is a remedy.

use std::{io, path::PathBuf};

use vm_host::RunError;

/// Why an image or kernel could not be acquired, checked or packed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A reference that breaks the form.
    #[error("{reference:?} is not an image reference: {rule}")]
    InvalidReference {
        /// What was given.
        reference: String,
        /// The rule it breaks, in words.
        rule: &'static str,
    },
    /// The distribution has no such suite.
    #[error("Debian has no suite {suite:?}")]
    UnknownSuite {
        /// What was asked for.
        suite: String,
    },
    /// A host tool failed or is absent.
    #[error("{action} failed")]
    Tool {
        /// What it was run for, e.g. `making the filesystem`.
        action: &'static str,
        /// The Debian package that has the tool.
        package: &'static str,
        /// How it failed.
        source: RunError,
    },
    /// A file on the host could not be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that was to be registered holds no root filesystem that can be used.
    #[error("{} cannot be registered: {reason}", path.display())]
    NotAFilesystem {
        /// Which file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A registered file is not what it was.
    #[error("{} has changed since it was registered", path.display())]
    RegisteredChanged {
        /// Which file.
        path: PathBuf,
    },
    /// A bundle that is not what it says it is, or cannot be used here.
    #[error("the bundle {} is refused: {reason}", path.display())]
    Bundle {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, the part named.
        reason: String,
    },
    /// Something is where a bundle is to be written.
    #[error("{} exists", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// The archive ends in the middle.
    #[error("the archive is truncated{}", after(last))]
    TruncatedArchive {
        /// The last entry that was begun, empty if none was.
        last: String,
    },
    /// The bytes are no archive, or a damaged one.
    #[error("the archive is corrupt{}: {reason}", after(last))]
    CorruptArchive {
        /// The last entry that was begun, empty if none was.
        last: String,
        /// What does not fit.
        reason: String,
    },
    /// The archive could not be read or decompressed.
    #[error("cannot read the archive")]
    ReadArchive {
        /// Why.
        source: io::Error,
    },
    /// An entry that would reach outside of the root filesystem, or cannot stand in one.
    #[error("the archive is refused: {path:?} {reason}")]
    RefusedEntry {
        /// The entry's name as in the archive.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An entry whose content could not be written on the host.
    #[error("cannot {action} archive entry {path:?}")]
    Entry {
        /// What was tried, e.g. `write`.
        action: &'static str,
        /// The entry's name as in the archive.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The file is not a kernel that can be booted here.
    #[error("{} is no x86-64 kernel: {reason}", path.display())]
    NotAKernel {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The kernel lacks drivers that every VM needs.
    #[error("kernel {release} has neither built in nor as a module: {}", missing.join(", "))]
    KernelLacks {
        /// `uname -r` of it.
        release: String,
        /// Names of the missing modules.
        missing: Vec<String>,
    },
    /// Nothing says what is built into the kernel.
    #[error("nothing says which drivers kernel {release} has built in")]
    KernelUnverifiable {
        /// `uname -r` of it.
        release: String,
    },
    /// The modules were made for another kernel.
    #[error("the modules in {} are for kernel {found}, not {release}", path.display())]
    ForeignModules {
        /// Their directory.
        path: PathBuf,
        /// The kernel they are for.
        found: String,
        /// `uname -r` of the kernel they were given with.
        release: String,
    },
    /// A kernel cannot be unpacked for a VMM that takes an ELF file only.
    #[error("no ELF kernel can be made of {}: {reason}", path.display())]
    NoElfKernel {
        /// The boot file.
        path: PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// A kernel module that cannot be read.
    #[error("kernel module {} is damaged: {reason}", path.display())]
    DamagedModule {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The host's package sources have no cloud kernel.
    #[error("the host's package sources have no package {package}")]
    NoKernelPackage {
        /// The package that was looked for.
        package: String,
    },
    /// The work was given up because nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
    /// A worker thread ended without a result.
    #[error("a worker thread failed")]
    Worker {
        /// How.
        source: tokio::task::JoinError,
    },
}

fn after(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!(" after {last:?}") }
}

impl ImageError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::InvalidReference { .. } => {
                "use debian:SUITE (e.g. debian:bookworm) or the name of an image in the store".into()
            }
            Self::UnknownSuite { .. } => {
                "use one of bullseye, bookworm, trixie, forky or sid; see https://www.debian.org/releases/".into()
            }
            Self::Tool { package, source: RunError::NotInstalled { program }, .. } => {
                format!("{program} is part of package {package}: apt-get install {package}")
            }
            Self::Tool { source: RunError::TimedOut { .. }, .. } => {
                "the host is very busy or a download stalls: check the network and proxy settings, then try again"
                    .into()
            }
            Self::Tool { source: RunError::Failed { stderr_tail, .. }, .. } => return tool_hint(stderr_tail),
            Self::Tool { source: RunError::Io { source, .. }, .. }
            | Self::File { source, .. }
            | Self::Entry { source, .. }
            | Self::ReadArchive { source } => return io_hint(source),
            Self::Worker { .. } => {
                "this is a defect of vmd or of the tool: please report it with the daemon's log".into()
            }
            Self::NotAFilesystem { .. } => {
                "give a file with one ext4 filesystem and nothing else, which is not mounted; `e2fsck -f FILE` mends one that \
                 was not unmounted, `vm image import` takes a tarball"
                    .into()
            }
            Self::RegisteredChanged { .. } => {
                "put the former file back, or register it anew: vm image register FILE --name NAME; `vm image promote` keeps \
                 a copy that nobody changes"
                    .into()
            }
            Self::Bundle { .. } => {
                "get it again from where it was made, or make it anew: vm image export IMAGE FILE --format bundle".into()
            }
            Self::Exists { .. } => "remove it or write to another place; nothing is overwritten".into(),
            Self::TruncatedArchive { .. } => {
                "fetch or export the archive again; a complete one ends with two empty blocks".into()
            }
            Self::CorruptArchive { .. } => {
                "give a tar archive, plain or compressed with gzip, zstd or xz; if it is one, fetch it again"
                    .into()
            }
            Self::RefusedEntry { .. } => {
                "an image's archives hold paths that stay inside of it, and what a Linux filesystem can hold; make \
                 the image anew, a root filesystem's e.g. with tar --numeric-owner --xattrs -C ROOT -cf IMAGE.tar ."
                    .into()
            }
            Self::NotAKernel { .. } => {
                "give an x86-64 bzImage (often /boot/vmlinuz-RELEASE) or an uncompressed ELF vmlinux".into()
            }
            Self::NoElfKernel { .. } => {
                "import the kernel's uncompressed vmlinux (vm kernel import --kernel vmlinux), or use QEMU".into()
            }
            Self::KernelLacks { .. } => {
                "give the directory of its modules (/lib/modules/RELEASE), or use another kernel, e.g. the \
                 distribution's cloud kernel"
                    .into()
            }
            Self::KernelUnverifiable { .. } => {
                "give its modules directory (/lib/modules/RELEASE) or its build configuration \
                 (/boot/config-RELEASE)"
                    .into()
            }
            Self::ForeignModules { .. } => "give the modules directory of this very kernel".into(),
            Self::DamagedModule { .. } => "install the kernel's package again".into(),
            Self::NoKernelPackage { .. } => {
                "import a kernel from files, or add Debian's main archive to the host's package sources".into()
            }
            Self::Cancelled => return None,
        };
        Some(text)
    }
}

fn io_hint(error: &io::Error) -> Option<String> {
    use rustix::io::Errno;
    match Errno::from_io_error(error)? {
        Errno::NOSPC | Errno::DQUOT => Some("free space on the disk of the state directory".into()),
        Errno::ACCESS | Errno::PERM => Some("vmd needs to run as root to make images".into()),
        Errno::NOENT => Some("check the path".into()),
        _ => None,
    }
}

fn tool_hint(stderr: &str) -> Option<String> {
    let network = [
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Connection timed out",
        "Unable to connect",
        "Network is unreachable",
    ];
    if network.iter().any(|text| stderr.contains(text)) {
        return Some(
            "the package mirror cannot be reached: check the network, and http_proxy/https_proxy if a proxy is needed"
                .into(),
        );
    }
    if stderr.contains("No space left") {
        return Some("free space on the disk of the state directory".into());
    }
    if stderr.contains("NO_PUBKEY") || stderr.contains("keyring") {
        return Some("install or update package debian-archive-keyring".into());
    }
    if stderr.contains("Operation not permitted") || stderr.contains("Permission denied") {
        return Some("run vmd as root, outside of a restricted container".into());
    }
    None
}
