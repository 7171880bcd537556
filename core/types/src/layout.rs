//! Where a daemon keeps things. Paths only; nothing here touches the filesystem.

use std::path::{Path, PathBuf};

use crate::{ImageDigest, KernelId, VmId};

/// The longest path a Unix socket address takes on Linux (unix(7): 108 bytes with the final NUL).
pub const SOCKET_PATH_MAX: usize = 107;

/// A daemon's directories. Two daemons never share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Sockets and what is void after a host reboot, e.g. `/run/vmd`.
    pub run: PathBuf,
    /// Database, disks, images and journals, e.g. `/var/lib/vmd`.
    pub state: PathBuf,
    /// Directory of `config.toml`, e.g. `/etc/vmd`.
    pub config: PathBuf,
}

impl Layout {
    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("vmd.sock")
    }
    /// Held with an exclusive lock by the daemon as long as it lives.
    pub fn lock_file(&self) -> PathBuf {
        self.state.join("vmd.lock")
    }
    /// The daemon's log where it was started on demand.
    pub fn log_file(&self) -> PathBuf {
        self.state.join("vmd.log")
    }
    /// The SQLite database.
    pub fn database(&self) -> PathBuf {
        self.state.join("vmd.db")
    }
    /// The event log; its older half is `events.jsonl.1`.
    pub fn events(&self) -> PathBuf {
        self.state.join("events.jsonl")
    }
    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.config.join("config.toml")
    }
    /// Private key with which `vm` logs in to guests (OpenSSH format); belongs to the daemon's group.
    pub fn client_key(&self) -> PathBuf {
        self.state.join("client_key")
    }
    /// Directory of root filesystems.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }
    /// The read-only ext4 of an image.
    pub fn image_rootfs(&self, digest: &ImageDigest) -> PathBuf {
        self.images().join(format!("{}.ext4", digest.hex()))
    }
    /// Directory of kernels.
    pub fn kernels(&self) -> PathBuf {
        self.state.join("kernels")
    }
    /// Directory of one kernel: `vmlinuz`, `modules.cpio`, and `initramfs-*.cpio` that the daemon makes of the agent and the latter.
    pub fn kernel(&self, id: &KernelId) -> PathBuf {
        self.kernels().join(id.as_str())
    }
    /// Directory of plugins: one each, with what is installed and what it keeps.
    pub fn plugins(&self) -> PathBuf {
        self.state.join("plugins")
    }
    /// A plugin's disks and files that outlive VMs.
    pub fn plugin_kept(&self, plugin: &str) -> PathBuf {
        self.plugins().join(plugin).join("kept")
    }
    /// A plugin's disks and files that live as long as a VM.
    pub fn plugin_vm(&self, plugin: &str, id: &VmId) -> PathBuf {
        self.plugins().join(plugin).join("vms").join(id.as_str())
    }
    /// A plugin's disks and files that live as long as a VM's run.
    pub fn plugin_run(&self, plugin: &str, id: &VmId) -> PathBuf {
        self.plugins().join(plugin).join("runs").join(id.as_str())
    }
    /// Blobs of images as registries have them, by digest.
    pub fn content(&self) -> PathBuf {
        self.state.join("content")
    }
    /// Names and passwords at registries, as docker's `config.json` has them.
    pub fn registry_logins(&self) -> PathBuf {
        self.state.join("registry-logins.json")
    }
    /// Half-made things; emptied when the daemon starts.
    pub fn scratch(&self) -> PathBuf {
        self.state.join("scratch")
    }
    /// Half-made things of workspaces, each a directory of the user's who asked; emptied when the daemon starts.
    pub fn workspace_scratch(&self) -> PathBuf {
        self.state.join("workspace-scratch")
    }
    /// Directory of effect journals.
    pub fn journals(&self) -> PathBuf {
        self.state.join("journal")
    }
    /// Journal of one VM's effects.
    pub fn vm_journal(&self, id: &VmId) -> PathBuf {
        self.journals().join(format!("{id}.jsonl"))
    }
    /// Fold of one VM's journal.
    pub fn vm_handles(&self, id: &VmId) -> PathBuf {
        self.journals().join(format!("{id}.handles.json"))
    }
    /// Journal of effects that belong to the daemon and not to one VM (bridge, table, sysctl).
    pub fn host_journal(&self) -> PathBuf {
        self.journals().join("host.jsonl")
    }
    /// Fold of the host journal.
    pub fn host_handles(&self) -> PathBuf {
        self.journals().join("host.handles.json")
    }
    /// A VM's files.
    pub fn vm(&self, id: &VmId) -> VmPaths {
        VmPaths {
            run: self.run.join("vms").join(id.as_str()),
            state: self.state.join("vms").join(id.as_str()),
        }
    }
    /// The longest socket path this layout makes, to be checked against [`SOCKET_PATH_MAX`].
    pub fn longest_socket(&self) -> PathBuf {
        self.run.join("vms").join("0".repeat(12)).join("vmm").join("api.sock")
    }
}

