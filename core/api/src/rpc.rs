//! The traits, one per namespace. A VM is named by its name or id.

// The client halves spell their results otherwise.
#[cfg(feature = "server")]
use jsonrpsee::core::RpcResult;
use jsonrpsee::proc_macros::rpc;

use crate::data::*;

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
    /// Acquires an image; the result is an [`ImageRecord`].
    #[method(name = "pull")]
    async fn pull(&self, reference: String) -> RpcResult<Begun>;
    /// Imports a root filesystem tarball; the result is an [`ImageRecord`].
    #[method(name = "import")]
    async fn import(&self, params: ImportImage) -> RpcResult<Begun>;
    /// All images.
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
    /// Its state now and at each change, the last one being its end. With `cancel_on_close` the operation is cancelled when
    /// this subscription ends before it, for instance because its client is gone.
    #[subscription(name = "watch" => "changed", unsubscribe = "unwatch", item = OperationInfo)]
    async fn watch(
        &self,
        id: OperationId,
        cancel_on_close: Option<bool>,
    ) -> jsonrpsee::core::SubscriptionResult;
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
