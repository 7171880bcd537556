//! The guest's side: its configuration, its control service and how the initramfs is laid out.

pub mod config;
pub mod control;
pub mod files;

/// virtio-serial port name of the guest channel.
pub const CHANNEL_PORT: &str = "org.vmd.channel";

/// vsock port of the guest channel, where there is no such virtio-serial port. Below 1024, so that only root in the guest can
/// take it (vsock(7)).
pub const CHANNEL_VSOCK_PORT: u32 = 1023;

/// vsock port on which nothing ever listens: whoever refuses a connection to it lives.
pub const DEAD_VSOCK_PORT: u32 = 1022;

/// What a VMM driver tells the agent on the kernel's command line.
pub mod kernel_args {
    /// Serials of the virtio drives in the order of their devices, with commas between them, from a VMM that cannot give a
    /// drive a serial of its own: `vmd.drives=root,data`.
    pub const DRIVES: &str = "vmd.drives";
    /// `vmd.power_off=reset`: the machine cannot switch itself off; a reset ends its VMM.
    pub const POWER_OFF: &str = "vmd.power_off";
    /// The value of [`POWER_OFF`].
    pub const POWER_OFF_BY_RESET: &str = "reset";
    /// What the agent says in the kernel's log right before a reset that is a power-off.
    pub const POWERED_OFF: &str = "vm-agent: powered off";
}

/// Environment variable by which an SSH client says that the command of an `exec` request is an
/// argument vector quoted for a POSIX shell, to be run without a shell. Any value but the empty one counts.
pub const EXEC_ARGV_ENV: &str = "VMD_EXEC_ARGV";

/// Environment variable by which an SSH client names the working directory of a command.
pub const EXEC_CWD_ENV: &str = "VMD_EXEC_CWD";

/// Environment variable by which an SSH client says that a command's channel ends with the command: what others write that it
/// has left running, is taken as far as it is there. Otherwise they are waited for as long as they go on writing. Any value
/// but the empty one counts.
pub const EXEC_ALONE_ENV: &str = "VMD_EXEC_ALONE";

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
