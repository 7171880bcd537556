//! The driver: what QEMU and this host offer.

use std::{env, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use vm_host::Runner;
use vm_types::{
    VmPaths,
    machine::MachineSpec,
    shim::{ChannelEndpoint, LaunchPlan},
    vm::VmmKind,
};

use super::{
    command_line::{self, Host},
    jail,
};
use crate::{
    Accelerator, Availability, Pause, PowerButton, Resize, Vmm, VmmError,
    control::{self, QmpControls},
    jail::{Jailing, Locking},
    kvm::{self, Verdict},
    program,
};

const KIND: VmmKind = VmmKind::Qemu;
const CONTROLS: QmpControls = QmpControls(KIND);

/// Drives QEMU.
#[derive(Debug, Clone)]
pub struct QemuDriver {
    runner: Arc<dyn Runner>,
    program: PathBuf,
    accelerator: Option<Accelerator>,
    jailing: Option<Jailing>,
}

impl QemuDriver {
    /// A driver for `program` (the emulator for this host's architecture in PATH if absent) that uses `accelerator`
    /// (KVM where the hardware has it, else TCG, if absent).
    pub fn new(runner: Arc<dyn Runner>, program: Option<PathBuf>, accelerator: Option<Accelerator>) -> Self {
        let program = program.unwrap_or_else(|| format!("qemu-system-{}", env::consts::ARCH).into());
        Self { runner, program, accelerator, jailing: None }
    }

    /// The same, with QEMU locked in.
    #[must_use]
    pub fn jailed(mut self, jailing: Option<Jailing>) -> Self {
        self.jailing = jailing;
        self
    }

    fn accelerator(&self) -> (Accelerator, String) {
        match (self.accelerator, kvm::probe()) {
            (Some(Accelerator::Kvm), Verdict::Missing { reason }) => {
                (Accelerator::Kvm, format!("forced by configuration although {reason}"))
            }
            (Some(forced), _) => (forced, "forced by configuration".to_owned()),
            (None, Verdict::Hardware { reason }) => (Accelerator::Kvm, reason),
            (None, Verdict::Missing { reason }) => (Accelerator::Tcg, reason),
        }
    }

    fn program(&self) -> Result<PathBuf, VmmError> {
        program::locate(KIND, &self.program)
    }
}

#[async_trait]
impl Vmm for QemuDriver {
    fn kind(&self) -> VmmKind {
        KIND
    }

    async fn availability(&self) -> Result<Availability, VmmError> {
        let program = self.program()?;
        let text = program::ask_version(&*self.runner, &program).await?;
        let version = parse_version(&text).ok_or_else(|| program::no_version(&program, &text))?;
        let (accelerator, reason) = self.accelerator();
        let jail_obstacle = Locking::of(self.jailing.as_ref(), KIND, &program)?.obstacle();
        Ok(Availability { version: version.to_owned(), accelerator, reason, jail_obstacle })
    }

    async fn plan(&self, machine: &MachineSpec, paths: &VmPaths) -> Result<LaunchPlan, VmmError> {
        let (accelerator, _) = self.accelerator();
        let program = self.program()?;
        let jailing = Locking::of(self.jailing.as_ref(), KIND, &program)?.jailing();
        let host = Host { accelerator, vhost_net: opens(super::VHOST_NET), jailed: jailing.is_some() };
        let (args, inherited) = command_line::arguments(machine, paths, host)?;
        Ok(LaunchPlan {
            jail: jailing.map(|jailing| jail::jail(jailing, &program, machine, accelerator)),
            program,
            args,
            channel: ChannelEndpoint::VirtioSerial { socket: paths.channel_sock() },
            events: Some(paths.events_sock()),
            setup: None,
            last_words: None,
            inherited,
            own_dir: None,
        })
    }

    async fn wait_up(&self, paths: &VmPaths, within: Duration) -> Result<(), VmmError> {
        control::wait_up(KIND, paths, within).await
    }

    async fn quit(&self, paths: &VmPaths) -> Result<(), VmmError> {
        control::quit(KIND, paths).await
    }

    fn power_button(&self) -> Option<&dyn PowerButton> {
        Some(&CONTROLS)
    }

    fn pause(&self) -> Option<&dyn Pause> {
        Some(&CONTROLS)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(&CONTROLS)
    }
}

fn opens(device: &str) -> bool {
    std::fs::OpenOptions::new().read(true).write(true).open(device).is_ok()
}

/// The third word of `QEMU emulator version 7.2.22 (Debian …)`, further checked to be a version.
fn parse_version(text: &str) -> Option<&str> {
    let version = text.split_once("version ")?.1.split([' ', '\n', '(']).next()?;
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_host::{HostCommand, RunError, RunOutput};

    use super::*;

    #[derive(Debug)]
    struct Says(&'static str, Mutex<Vec<String>>);

    #[async_trait]
    impl Runner for Says {
        async fn run(&self, command: HostCommand) -> Result<RunOutput, RunError> {
            self.1.lock().unwrap().push(command.display());
            Ok(RunOutput { stdout: self.0.into(), stderr_tail: String::new() })
        }
    }

    async fn available(says: &'static str, force: Option<Accelerator>) -> Result<Availability, VmmError> {
        QemuDriver::new(Arc::new(Says(says, Mutex::default())), Some("/bin/sh".into()), force)
            .availability()
            .await
    }

    #[tokio::test]
    async fn doctor_is_told_version_accelerator_and_reason() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003\n";
        let found = available(debian, Some(Accelerator::Tcg)).await.unwrap();
        assert_eq!(found.version, "7.2.22");
        assert_eq!((found.accelerator, found.reason.as_str()), (Accelerator::Tcg, "forced by configuration"));
        assert_eq!(available("QEMU emulator version 9.1.0\n", None).await.unwrap().version, "9.1.0");
        let error = available("hello\n", None).await.unwrap_err();
        assert!(matches!(error, VmmError::NoVersion { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named_with_its_package() {
        let driver =
            QemuDriver::new(Arc::new(Says("", Mutex::default())), Some("no-such-emulator".into()), None);
        let error = driver.availability().await.unwrap_err();
        assert!(error.to_string().contains("no-such-emulator"), "{error}");
        assert!(error.hint().unwrap().contains(crate::qemu::PACKAGE));
    }
}
