//! QEMU's command line, made from the machine alone (<https://www.qemu.org/docs/master/system/invocation.html>).
//!
//! What is not needed is not there: no default devices, no firmware menus, no option ROMs. The kernel is booted
//! directly; the serial console is QEMU's stdin and stdout, which belong to the shim.

use std::path::Path;

use vm_types::{
    VmPaths,
    guest::CHANNEL_PORT,
    machine::{Drive, MachineSpec, Nic},
    shim::{FIRST_INHERITED, Inherited},
    vm::DiskLimits,
};

use super::VHOST_NET;
use crate::{
    Accelerator, VmmError,
    checks::{self, path as text},
    control::drive_id,
};

/// What of the host decides about the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// Whether the kernel can do a network interface's work (`/dev/vhost-net` opens).
    pub vhost_net: bool,
    /// Whether QEMU may open nothing of the host's but what its jail shows, and so is given sockets and taps open.
    pub jailed: bool,
}

/// The serial console of the guest architecture, which is the host's.
const CONSOLE: &str = if cfg!(target_arch = "aarch64") { "ttyAMA0" } else { "ttyS0" };

/// What every guest's kernel is told. Boot to init and power off of a Debian 6.1 cloud kernel under TCG, CPU seconds
/// of QEMU (median of 3 on a busy host): 3.2 as it is, 2.8 with `quiet`, 2.2 with `cryptomgr.notests` too. No better, and therefore not here: `tsc=reliable`,
/// `i8042.*`, `mitigations=off`, `nokaslr`, `8250.nr_uarts=1`, `loglevel=1`.
const KERNEL_ARGUMENTS: &[&str] = &[
    // A panic resets, and a reset ends the VMM, where nobody reports the panic before: a kernel without the driver of
    // pvpanic, or one that has not loaded it yet.
    "panic=-1",
    "quiet",
    "cryptomgr.notests",
];
/// The check counts timer interrupts in a loop that a busy host can starve under emulation, and ends in a panic.
const KERNEL_ARGUMENTS_TCG: &[&str] = if cfg!(target_arch = "x86_64") { &["no_timer_check"] } else { &[] };

/// The arguments, without the program, and what QEMU is to inherit for them.
///
/// # Errors
/// [`VmmError::BadMachine`] naming what QEMU could not be told.
pub fn arguments(
    machine: &MachineSpec,
    paths: &VmPaths,
    host: Host,
) -> Result<(Vec<String>, Vec<Inherited>), VmmError> {
    checks::size(machine)?;
    let mut line = CommandLine { jailed: host.jailed, ..CommandLine::default() };
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    // A guest that resets ends its VMM; whether it is started again is the engine's decision.
    line.flag("-no-reboot");
    // The process name is cut at 15 bytes (prctl(2)).
    line.option("-name", format!("guest={vm},process=vm-{vm},debug-threads=on", vm = machine.vm));
    // A version 8 UUID (RFC 9562) that ends with the VM's id: a guest's DMI data lead to its VM.
    line.option("-uuid", format!("766d6400-0000-8000-8000-{}", machine.vm));
    line.option("-msg", "timestamp=on");
    line.option("-display", "none");
    line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    for (option, value) in platform(host.accelerator) {
        line.option(option, *value);
    }
    line.option("-smp", machine.cpus.to_string());
    line.option("-m", format!("{}M", machine.memory_mib));

    line.option("-kernel", text("kernel path", &machine.kernel)?);
    line.option("-initrd", text("initramfs path", &machine.initramfs)?);
    line.option("-append", kernel_command_line(machine, host.accelerator)?);

    line.option("-chardev", "stdio,id=console,signal=off");
    line.option("-serial", "chardev:console");
    line.listening("qmp", "VMM socket path", &paths.vmm_sock())?;
    line.option("-mon", "chardev=qmp,mode=control");
    // A second monitor, which the shim holds for as long as the VMM lives: clients of the first come and go.
    line.listening("events", "event socket path", &paths.events_sock())?;
    line.option("-mon", "chardev=events,mode=control");
    line.option("-device", "virtio-serial-pci,id=serial,disable-legacy=on,max_ports=2");
    line.listening("channel", "channel socket path", &paths.channel_sock())?;
    line.option("-device", format!("virtserialport,bus=serial.0,nr=1,chardev=channel,name={CHANNEL_PORT}"));
    line.option("-device", "virtio-rng-pci,disable-legacy=on");
    // Tells a panic from a reset; by QEMU's default action it ends the VMM at once.
    line.option("-device", "pvpanic-pci");

    for drive in &machine.drives {
        add_drive(&mut line, drive)?;
    }
    for (number, nic) in machine.nics.iter().enumerate() {
        add_nic(&mut line, number, nic, host)?;
    }
    if let Some(cid) = machine.vsock_cid {
        line.option("-device", format!("vhost-vsock-pci,disable-legacy=on,guest-cid={cid}"));
    }
    Ok((line.arguments, line.inherited))
}

