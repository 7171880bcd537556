//! What a kernel's boot file says of itself.
//!
//! Sources: Linux, Documentation/arch/x86/boot.rst (bzImage header, protocol 2.08 and later); System V ABI, ELF-64;
//! Linux, kernel/configs.c (the embedded configuration).

use std::io::Read;

use crate::rootfs::stream::decompressed;

const SETUP: usize = 0x200;
const ELF_X86_64: u16 = 62;

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
    let unpacked;
    let image = if bytes.starts_with(b"\x7fELF") {
        bytes
    } else {
        let (start, length) = payload_range(bytes)?;
        let payload = bytes.get(start..start + length)?.to_vec();
        let mut image = Vec::new();
        // The payload's last 4 bytes are its unpacked size, which a decompressor may take for damage: what came before
        // counts.
        let _ = decompressed(std::io::Cursor::new(payload)).ok()?.read_to_end(&mut image);
        unpacked = image;
        &unpacked
    };
    let start = find(image, b"IKCFG_ST")? + 8;
    let mut text = String::new();
    flate2::read::GzDecoder::new(&image[start..]).read_to_string(&mut text).ok()?;
    Some(text)
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

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
