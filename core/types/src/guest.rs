//! The guest's side: its configuration, its control service and how the initramfs is laid out.

pub mod config;
pub mod control;
pub mod files;

/// virtio-serial port name of the guest channel.
pub const CHANNEL_PORT: &str = "org.vmd.channel";

/// Environment variable by which an SSH client says that the command of an `exec` request is an
/// argument vector quoted for a POSIX shell, to be run without a shell. Any value but the empty one counts.
pub const EXEC_ARGV_ENV: &str = "VMD_EXEC_ARGV";

/// Environment variable by which an SSH client names the working directory of a command.
pub const EXEC_CWD_ENV: &str = "VMD_EXEC_CWD";

/// SSH subsystem of [`files`].
pub const FILES_SUBSYSTEM: &str = "files@vmd";

/// Files in the initramfs.
pub mod initramfs {
    /// The agent.
    pub const INIT: &str = "init";
    /// Directory of kernel modules, flat.
    pub const MODULES: &str = "modules";
    /// Names (file names in [`MODULES`]) to load at once, one a line, in order.
    pub const MODULES_EARLY: &str = "modules/early.list";
    /// `modules.dep` form, paths relative to [`MODULES`]: what `modprobe` in the guest may load later.
    pub const MODULES_DEP: &str = "modules/modules.dep";
    /// `modules.alias` form, restricted to the packed modules.
    pub const MODULES_ALIAS: &str = "modules/modules.alias";
    /// The [`super::config::GuestConfig`] as JSON; in the per-VM segment.
    pub const CONFIG: &str = "vm-config.json";
}
