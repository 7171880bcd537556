//! The traits, one per namespace. A VM is named by its name or id.

// The client halves spell their results otherwise.
#[cfg(feature = "server")]
use jsonrpsee::core::RpcResult;
use jsonrpsee::proc_macros::rpc;

use crate::{daemon::*, image::*, operation::*, plugin::*, vm::*, workspace::*};

/// VMs.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "vm", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "vm", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "vm", namespace_separator = ".")
)]
pub trait Vm {
    /// Makes a VM, and starts it if asked; the operation's result is a [`VmInfo`].
    #[method(name = "create", with_extensions)]
    async fn create(&self, params: CreateVm) -> RpcResult<Begun>;
    /// Starts a VM; the result is a [`VmInfo`].
    #[method(name = "start")]
    async fn start(&self, vm: String) -> RpcResult<Begun>;
    /// Shuts a VM down, and kills it when its grace is over; the result is a [`VmInfo`].
    #[method(name = "stop")]
    async fn stop(&self, vm: String, params: StopVm) -> RpcResult<Begun>;
    /// Ends a VM at once; the result is a [`VmInfo`].
    #[method(name = "kill")]
    async fn kill(&self, vm: String) -> RpcResult<Begun>;
    /// Stops a VM, if it is up, and starts it; the result is a [`VmInfo`].
    #[method(name = "restart")]
    async fn restart(&self, vm: String, params: StopVm) -> RpcResult<Begun>;
    /// Halts a running VM's CPUs; the result is a [`VmInfo`].
    #[method(name = "pause")]
    async fn pause(&self, vm: String) -> RpcResult<Begun>;
    /// Lets a paused VM run; the result is a [`VmInfo`].
    #[method(name = "resume")]
    async fn resume(&self, vm: String) -> RpcResult<Begun>;
    /// Changes a VM; the result is a [`VmChanged`].
    #[method(name = "set")]
    async fn set(&self, vm: String, params: SetVm) -> RpcResult<Begun>;
    /// Deletes VMs that are off; the result is a [`Pruned`].
    #[method(name = "prune")]
    async fn prune(&self, params: PruneVms) -> RpcResult<Begun>;
    /// Deletes a VM with its disk. One that is up is refused unless `force`.
    #[method(name = "delete")]
    async fn delete(&self, vm: String, force: bool) -> RpcResult<Begun>;
    /// All VMs, by name; what their disks take may be a second old (see [`VmInfo`]).
    #[method(name = "list")]
    async fn list(&self) -> RpcResult<VmList>;
    /// One VM; all of it is as of now.
    #[method(name = "get")]
    async fn get(&self, vm: String) -> RpcResult<VmInfo>;
    /// How to log in to a running VM.
    #[method(name = "access")]
    async fn access(&self, vm: String) -> RpcResult<GuestAccess>;
    /// What a start would do by the plugins that are enabled now; changes nothing.
    #[method(name = "plan")]
    async fn plan(&self, vm: String) -> RpcResult<VmPlan>;
    /// What a VM's creation with `start` would do by the plugins that are enabled now; changes nothing, in the store neither.
    ///
    /// A server checks and completes the parameters as [`Self::create`] does and gives its plugins what they would be told of
    /// that VM: an id that no VM has, a name that is made up if there is none, and the image and kernel that it would get. One that
    /// would have to be acquired first is not: that is [`crate::ErrorKind::NotFound`], with the command that acquires it as
    /// hint. A name that is taken is [`crate::ErrorKind::AlreadyExists`]. A plugin's refusal is no error but a finding.
    #[method(name = "plan_create")]
    async fn plan_create(&self, params: CreateVm) -> RpcResult<VmPlan> {
        let _ = params;
        let problem = crate::Problem::new(
            crate::ErrorKind::Unsupported,
            "this daemon plans only for VMs that are there",
        );
        Err(problem.hint("make the VM without starting it, then `vm plan start NAME`").into())
    }
    /// The end of the console log, `bytes` at most.
    #[method(name = "console")]
    async fn console(&self, vm: String, bytes: u64) -> RpcResult<ConsoleChunk>;
    /// The end of the console log and what comes after it, until the VM is off or the client leaves.
    #[subscription(name = "console_subscribe" => "console_chunk", unsubscribe = "console_unsubscribe", item = ConsoleChunk)]
    async fn console_follow(&self, vm: String, bytes: u64) -> jsonrpsee::core::SubscriptionResult;
}

