//! Which modules a guest needs.

/// A module that is loaded before the root is mounted.
pub(super) struct Early {
    /// Its name with underscores.
    pub(super) name: &'static str,
    /// The build option that makes it built in.
    pub(super) option: &'static str,
    /// No VM works without.
    pub(super) required: bool,
}

const fn early(name: &'static str, option: &'static str, required: bool) -> Early {
    Early { name, option, required }
}

/// In the order in which they are loaded, but that what one depends on goes before it.
pub(super) const EARLY: [Early; 13] = [
    early("virtio", "CONFIG_VIRTIO", true),
    early("virtio_ring", "CONFIG_VIRTIO", true),
    early("virtio_pci", "CONFIG_VIRTIO_PCI", true),
    early("virtio_mmio", "CONFIG_VIRTIO_MMIO", false),
    early("virtio_blk", "CONFIG_VIRTIO_BLK", true),
    early("virtio_net", "CONFIG_VIRTIO_NET", true),
    early("virtio_console", "CONFIG_VIRTIO_CONSOLE", true),
    // Reports a panic to the VMM.
    early("pvpanic_pci", "CONFIG_PVPANIC_PCI", false),
    early("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO", false),
    // ext4's check sums ask the crypto layer for "crc32c" by an alias; one of these serves it. Kernels since 6.14 have
    // it as a library and need neither.
    early("crc32c_generic", "CONFIG_CRYPTO_CRC32C", false),
    early("crc32c_intel", "CONFIG_CRYPTO_CRC32C_INTEL", false),
    early("ext4", "CONFIG_EXT4_FS", true),
    early("af_packet", "CONFIG_PACKET", false),
];

/// Packed for `modprobe` in the guest where the kernel has them: containers, firewalls, WireGuard, other filesystems. A `*` at
/// the end stands for any rest. All of it is unpacked at every boot, at some 10 ms a megabyte under emulation, so what few
/// need is left to images that bring the kernel's modules themselves.
pub(super) const ON_DEMAND: &[&str] = &[
    // Containers
    "overlay",
    "fuse",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "squashfs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_utf8",
    "loop",
    "dm_mod",
    "dm_snapshot",
    "dm_crypt",
    "zram",
    // Networks
    "veth",
    "bridge",
    "br_netfilter",
    "tun",
    "tap",
    "macvlan",
    "ipvlan",
    "dummy",
    "8021q",
    "wireguard",
    "sch_fq_codel",
    "sch_ingress",
    "sch_netem",
    "cls_bpf",
    "tcp_bbr",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "netlink_diag",
    "packet_diag",
    "vsock",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "vhost_net",
    // Firewalls
    "nfnetlink",
    "nf_tables",
    "nft_*",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_log_syslog",
    "nf_reject_ipv4",
    "nf_reject_ipv6",
    "nf_flow_table*",
    "x_tables",
    "xt_*",
    "ip_tables",
    "iptable_*",
    "ipt_*",
    "ip6_tables",
    "ip6table_*",
    "ip6t_*",
    // Devices of other VMMs and features
    "virtio_balloon",
    "binfmt_misc",
    "configfs",
    "autofs4",
];

/// Whether a name is in a list of [`ON_DEMAND`]'s form.
pub(super) fn wanted(name: &str) -> bool {
    ON_DEMAND.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => *pattern == name,
    })
}
