//! A guest of two hundred bytes that any emulator of an x86 PC boots at once: it greets on the serial port, sends back
//! what it receives, powers off when the power button is pressed, and ends as [`super::Subject`] says when it is told to.

/// What it says first.
pub const GREETING: &str = "tiny guest up";

/// Where the file is loaded; multiboot wants that above 1 MiB.
const LOAD: u32 = 0x10_0000;
/// Length of the multiboot header with its address fields, whose video fields are not needed.
const HEADER: u32 = 32;

/// x86 machine code for 32-bit protected mode, entered with interrupts off. It listens to the power button before it greets,
/// because a press that nobody listens to is lost. pvpanic-pci: <https://www.qemu.org/docs/master/specs/pvpanic.html>.
#[rustfmt::skip]
const CODE: [u8; 156] = [
    0x66, 0xba, 0x02, 0x06, //                     mov  dx, 0x602        ACPI PM1 enable, as SeaBIOS places it
    0x66, 0xb8, 0x00, 0x01, //                     mov  ax, 0x100        power button
    0x66, 0xef, //                                 out  dx, ax
    0xbe, 0xbc, 0x00, 0x10, 0x00, //               mov  esi, message
    0xac, //                                 next: lodsb
    0x84, 0xc0, //                                 test al, al
    0x74, 0x14, //                                 jz   poll
    0x88, 0xc3, //                                 mov  bl, al
    0x66, 0xba, 0xfd, 0x03, //               full: mov  dx, 0x3fd        16550 line status
    0xec, //                                       in   al, dx
    0xa8, 0x20, //                                 test al, 0x20         transmitter empty?
    0x74, 0xf7, //                                 jz   full
    0x66, 0xba, 0xf8, 0x03, //                     mov  dx, 0x3f8        16550 data
    0x88, 0xd8, //                                 mov  al, bl
    0xee, //                                       out  dx, al
    0xeb, 0xe7, //                                 jmp  next
    0xf3, 0x90, //                           poll: pause
    0x66, 0xba, 0x00, 0x06, //                     mov  dx, 0x600        ACPI PM1 status
    0x66, 0xed, //                                 in   ax, dx
    0xf6, 0xc4, 0x01, //                           test ah, 1            power button pressed?
    0x75, 0x1d, //                                 jnz  off
    0x66, 0xba, 0xfd, 0x03, //                     mov  dx, 0x3fd
    0xec, //                                       in   al, dx
    0xa8, 0x01, //                                 test al, 1            anything received?
    0x74, 0xea, //                                 jz   poll
    0x66, 0xba, 0xf8, 0x03, //                     mov  dx, 0x3f8
    0xec, //                                       in   al, dx
    0x3c, 0x0f, //                                 cmp  al, 0x0f
    0x74, 0x0b, //                                 je   off
    0x3c, 0x12, //                                 cmp  al, 0x12
    0x74, 0x13, //                                 je   reset
    0x3c, 0x10, //                                 cmp  al, 0x10
    0x74, 0x18, //                                 je   panic
    0xee, //                                       out  dx, al
    0xeb, 0xd6, //                                 jmp  poll
    0x66, 0xba, 0x04, 0x06, //                off: mov  dx, 0x604        ACPI PM1 control
    0x66, 0xb8, 0x00, 0x20, //                     mov  ax, 0x2000       SLP_EN, SLP_TYP 0: off
    0x66, 0xef, //                                 out  dx, ax
    0xeb, 0xfe, //                           stay: jmp  stay
    0x66, 0xba, 0xf9, 0x0c, //              reset: mov  dx, 0xcf9        ICH9 reset control
    0xb0, 0x06, //                                 mov  al, 6            RST_CPU, SYS_RST
    0xee, //                                       out  dx, al
    0xeb, 0xf5, //                                 jmp  stay
    0xb9, 0x00, 0x00, 0x00, 0x80, //        panic: mov  ecx, 0x80000000   PCI bus 0, device 0, register 0
    0x89, 0xc8, //                           find: mov  eax, ecx
    0x66, 0xba, 0xf8, 0x0c, //                     mov  dx, 0xcf8        PCI configuration address
    0xef, //                                       out  dx, eax
    0x66, 0xba, 0xfc, 0x0c, //                     mov  dx, 0xcfc        PCI configuration data
    0xed, //                                       in   eax, dx
    0x3d, 0x36, 0x1b, 0x11, 0x00, //               cmp  eax, 0x00111b36  pvpanic-pci?
    0x74, 0x08, //                                 je   found
    0x81, 0xc1, 0x00, 0x08, 0x00, 0x00, //         add  ecx, 0x800       next device
    0xeb, 0xe5, //                                 jmp  find
    0x89, 0xc8, //                          found: mov  eax, ecx
    0xb0, 0x10, //                                 mov  al, 0x10         base address 0
    0x66, 0xba, 0xf8, 0x0c, //                     mov  dx, 0xcf8
    0xef, //                                       out  dx, eax
    0x66, 0xba, 0xfc, 0x0c, //                     mov  dx, 0xcfc
    0xed, //                                       in   eax, dx
    0x24, 0xf0, //                                 and  al, 0xf0
    0xc6, 0x00, 0x01, //                           mov  byte [eax], 1    panicked
    0xeb, 0xc0, //                                 jmp  stay
];