/// Images.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "image", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "image", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "image", namespace_separator = ".")
)]
pub trait Image {
    /// Acquires an image: `debian:SUITE`, a registry's, or one of a layout or archive (`oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`,
    /// `docker-archive:FILE[:TAG]`, with absolute paths). It gets `name`, else its own. The result is an [`ImageRecord`].
    #[method(name = "pull")]
    async fn pull(&self, reference: String, name: Option<String>) -> RpcResult<Begun>;
    /// Makes an image of a VM's root filesystem; the result is a [`MadeImage`].
    #[method(name = "commit")]
    async fn commit(&self, params: CommitImage) -> RpcResult<Begun>;
    /// Builds an image by a Dockerfile; the result is a [`MadeImage`]. What its commands write is said by the operation, see
    /// [`Operation::output`].
    #[method(name = "build")]
    async fn build(&self, params: BuildImage) -> RpcResult<Begun>;
    /// Sends an image to a registry, under its own name or another; the result is its [`ImageRecord`].
    #[method(name = "push")]
    async fn push(&self, image: String, to: Option<String>) -> RpcResult<Begun>;
    /// Writes an image to a file or directory; the result is its [`ImageRecord`].
    #[method(name = "export")]
    async fn export(&self, params: ExportImage) -> RpcResult<Begun>;
    /// Asks a registry whether name and password are right, and keeps them if so.
    #[method(name = "login")]
    async fn login(&self, params: Login) -> RpcResult<()>;
    /// Forgets name and password at a registry.
    #[method(name = "logout")]
    async fn logout(&self, registry: String) -> RpcResult<()>;
    /// Removes images that no VM uses.
    #[method(name = "prune")]
    async fn prune(&self, params: PruneImages) -> RpcResult<PrunedImages>;
    /// What images, kernels and VMs take on the disk.
    #[method(name = "disk_usage")]
    async fn disk_usage(&self) -> RpcResult<DiskUsage>;
    /// Imports what is in a file or directory; the result is an [`ImageRecord`].
    #[method(name = "import")]
    async fn import(&self, params: ImportImage) -> RpcResult<Begun>;
    /// What the configured catalogues have for this host; `catalogue:NAME` pulls one.
    #[method(name = "catalogue")]
    async fn catalogue(&self) -> RpcResult<Vec<CatalogueImage>>;
    /// Makes a file of the host's an image, which is used where it is and never written; the result is an [`ImageRecord`].
    #[method(name = "register")]
    async fn register(&self, params: RegisterImage) -> RpcResult<Begun>;
    /// Copies a registered image into the store; the result is an [`ImageRecord`].
    #[method(name = "promote")]
    async fn promote(&self, image: String) -> RpcResult<Begun>;
    /// Gives an image one more reference.
    #[method(name = "tag")]
    async fn tag(&self, image: String, reference: String) -> RpcResult<ImageRecord>;
    /// The image of a reference or digest.
    #[method(name = "show")]
    async fn show(&self, image: String) -> RpcResult<ImageRecord>;
    /// All images, without their histories.
    #[method(name = "list")]
    async fn list(&self) -> RpcResult<Vec<ImageRecord>>;
    /// Takes a reference from an image and deletes it with its last one; refused while a VM uses it.
    #[method(name = "delete")]
    async fn delete(&self, image: String) -> RpcResult<()>;
}

/// Kernels.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "kernel", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "kernel", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "kernel", namespace_separator = ".")
)]
pub trait Kernel {
    /// Imports a kernel; the result is a [`KernelRecord`].
    #[method(name = "import")]
    async fn import(&self, params: ImportKernel) -> RpcResult<Begun>;
    /// All kernels.
    #[method(name = "list")]
    async fn list(&self) -> RpcResult<Vec<KernelRecord>>;
    /// Deletes a kernel; refused while a VM uses it.
    #[method(name = "delete")]
    async fn delete(&self, kernel: String) -> RpcResult<()>;
}

