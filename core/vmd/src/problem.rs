//! From the layers' errors to the interface's: one exhaustive match for each, so that a new variant must be placed.

use vm_api::{ErrorKind, Problem};
use vm_disk::DiskError;
use vm_engine::{ContextError, EngineError, workspaces::WorkspacesError};
use vm_image::ImageError;
use vm_net::NetError;
use vm_plugin::LoadError;
use vm_shim::ShimError;
use vm_store::StoreError;
use vm_types::guest::files::code;
use vm_vmm::VmmError;
use vm_workspace::{GitError, WorkspaceError, export::ExportError};

use crate::plugins::{OciError, PluginsError};

/// An engine's error as clients meet it: causes in the message, hint apart.
pub(crate) fn problem(error: &EngineError) -> Problem {
    Problem { kind: kind(error), message: error.chain(), hint: error.hint() }
}

fn kind(error: &EngineError) -> ErrorKind {
    match error {
        EngineError::NotFound { .. } => ErrorKind::NotFound,
        EngineError::InvalidArgument { .. } => ErrorKind::InvalidArgument,
        EngineError::WrongState { .. } | EngineError::Busy { .. } => ErrorKind::WrongState,
        EngineError::Cancelled => ErrorKind::Cancelled,
        EngineError::ShuttingDown => ErrorKind::ShuttingDown,
        EngineError::AddressesExhausted { .. } | EngineError::Admission { .. } => ErrorKind::NoSpace,
        EngineError::GuestUnresponsive { .. } | EngineError::Guest { .. } => ErrorKind::GuestUnresponsive,
        EngineError::VmmDied { .. } | EngineError::GuestEnded { .. } => ErrorKind::VmmDied,
        EngineError::Agent { .. } => ErrorKind::NotInstalled,
        EngineError::Key { .. } | EngineError::Undo { .. } => ErrorKind::HostFailure,
        EngineError::Journal { source, .. }
        | EngineError::File { source, .. }
        | EngineError::Injected { source, .. } => io(source),
        EngineError::Panicked { .. } => ErrorKind::Internal,
        EngineError::Forbidden { .. } => ErrorKind::PluginRefused,
        EngineError::Plugin(_) => ErrorKind::PluginFailed,
        EngineError::Tool { source, .. } => match source {
            vm_host::RunError::NotInstalled { .. } => ErrorKind::NotInstalled,
            vm_host::RunError::Io { source, .. } => io(source),
            vm_host::RunError::Failed { .. } | vm_host::RunError::TimedOut { .. } => ErrorKind::HostFailure,
        },
        EngineError::Store(error) => store(error),
        EngineError::Net(error) => net(error),
        EngineError::Disk(error) => disk(error),
        EngineError::Image(error) => image(error),
        EngineError::KernelOfImage { .. } => ErrorKind::InUse,
        EngineError::NotPulled { .. } => ErrorKind::NotFound,
        EngineError::Oci(error) => content(error),
        EngineError::BuildFile(_) => ErrorKind::InvalidArgument,
        EngineError::BuildContext(error) => build_context(error),
        EngineError::BuildStep { source, .. } => kind(source),
        EngineError::BuildCommand { .. } => ErrorKind::CommandFailed,
        EngineError::Catalogue { .. } => ErrorKind::HostFailure,
        EngineError::InGuest(error) => error.kind(),
        EngineError::Workspace(error) => workspace(error),
        EngineError::Vmm(error) => vmm(error),
        EngineError::Shim(error) => shim(error),
    }
}

fn workspace(error: &WorkspacesError) -> ErrorKind {
    match error {
        WorkspacesError::Host(error) => host(error),
        WorkspacesError::Export(error) => export(error),
        WorkspacesError::NotUp { .. } | WorkspacesError::Unfinished { .. } => ErrorKind::WrongState,
        WorkspacesError::Down { .. } => ErrorKind::Cancelled,
        WorkspacesError::NoOffer { .. } => ErrorKind::Unsupported,
        WorkspacesError::Settings { .. }
        | WorkspacesError::Destination { .. }
        | WorkspacesError::Relative { .. }
        | WorkspacesError::Several { .. } => ErrorKind::InvalidArgument,
        WorkspacesError::Import(error) => match error.source.code.as_str() {
            "workspace.destination-not-empty" | "workspace.guest-changed" | "workspace.not-prepared" => {
                ErrorKind::WrongState
            }
            code::NO_SPACE => ErrorKind::NoSpace,
            code::NO_USER => ErrorKind::NotFound,
            "guest.unresponsive" => ErrorKind::GuestUnresponsive,
            _ => ErrorKind::PluginFailed,
        },
        WorkspacesError::NotPrepared { .. } | WorkspacesError::NoPatch { .. } => ErrorKind::NotFound,
        WorkspacesError::File { source, .. } => io(source),
    }
}

