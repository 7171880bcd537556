//! Kernels: the distribution's own for real, and small ones made by hand for what must be refused.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use crate::common::{recorded, silent};
use vm_host::HostRunner;
use vm_image::{ImageError, kernel};

/// A bzImage's header and nothing behind it.
pub(crate) fn bzimage(release: &str) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[0x1f1] = 1;
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x20e..0x210].copy_from_slice(&0x400u16.to_le_bytes());
    let text = format!("{release} (someone@somewhere) #1 SMP\0");
    bytes[0x600..0x600 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

pub(crate) const COMPLETE: &str = "CONFIG_VIRTIO=y\nCONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_NET=y\n\
                        CONFIG_VIRTIO_CONSOLE=y\nCONFIG_EXT4_FS=y\n";

/// Mode and content.
pub(crate) type File = (u32, Vec<u8>);

/// Reads a newc archive by its specification, on its own terms.
pub(crate) fn unpack(archive: &[u8]) -> (HashMap<String, File>, Vec<String>) {
    let (mut files, mut order, mut at) = (HashMap::new(), Vec::new(), 0);
    loop {
        assert_eq!(at % 4, 0);
        assert_eq!(&archive[at..at + 6], b"070701");
        let field = |i: usize| {
            let text = std::str::from_utf8(&archive[at + 6 + 8 * i..at + 14 + 8 * i]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        assert_eq!((field(2), field(3), field(5)), (0, 0, 0), "owner and time");
        let name_end = at + 110 + field(11) as usize;
        let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
        let start = name_end.next_multiple_of(4);
        let end = start + field(6) as usize;
        if name == "TRAILER!!!" {
            assert_eq!(end.next_multiple_of(4), archive.len());
            return (files, order);
        }
        order.push(name.clone());
        files.insert(name, (field(1), archive[start..end].to_vec()));
        at = end.next_multiple_of(4);
    }
}

async fn installed(
    vmlinuz: &[u8],
    config: Option<&str>,
    dir: &Path,
) -> Result<kernel::InstalledKernel, ImageError> {
    let path = dir.join("vmlinuz");
    fs::write(&path, vmlinuz).unwrap();
    let config = config.map(|text| {
        fs::write(dir.join("config"), text).unwrap();
        dir.join("config")
    });
    let source = kernel::import_files(&path, None, config.as_deref()).await?;
    kernel::install(source, &dir.join("kernels")).await
}

#[tokio::test]
async fn a_kernel_with_everything_built_in_needs_no_modules() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = installed(&bzimage("6.9.1-mine"), Some(COMPLETE), dir.path()).await.unwrap();
    assert_eq!(kernel.release, "6.9.1-mine");
    let place = dir.path().join("kernels").join(kernel.id.as_str());
    assert_eq!(fs::read(place.join("vmlinuz")).unwrap(), bzimage("6.9.1-mine"));
    assert_eq!(fs::read_to_string(place.join("config")).unwrap(), COMPLETE);
    let first = fs::read(place.join("modules.cpio")).unwrap();
    let (files, _) = unpack(&first);
    assert_eq!(files["modules/early.list"].1, b"");

    // Again over what is there and was damaged: replaced whole, nothing left beside it.
    fs::write(place.join("stray"), b"x").unwrap();
    let source = kernel::import_files(&dir.path().join("vmlinuz"), None, Some(&dir.path().join("config")))
        .await
        .unwrap();
    let again = kernel::install(source, &dir.path().join("kernels")).await.unwrap();
    assert_eq!(again, kernel);
    assert_eq!(fs::read(place.join("modules.cpio")).unwrap(), first);
    assert!(!place.join("stray").exists());
    assert_eq!(fs::read_dir(dir.path().join("kernels")).unwrap().count(), 1);
}

#[tokio::test]
async fn unfit_kernels_are_refused_and_say_why() {
    let without =
        COMPLETE.replace("CONFIG_VIRTIO_CONSOLE=y\n", "").replace("CONFIG_EXT4_FS=y\n", "CONFIG_EXT4_FS=m\n");
    let cases: [(&[u8], Option<&str>, &str); 6] = [
        (&bzimage("6.9"), Some(&without), "virtio_console, ext4"),
        (&bzimage("6.9"), None, "nothing says"),
        (b"not a kernel", None, "neither a bzImage nor an ELF"),
        (b"", None, "neither a bzImage nor an ELF"),
        (b"\x7fELF\x01\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x03\0", None, "another processor"),
        (
            &[&b"\x7fELF\x02\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x3e\0"[..], &[0; 100]].concat(),
            None,
            "no Linux kernel",
        ),
    ];
    for (vmlinuz, config, reason) in cases {
        let dir = tempfile::tempdir().unwrap();
        let error = installed(vmlinuz, config, dir.path()).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert!(error.hint().is_some());
        assert!(!dir.path().join("kernels").exists());
    }
}

#[test]
fn the_agents_segment_makes_it_the_first_process() {
    let segment = kernel::agent_segment(b"agent");
    assert_eq!(segment.len() % 4, 0);
    let (files, order) = unpack(&segment);
    assert_eq!(files["init"], (0o100_755, b"agent".to_vec()));
    assert_eq!(files["dev/console"].0, 0o020_600);
    assert_eq!(order, ["dev", "dev/console", "init"]);
}

#[tokio::test]
async fn an_elf_kernel_tells_its_release() {
    let dir = tempfile::tempdir().unwrap();
    let mut elf = b"\x7fELF\x02\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec();
    elf.extend_from_slice(&[0; 200]);
    elf.extend_from_slice(b"Linux version 5.10.1 (x@y) #1\n\0");
    assert_eq!(installed(&elf, Some(COMPLETE), dir.path()).await.unwrap().release, "5.10.1");
}

#[test]
fn a_segment_is_a_whole_archive_that_only_root_reads() {
    use vm_types::guest::config::{GuestConfig, Root, SshConfig, VERSION};
    let config = GuestConfig {
        version: VERSION,
        hostname: "web".into(),
        machine_id: "0".repeat(32),
        clock_unix_nanos: None,
        interfaces: vec![],
        routes: vec![],
        resolvers: vec![],
        search: vec![],
        hosts: vec![],
        ssh: SshConfig { host_key: "key".into(), authorized_keys: vec![] },
        environment: Default::default(),
        files: vec![],
        mounts: vec![],
        boot_commands: vec![],
        modules: vec![],
        units: vec![],
        root: Root { serial: "root".into(), fstype: "ext4".into(), grow: true },
        agent_init: false,
    };
    let segment = kernel::segment(&config).unwrap();
    assert_eq!(segment.len() % 4, 0);
    let (files, _) = unpack(&segment);
    let (mode, text) = &files["vm-config.json"];
    assert_eq!(*mode, 0o100_600);
    assert_eq!(serde_json::from_slice::<GuestConfig>(text).unwrap(), config);
}

/// Downloads: the one test of kernels that needs the network.
#[tokio::test]
async fn the_distributions_kernel_is_fetched_and_packed() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = dir.path().join("scratch");
    let (sink, seen) = recorded();
    let source = kernel::import_debian(&HostRunner, &scratch, sink).await.unwrap();
    assert!(source.release().ends_with("-cloud-amd64"), "{source:?}");
    assert!(source.origin().contains(source.release()), "{source:?}");
    assert!(seen.lock().unwrap().iter().any(|progress| progress.stage.contains("downloading")));
    let release = source.release().to_owned();
    let out = dir.path().join("kernels");
    let kernel = kernel::install(source, &out).await.unwrap();
    assert_eq!(kernel.release, release);
    let place = out.join(kernel.id.as_str());
    let archive = fs::read(place.join("modules.cpio")).unwrap();
    let (files, order) = unpack(&archive);
    let text = |name: &str| String::from_utf8(files[name].1.clone()).unwrap();
    let early = text("modules/early.list");
    let early: Vec<&str> = early.lines().collect();
    println!("initramfs {} bytes, {} files, early {early:?}", archive.len(), files.len());
    assert!(archive.len() < 24 << 20, "the initramfs has grown to {}", archive.len());
    // In dependency order, each file there.
    let place_of = |name: &str| early.iter().position(|file| *file == format!("{name}.ko"));
    assert!(
        place_of("virtio_ring") < place_of("virtio_blk") && place_of("virtio_blk").is_some(),
        "{early:?}"
    );
    assert!(place_of("failover") < place_of("virtio_net") && place_of("virtio_net").is_some(), "{early:?}");
    let dep = text("modules/modules.dep");
    let mut packed: Vec<&str> = Vec::new();
    for line in dep.lines() {
        let (file, needs) = line.split_once(':').unwrap();
        for file in needs.split_whitespace().chain([file]) {
            assert!(files[&format!("modules/{file}")].1.starts_with(b"\x7fELF"), "{file}");
        }
        packed.push(file);
    }
    for wanted in ["overlay.ko", "nf_tables.ko", "br_netfilter.ko", "veth.ko", "tun.ko"] {
        assert!(packed.contains(&wanted), "{wanted} is not packed");
    }
    // As modprobe reads it: from the line's end to its start.
    let masquerade = dep.lines().find(|line| line.starts_with("xt_MASQUERADE.ko:")).unwrap();
    let position = |name: &str| masquerade.find(name).unwrap_or_else(|| panic!("{name} in {masquerade}"));
    assert!(position(" nf_nat.ko") < position(" nf_conntrack.ko"), "{masquerade}");
    assert!(text("modules/modules.alias").contains("alias fs-overlay overlay\n"));
    assert!(
        order.iter().position(|name| name == "modules") < order.iter().position(|name| name.ends_with(".ko"))
    );
    assert!(place.join("config").is_file());
    crate::bundle::carried(&place, dir.path()).await;
    let vmlinux = fs::read(kernel::vmlinux(&place).await.unwrap()).unwrap();
    let banner = format!("Linux version {release} ");
    assert!(vmlinux.starts_with(b"\x7fELF"));
    assert!(vmlinux.windows(banner.len()).any(|window| window == banner.as_bytes()), "no {banner:?} in it");
    tokio::time::timeout(Duration::from_secs(60), async {
        while fs::read_dir(&scratch).unwrap().count() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the scratch directory was not emptied");
}

/// An ELF-64 file with one segment, which takes all of it.
fn elf(length: usize) -> Vec<u8> {
    let mut bytes = vec![0x5a; length];
    bytes[..64].fill(0);
    bytes[..5].copy_from_slice(b"\x7fELF\x02");
    bytes[18] = 62;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64..120].fill(0);
    bytes[96..104].copy_from_slice(&(length as u64).to_le_bytes());
    bytes
}

/// A bzImage with something packed in it.
fn packed_in_bzimage(payload: &[u8]) -> Vec<u8> {
    let mut bytes = bzimage("6.9.1");
    // Behind the setup sectors: the boot sector and one more.
    bytes[0x248..0x24c].copy_from_slice(&3072u32.to_le_bytes());
    bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[tokio::test]
async fn a_vmlinux_is_unpacked_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let gzip = |bytes: &[u8]| {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut packer, bytes).unwrap();
        packer.finish().unwrap()
    };
    let place = |name: &str, boot: &[u8]| {
        let place = dir.path().join(name);
        fs::create_dir(&place).unwrap();
        fs::write(place.join("vmlinuz"), boot).unwrap();
        place
    };
    let image = elf(100_000);
    let packed = gzip(&image);
    let sound = place("sound", &packed_in_bzimage(&packed));
    let made = kernel::vmlinux(&sound).await.unwrap();
    assert_eq!(fs::read(&made).unwrap(), image);
    // What is there already is taken.
    fs::remove_file(sound.join("vmlinuz")).unwrap();
    assert_eq!(kernel::vmlinux(&sound).await.unwrap(), made);

    let cases = [
        ("cut", packed_in_bzimage(&gzip(&image[..60_000])), "damaged"),
        ("none", packed_in_bzimage(&gzip(b"no ELF")), "no ELF"),
        ("unknown", packed_in_bzimage(b"\x89LZO\0 and so on"), "packed otherwise"),
    ];
    for (name, boot, why) in cases {
        let place = place(name, &boot);
        let error = kernel::vmlinux(&place).await.unwrap_err();
        assert!(matches!(&error, ImageError::NoElfKernel { reason, .. } if reason.contains(why)), "{error}");
        assert!(error.hint().unwrap().contains("vmlinux"));
        assert_eq!(fs::read_dir(&place).unwrap().count(), 1, "something was left");
    }
}

#[tokio::test]
async fn without_apt_the_hint_names_its_package() {
    #[derive(Debug)]
    struct NoTools;
    #[async_trait::async_trait]
    impl vm_host::Runner for NoTools {
        async fn run(&self, command: vm_host::HostCommand) -> Result<vm_host::RunOutput, vm_host::RunError> {
            Err(vm_host::RunError::NotInstalled { program: command.program.to_string_lossy().into_owned() })
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let error = kernel::import_debian(&NoTools, dir.path(), silent()).await.unwrap_err();
    assert!(error.hint().unwrap().contains("apt-get install apt"), "{error:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
