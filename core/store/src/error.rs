//! Everything that can go wrong with the store.

use std::{io, net::Ipv4Addr, path::PathBuf};

use vm_types::{ImageDigest, KernelId, VmId, VmName};

/// A failed operation on the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database file or its directory cannot be opened or made.
    #[error("could not open the database {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// The file is no SQLite database or a damaged one.
    #[error("the database {path} is damaged: {detail}", path = .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// A healthy SQLite database, but of another program.
    #[error("the database {path} belongs to another program (application id {application_id:#x})", path = .path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        application_id: i32,
    },
    /// Bringing the schema up to date failed; the database is as it was.
    #[error("could not bring the database {path} up to date", path = .path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite_migration::Error,
    },
    /// The store's thread could not be started.
    #[error("could not start the store's thread")]
    Thread {
        /// Why.
        source: io::Error,
    },
    /// The store's thread is gone or gave no answer.
    #[error("the store does not answer")]
    Gone,
    /// A statement failed.
    #[error("could not {action}")]
    Query {
        /// What was being done, e.g. `insert a VM`.
        action: &'static str,
        /// Why.
        source: rusqlite::Error,
    },
    /// A stored value does not have the form it should have.
    #[error("the database holds an unreadable {what}: {value:?}")]
    BadValue {
        /// Table and column.
        what: &'static str,
        /// What is there.
        value: String,
        /// Why it cannot be read.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A value cannot be stored.
    #[error("could not encode {what} for the database")]
    Encode {
        /// Table and column.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// Another VM has that name.
    #[error("a VM named {name} already exists")]
    NameTaken {
        /// The name.
        name: VmName,
    },
    /// Another VM has that address.
    #[error("another VM has the address {address}")]
    AddressTaken {
        /// The address.
        address: Ipv4Addr,
    },
    /// There is no VM of that id.
    #[error("there is no VM {id}")]
    NoSuchVm {
        /// The id.
        id: VmId,
    },
    /// The image is not in the catalogue.
    #[error("there is no image {digest}")]
    NoSuchImage {
        /// Its digest.
        digest: ImageDigest,
    },
    /// The kernel is not in the catalogue.
    #[error("there is no kernel {id}")]
    NoSuchKernel {
        /// Its id.
        id: KernelId,
    },
    /// VMs are made from the image.
    #[error("image {digest} is used by {vms}", digest = .digest.short(), vms = names(.vms))]
    ImageInUse {
        /// The image.
        digest: ImageDigest,
        /// Who uses it.
        vms: Vec<VmName>,
    },
    /// VMs boot the kernel.
    #[error("kernel {id} is used by {vms}", vms = names(.vms))]
    KernelInUse {
        /// The kernel.
        id: KernelId,
        /// Who uses it.
        vms: Vec<VmName>,
    },
    /// A shortened id or a release fits more than one thing.
    #[error("{given:?} fits more than one {what}: {}", .matches.join(", "))]
    Ambiguous {
        /// `image` or `kernel`.
        what: &'static str,
        /// What was asked for.
        given: String,
        /// What it fits.
        matches: Vec<String>,
    },
}

fn names(vms: &[VmName]) -> String {
    vms.iter().map(VmName::as_str).collect::<Vec<_>>().join(", ")
}

impl StoreError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Open { path, .. } => format!(
                "check that {} exists, that the daemon may write to it, and that the disk is not full",
                path.parent().unwrap_or(path).display()
            ),
            Self::Corrupt { path, .. } => format!(
                "restore {0} from a backup, or move {0} with its -wal and -shm files away: \
                 the daemon then starts with an empty list of VMs, their disks stay where they are",
                path.display()
            ),
            Self::NotOurs { .. } => "point the daemon's state directory at a directory of its own".to_owned(),
            Self::Migrate { path, .. } => {
                format!("free some disk space and start the daemon again; {} is unchanged", path.display())
            }
            Self::Thread { .. } | Self::Gone => "restart the daemon; its log says more".to_owned(),
            Self::Query { .. } => {
                "check the disk's free space and health; the daemon's log says more".to_owned()
            }
            Self::BadValue { .. } => {
                "a newer daemon may have written it: run that version, or restore the database from a backup"
                    .to_owned()
            }
            Self::Encode { .. } => return None,
            Self::NameTaken { name } => {
                format!(
                    "choose another name, log in to that one (vm ssh {name}), or delete it: vm rm --force {name}"
                )
            }
            Self::AddressTaken { .. } => "try again; the next free address is used".to_owned(),
            Self::NoSuchVm { .. } => "`vm ls` lists the VMs there are".to_owned(),
            Self::NoSuchImage { .. } => {
                "`vm image ls` lists the images there are, `vm image pull` gets one".to_owned()
            }
            Self::NoSuchKernel { .. } => "`vm kernel ls` lists the kernels there are".to_owned(),
            Self::ImageInUse { .. } | Self::KernelInUse { .. } => {
                "delete these VMs first, with `vm rm`".to_owned()
            }
            Self::Ambiguous { .. } => "give more of its digits".to_owned(),
        })
    }
}
