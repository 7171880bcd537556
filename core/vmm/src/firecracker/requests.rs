//! A machine as requests to Firecracker's API, made from the machine alone
//! (<https://github.com/firecracker-microvm/firecracker/blob/main/src/firecracker/swagger/firecracker.yaml>).

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vm_types::{
    VmPaths,
    guest::kernel_args,
    machine::{Drive, MachineSpec, Nic},
    shim::{ApiRequest, LastWords, OwnDir, Paused, Setup, Told, VmmPipe},
    vm::{DiskLimits, VmmKind},
};

use super::Version;
use crate::{
    VmmError,
    checks::{self, bad, path as text},
};

/// `MAX_SUPPORTED_VCPUS`.
const CPUS_MAX: u32 = 32;
/// The guest's context id (vsock(7)): the first one that is free. It means something to this VM's own socket only.
const GUEST_CID: u32 = 3;

/// The most bytes that Linux puts into one request to a disk, until 6.14 (`BLK_DEF_MAX_SECTORS`).
const LARGEST_REQUEST: u64 = 1280 << 10;

/// What every guest's kernel is told, as QEMU's are, and what this machine needs besides.
const KERNEL_ARGUMENTS: &[&str] = &[
    "console=ttyS0",
    // The only way to end the VMM from inside is a reset by the keyboard controller.
    "reboot=k",
    "panic=-1",
    "quiet",
    "cryptomgr.notests",
    // There is a keyboard, with Control, Alt and Delete, and nothing else: looking for more takes time.
    "i8042.noaux",
    "i8042.nomux",
    "i8042.dumbkbd",
];

/// The machine, and then its start.
///
/// # Errors
/// [`VmmError::BadMachine`] naming what Firecracker could not be told.
pub fn setup(machine: &MachineSpec, paths: &VmPaths, version: Version) -> Result<Setup, VmmError> {
    checks::size(machine)?;
    if machine.vsock_cid.is_some() {
        // Its host end is a Unix socket, and the agent's channel already.
        return Err(VmmError::Unsupported {
            vmm: VmmKind::Firecracker,
            what: "a vsock device of the host's own",
        });
    }
    if machine.cpus > CPUS_MAX {
        return Err(bad("number of CPUs", &machine.cpus.to_string(), "32 at most under Firecracker"));
    }
    let socket = text("VMM socket path", &paths.api_sock())?;
    let mut requests = vec![
        // First, so that what is counted is counted from the beginning.
        put("/metrics", json!({"metrics_path": text("metrics path", &metrics_pipe(paths))?})),
        put(
            "/machine-config",
            json!({"vcpu_count": machine.cpus, "mem_size_mib": machine.memory_mib, "smt": false}),
        ),
        put(
            "/boot-source",
            json!({
                "kernel_image_path": text("kernel path", &machine.kernel)?,
                "initrd_path": text("initramfs path", &machine.initramfs)?,
                "boot_args": kernel_command_line(machine, version)?,
            }),
        ),
    ];
    for drive in &machine.drives {
        requests.push(add_drive(drive)?);
    }
    for (number, nic) in machine.nics.iter().enumerate() {
        requests.push(add_nic(number, nic)?);
    }
    requests.push(put(
        "/vsock",
        json!({
            "guest_cid": GUEST_CID,
            "uds_path": text("channel socket path", &paths.vsock_sock())?,
        }),
    ));
    requests.push(put("/entropy", json!({})));
    // Empty: it takes nothing of the guest's memory until somebody wants that.
    requests.push(put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true})));
    requests.push(put("/actions", json!({"action_type": "InstanceStart"})));
    Ok(Setup { socket: socket.into(), requests })
}

/// Where Firecracker makes its sockets, and the pipes it tells what it does through. It has metrics written once a minute, and with the
/// guest's start.
pub fn own_dir(paths: &VmPaths) -> OwnDir {
    let pipes = vec![
        VmmPipe { path: log_pipe(paths), what: Told::Log },
        VmmPipe { path: metrics_pipe(paths), what: Told::Metrics },
    ];
    OwnDir { path: paths.vmm_dir(), pipes }
}

/// Where it logs.
pub(super) fn log_pipe(paths: &VmPaths) -> PathBuf {
    paths.vmm_dir().join("log")
}

fn metrics_pipe(paths: &VmPaths) -> PathBuf {
    paths.vmm_dir().join("metrics")
}

/// What a Linux guest of this machine says last. Its kernel has no way to switch off, says so in this or that way and halts.
pub fn last_words(socket: &Path) -> LastWords {
    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    LastWords {
        power_off: texts(&[
            kernel_args::POWERED_OFF,
            "reboot: System halted",
            "reboot: Power off not available",
            "reboot: Power down",
        ]),
        reboot: texts(&["reboot: Restarting system", "reboot: machine restart"]),
        panic: texts(&["Kernel panic - not syncing"]),
        paused: Some(Paused {
            socket: socket.to_owned(),
            path: "/".to_owned(),
            pointer: "/state".to_owned(),
            value: "Paused".to_owned(),
        }),
    }
}

