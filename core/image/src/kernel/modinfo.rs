//! What a kernel module says of itself: the section `.modinfo`, strings `key=value` that end in NUL.
//!
//! It holds what depmod(8) would find out: direct dependencies, aliases, the kernel it is for. Distributions run depmod
//! when a package is installed, so an unpacked package has no `modules.dep`. Source: System V ABI, ELF-64 section headers.

/// A module's own statements.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ModInfo {
    /// Names of modules that must be loaded before.
    pub(super) depends: Vec<String>,
    /// Patterns of device ids and names it serves.
    pub(super) aliases: Vec<String>,
    /// First word of `vermagic`.
    pub(super) release: Option<String>,
}

/// Reads the section; `None` where the bytes are no 64-bit little-endian ELF file that has one.
pub(super) fn parse(elf: &[u8]) -> Option<ModInfo> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(u64_at(elf, 0x28)?).ok()?;
    let entry_size = usize::from(u16_at(elf, 0x3a)?);
    let count = usize::from(u16_at(elf, 0x3c)?);
    let section = |index: usize| elf.get(table.checked_add(index.checked_mul(entry_size)?)?..);
    let content = |header: &[u8]| {
        let start = usize::try_from(u64_at(header, 0x18)?).ok()?;
        let size = usize::try_from(u64_at(header, 0x20)?).ok()?;
        elf.get(start..start.checked_add(size)?)
    };
    let names = content(section(usize::from(u16_at(elf, 0x3e)?))?)?;
    let modinfo = (0..count).find_map(|index| {
        let header = section(index)?;
        let name = names.get(u32_at(header, 0)? as usize..)?;
        if name.starts_with(b".modinfo\0") { content(header) } else { None }
    })?;
    let mut info = ModInfo::default();
    for record in modinfo.split(|&b| b == 0) {
        let record = String::from_utf8_lossy(record);
        match record.split_once('=') {
            Some(("depends", names)) => {
                info.depends =
                    names.split(',').filter(|name| !name.is_empty()).map(super::modules::normal).collect();
            }
            Some(("alias", pattern)) => info.aliases.push(pattern.to_owned()),
            Some(("vermagic", magic)) => info.release = magic.split(' ').next().map(str::to_owned),
            _ => {}
        }
    }
    Some(info)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
