//! From the layers' errors to the interface's: one exhaustive match for each, so that a new variant must be placed.

use vm_api::{ErrorKind, Problem};
use vm_disk::DiskError;
use vm_engine::EngineError;
use vm_image::ImageError;
use vm_net::NetError;
use vm_plugin::LoadError;
use vm_shim::ShimError;
use vm_store::StoreError;
use vm_vmm::VmmError;

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
        EngineError::Vmm(error) => vmm(error),
        EngineError::Shim(error) => shim(error),
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
        ImageError::Cancelled => ErrorKind::Cancelled,
        ImageError::NoKernelPackage { .. } => ErrorKind::HostFailure,
        ImageError::Worker { .. } => ErrorKind::Internal,
    }
}

fn content(error: &vm_oci::OciError) -> ErrorKind {
    use vm_oci::OciError;
    match error {
        OciError::Reference { .. } | OciError::Source { .. } | OciError::Ambiguous { .. } => {
            ErrorKind::InvalidArgument
        }
        OciError::NotFound { .. } | OciError::NoEntry { .. } => ErrorKind::NotFound,
        OciError::Unauthorized { .. } | OciError::LoginRefused { .. } => ErrorKind::PermissionDenied,
        OciError::Platform { .. } | OciError::MediaType { .. } | OciError::Foreign { .. } => {
            ErrorKind::Unsupported
        }
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