/// Long operations.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "operation", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "operation", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "operation", namespace_separator = ".")
)]
pub trait Operation {
    /// Those at work and the last of the ended.
    #[method(name = "list")]
    async fn list(&self) -> RpcResult<Vec<OperationInfo>>;
    /// One of them.
    #[method(name = "get")]
    async fn get(&self, id: OperationId) -> RpcResult<OperationInfo>;
    /// Cancels it; what it had made is undone before it ends.
    #[method(name = "cancel")]
    async fn cancel(&self, id: OperationId) -> RpcResult<()>;
    /// What it says beside its progress, such as the output of a build's commands, as far back as it is kept, until its end.
    #[subscription(name = "output_subscribe" => "said", unsubscribe = "output_unsubscribe", item = OutputChunk)]
    async fn output(&self, id: OperationId) -> jsonrpsee::core::SubscriptionResult;
    /// Its state now and at each change, the last one being its end. With `cancel_on_close` the operation is cancelled when
    /// this subscription ends before it, for instance because its client is gone.
    #[subscription(name = "watch" => "changed", unsubscribe = "unwatch", item = OperationInfo)]
    async fn watch(
        &self,
        id: OperationId,
        cancel_on_close: Option<bool>,
    ) -> jsonrpsee::core::SubscriptionResult;
}

/// Workspaces: directories of the host in VMs. The rights that count on the host are those of whoever asks; root acts as the owner
/// of the workspace.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "workspace", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "workspace", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "workspace", namespace_separator = ".")
)]
pub trait Workspaces {
    /// Tells what would be done with a directory; the result is a [`WorkspacePlan`].
    #[method(name = "plan", with_extensions)]
    async fn plan(&self, params: PrepareWorkspace) -> RpcResult<Begun>;
    /// Sees beforehand whether a directory could be brought into a VM that is still to be made, and the work in it back: the operation
    /// fails as [`Self::prepare`] and [`Self::export`] would, as far as the host's side tells. Changes nothing; the result is a
    /// [`WorkspacePlan`].
    #[method(name = "check", with_extensions)]
    async fn check(&self, params: PrepareWorkspace, export: Option<ExportAs>) -> RpcResult<Begun>;
    /// Brings a directory into a running VM; the result is a [`PreparedWorkspace`].
    #[method(name = "prepare", with_extensions)]
    async fn prepare(&self, params: PrepareWorkspace) -> RpcResult<Begun>;
    /// The workspaces of a VM.
    #[method(name = "list")]
    async fn list(&self, vm: String) -> RpcResult<Vec<WorkspaceRecord>>;
    /// Tells what has changed since one was brought; the result is a [`WorkspaceStatus`].
    #[method(name = "status", with_extensions)]
    async fn status(&self, params: LookAtWorkspace) -> RpcResult<Begun>;
    /// Brings the guest's work back; the result is a [`WorkspaceExport`].
    #[method(name = "export", with_extensions)]
    async fn export(&self, params: ExportWorkspace) -> RpcResult<Begun>;
    /// The patch that an export has made, from `offset` on.
    #[method(name = "read_patch")]
    async fn read_patch(&self, operation: OperationId, offset: u64) -> RpcResult<PatchPiece>;
}

/// The daemon itself.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "daemon", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "daemon", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "daemon", namespace_separator = ".")
)]
pub trait Daemon {
    /// How it is.
    #[method(name = "status")]
    async fn status(&self) -> RpcResult<DaemonStatus>;
    /// Locks that are held or waited for, those that are held first.
    #[method(name = "locks")]
    async fn locks(&self) -> RpcResult<Vec<LockInfo>>;
    /// Ends it; VMs go on.
    #[method(name = "stop")]
    async fn stop(&self) -> RpcResult<()>;
    /// Checks the host.
    #[method(name = "doctor")]
    async fn doctor(&self) -> RpcResult<Vec<Finding>>;
}

