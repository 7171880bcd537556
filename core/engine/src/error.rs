//! What can go wrong in the engine: one variant per failed operation, each with a hint where a person can do something.

use std::{error::Error, path::PathBuf};

use vm_disk::DiskError;
use vm_image::ImageError;
use vm_net::NetError;
use vm_shim::{ControlError, ShimError};
use vm_store::StoreError;
use vm_types::{EffectId, VmName, shim::GuestEnd, vm::ExitStatus};
use vm_vmm::VmmError;

/// An engine's error.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An image that is not there and cannot be got either.
    #[error("there is no image {name} here, and it could not be pulled")]
    NotPulled {
        /// As it was asked for.
        name: String,
        /// Why not.
        source: Box<vm_oci::OciError>,
    },
    /// A kernel that VMs of an image boot.
    #[error("kernel {kernel} is what VMs of image {image} boot")]
    KernelOfImage {
        /// Which.
        kernel: vm_types::KernelId,
        /// One of the images.
        image: String,
    },
    /// Getting or giving an image.
    #[error(transparent)]
    Oci(Box<vm_oci::OciError>),
    /// A build file, or an instruction by itself, that cannot be understood.
    #[error(transparent)]
    BuildFile(#[from] crate::images::build::file::FileError),
    /// A catalogue of images that cannot be used.
    #[error("the catalogue {catalogue} cannot be used: {reason}")]
    Catalogue {
        /// Its path or address.
        catalogue: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory that a build takes files from.
    #[error(transparent)]
    BuildContext(#[from] crate::images::build::ContextError),
    /// A step of a build.
    #[error("line {line}: {}", first_line(text))]
    BuildStep {
        /// Where it begins in the file.
        line: usize,
        /// The instruction.
        text: String,
        /// Why it could not be done.
        source: Box<EngineError>,
    },
    /// A command of a build that failed.
    #[error("line {line}: {} failed with {how}{}", first_line(text), wrote(.output))]
    BuildCommand {
        /// Where it begins in the file.
        line: usize,
        /// The instruction.
        text: String,
        /// Its exit code or signal, in words.
        how: String,
        /// The end of what it wrote.
        output: String,
    },
    /// Acting in a running guest.
    #[error(transparent)]
    InGuest(Box<vm_guest::GuestError>),
    /// Workspaces, in or back.
    #[error(transparent)]
    Workspace(Box<crate::workspaces::WorkspacesError>),
    /// No such thing.
    #[error("there is no {what} {name}")]
    NotFound {
        /// `VM`, `image`, `kernel` or `operation`.
        what: &'static str,
        /// As it was asked for.
        name: String,
        /// What to do.
        hint: String,
    },
    /// An argument does not fit.
    #[error("{message}")]
    InvalidArgument {
        /// Which and why.
        message: String,
        /// What would fit.
        hint: String,
    },
    /// The VM's state does not allow it.
    #[error("VM {name} is {state}; it cannot be {wanted}")]
    WrongState {
        /// The VM.
        name: VmName,
        /// The state's word.
        state: &'static str,
        /// What was asked for, as a participle: `started`, `deleted`.
        wanted: &'static str,
    },
    /// Another operation has the VM.
    #[error("VM {name} is busy: {state}")]
    Busy {
        /// The VM.
        name: VmName,
        /// The state's word.
        state: &'static str,
    },
    /// A plugin says no, before anything was made.
    #[error("plugin {plugin} does not allow it: {message}")]
    Forbidden {
        /// Which.
        plugin: String,
        /// Why.
        message: String,
        /// What it says can be done.
        hint: Option<String>,
    },
    /// A plugin that is required failed.
    #[error(transparent)]
    Plugin(crate::ports::HookFailure),
    /// A tool of the host that a plugin's manifest names.
    #[error("the tool {} failed", program.display())]
    Tool {
        /// Which.
        program: PathBuf,
        /// How.
        source: vm_host::RunError,
    },
    /// Somebody cancelled the operation; it was undone.
    #[error("cancelled")]
    Cancelled,
    /// The daemon takes no new work.
    #[error("the daemon is on its way down")]
    ShuttingDown,
    /// No free address.
    #[error("no address is free in {subnet}")]
    AddressesExhausted {
        /// The subnet.
        subnet: String,
    },
    /// The limits of the configuration do not allow it; nothing was made.
    #[error("the limit of {what} leaves no room for {wanted}: {in_use} of {limit} are taken")]
    Admission {
        /// Of what there is too little.
        what: &'static str,
        /// How much was wanted.
        wanted: String,
        /// How much the others have.
        in_use: String,
        /// How much there is.
        limit: String,
        /// Who has most of it, and what to do.
        hint: String,
    },
    /// The guest's agent did not answer.
    #[error("the guest did not answer within {seconds} s{}", tail(.console))]
    GuestUnresponsive {
        /// The limit.
        seconds: u64,
        /// The console's end.
        console: String,
    },
    /// The agent answered that it cannot.
    #[error("the guest's agent could not {what}")]
    Guest {
        /// What it was asked for.
        what: &'static str,
        /// Why not.
        source: ControlError,
    },
    /// The VMM ended while the VM was started.
    #[error("the VMM ended with {status}{}{}", said(.log), tail(.console))]
    VmmDied {
        /// How.
        status: ExitStatus,
        /// What the VMM said.
        log: String,
        /// The console's end.
        console: String,
    },
    /// The guest ended its machine while it was started, or by a panic.
    #[error("{how}{}", tail(.console))]
    GuestEnded {
        /// How.
        how: GuestEnd,
        /// The console's end.
        console: String,
    },
    /// The agent binary is not where it should be.
    #[error("the guest agent {} cannot be read", path.display())]
    Agent {
        /// Where it was looked for.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An SSH key could not be made or read.
    #[error("could not {action} the SSH key {}", path.display())]
    Key {
        /// `make` or `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A step could not be journaled, so it was not taken.
    #[error("could not record a step in the journal {}", path.display())]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file of the daemon's own.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An effect could not be undone; it stays in the journal and is tried again.
    #[error("could not undo {id}")]
    Undo {
        /// The effect.
        id: EffectId,
        /// Why not.
        source: Box<EngineError>,
    },
    /// A test's failpoint.
    #[error("the failpoint {point} says so")]
    Injected {
        /// The point's name.
        point: String,
        /// What it was told to fail with.
        source: std::io::Error,
    },
    /// A bug.
    #[error("a bug ended the operation: {detail}")]
    Panicked {
        /// What the runtime says.
        detail: String,
    },
    /// The store.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// The network layer.
    #[error(transparent)]
    Net(Box<NetError>),
    /// The disk layer.
    #[error(transparent)]
    Disk(Box<DiskError>),
    /// The image layer.
    #[error(transparent)]
    Image(Box<ImageError>),
    /// The VMM driver.
    #[error(transparent)]
    Vmm(Box<VmmError>),
    /// The shim.
    #[error(transparent)]
    Shim(Box<ShimError>),
}

macro_rules! layer {
    ($($variant:ident($error:ty),)*) => {
        // Boxed, so that the result of every function here stays small.
        $(impl From<$error> for EngineError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        })*
    };
}

layer! {
    Store(StoreError),
    Net(NetError),
    Disk(DiskError),
    Image(ImageError),
    Vmm(VmmError),
    Shim(ShimError),
    Oci(vm_oci::OciError),
    InGuest(vm_guest::GuestError),
    Workspace(crate::workspaces::WorkspacesError),
}

impl EngineError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { hint, .. } | Self::InvalidArgument { hint, .. } | Self::Admission { hint, .. } => {
                Some(hint.clone())
            }
            Self::WrongState { name, wanted, .. } => Some(match *wanted {
                "started" => format!("`vm show {name}` tells more; `vm ssh {name}` logs in to a running one, `vm resume {name}` lets a paused one run"),
                "paused" => format!("start it first with `vm start {name}`"),
                "committed" => format!("`vm resume {name}` lets it run; `vm stop {name}` turns it off"),
                "deleted" => format!("stop it first with `vm stop {name}`, or use `vm delete --force {name}`"),
                _ => format!("`vm show {name}` tells more"),
            }),
            Self::Busy { name, .. } => {
                Some(format!("wait for it, or end it with `vm kill {name}`; `vm show {name}` tells more"))
            }
            Self::AddressesExhausted { .. } => {
                Some("delete VMs you no longer need, or set a larger network.subnet in the configuration".into())
            }
            Self::GuestUnresponsive { .. } => Some(
                "read the whole console with `vm logs`; on a slow host raise start_timeout_seconds in the configuration".into(),
            ),
            Self::VmmDied { .. } => {
                Some("`vm doctor` checks the VMM; `vm logs` shows the console; more memory (--memory) may help".into())
            }
            Self::GuestEnded { how: GuestEnd::Panic, .. } => {
                Some("`vm logs` shows the whole console; more memory (--memory) or another kernel may help".into())
            }
            Self::GuestEnded { .. } => Some("`vm logs` shows the whole console".into()),
            Self::Agent { .. } => Some("vm-agent belongs beside vmd; or set `agent` in the configuration".into()),
            Self::Journal { source, .. } | Self::File { source, .. } | Self::Injected { source, .. } => io_hint(source),
            Self::Undo { .. } => Some("mend the cause, then delete the VM again or restart the daemon".into()),
            Self::Store(error) => error.hint(),
            Self::Net(error) => error.hint(),
            Self::Disk(error) => error.hint(),
            Self::Image(error) => error.hint(),
            Self::KernelOfImage { image, .. } => {
                Some(format!("delete the image first with `vm image delete {image}`, or register it with another kernel"))
            }
            Self::Oci(error) => Some(error.hint()),
            Self::Catalogue { .. } => {
                Some("docs/images.md says what is in one; images.catalogues in config.toml names them".into())
            }
            Self::BuildFile(error) => Some(error.hint.clone()),
            Self::BuildContext(error) => Some(error.hint()),
            Self::BuildStep { source, .. } => source.hint(),
            Self::BuildCommand { .. } => Some(
                "try it by hand: vm run --image IMAGE, with the image that the last FROM names; steps before it are kept".into(),
            ),
            Self::Workspace(error) => error.hint(),
            Self::InGuest(error) => error.hint().map(str::to_owned),
            Self::NotPulled { source, .. } => {
                Some(format!("{}; `vm image ls` lists the images that are here", source.hint()))
            }
            Self::Vmm(error) => error.hint(),
            Self::Shim(error) => error.hint(),
            Self::Guest { source, .. } => source.hint(),
            Self::Forbidden { hint, .. } => hint.clone(),
            Self::Plugin(failure) => failure.hint.clone(),
            Self::Tool { .. } => Some("run it by hand to see why; a plugin's manifest names it".into()),
            Self::ShuttingDown => Some("start it again with `vm daemon start`".into()),
            Self::Cancelled | Self::Key { .. } | Self::Panicked { .. } => None,
        }
    }

    /// The message with all its causes.
    pub fn chain(&self) -> String {
        vm_types::report::chain(self)
    }
}

pub(crate) fn io_hint(error: &std::io::Error) -> Option<String> {
    (error.kind() == std::io::ErrorKind::StorageFull).then(|| {
        "free some space on the disk of the state directory; `vm image ls` shows what images take".into()
    })
}

/// Enough of an instruction to know it by.
fn first_line(text: &str) -> String {
    const MOST: usize = 120;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn wrote(output: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<_> = output.trim_end().lines().collect();
    let last = lines[lines.len().saturating_sub(LINES)..].join("\n");
    if last.is_empty() { String::new() } else { format!("; its output ends with:\n{last}") }
}

fn tail(console: &str) -> String {
    let console = console.trim();
    if console.is_empty() {
        "; its console is empty".into()
    } else {
        format!("; its console ends with:\n{console}")
    }
}

fn said(log: &str) -> String {
    let log = log.trim();
    if log.is_empty() { String::new() } else { format!(" and said: {log}") }
}