/// Machine, accelerator and CPU model.
fn platform(accelerator: Accelerator) -> &'static [(&'static str, &'static str)] {
    match (accelerator, cfg!(target_arch = "aarch64")) {
        // The microvm machine can hang in timer calibration when it is emulated.
        (Accelerator::Tcg, false) => &[("-machine", "q35"), ("-accel", "tcg,thread=multi"), ("-cpu", "max")],
        // Devices are on PCI here too, so that both machines need the same guest modules, and ACPI
        // describes them: distribution kernels take no virtio-mmio devices from the command line.
        (Accelerator::Kvm, false) => {
            &[("-machine", "microvm,acpi=on,pcie=on,rtc=on,usb=off"), ("-accel", "kvm"), ("-cpu", "host")]
        }
        (Accelerator::Tcg, true) => &[("-machine", "virt"), ("-accel", "tcg,thread=multi"), ("-cpu", "max")],
        (Accelerator::Kvm, true) => {
            &[("-machine", "virt,gic-version=host"), ("-accel", "kvm"), ("-cpu", "host")]
        }
    }
}

/// What the guest's kernel is told: what this machine needs, then what the caller adds.
fn kernel_command_line(machine: &MachineSpec, accelerator: Accelerator) -> Result<String, VmmError> {
    let mut words = vec![format!("console={CONSOLE}")];
    words.extend(KERNEL_ARGUMENTS.iter().map(|&word| word.to_owned()));
    if accelerator == Accelerator::Tcg {
        words.extend(KERNEL_ARGUMENTS_TCG.iter().map(|&word| word.to_owned()));
    }
    for argument in &machine.kernel_args {
        checks::kernel_argument(argument)?;
        words.push(argument.clone());
    }
    Ok(words.join(" "))
}

fn add_drive(line: &mut CommandLine, drive: &Drive) -> Result<(), VmmError> {
    let Drive { serial, path, read_only, limits } = drive;
    checks::serial(serial)?;
    let path = escape(&text("drive path", path)?);
    // Through the host's page cache, because VMs share base data; flushes are honoured. Few and noisy runs under TCG showed no
    // steady gain of io_uring, which some hosts forbid, of O_DIRECT or of an iothread over plain threads.
    let id = drive_id(serial);
    let read_only = if *read_only { "on" } else { "off" };
    line.option(
        "-drive",
        format!(
            "if=none,id={id},file={path},format=raw,readonly={read_only},\
             cache=writeback,aio=threads,discard=unmap,detect-zeroes=off{}",
            throttling(*limits)
        ),
    );
    line.option("-device", format!("virtio-blk-pci,drive={id},serial={serial},disable-legacy=on"));
    Ok(())
}

/// The part of a drive that limits it. QEMU evens out what comes in by tenths of a second
/// (<https://github.com/qemu/qemu/blob/master/docs/throttle.txt>).
fn throttling(limits: DiskLimits) -> String {
    let DiskLimits { bytes_per_second, operations_per_second } = limits;
    let limits = [("bps-total", bytes_per_second), ("iops-total", operations_per_second)];
    limits.iter().filter_map(|(key, limit)| Some(format!(",throttling.{key}={}", (*limit)?))).collect()
}

fn add_nic(line: &mut CommandLine, number: usize, nic: &Nic, host: Host) -> Result<(), VmmError> {
    checks::nic(nic)?;
    let Nic { tap, mac } = nic;
    // Only KVM can hand interrupts from the kernel's vhost thread to the guest without QEMU in between.
    let vhost = host.vhost_net && host.accelerator == Accelerator::Kvm;
    let on = if vhost { "on" } else { "off" };
    let backend = if host.jailed {
        let tap = line.inherit(Inherited::Tap { name: tap.clone() });
        match vhost {
            true => {
                let device = line.inherit(Inherited::File { path: VHOST_NET.into() });
                format!("fd={tap},vhost=on,vhostfd={device}")
            }
            false => format!("fd={tap},vhost=off"),
        }
    } else {
        format!("ifname={tap},script=no,downscript=no,vhost={on}")
    };
    line.option("-netdev", format!("tap,id=net{number},{backend}"));
    line.option("-device", format!("virtio-net-pci,netdev=net{number},mac={mac},disable-legacy=on,romfile="));
    Ok(())
}