/// What Firecracker calls a drive. It takes letters, digits and `_` only; all else is written as its code.
pub(super) fn drive_id(serial: &str) -> String {
    let mut id = String::with_capacity(serial.len());
    for byte in serial.bytes() {
        if byte.is_ascii_alphanumeric() {
            id.push(char::from(byte));
        } else {
            id.push_str(&format!("_{byte:02x}"));
        }
    }
    id
}

fn kernel_command_line(machine: &MachineSpec, version: Version) -> Result<String, VmmError> {
    let mut words: Vec<String> = KERNEL_ARGUMENTS.iter().map(|&word| word.to_owned()).collect();
    if version < Version::SAYS_NO_PCI {
        words.push("pci=off".to_owned());
    }
    words.push(format!("{}={}", kernel_args::POWER_OFF, kernel_args::POWER_OFF_BY_RESET));
    let serials: Vec<_> = machine.drives.iter().map(|drive| drive.serial.as_str()).collect();
    words.push(format!("{}={}", kernel_args::DRIVES, serials.join(",")));
    for argument in &machine.kernel_args {
        checks::kernel_argument(argument)?;
        words.push(argument.clone());
    }
    Ok(words.join(" "))
}

fn add_drive(drive: &Drive) -> Result<ApiRequest, VmmError> {
    checks::serial(&drive.serial)?;
    let id = drive_id(&drive.serial);
    let mut body = json!({
        "drive_id": id,
        "path_on_host": text("drive path", &drive.path)?,
        "is_read_only": drive.read_only,
        // Only for kernels that mount their root themselves; it would go before the others.
        "is_root_device": false,
        // A guest's flush reaches the host's disk.
        "cache_type": "Writeback",
    });
    if let Some(limiter) = rate_limiter(drive.limits) {
        body["rate_limiter"] = limiter;
    }
    Ok(put(&format!("/drives/{id}"), body))
}

/// The limits as token buckets, which begin full.
fn rate_limiter(limits: DiskLimits) -> Option<Value> {
    let buckets = [
        ("bandwidth", limits.bytes_per_second.map(|limit| bucket(limit, LARGEST_REQUEST))),
        ("ops", limits.operations_per_second.map(|limit| bucket(limit, 1))),
    ];
    let limiter: serde_json::Map<_, _> =
        buckets.into_iter().filter_map(|(name, bucket)| Some((name.to_owned(), bucket?))).collect();
    (!limiter.is_empty()).then_some(Value::Object(limiter))
}

/// A bucket that lets `limit` tokens through in a second. It holds a second's worth: a drive that has been held up is looked at again only
/// each 100 ms, and what refills meanwhile beyond the bucket's size is lost, so that with less the guest would not get all of its limit. And
/// in so long a time each limit refills a whole number of tokens. A bucket that cannot hold one request lets it through all the
/// same and has it paid for afterwards, but Firecracker logs that as an error each time; so it holds at least that.
fn bucket(limit: u64, least: u64) -> Value {
    let size = limit.max(least);
    let milliseconds = u128::from(size) * 1000 / u128::from(limit.max(1));
    json!({"size": size, "refill_time": u64::try_from(milliseconds).unwrap_or(u64::MAX)})
}

fn add_nic(number: usize, nic: &Nic) -> Result<ApiRequest, VmmError> {
    checks::nic(nic)?;
    let id = format!("eth{number}");
    Ok(put(
        &format!("/network-interfaces/{id}"),
        json!({"iface_id": id, "host_dev_name": nic.tap, "guest_mac": nic.mac}),
    ))
}

