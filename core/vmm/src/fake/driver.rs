//! The driver of fake VMMs.

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use vm_host::files;
use vm_types::{
    VmPaths,
    machine::MachineSpec,
    shim::{ChannelEndpoint, LaunchPlan},
    vm::VmmKind,
};

use super::{End, FakeBehaviour, process::Arguments};
use crate::{
    Accelerator, Availability, Pause, PowerButton, Resize, Vmm, VmmError,
    control::{self, QmpControls},
    driver::CONTROL_TIMEOUT,
    qmp::{Qmp, QmpError},
};

const KIND: VmmKind = VmmKind::Fake;
const CONTROLS: QmpControls = QmpControls(KIND);

/// Drives fake VMMs.
#[derive(Debug, Clone)]
pub struct FakeDriver {
    program: PathBuf,
    leading: Vec<String>,
    behaviour: FakeBehaviour,
}

impl FakeDriver {
    /// File in a VM's state directory with a [`FakeBehaviour`] as JSON that takes the driver's own's place.
    pub const BEHAVIOUR_FILE: &str = "fake-behaviour.json";

    /// A driver of flawless fakes. `program` is `vm-fake-vmm`, or any other program that comes to [`super::run`]
    /// when its arguments begin with `leading`.
    pub fn new(program: impl Into<PathBuf>, leading: impl IntoIterator<Item = String>) -> Self {
        Self {
            program: program.into(),
            leading: leading.into_iter().collect(),
            behaviour: FakeBehaviour::default(),
        }
    }

    /// The same with other behaviour.
    #[must_use]
    pub fn with_behaviour(mut self, behaviour: FakeBehaviour) -> Self {
        self.behaviour = behaviour;
        self
    }

    /// Ends a running fake, or its guest, at once and in this way. On its control socket that is the command
    /// `{"execute": "x-end", "arguments": {"end": {"guest": "panic"}}}`.
    ///
    /// # Errors
    /// The fake not answering, or being gone already.
    pub async fn end(paths: &VmPaths, end: End) -> Result<(), VmmError> {
        let failed = |error: QmpError| VmmError::Control {
            vmm: KIND,
            operation: "end the guest",
            source: error.into(),
        };
        let mut qmp = Qmp::connect(&paths.vmm_sock(), CONTROL_TIMEOUT).await.map_err(failed)?;
        match qmp.execute_with("x-end", serde_json::json!({"end": end})).await {
            // One that hangs up in answer has obeyed.
            Ok(_) | Err(QmpError::HungUp { .. }) => Ok(()),
            Err(source) => Err(failed(source)),
        }
    }
}

#[async_trait]
impl Vmm for FakeDriver {
    fn kind(&self) -> VmmKind {
        KIND
    }

    async fn availability(&self) -> Result<Availability, VmmError> {
        if !self.program.is_file() {
            let program = self.program.display().to_string();
            return Err(VmmError::NotInstalled { vmm: KIND, program });
        }
        Ok(Availability {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            accelerator: Accelerator::Tcg,
            reason: "a fake executes nothing".to_owned(),
            jail_obstacle: None,
        })
    }

    async fn plan(&self, machine: &MachineSpec, paths: &VmPaths) -> Result<LaunchPlan, VmmError> {
        let path = paths.state.join(Self::BEHAVIOUR_FILE);
        let own = files::read_json(&path).map_err(|source| VmmError::Behaviour { path, source })?;
        let arguments = Arguments {
            vm: machine.vm.clone(),
            channel: paths.channel_sock(),
            control: paths.vmm_sock(),
            events: paths.events_sock(),
            drives: machine.drives.clone(),
            behaviour: own.unwrap_or_else(|| self.behaviour.clone()),
        };
        let mut args = self.leading.clone();
        args.extend(arguments.to_args());
        Ok(LaunchPlan {
            program: self.program.clone(),
            args,
            channel: ChannelEndpoint::VirtioSerial { socket: paths.channel_sock() },
            events: Some(paths.events_sock()),
            setup: None,
            last_words: None,
            inherited: Vec::new(),
            own_dir: None,
            jail: None,
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
