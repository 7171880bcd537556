//! What every VMM asks of a machine's parts before it is told of them.

use std::path::Path;

use vm_types::machine::{MachineSpec, Nic};

use crate::VmmError;

/// Linux's limit of a device name: IFNAMSIZ less the end mark (netdevice(7)).
const TAP_NAME_MAX: usize = 15;
/// VIRTIO_BLK_ID_BYTES (virtio 1.2, section 5.2.6).
const SERIAL_MAX: usize = 20;

pub(crate) fn size(machine: &MachineSpec) -> Result<(), VmmError> {
    if machine.cpus == 0 {
        return Err(bad("number of CPUs", "0", "at least 1"));
    }
    if machine.memory_mib == 0 {
        return Err(bad("memory", "0 MiB", "at least 1 MiB"));
    }
    Ok(())
}

pub(crate) fn kernel_argument(argument: &str) -> Result<(), VmmError> {
    if argument.is_empty() || argument.contains(|c: char| c.is_control()) {
        return Err(bad("kernel argument", argument, "not empty, without control characters"));
    }
    Ok(())
}

pub(crate) fn serial(serial: &str) -> Result<(), VmmError> {
    let fits = (1..=SERIAL_MAX).contains(&serial.len())
        && serial.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if !fits {
        return Err(bad("drive serial", serial, "1 to 20 ASCII letters, digits, '-', '_' and '.'"));
    }
    Ok(())
}

pub(crate) fn nic(nic: &Nic) -> Result<(), VmmError> {
    let Nic { tap, mac } = nic;
    let named = (1..=TAP_NAME_MAX).contains(&tap.len())
        && tap.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b',' | b'=' | b':'));
    if !named {
        return Err(bad("tap name", tap, "1 to 15 printable ASCII characters without '/', ',', '=' and ':'"));
    }
    let octets: Vec<_> = mac.split(':').collect();
    if octets.len() != 6 || !octets.iter().all(|o| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(bad("hardware address", mac, "six pairs of hexadecimal digits with ':' between them"));
    }
    Ok(())
}

/// A path as an argument: absolute, so that it means the same in the shim and cannot be taken for `protocol:path`.
pub(crate) fn path(what: &'static str, path: &Path) -> Result<String, VmmError> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text.to_owned()),
        _ => Err(bad(what, &path.to_string_lossy(), "an absolute path in UTF-8")),
    }
}

pub(crate) fn bad(what: &'static str, value: &str, rule: &'static str) -> VmmError {
    VmmError::BadMachine { what, value: value.to_owned(), rule }
}
