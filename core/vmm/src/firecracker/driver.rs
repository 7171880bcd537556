//! The driver: what Firecracker and this host offer.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use vm_host::Runner;
use vm_types::{
    VmPaths,
    guest::CHANNEL_VSOCK_PORT,
    machine::MachineSpec,
    shim::{ChannelEndpoint, LaunchPlan},
    vm::VmmKind,
};

use super::{
    Version,
    controls::{self, Controls},
    jail, requests,
};
use crate::{
    Accelerator, Availability, Pause, PowerButton, Resize, Vmm, VmmError,
    checks::{bad, path as text},
    jail::{Jailing, Locking},
    kvm::{self, Verdict},
    program::{self, Remembered},
};

const KIND: VmmKind = VmmKind::Firecracker;
const CONTROLS: Controls = Controls;

/// Drives Firecracker.
#[derive(Debug, Clone)]
pub struct FirecrackerDriver {
    runner: Arc<dyn Runner>,
    program: PathBuf,
    kvm: fn() -> Verdict,
    jailing: Option<Jailing>,
    remembered: Arc<Remembered>,
}

impl FirecrackerDriver {
    /// A driver for `program` (`firecracker` in PATH if absent).
    pub fn new(runner: Arc<dyn Runner>, program: Option<PathBuf>) -> Self {
        Self {
            runner,
            program: program.unwrap_or_else(|| "firecracker".into()),
            kvm: kvm::probe,
            jailing: None,
            remembered: Arc::default(),
        }
    }

    /// The same, with Firecracker locked in.
    #[must_use]
    pub fn jailed(mut self, jailing: Option<Jailing>) -> Self {
        self.jailing = jailing;
        self
    }

    /// The same, wherever it is: for what needs no guest to run.
    #[must_use]
    pub fn whatever_the_cpu(mut self) -> Self {
        self.kvm = || Verdict::Hardware { reason: "nobody looked".to_owned() };
        self
    }

    async fn version(&self, program: &Path) -> Result<Version, VmmError> {
        let text = self.remembered.ask_version(&*self.runner, program).await?;
        let version = Version::find(&text).ok_or_else(|| program::no_version(program, &text))?;
        if version < Version::OLDEST {
            return Err(too_old(version, "1.7.0", "what VMs need here"));
        }
        Ok(version)
    }
}

fn too_old(version: Version, needed: &'static str, what: &'static str) -> VmmError {
    VmmError::TooOld { vmm: KIND, version: version.to_string(), needed, what }
}

#[async_trait]
impl Vmm for FirecrackerDriver {
    fn kind(&self) -> VmmKind {
        KIND
    }

    async fn availability(&self) -> Result<Availability, VmmError> {
        let program = program::locate(KIND, &self.program)?;
        let version = self.version(&program).await?.to_string();
        let jail_obstacle = Locking::of(self.jailing.as_ref(), KIND, &program)?.obstacle();
        match (self.kvm)() {
            Verdict::Hardware { reason } => {
                Ok(Availability { version, accelerator: Accelerator::Kvm, reason, jail_obstacle })
            }
            Verdict::Missing { reason } => Err(VmmError::NoKvm { vmm: KIND, reason }),
        }
    }

    fn unpacks_kernels(&self) -> bool {
        // On arm64 a boot file is a plain image, which is what Firecracker takes there.
        cfg!(target_arch = "aarch64")
    }

    async fn plan(&self, machine: &MachineSpec, paths: &VmPaths) -> Result<LaunchPlan, VmmError> {
        let program = program::locate(KIND, &self.program)?;
        let jailing = Locking::of(self.jailing.as_ref(), KIND, &program)?.jailing();
        let version = self.version(&program).await?;
        let setup = requests::setup(machine, paths, version)?;
        if !self.unpacks_kernels() && !is_elf(&machine.kernel) {
            let kernel = machine.kernel.to_string_lossy();
            return Err(bad("kernel", &kernel, "an unpacked ELF file under Firecracker"));
        }
        if version < Version::ACPI && needs_acpi(&machine.kernel) {
            return Err(too_old(version, "1.8.0", "kernels that find their devices by ACPI alone"));
        }
        let args = [
            "--api-sock",
            &text("VMM socket path", &paths.api_sock())?,
            "--id",
            machine.vm.as_str(),
            // Without one it goes to stdout, which is the console.
            "--log-path",
            &text("log path", &requests::log_pipe(paths))?,
            "--level",
            "Warning",
        ];
        let own = requests::own_dir(paths);
        Ok(LaunchPlan {
            args: args.map(str::to_owned).into(),
            channel: ChannelEndpoint::Vsock { socket: paths.vsock_sock(), port: CHANNEL_VSOCK_PORT },
            events: None,
            setup: Some(setup),
            last_words: Some(requests::last_words(&paths.api_sock())),
            inherited: Vec::new(),
            jail: jailing.map(|jailing| jail::jail(jailing, &program, machine, &own)),
            own_dir: Some(own),
            program,
        })
    }