/// What happened.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "event", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "event", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "event", namespace_separator = ".")
)]
pub trait Events {
    /// The last events after `after` (a sequence number; 0 for all that are kept), oldest first.
    #[method(name = "list")]
    async fn list(&self, after: u64) -> RpcResult<Vec<Event>>;
    /// The same, and then each event as it happens.
    #[subscription(name = "subscribe" => "happened", unsubscribe = "unsubscribe", item = Event)]
    async fn follow(&self, after: u64) -> jsonrpsee::core::SubscriptionResult;
}

/// Plugins. Each answers when it is done: none waits for a VM, and what takes longest is compiling a component.
#[cfg_attr(
    all(feature = "server", feature = "client"),
    rpc(server, client, namespace = "plugin", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "server", not(feature = "client")),
    rpc(server, namespace = "plugin", namespace_separator = ".")
)]
#[cfg_attr(
    all(feature = "client", not(feature = "server")),
    rpc(client, namespace = "plugin", namespace_separator = ".")
)]
pub trait Plugins {
    /// All that are installed: those that are called in their order, then the others by name.
    #[method(name = "list")]
    async fn list(&self) -> RpcResult<Vec<PluginSummary>>;
    /// One of them.
    #[method(name = "get")]
    async fn get(&self, name: String) -> RpcResult<PluginInfo>;
    /// What an installation would bring; changes nothing. For `source` see [`InstallPlugin::source`].
    #[method(name = "inspect")]
    async fn inspect(&self, source: String) -> RpcResult<PluginInspection>;
    /// Installs one, or another version of it. VMs that are up keep what they have.
    #[method(name = "install")]
    async fn install(&self, params: InstallPlugin) -> RpcResult<PluginInfo>;
    /// Removes one, with its state; with `purge` also the disks it keeps and the operator's files for it.
    #[method(name = "remove")]
    async fn remove(&self, name: String, purge: bool) -> RpcResult<()>;
    /// Calls it from now on; also one that had failed too often.
    #[method(name = "enable")]
    async fn enable(&self, name: String) -> RpcResult<PluginInfo>;
    /// Calls it no more. VMs that are up keep what they have.
    #[method(name = "disable")]
    async fn disable(&self, name: String) -> RpcResult<PluginInfo>;
    /// Gives it a configuration, the whole of it without defaults.
    #[method(name = "configure")]
    async fn configure(&self, name: String, config: serde_json::Value) -> RpcResult<PluginConfigured>;
    /// Compares what is installed with what was recorded then.
    #[method(name = "verify")]
    async fn verify(&self, name: String) -> RpcResult<Vec<PluginCheck>>;
    /// Its last messages, oldest first.
    #[method(name = "logs")]
    async fn logs(&self, name: String, lines: usize) -> RpcResult<Vec<PluginLogLine>>;
    /// The same, and then each as it comes, until the plugin is gone or the client leaves.
    #[subscription(name = "logs_subscribe" => "log", unsubscribe = "logs_unsubscribe", item = PluginLogLine)]
    async fn logs_follow(&self, name: String, lines: usize) -> jsonrpsee::core::SubscriptionResult;
    /// Its last calls, newest first.
    #[method(name = "calls")]
    async fn calls(&self, name: String) -> RpcResult<Vec<PluginCall>>;
    /// Makes a recorded call again; changes nothing.
    #[method(name = "replay")]
    async fn replay(&self, name: String, call: u64) -> RpcResult<PluginReplay>;
    /// Tries a component that is not installed: loads it with all it asks for, calls its hooks. For `source` see
    /// [`InstallPlugin::source`].
    #[method(name = "test")]
    async fn test(&self, source: String) -> RpcResult<Vec<PluginCheck>>;
    /// The operator's order; those that are not named come after them. Answers with the order in force.
    #[method(name = "order")]
    async fn order(&self, names: Vec<String>) -> RpcResult<Vec<String>>;
}