fn put(path: &str, body: Value) -> ApiRequest {
    ApiRequest { method: "PUT".to_owned(), path: path.to_owned(), body }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(serial: &str, path: &str, read_only: bool) -> Drive {
        Drive { serial: serial.to_owned(), path: path.into(), read_only, limits: DiskLimits::default() }
    }

    fn machine() -> MachineSpec {
        MachineSpec {
            vm: "0123456789ab".parse().unwrap(),
            cpus: 2,
            memory_mib: 512,
            kernel: "/k/vmlinux".into(),
            initramfs: "/r/initramfs.cpio".into(),
            kernel_args: vec!["systemd.show_status=0".to_owned()],
            drives: vec![drive("root", "/s/disk.raw", false), drive("my-data.1", "/s/data", true)],
            nics: vec![Nic { tap: "vt3f2a0001".to_owned(), mac: "02:00:00:00:00:01".to_owned() }],
            vsock_cid: None,
        }
    }

    fn paths() -> VmPaths {
        VmPaths { run: "/run/v".into(), state: "/s".into() }
    }

    fn body<'a>(setup: &'a Setup, path: &str) -> &'a Value {
        &setup.requests.iter().find(|request| request.path == path).expect(path).body
    }

    #[test]
    fn drives_keep_their_order_and_the_kernel_is_told_which_is_which() {
        let setup = setup(&machine(), &paths(), Version(1, 13, 2)).unwrap();
        let drives: Vec<_> =
            setup.requests.iter().filter_map(|request| request.path.strip_prefix("/drives/")).collect();
        assert_eq!(drives, ["root", "my_2ddata_2e1"]);
        assert_eq!(body(&setup, "/drives/my_2ddata_2e1")["is_read_only"], true);
        let line = body(&setup, "/boot-source")["boot_args"].as_str().unwrap();
        assert!(
            line.contains(" vmd.drives=root,my-data.1 ") && line.contains(" vmd.power_off=reset "),
            "{line}"
        );
        assert!(line.ends_with(" systemd.show_status=0"), "the caller's arguments win: {line}");
    }

    #[test]
    fn a_limited_drive_has_buckets_that_refill_by_its_limits() {
        let limiter = |bytes_per_second, operations_per_second| {
            let mut machine = machine();
            machine.drives[0].limits = DiskLimits { bytes_per_second, operations_per_second };
            let setup = setup(&machine, &paths(), Version(1, 13, 2)).unwrap();
            assert!(body(&setup, "/drives/my_2ddata_2e1").get("rate_limiter").is_none());
            body(&setup, "/drives/root").get("rate_limiter").cloned()
        };
        assert_eq!(limiter(None, None), None);
        let ops = |size, refill_time| json!({"ops": {"size": size, "refill_time": refill_time}});
        assert_eq!(limiter(None, Some(1)), Some(ops(1, 1000)));
        assert_eq!(limiter(None, Some(15)), Some(ops(15, 1000)));
        let both = limiter(Some(100 << 20), Some(500)).unwrap();
        assert_eq!(both["bandwidth"], json!({"size": 100 << 20, "refill_time": 1000}));
        assert_eq!(both["ops"]["size"], 500);
        // A bucket holds a request, and refills so much more slowly.
        let small = limiter(Some(64 << 10), None).unwrap();
        assert_eq!(small, json!({"bandwidth": {"size": 1280 << 10, "refill_time": 20_000}}));
    }

    #[test]
    fn the_guest_starts_last_and_reaches_the_host_by_its_own_socket() {
        let setup = setup(&machine(), &paths(), Version(1, 13, 2)).unwrap();
        assert_eq!(setup.socket, Path::new("/run/v/vmm/api.sock"));
        let last = setup.requests.last().unwrap();
        assert_eq!((last.path.as_str(), &last.body["action_type"]), ("/actions", &json!("InstanceStart")));
        assert_eq!(body(&setup, "/vsock")["uds_path"], "/run/v/vmm/vsock");
        let own = own_dir(&paths());
        let piped = |what| &own.pipes.iter().find(|pipe| pipe.what == what).unwrap().path;
        assert_eq!(body(&setup, "/metrics")["metrics_path"], piped(Told::Metrics).to_str().unwrap());
        assert!(own.pipes.iter().all(|pipe| pipe.path.parent() == Some(&own.path)), "{own:?}");
        assert_eq!(body(&setup, "/network-interfaces/eth0")["host_dev_name"], "vt3f2a0001");
    }

    #[test]
    fn only_old_versions_are_told_what_new_ones_say_themselves() {
        let line = |version| kernel_command_line(&machine(), version).unwrap();
        assert!(line(Version(1, 12, 1)).contains(" pci=off "));
        assert!(!line(Version(1, 13, 0)).contains("pci=off"));
    }

    #[test]
    fn a_vsock_device_of_the_hosts_own_is_refused() {
        let machine = MachineSpec { vsock_cid: Some(77), ..machine() };
        let error = setup(&machine, &paths(), Version::OLDEST).unwrap_err();
        assert!(matches!(error, VmmError::Unsupported { .. }) && error.hint().is_some(), "{error}");
    }

    #[test]
    fn what_firecracker_cannot_be_told_is_refused_by_name() {
        type Change = fn(&mut MachineSpec);
        let cases: [(&str, Change); 8] = [
            ("number of CPUs", |m| m.cpus = 0),
            ("number of CPUs", |m| m.cpus = 33),
            ("memory", |m| m.memory_mib = 0),
            ("kernel path", |m| m.kernel = "vmlinux".into()),
            ("drive path", |m| m.drives[0].path = "disk".into()),
            ("drive serial", |m| m.drives[0].serial = "a,b".to_owned()),
            ("tap name", |m| m.nics[0].tap = "t".repeat(16)),
            ("kernel argument", |m| m.kernel_args.push("a\nb".to_owned())),
        ];
        for (part, change) in cases {
            let mut machine = machine();
            change(&mut machine);
            let error = setup(&machine, &paths(), Version::OLDEST).unwrap_err();
            assert!(matches!(error, VmmError::BadMachine { what, .. } if what == part), "{part}: {error}");
        }
    }
}