    async fn wait_up(&self, paths: &VmPaths, within: Duration) -> Result<(), VmmError> {
        controls::wait_up(paths, within).await
    }

    async fn quit(&self, _: &VmPaths) -> Result<(), VmmError> {
        Err(VmmError::Unsupported { vmm: KIND, what: "being ended by a request" })
    }

    fn power_button(&self) -> Option<&dyn PowerButton> {
        // The action is of x86 alone.
        cfg!(target_arch = "x86_64").then_some(&CONTROLS)
    }

    fn pause(&self) -> Option<&dyn Pause> {
        Some(&CONTROLS)
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(&CONTROLS)
    }
}

/// A file that cannot be read is left to Firecracker, which says why.
fn is_elf(kernel: &Path) -> bool {
    let mut magic = [0; 4];
    match File::open(kernel).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) => &magic == b"\x7fELF",
        Err(_) => true,
    }
}

/// Whether a kernel takes no devices from its command line, by the configuration beside it. Without one it is given a try.
fn needs_acpi(kernel: &Path) -> bool {
    let config = std::fs::read_to_string(kernel.with_file_name("config")).unwrap_or_default();
    cfg!(target_arch = "x86_64")
        && !config.is_empty()
        && !config.lines().any(|line| line == "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y")
}

#[cfg(test)]
mod tests {
    use vm_host::{HostCommand, RunError, RunOutput};

    use super::*;
    use crate::jail::tests::USERS;

    #[derive(Debug)]
    struct Says(&'static str);

    #[async_trait]
    impl Runner for Says {
        async fn run(&self, _: HostCommand) -> Result<RunOutput, RunError> {
            Ok(RunOutput { stdout: self.0.into(), stderr_tail: String::new() })
        }
    }

    fn driver(says: &'static str) -> FirecrackerDriver {
        FirecrackerDriver::new(Arc::new(Says(says)), Some("/bin/sh".into())).whatever_the_cpu()
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn new(kernel: &[u8], config: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("kernel"), kernel).unwrap();
            std::fs::write(dir.path().join("config"), config).unwrap();
            Self(dir)
        }

        async fn plan(&self, driver: &FirecrackerDriver) -> Result<LaunchPlan, VmmError> {
            let machine = MachineSpec {
                vm: "0123456789ab".parse().unwrap(),
                cpus: 1,
                memory_mib: 128,
                kernel: self.0.path().join("kernel"),
                initramfs: "/none".into(),
                kernel_args: Vec::new(),
                drives: Vec::new(),
                nics: Vec::new(),
                vsock_cid: None,
            };
            driver.plan(&machine, &VmPaths { run: "/run/v".into(), state: "/s".into() }).await
        }
    }

    #[tokio::test]
    async fn a_host_without_kvm_or_a_version_of_old_is_refused_with_what_would_do() {
        assert_eq!(driver("Firecracker v1.13.2\n").availability().await.unwrap().version, "1.13.2");
        let old = driver("Firecracker v1.6.0\n").availability().await.unwrap_err();
        assert!(matches!(old, VmmError::TooOld { needed: "1.7.0", .. }), "{old}");
        assert!(old.hint().unwrap().contains("1.7.0"));
        let mut jailing = Jailing { users: USERS, required: false, obstacle: Some("no namespaces".into()) };
        let bare = driver("Firecracker v1.13.2\n").jailed(Some(jailing.clone()));
        let found = bare.availability().await.unwrap();
        assert_eq!(found.jail_obstacle.as_deref(), Some("no namespaces"));
        jailing.required = true;
        let refused = bare.jailed(Some(jailing)).availability().await.unwrap_err();
        assert!(matches!(refused, VmmError::NoJail { .. }) && refused.hint().is_some(), "{refused}");
        let mut driver = driver("Firecracker v1.13.2\n");
        driver.kvm = || Verdict::Missing { reason: "no svm".to_owned() };
        let error = driver.availability().await.unwrap_err();
        assert!(error.to_string().contains("no svm") && error.hint().unwrap().contains("QEMU"), "{error}");
    }

    #[tokio::test]
    async fn a_packed_kernel_or_one_that_the_version_cannot_serve_is_refused_before_the_start() {
        const ACPI_ONLY: &str = "# CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is not set\n";
        let (old, new) = (driver("Firecracker v1.7.0\n"), driver("Firecracker v1.8.0\n"));
        let place = Place::new(b"\x7fELF", ACPI_ONLY);
        let error = place.plan(&old).await.unwrap_err();
        assert!(matches!(error, VmmError::TooOld { needed: "1.8.0", .. }), "{error}");
        place.plan(&new).await.unwrap();
        Place::new(b"\x7fELF", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n").plan(&old).await.unwrap();
        Place::new(b"\x7fELF", "").plan(&old).await.unwrap();
        let packed = Place::new(b"MZ\0\0", "").plan(&new).await.unwrap_err();
        assert!(matches!(packed, VmmError::BadMachine { what: "kernel", .. }), "{packed}");
    }
}
