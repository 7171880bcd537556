//! VMM drivers: QEMU, and a fake VMM with a fake guest.