/// The same for Firecracker, which boots ELF files in 64-bit mode and has neither ACPI power buttons nor pvpanic: x86 machine code, entered
/// with a stack. Control-Alt-Delete is whatever the keyboard controller has to say. It cannot switch itself off, so it
/// says, as Linux does, that it has halted.
#[rustfmt::skip]
const CODE_64: [u8; 147] = [
    0xfa, //                                       cli
    0x48, 0x8d, 0x35, 0x8b, 0x00, 0x00, 0x00, //   lea  rsi, [greeting]
    0xac, //                                 next: lodsb
    0x84, 0xc0, //                                 test al, al
    0x74, 0x07, //                                 jz   poll
    0xe8, 0x6e, 0x00, 0x00, 0x00, //               call put
    0xeb, 0xf4, //                                 jmp  next
    0xf3, 0x90, //                           poll: pause
    0x66, 0xba, 0x64, 0x00, //                     mov  dx, 0x64         i8042 status
    0xec, //                                       in   al, dx
    0xa8, 0x01, //                                 test al, 1            a key pressed?
    0x75, 0x3f, //                                 jnz  reset
    0x66, 0xba, 0xfd, 0x03, //                     mov  dx, 0x3fd        16550 line status
    0xec, //                                       in   al, dx
    0xa8, 0x01, //                                 test al, 1            anything received?
    0x74, 0xec, //                                 jz   poll
    0x66, 0xba, 0xf8, 0x03, //                     mov  dx, 0x3f8        16550 data
    0xec, //                                       in   al, dx
    0x3c, 0x0f, //                                 cmp  al, 0x0f
    0x74, 0x0f, //                                 je   off
    0x3c, 0x12, //                                 cmp  al, 0x12
    0x74, 0x29, //                                 je   reset
    0x3c, 0x10, //                                 cmp  al, 0x10
    0x74, 0x17, //                                 je   panic
    0xe8, 0x42, 0x00, 0x00, 0x00, //               call put
    0xeb, 0xd4, //                                 jmp  poll
    0x48, 0x8d, 0x35, 0x5c, 0x00, 0x00, 0x00, //  off: lea rsi, [halted]
    0xe8, 0x27, 0x00, 0x00, 0x00, //               call say
    0xfa, //                                 stay: cli
    0xf4, //                                       hlt
    0xeb, 0xfc, //                                 jmp  stay
    0x48, 0x8d, 0x35, 0x80, 0x00, 0x00, 0x00, //  panic: lea rsi, [panicked]
    0xe8, 0x17, 0x00, 0x00, 0x00, //               call say
    0xeb, 0x0c, //                                 jmp  down
    0x48, 0x8d, 0x35, 0x56, 0x00, 0x00, 0x00, //  reset: lea rsi, [restarting]
    0xe8, 0x09, 0x00, 0x00, 0x00, //               call say
    0x66, 0xba, 0x64, 0x00, //               down: mov  dx, 0x64         i8042 command
    0xb0, 0xfe, //                                 mov  al, 0xfe         reset
    0xee, //                                       out  dx, al
    0xeb, 0xd9, //                                 jmp  stay
    0xac, //                                  say: lodsb
    0x84, 0xc0, //                                 test al, al
    0x74, 0x07, //                                 jz   said
    0xe8, 0x03, 0x00, 0x00, 0x00, //               call put
    0xeb, 0xf4, //                                 jmp  say
    0xc3, //                                 said: ret
    0x88, 0xc3, //                            put: mov  bl, al
    0x66, 0xba, 0xfd, 0x03, //               full: mov  dx, 0x3fd
    0xec, //                                       in   al, dx
    0xa8, 0x20, //                                 test al, 0x20         transmitter empty?
    0x74, 0xf7, //                                 jz   full
    0x66, 0xba, 0xf8, 0x03, //                     mov  dx, 0x3f8
    0x88, 0xd8, //                                 mov  al, bl
    0xee, //                                       out  dx, al
    0xc3, //                                       ret
];

/// What [`CODE_64`] says: `greeting`, `halted`, `restarting` and `panicked`, which it finds by their lengths.
const TEXTS_64: &[u8] = b"tiny guest up\r\n\0reboot: System halted\r\n\0reboot: Restarting system\r\n\0\
                          Kernel panic - not syncing: asked for\r\n\0";

/// Its boot file: an ELF-64 header, one program header (System V ABI), the code, the texts.
pub fn kernel_64() -> Vec<u8> {
    /// Where Linux is, too.
    const LOAD_64: u64 = 0x100_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + (CODE_64.len() + TEXTS_64.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let short = |file: &mut Vec<u8>, values: &[u16]| {
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    // An executable for x86-64, version 1.
    short(&mut file, &[2, 62, 1, 0]);
    for value in [LOAD_64 + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    // Flags, sizes of this header and of the one program header, no sections.
    short(&mut file, &[0, 0, 64, 56, 1, 64, 0, 0]);
    // To be loaded, readable, writable, executable.
    file.extend([1u32, 7].iter().flat_map(|value| value.to_le_bytes()));
    for value in [0, LOAD_64, LOAD_64, size, size, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(CODE_64);
    file.extend(TEXTS_64);
    file
}

/// Its boot file: a multiboot header (Multiboot Specification 0.6.96, section 3.1), the code, the greeting.
pub fn kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    // The header itself says where to load and enter, because the file is no ELF.
    const FLAGS: u32 = 1 << 16;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    // header, load, load end (0: whole file), bss end (0: none), entry.
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, 0, 0, LOAD + HEADER];
    let mut file: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    file.extend_from_slice(&CODE);
    file.extend_from_slice(GREETING.as_bytes());
    file.extend_from_slice(b"\r\n\0");
    file
}