/// One VM's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    /// Sockets; void after a host reboot.
    pub run: PathBuf,
    /// Disk, logs and keys.
    pub state: PathBuf,
}

impl VmPaths {
    /// Shim's own requests (see [`crate::shim`]).
    pub fn shim_sock(&self) -> PathBuf {
        self.run.join("shim.sock")
    }
    /// A stream to the agent's SSH server.
    pub fn ssh_sock(&self) -> PathBuf {
        self.run.join("ssh.sock")
    }
    /// A stream to the agent's control service.
    pub fn control_sock(&self) -> PathBuf {
        self.run.join("control.sock")
    }
    /// The live serial console, both ways.
    pub fn console_sock(&self) -> PathBuf {
        self.run.join("console.sock")
    }
    /// Where the VMM offers the guest channel's host end.
    pub fn channel_sock(&self) -> PathBuf {
        self.run.join("channel.sock")
    }
    /// The VMM's own control socket (QMP).
    pub fn vmm_sock(&self) -> PathBuf {
        self.run.join("vmm.sock")
    }
    /// Directory of a VMM that makes its sockets itself, and may be locked in with it (see [`crate::shim::OwnDir`]).
    pub fn vmm_dir(&self) -> PathBuf {
        self.run.join("vmm")
    }
    /// Such a VMM's control socket.
    pub fn api_sock(&self) -> PathBuf {
        self.vmm_dir().join("api.sock")
    }
    /// The host's end of such a VMM's vsock device.
    pub fn vsock_sock(&self) -> PathBuf {
        self.vmm_dir().join("vsock")
    }
    /// Where the VMM tells its events (see [`crate::shim::LaunchPlan::events`]).
    pub fn events_sock(&self) -> PathBuf {
        self.run.join("events.sock")
    }
    /// The root disk, where it is a file.
    pub fn disk(&self) -> PathBuf {
        self.state.join("disk.raw")
    }
    /// What differs from the image, where the root disk is a device made of both.
    pub fn disk_delta(&self) -> PathBuf {
        self.state.join("disk.delta")
    }
    /// Our node of that device. In the state directory, for the run directory is often on a filesystem without devices.
    pub fn disk_node(&self) -> PathBuf {
        self.state.join("disk.dev")
    }
    /// Where what is on the root disk may be, for those who ask how much it takes: one of the two is there.
    pub fn disk_files(&self) -> [PathBuf; 2] {
        [self.disk(), self.disk_delta()]
    }
    /// Shared initramfs with this VM's segment behind it.
    pub fn initramfs(&self) -> PathBuf {
        self.run.join("initramfs.cpio")
    }
    /// What the shim was told (see [`crate::shim::ShimSpec`]).
    pub fn shim_spec(&self) -> PathBuf {
        self.run.join("shim.json")
    }
    /// Bounded console log; its older half is `console.log.1`.
    pub fn console_log(&self) -> PathBuf {
        self.state.join("console.log")
    }
    /// The VMM's stderr, bounded likewise.
    pub fn vmm_log(&self) -> PathBuf {
        self.state.join("vmm.log")
    }
    /// How the VMM ended (see [`crate::shim::ExitRecord`]).
    pub fn exit_record(&self) -> PathBuf {
        self.state.join("exit.json")
    }
    /// Directory of what is known of the workspaces in it.
    pub fn workspaces(&self) -> PathBuf {
        self.state.join("workspaces")
    }
    /// The guest's SSH host key (OpenSSH private key), made by the daemon.
    pub fn host_key(&self) -> PathBuf {
        self.state.join("host_key")
    }
    /// Both directories, state first.
    pub fn directories(&self) -> [&Path; 2] {
        [&self.state, &self.run]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_socket_has_a_longer_path_than_the_longest() {
        let [run, state, config] = ["/r", "/s", "/c"].map(PathBuf::from);
        let layout = Layout { run, state, config };
        let longest = layout.longest_socket().as_os_str().len();
        let vm = layout.vm(&"0123456789ab".parse().expect("it is an id"));
        let sockets = [
            vm.shim_sock(),
            vm.ssh_sock(),
            vm.control_sock(),
            vm.console_sock(),
            vm.channel_sock(),
            vm.vmm_sock(),
            vm.events_sock(),
            vm.api_sock(),
            vm.vsock_sock(),
            layout.socket(),
        ];
        for socket in sockets {
            assert!(socket.as_os_str().len() <= longest, "{}", socket.display());
        }
    }
}