fn host(error: &WorkspaceError) -> ErrorKind {
    match error {
        WorkspaceError::Open { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ErrorKind::NotFound
        }
        WorkspaceError::Open { source, .. }
        | WorkspaceError::Read { source, .. }
        | WorkspaceError::Output { source }
        | WorkspaceError::Scratch { source, .. }
        | WorkspaceError::Baseline { source, .. } => io(source),
        WorkspaceError::NotADirectory { .. }
        | WorkspaceError::Bare { .. }
        | WorkspaceError::WithinGit { .. }
        | WorkspaceError::NotARepository { .. } => ErrorKind::InvalidArgument,
        WorkspaceError::NoSuchFile { .. } => ErrorKind::NotFound,
        WorkspaceError::ForeignRepository { .. } | WorkspaceError::Identity { .. } => {
            ErrorKind::PermissionDenied
        }
        WorkspaceError::NoCommit { .. }
        | WorkspaceError::BaseGone { .. }
        | WorkspaceError::Changing { .. } => ErrorKind::WrongState,
        WorkspaceError::Git { source: GitError::NotInstalled, .. } => ErrorKind::NotInstalled,
        WorkspaceError::Cancelled => ErrorKind::Cancelled,
        WorkspaceError::Ask { .. } => ErrorKind::GuestUnresponsive,
        _ => ErrorKind::HostFailure,
    }
}

fn export(error: &ExportError) -> ErrorKind {
    match error {
        ExportError::Workspace(error) => host(error),
        ExportError::Survey { .. }
        | ExportError::Archive { .. }
        | ExportError::Unasked { .. }
        | ExportError::TooMuch
        | ExportError::History { .. }
        | ExportError::Refused { .. } => ErrorKind::GuestUnresponsive,
        ExportError::NotFetched { .. } | ExportError::NotWished { .. } => ErrorKind::Internal,
        ExportError::Scratch { source, .. }
        | ExportError::Room { source, .. }
        | ExportError::Host { source, .. }
        | ExportError::Output { source } => io(source),
        ExportError::BranchName { .. } => ErrorKind::InvalidArgument,
        ExportError::BranchDiverged { .. } | ExportError::BranchInTheWay { .. } => ErrorKind::AlreadyExists,
        ExportError::BranchCheckedOut { .. } => ErrorKind::InUse,
    }
}

fn build_context(error: &ContextError) -> ErrorKind {
    match error {
        ContextError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ErrorKind::NotFound
        }
        ContextError::Read { source, .. } => io(source),
        ContextError::Missing { .. } => ErrorKind::NotFound,
        ContextError::Ignore { .. }
        | ContextError::Outside { .. }
        | ContextError::Pattern { .. }
        | ContextError::Kind { .. } => ErrorKind::InvalidArgument,
        ContextError::Changed { .. } => ErrorKind::InUse,
    }
}

/// An error of the plugins' manager as clients meet it.
pub(crate) fn plugins(error: &PluginsError) -> Problem {
    Problem { kind: plugins_kind(error), message: vm_types::report::chain(error), hint: error.hint() }
}

fn plugins_kind(error: &PluginsError) -> ErrorKind {
    match error {
        PluginsError::Unknown { .. } | PluginsError::NotBundled { .. } | PluginsError::NoCall { .. } => {
            ErrorKind::NotFound
        }
        PluginsError::Installed { .. } => ErrorKind::AlreadyExists,
        PluginsError::Source { .. }
        | PluginsError::Grant { .. }
        | PluginsError::Twice { .. }
        | PluginsError::Order(_) => ErrorKind::InvalidArgument,
        PluginsError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ErrorKind::NotFound
        }
        PluginsError::Read { source, .. } | PluginsError::Write { source, .. } => io(source),
        PluginsError::Manifest { .. } | PluginsError::Large { .. } | PluginsError::Digest { .. } => {
            ErrorKind::PluginFailed
        }
        PluginsError::Changed { .. } | PluginsError::NotReplayable { .. } => ErrorKind::WrongState,
        PluginsError::Engine(error) => kind(error),
        PluginsError::Undo(error) => kind(error),
        PluginsError::Broken { .. } => ErrorKind::Internal,
        PluginsError::Store(error) => store(error),
        PluginsError::Oci(error) => oci(error),
        PluginsError::Load(error) => load(error),
    }
}

