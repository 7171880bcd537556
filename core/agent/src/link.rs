//! What PID 1 and the agent process share: the agent's place in the guest and the socket between the two.
//!
//! The socket is a pair of datagram sockets; the agent's end is its standard input.

use std::{os::fd::OwnedFd, path::PathBuf};

use vm_types::guest::control::ShutdownKind;

/// Where the initramfs stays visible in the guest.
pub(crate) const HOME: &str = "/run/vmd-agent";

/// The agent to PID 1, one datagram each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// Configuration applied: the image's init may start.
    Go,
    /// From PID 1: the image's init cannot be run, for this reason; PID 1 stays what it is.
    Stay(String),
    /// Take the machine down; PID 1 is the agent's own.
    Shutdown { kind: ShutdownKind, grace_ms: u64 },
}

impl Message {
    pub(crate) fn encode(&self) -> String {
        match self {
            Self::Go => "go".into(),
            Self::Stay(why) => format!("stay {why}"),
            Self::Shutdown { kind: ShutdownKind::PowerOff, grace_ms } => format!("poweroff {grace_ms}"),
            Self::Shutdown { kind: ShutdownKind::Reboot, grace_ms } => format!("reboot {grace_ms}"),
        }
    }

    pub(crate) fn decode(text: &str) -> Option<Self> {
        match text.split_once(' ') {
            None if text == "go" => Some(Self::Go),
            Some(("stay", why)) => Some(Self::Stay(why.to_owned())),
            Some((word, grace)) => {
                let kind = match word {
                    "poweroff" => ShutdownKind::PowerOff,
                    "reboot" => ShutdownKind::Reboot,
                    _ => return None,
                };
                Some(Self::Shutdown { kind, grace_ms: grace.parse().ok()? })
            }
            None => None,
        }
    }

    pub(crate) fn send(&self, socket: &OwnedFd) -> nix::Result<()> {
        nix::unistd::write(socket, self.encode().as_bytes()).map(drop)
    }
}

/// What the agent process is told on its command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// The image's own init, if it has one.
    pub image_init: Option<PathBuf>,
    /// The agent process is a second one in this boot: commands of the boot are not run again.
    pub again: bool,
    /// The boot failed: a stable code and a message for people.
    pub failure: Option<(String, String)>,
    /// What went wrong before, but stopped nothing.
    pub warnings: Vec<String>,
}

impl Arguments {
    pub(crate) fn encode(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(path) = &self.image_init {
            words.extend(["init".into(), path.to_string_lossy().into_owned()]);
        }
        if self.again {
            words.extend(["again".into(), String::new()]);
        }
        if let Some((code, message)) = &self.failure {
            words.extend(["failure-code".into(), code.clone(), "failure".into(), message.clone()]);
        }
        for warning in &self.warnings {
            words.extend(["warning".into(), warning.clone()]);
        }
        words
    }

    pub(crate) fn decode(words: &[std::ffi::OsString]) -> Self {
        let mut arguments = Self::default();
        for pair in words.chunks_exact(2) {
            let value = pair[1].to_string_lossy().into_owned();
            match pair[0].to_str() {
                Some("init") => arguments.image_init = Some(pair[1].clone().into()),
                Some("again") => arguments.again = true,
                Some("failure-code") => arguments.failure = Some((value, String::new())),
                Some("failure") => {
                    if let Some((_, message)) = &mut arguments.failure {
                        *message = value;
                    }
                }
                Some("warning") => arguments.warnings.push(value),
                _ => {}
            }
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        for message in [
            Message::Go,
            Message::Stay("no such file".into()),
            Message::Shutdown { kind: ShutdownKind::Reboot, grace_ms: 1500 },
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode("dance 1"), None);
        let arguments = Arguments {
            image_init: Some("/sbin/init".into()),
            again: true,
            failure: Some(("root.mount".into(), "no".into())),
            warnings: vec!["a".into(), "b".into()],
        };
        let words: Vec<_> = arguments.encode().into_iter().map(Into::into).collect();
        assert_eq!(Arguments::decode(&words), arguments);
    }
}
