//! What a kernel's boot file says of itself.
//!
//! Sources: Linux, Documentation/arch/x86/boot.rst (bzImage header, protocol 2.08 and later); System V ABI, ELF-64;
//! Linux, kernel/configs.c (the embedded configuration) and scripts/Makefile.lib (what is behind a packed kernel); LZ4's
//! lz4_Frame_format.md (the legacy frame).

use std::{borrow::Cow, io::Read};

use crate::rootfs::stream::decompressed;

const SETUP: usize = 0x200;
const ELF_X86_64: u16 = 62;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// The most that a block of LZ4's legacy frame unpacks to, in bytes.
const LZ4_BLOCK: usize = 8 << 20;

/// `uname -r` of a bzImage or an ELF vmlinux; an error says in words why it is neither.
pub(super) fn release(bytes: &[u8]) -> Result<String, String> {
    if bytes.get(0x202..0x206) == Some(b"HdrS") && bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) {
        if u16_at(bytes, 0x206).unwrap_or(0) < 0x20c {
            return Err("its boot protocol is older than 2.12 (Linux 3.8)".into());
        }
        // xloadflags bit 0: there is a 64-bit entry point.
        if u16_at(bytes, 0x236).unwrap_or(0) & 1 == 0 {
            return Err("it is for 32-bit processors".into());
        }
        let (payload, length) = payload_range(bytes).ok_or("its header is damaged")?;
        if bytes.len() < payload + length {
            return Err("it is cut short".into());
        }
        let at = usize::from(u16_at(bytes, 0x20e).unwrap_or(0));
        let text = bytes.get(SETUP + at..).filter(|_| at != 0).ok_or("it does not say its version")?;
        return first_word(text).ok_or_else(|| "it does not say its version".into());
    }
    if bytes.starts_with(b"\x7fELF") {
        if bytes.get(4) != Some(&2) || u16_at(bytes, 18) != Some(ELF_X86_64) {
            return Err("it is an ELF file for another processor".into());
        }
        let banner = b"Linux version ";
        return find(bytes, banner)
            .and_then(|at| first_word(&bytes[at + banner.len()..]))
            .ok_or_else(|| "it is an ELF file, but no Linux kernel".into());
    }
    Err("it is neither a bzImage nor an ELF file".into())
}

/// The configuration the kernel carries inside, where it was built so.
pub(super) fn embedded_config(bytes: &[u8]) -> Option<String> {
    let image = unpacked(bytes)?;
    let start = find(&image, b"IKCFG_ST")? + 8;
    let mut text = String::new();
    flate2::read::GzDecoder::new(&image[start..]).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The ELF vmlinux that a bzImage unpacks when it boots, or that the bytes are; an error says in words why there is none.
pub(super) fn elf(bytes: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    release(bytes)?;
    let image = unpacked(bytes).ok_or("what it unpacks is damaged")?;
    match loaded_length(&image) {
        Some(length) if image.len() as u64 >= length => Ok(image),
        Some(_) => Err("what it unpacks is damaged".into()),
        None => Err("it unpacks no ELF file, or is packed otherwise than by gzip, xz, zstd or lz4".into()),
    }
}

/// How much of an ELF-64 file a loader reads: up to the last program header's or segment's end.
fn loaded_length(elf: &[u8]) -> Option<u64> {
    if !elf.starts_with(b"\x7fELF") {
        return None;
    }
    let (table, size, number) = (u64_at(elf, 32)?, u64::from(u16_at(elf, 54)?), u64::from(u16_at(elf, 56)?));
    let mut length = table.checked_add(size * number)?;
    for at in (0..number).map(|index| table + index * size) {
        let at = usize::try_from(at).ok()?;
        length = length.max(u64_at(elf, at + 8)?.checked_add(u64_at(elf, at + 32)?)?);
    }
    Some(length)
}

/// What a bzImage unpacks, as far as it can be unpacked; an ELF file itself.
fn unpacked(bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    if bytes.starts_with(b"\x7fELF") {
        return Some(bytes.into());
    }
    let (start, length) = payload_range(bytes)?;
    let payload = bytes.get(start..start + length)?;
    if let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY) {
        return unpacked_lz4(blocks).map(Cow::Owned);
    }
    let mut image = Vec::new();
    // The payload's last 4 bytes are its unpacked size, which a decompressor may take for damage: what came before counts.
    let _ = decompressed(std::io::Cursor::new(payload.to_vec())).ok()?.read_to_end(&mut image);
    Some(image.into())
}

/// The blocks of LZ4's legacy frame, and the unpacked size behind them.
fn unpacked_lz4(mut blocks: &[u8]) -> Option<Vec<u8>> {
    let mut image = Vec::new();
    while blocks.len() > 4 {
        let length = u32_at(blocks, 0)? as usize;
        let block = blocks.get(4..length.checked_add(4)?)?;
        image.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).ok()?);
        blocks = &blocks[4 + length..];
    }
    Some(image)
}

fn payload_range(bytes: &[u8]) -> Option<(usize, usize)> {
    let sectors = match *bytes.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32_at(bytes, 0x248)? as usize;
    Some(((sectors + 1) * 512 + offset, u32_at(bytes, 0x24c)? as usize))
}

/// A release: what stands before the first blank.
fn first_word(text: &[u8]) -> Option<String> {
    let word = text
        .iter()
        .take(128)
        .take_while(|b| b.is_ascii_graphic())
        .map(|&b| char::from(b))
        .collect::<String>();
    word.starts_with(|c: char| c.is_ascii_digit()).then_some(word)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
