//! Copy-on-write root disks.