fn oci(error: &OciError) -> ErrorKind {
    match error {
        OciError::Reference { .. } | OciError::Ambiguous { .. } => ErrorKind::InvalidArgument,
        OciError::NotFound { .. } | OciError::NoEntry { .. } => ErrorKind::NotFound,
        OciError::Layout { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ErrorKind::NotFound
        }
        OciError::Layout { source, .. } | OciError::Credentials { source, .. } => io(source),
        OciError::Unauthorized { .. } | OciError::Unsigned { .. } => ErrorKind::PermissionDenied,
        // A mistake of the operator's, whoever meets it.
        OciError::Key { .. } => ErrorKind::HostFailure,
        OciError::Unreachable { .. } | OciError::Stalled { .. } | OciError::Answer { .. } => {
            ErrorKind::HostFailure
        }
        OciError::Outside { .. }
        | OciError::Malformed { .. }
        | OciError::Index
        | OciError::NotWasm { .. }
        | OciError::Missing { .. }
        | OciError::Several { .. }
        | OciError::Large { .. }
        | OciError::Size { .. }
        | OciError::Digest { .. }
        | OciError::Files { .. } => ErrorKind::PluginFailed,
    }
}

fn load(error: &LoadError) -> ErrorKind {
    match error {
        LoadError::Config { .. } => ErrorKind::InvalidArgument,
        LoadError::Cache { .. } => ErrorKind::HostFailure,
        LoadError::Read { source, .. } => io(source),
        LoadError::Manifest { .. }
        | LoadError::Compile { .. }
        | LoadError::Version { .. }
        | LoadError::Import { .. }
        | LoadError::Link { .. }
        | LoadError::Empty { .. } => ErrorKind::PluginFailed,
    }
}

fn io(error: &std::io::Error) -> ErrorKind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        _ => ErrorKind::HostFailure,
    }
}

fn store(error: &StoreError) -> ErrorKind {
    match error {
        StoreError::NameTaken { .. } => ErrorKind::AlreadyExists,
        StoreError::NoSuchVm { .. } | StoreError::NoSuchImage { .. } | StoreError::NoSuchKernel { .. } => {
            ErrorKind::NotFound
        }
        StoreError::ImageInUse { .. } | StoreError::KernelInUse { .. } => ErrorKind::InUse,
        StoreError::Ambiguous { .. } => ErrorKind::InvalidArgument,
        StoreError::AddressTaken { .. }
        | StoreError::Open { .. }
        | StoreError::Corrupt { .. }
        | StoreError::NotOurs { .. }
        | StoreError::Migrate { .. }
        | StoreError::Thread { .. }
        | StoreError::Gone
        | StoreError::Query { .. }
        | StoreError::BadValue { .. }
        | StoreError::Encode { .. } => ErrorKind::Internal,
    }
}

fn net(error: &NetError) -> ErrorKind {
    match error {
        NetError::SubnetClash { .. }
        | NetError::NoFreeSubnet { .. }
        | NetError::Foreign { .. }
        | NetError::PortTaken { .. } => ErrorKind::NetworkClash,
        NetError::Port { .. }
        | NetError::PortFamily { .. }
        | NetError::BadRule { .. }
        | NetError::BadDomain { .. } => ErrorKind::InvalidArgument,
        NetError::NotMine { .. } | NetError::BadName { .. } | NetError::BadKey { .. } => ErrorKind::Internal,
        NetError::Socket { .. }
        | NetError::Netlink { .. }
        | NetError::Tap { .. }
        | NetError::Nft { .. }
        | NetError::NftAnswer { .. }
        | NetError::Sysctl { .. }
        | NetError::Died { .. }
        | NetError::Resolvers { .. }
        | NetError::NoTable { .. }
        | NetError::Resolvectl { .. }
        | NetError::Injected { .. } => ErrorKind::HostFailure,
    }
}

fn disk(error: &DiskError) -> ErrorKind {
    match error {
        DiskError::NoSpace { .. } => ErrorKind::NoSpace,
        DiskError::SmallerThanBase { .. } | DiskError::TooSmall { .. } => ErrorKind::InvalidArgument,
        DiskError::Unsupported { .. } | DiskError::Filesystem { .. } => ErrorKind::Unsupported,
        DiskError::Io { source, .. } => io(source),
        DiskError::Cancelled { .. } => ErrorKind::Cancelled,
        DiskError::NotMine { .. } | DiskError::OutsideRoots { .. } => ErrorKind::Internal,
        DiskError::Foreign { .. }
        | DiskError::InUse { .. }
        | DiskError::Tool { .. }
        | DiskError::Died { .. }
        | DiskError::Device { .. }
        | DiskError::Busy { .. }
        | DiskError::Invalid { .. }
        | DiskError::Injected { .. } => ErrorKind::HostFailure,
    }
}

