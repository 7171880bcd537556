//! A guest of a hundred bytes that any emulator of an x86 PC boots at once: it greets on the serial port, sends back
//! what it receives, and powers off when the power button is pressed.

/// What it says first.
pub const GREETING: &str = "tiny guest up";

/// Where the file is loaded; multiboot wants that above 1 MiB.
const LOAD: u32 = 0x10_0000;
/// Length of the multiboot header with its address fields, whose video fields are not needed.
const HEADER: u32 = 32;

/// x86 machine code for 32-bit protected mode, entered with interrupts off. It listens to the power button before it greets,
/// because a press that nobody listens to is lost.
const CODE: [u8; 82] = [
    0x66, 0xba, 0x02, 0x06, //             mov  dx, 0x602        ACPI PM1 enable, as SeaBIOS places it
    0x66, 0xb8, 0x00, 0x01, //             mov  ax, 0x100        power button
    0x66, 0xef, //                         out  dx, ax
    0xbe, 0x72, 0x00, 0x10, 0x00, //       mov  esi, message
    0xac, //                         next: lodsb
    0x84, 0xc0, //                         test al, al
    0x74, 0x14, //                         jz   poll
    0x88, 0xc3, //                         mov  bl, al
    0x66, 0xba, 0xfd, 0x03, //       full: mov  dx, 0x3fd        16550 line status
    0xec, //                               in   al, dx
    0xa8, 0x20, //                         test al, 0x20         transmitter empty?
    0x74, 0xf7, //                         jz   full
    0x66, 0xba, 0xf8, 0x03, //             mov  dx, 0x3f8        16550 data
    0x88, 0xd8, //                         mov  al, bl
    0xee, //                               out  dx, al
    0xeb, 0xe7, //                         jmp  next
    0xf3, 0x90, //                   poll: pause
    0x66, 0xba, 0x00, 0x06, //             mov  dx, 0x600        ACPI PM1 status
    0x66, 0xed, //                         in   ax, dx
    0xf6, 0xc4, 0x01, //                   test ah, 1            power button pressed?
    0x75, 0x11, //                         jnz  off
    0x66, 0xba, 0xfd, 0x03, //             mov  dx, 0x3fd
    0xec, //                               in   al, dx
    0xa8, 0x01, //                         test al, 1            anything received?
    0x74, 0xea, //                         jz   poll
    0x66, 0xba, 0xf8, 0x03, //             mov  dx, 0x3f8
    0xec, //                               in   al, dx
    0xee, //                               out  dx, al
    0xeb, 0xe2, //                         jmp  poll
    0x66, 0xba, 0x04, 0x06, //        off: mov  dx, 0x604        ACPI PM1 control
    0x66, 0xb8, 0x00, 0x20, //             mov  ax, 0x2000       SLP_EN, SLP_TYP 0: off
    0x66, 0xef, //                         out  dx, ax
    0xeb, 0xfe, //                   stay: jmp  stay
];

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