/// A comma ends a value unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[derive(Default)]
struct CommandLine {
    arguments: Vec<String>,
    inherited: Vec<Inherited>,
    jailed: bool,
}

impl CommandLine {
    fn flag(&mut self, flag: &str) {
        self.arguments.push(flag.to_owned());
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.arguments.push(option.to_owned());
        self.arguments.push(value.into());
    }

    /// The number of a descriptor that QEMU will have.
    fn inherit(&mut self, what: Inherited) -> usize {
        self.inherited.push(what);
        FIRST_INHERITED as usize + self.inherited.len() - 1
    }

    /// A character device behind a socket that listens.
    fn listening(&mut self, id: &str, what: &'static str, socket: &Path) -> Result<(), VmmError> {
        let path = text(what, socket)?;
        let place = match self.jailed {
            true => format!("fd={}", self.inherit(Inherited::Listener { path: socket.to_owned() })),
            false => format!("path={}", escape(&path)),
        };
        self.option("-chardev", format!("socket,id={id},{place},server=on,wait=off"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn drive(serial: &str, path: &str, read_only: bool) -> Drive {
        Drive { serial: serial.to_owned(), path: path.into(), read_only, limits: DiskLimits::default() }
    }

    fn machine() -> MachineSpec {
        MachineSpec {
            vm: "0123456789ab".parse().unwrap(),
            cpus: 2,
            memory_mib: 512,
            kernel: "/k/vmlinuz".into(),
            initramfs: "/r/initramfs.cpio".into(),
            kernel_args: vec!["systemd.show_status=0".to_owned()],
            drives: vec![drive("root", "/s,x/disk.raw", false)],
            nics: vec![Nic { tap: "vt3f2a0001".to_owned(), mac: "02:00:00:00:00:01".to_owned() }],
            vsock_cid: None,
        }
    }

    fn paths() -> VmPaths {
        VmPaths { run: "/r,un".into(), state: "/s,x".into() }
    }

    fn args(machine: &MachineSpec, accelerator: Accelerator) -> Vec<String> {
        arguments(machine, &paths(), Host { accelerator, vhost_net: true, jailed: false }).unwrap().0
    }

    /// Values of all occurrences of an option.
    fn values<'a>(args: &'a [String], option: &str) -> Vec<&'a str> {
        args.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn commas_in_paths_end_no_value() {
        let line = args(&machine(), Accelerator::Tcg);
        assert!(values(&line, "-drive")[0].contains("file=/s,,x/disk.raw,format=raw"), "{line:?}");
        let sockets = values(&line, "-chardev");
        assert!(sockets.contains(&"socket,id=qmp,path=/r,,un/vmm.sock,server=on,wait=off"), "{sockets:?}");
        assert!(sockets.contains(&"socket,id=channel,path=/r,,un/channel.sock,server=on,wait=off"));
        assert!(sockets.contains(&"socket,id=events,path=/r,,un/events.sock,server=on,wait=off"));
    }

    #[test]
    fn the_guest_finds_its_channel_disk_and_network_by_the_agreed_names() {
        let line = args(&machine(), Accelerator::Tcg);
        let devices = values(&line, "-device");
        let has = |parts: &[&str]| devices.iter().any(|d| parts.iter().all(|part| d.contains(part)));
        assert!(has(&["virtserialport", "chardev=channel", "name=org.vmd.channel"]), "{devices:?}");
        assert!(has(&["virtio-blk-pci", "drive=drive-root", "serial=root"]), "{devices:?}");
        assert!(has(&["virtio-net-pci", "netdev=net0", "mac=02:00:00:00:00:01", "romfile="]), "{devices:?}");
    }

    #[test]
    fn the_accelerator_decides_machine_cpu_and_vhost() {
        let tcg = args(&machine(), Accelerator::Tcg);
        assert!(values(&tcg, "-machine")[0].starts_with(if cfg!(target_arch = "aarch64") {
            "virt"
        } else {
            "q35"
        }));
        assert_eq!(values(&tcg, "-cpu"), ["max"]);
        assert!(values(&tcg, "-netdev")[0].ends_with("vhost=off"));
        let kvm = args(&machine(), Accelerator::Kvm);
        assert_eq!((values(&kvm, "-accel"), values(&kvm, "-cpu")), (vec!["kvm"], vec!["host"]));
        assert!(values(&kvm, "-netdev")[0].ends_with("vhost=on"));
        let without = Host { accelerator: Accelerator::Kvm, vhost_net: false, jailed: false };
        let line = arguments(&machine(), &paths(), without).unwrap().0;
        assert!(values(&line, "-netdev")[0].ends_with("vhost=off"));
    }

    #[test]
    fn a_jailed_qemu_opens_no_socket_and_no_tap_itself() {
        let host = Host { accelerator: Accelerator::Kvm, vhost_net: true, jailed: true };
        let (line, inherited) = arguments(&machine(), &paths(), host).unwrap();
        let sockets = values(&line, "-chardev");
        assert!(sockets.contains(&"socket,id=qmp,fd=100,server=on,wait=off"), "{sockets:?}");
        assert!(sockets.contains(&"socket,id=channel,fd=102,server=on,wait=off"), "{sockets:?}");
        assert_eq!(values(&line, "-netdev"), ["tap,id=net0,fd=103,vhost=on,vhostfd=104"]);
        let listener = |path: PathBuf| Inherited::Listener { path };
        let paths = paths();
        let expected = [
            listener(paths.vmm_sock()),
            listener(paths.events_sock()),
            listener(paths.channel_sock()),
            Inherited::Tap { name: "vt3f2a0001".to_owned() },
            Inherited::File { path: VHOST_NET.into() },
        ];
        assert_eq!(inherited, expected);
    }

    #[test]
    fn the_callers_kernel_arguments_come_last_so_that_they_win() {
        let line = args(&machine(), Accelerator::Tcg);
        let append = values(&line, "-append")[0];
        assert!(append.starts_with(&format!("console={CONSOLE} ")), "{append}");
        assert!(append.ends_with(" systemd.show_status=0"), "{append}");
    }

    #[test]
    fn a_read_only_drive_cannot_be_written() {
        let mut machine = machine();
        machine.drives.push(drive("data", "/d", true));
        let line = args(&machine, Accelerator::Tcg);
        let drives = values(&line, "-drive");
        assert!(drives[0].contains("readonly=off") && drives[1].contains("readonly=on"), "{drives:?}");
        assert!(drives[1].contains("id=drive-data"), "{drives:?}");
    }

    #[test]
    fn a_limited_drive_is_throttled_and_no_other() {
        let mut machine = machine();
        machine.drives.push(drive("data", "/d", false));
        let limited = |bytes_per_second, operations_per_second| {
            let mut machine = machine.clone();
            machine.drives[0].limits = DiskLimits { bytes_per_second, operations_per_second };
            let line = args(&machine, Accelerator::Tcg);
            values(&line, "-drive").into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let drives = limited(Some(1 << 20), Some(500));
        assert!(drives[0].ends_with(",throttling.bps-total=1048576,throttling.iops-total=500"), "{drives:?}");
        assert!(!drives[1].contains("throttling"), "{drives:?}");
        assert!(limited(None, Some(7))[0].ends_with("=off,throttling.iops-total=7"));
        assert!(limited(Some(4096), None)[0].ends_with("=off,throttling.bps-total=4096"));
        assert!(!limited(None, None)[0].contains("throttling"));
    }

    #[test]
    fn what_qemu_cannot_be_told_is_refused_by_name() {
        type Change = fn(&mut MachineSpec);
        let cases: [(&str, Change); 9] = [
            ("number of CPUs", |m| m.cpus = 0),
            ("memory", |m| m.memory_mib = 0),
            ("kernel path", |m| m.kernel = "vmlinuz".into()),
            ("drive path", |m| m.drives[0].path = "nbd:localhost".into()),
            ("drive serial", |m| m.drives[0].serial = "x".repeat(21)),
            ("drive serial", |m| m.drives[0].serial = "a,b".to_owned()),
            ("tap name", |m| m.nics[0].tap = "t".repeat(16)),
            ("hardware address", |m| m.nics[0].mac = "02:00,romfile=/etc".to_owned()),
            ("kernel argument", |m| m.kernel_args.push("a\nb".to_owned())),
        ];
        for (part, change) in cases {
            let mut machine = machine();
            change(&mut machine);
            let host = Host { accelerator: Accelerator::Tcg, vhost_net: false, jailed: false };
            let error = arguments(&machine, &paths(), host).unwrap_err();
            assert!(matches!(error, VmmError::BadMachine { what, .. } if what == part), "{part}: {error}");
            assert!(error.hint().unwrap().contains(part));
        }
    }
}