fn image(error: &ImageError) -> ErrorKind {
    match error {
        ImageError::InvalidReference { .. } | ImageError::UnknownSuite { .. } => ErrorKind::InvalidArgument,
        ImageError::TruncatedArchive { .. }
        | ImageError::Bundle { .. }
        | ImageError::NotAFilesystem { .. }
        | ImageError::RegisteredChanged { .. }
        | ImageError::CorruptArchive { .. }
        | ImageError::RefusedEntry { .. }
        | ImageError::NotAKernel { .. }
        | ImageError::NoElfKernel { .. }
        | ImageError::KernelLacks { .. }
        | ImageError::KernelUnverifiable { .. }
        | ImageError::ForeignModules { .. }
        | ImageError::DamagedModule { .. } => ErrorKind::BadImage,
        ImageError::Tool { source, .. } => match source {
            vm_host::RunError::NotInstalled { .. } => ErrorKind::NotInstalled,
            vm_host::RunError::Io { source, .. } => io(source),
            vm_host::RunError::Failed { .. } | vm_host::RunError::TimedOut { .. } => ErrorKind::HostFailure,
        },
        ImageError::File { source, .. }
        | ImageError::Entry { source, .. }
        | ImageError::ReadArchive { source, .. } => io(source),
        ImageError::Exists { .. } => ErrorKind::AlreadyExists,
        ImageError::Cancelled => ErrorKind::Cancelled,
        ImageError::NoKernelPackage { .. } => ErrorKind::HostFailure,
        ImageError::Worker { .. } => ErrorKind::Internal,
    }
}

fn content(error: &vm_oci::OciError) -> ErrorKind {
    use vm_oci::OciError;
    match error {
        OciError::Reference { .. }
        | OciError::Source { .. }
        | OciError::Address { .. }
        | OciError::Ambiguous { .. } => ErrorKind::InvalidArgument,
        OciError::NotFound { .. } | OciError::NoEntry { .. } => ErrorKind::NotFound,
        OciError::Unauthorized { .. } | OciError::LoginRefused { .. } => ErrorKind::PermissionDenied,
        OciError::Platform { .. }
        | OciError::MediaType { .. }
        | OciError::ArtifactType { .. }
        | OciError::Foreign { .. } => ErrorKind::Unsupported,
        OciError::NoImage { .. }
        | OciError::Malformed { .. }
        | OciError::Large { .. }
        | OciError::Size { .. }
        | OciError::Digest { .. }
        | OciError::NoPart { .. }
        | OciError::Outside { .. } => ErrorKind::BadImage,
        OciError::Exists { .. } => ErrorKind::AlreadyExists,
        OciError::InUse { .. } => ErrorKind::InUse,
        OciError::Read { source, .. } | OciError::Store { source, .. } | OciError::Export { source, .. } => {
            io(source)
        }
        _ => ErrorKind::HostFailure,
    }
}

fn vmm(error: &VmmError) -> ErrorKind {
    match error {
        VmmError::Unsupported { .. }
        | VmmError::NoDriver { .. }
        | VmmError::TooOld { .. }
        | VmmError::NoJail { .. }
        | VmmError::NoKvm { .. } => ErrorKind::Unsupported,
        VmmError::NotInstalled { .. } => ErrorKind::NotInstalled,
        VmmError::BadMachine { .. } => ErrorKind::InvalidArgument,
        VmmError::NotUp { .. } => ErrorKind::VmmDied,
        VmmError::Growth { .. } => ErrorKind::InvalidArgument,
        VmmError::NoDrive { .. } => ErrorKind::Internal,
        VmmError::Probe { .. }
        | VmmError::NoVersion { .. }
        | VmmError::Behaviour { .. }
        | VmmError::Image { .. }
        | VmmError::Machine { .. }
        | VmmError::Control { .. } => ErrorKind::HostFailure,
    }
}

fn shim(error: &ShimError) -> ErrorKind {
    match error {
        ShimError::NotRunning { .. } => ErrorKind::VmmDied,
        ShimError::Read { source, .. } | ShimError::Spawn { source, .. } => io(source),
        ShimError::Refused { .. }
        | ShimError::NoAnswer { .. }
        | ShimError::StartTimedOut { .. }
        | ShimError::Talk { .. }
        | ShimError::TimedOut { .. }
        | ShimError::Unexpected { .. }
        | ShimError::Signal { .. }
        | ShimError::StillRunning { .. } => ErrorKind::HostFailure,
    }
}
