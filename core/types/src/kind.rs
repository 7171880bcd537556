//! Sorts of errors, as clients meet them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $word:literal;)*) => {
        /// What sort of thing went wrong. Codes and words never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorKind {
            $($(#[$doc])* $name,)*
        }

        impl ErrorKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The JSON-RPC error code.
            pub fn code(self) -> i32 {
                match self { $(Self::$name => $code,)* }
            }

            /// The word in `data.kind`.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}

kinds! {
    /// A bug or a host that behaves unlike any we know.
    Internal = 1000, "internal";
    /// No such VM, image, kernel or operation.
    NotFound = 1001, "not_found";
    /// The name is taken.
    AlreadyExists = 1002, "already_exists";
    /// An argument that does not fit.
    InvalidArgument = 1003, "invalid_argument";
    /// Not possible in the state the VM is in.
    WrongState = 1004, "wrong_state";
    /// Something else still uses it.
    InUse = 1005, "in_use";
    /// No space left, or less than it would take.
    NoSpace = 1006, "no_space";
    /// A program the host lacks.
    NotInstalled = 1007, "not_installed";
    /// The subnet or a name clashes with something on the host.
    NetworkClash = 1008, "network_clash";
    /// The guest did not answer in time.
    GuestUnresponsive = 1009, "guest_unresponsive";
    /// The VMM ended when it should not have.
    VmmDied = 1010, "vmm_died";
    /// Somebody cancelled it.
    Cancelled = 1011, "cancelled";
    /// The caller may not.
    PermissionDenied = 1012, "permission_denied";
    /// This VMM, host or build cannot.
    Unsupported = 1013, "unsupported";
    /// An image, archive, package or kernel that is not what it should be.
    BadImage = 1014, "bad_image";
    /// A host command or system call failed.
    HostFailure = 1015, "host_failure";
    /// The daemon is on its way down.
    ShuttingDown = 1016, "shutting_down";
    /// A plugin did not do what it should: it failed, exceeded a limit or planned what it may not, or is not a plugin.
    PluginFailed = 1017, "plugin_failed";
    /// A plugin says no.
    PluginRefused = 1018, "plugin_refused";
    /// A command that a build asks for failed.
    CommandFailed = 1019, "command_failed";
}
