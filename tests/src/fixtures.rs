//! Images and the kernel that all tests share, made once by the daemon itself and kept in a cache.
//!
//! The cache is `VM_TEST_CACHE`, else `$XDG_CACHE_HOME/vmd-tests`. A seed in it is a state directory whose name is a digest of
//! all that its content depends on, so that a change of the image builder or of a recipe makes a new one. `VM_TEST_IMAGES` names
//! one that is to be taken as it is.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use vm_store::{Store, StoreError};
use vm_types::{
    ImageDigest, KernelId, Layout,
    image::{ImageConfig, ImageRecord, KernelRecord},
};

use crate::{World, namespaces::Network, programs};

/// The image that the daemon's configuration names by default.
pub const DEBIAN: &str = "debian:bookworm";
/// Debian with systemd, an SSH server of its own, an enabled firewall and tmux.
pub const SYSTEMD: &str = "systemd";
/// A busybox tree: no init, no libraries, no users.
pub const BUSYBOX: &str = "busybox";
/// One static binary, `/prog`, and nothing else.
pub const STATIC: &str = "static";

/// A file of 1 MiB, for fake guests, which look at nothing in it.
pub const TINY: &str = "tiny";

/// Downloads on a slow line.
pub const DOWNLOAD: Duration = Duration::from_secs(1800);
const SYSTEMD_PACKAGES: &str = "systemd-sysv,dbus,openssh-server,nftables,tmux,iproute2,procps";
/// What the database has not merged yet.
const WAL: &str = "vmd.db-wal";
/// Bumped when this file makes something else.
const RECIPE: &str = "2";

/// Where the cache is.
///
/// # Panics
/// There is neither a home nor another place.
pub fn cache() -> PathBuf {
    let from = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("VM_TEST_CACHE")
        .or_else(|| Some(from("XDG_CACHE_HOME")?.join("vmd-tests")))
        .or_else(|| Some(from("HOME")?.join(".cache/vmd-tests")))
        .expect("VM_TEST_CACHE, XDG_CACHE_HOME or HOME is set")
}

/// The seed, made if it is not there. That takes minutes and the network.
///
/// # Panics
/// It cannot be made.
pub fn seed() -> PathBuf {
    // Held as long as this process lives: nobody removes a seed that is in use.
    static SEED: OnceLock<Held> = OnceLock::new();
    let get = || hold().unwrap_or_else(|error| panic!("the tests' images cannot be made: {error}"));
    SEED.get_or_init(get).0.clone()
}

/// A directory of the cache and what keeps it there: nobody removes it while this is held.
pub type Held = (PathBuf, Flock<fs::File>);

fn hold() -> io::Result<Held> {
    // A host of its own has the seed of the one it was made on.
    if let Some(seed) = env::var_os("VM_TEST_IMAGES").filter(|value| !value.is_empty()) {
        return share(seed.into());
    }
    cached("seed", &key()?, make)
}

/// The cache's directory of this kind and key, made by `make` from the cache's path and its own if it is not there. Others of its
/// kind that nobody uses are removed then.
///
/// # Errors
/// The cache cannot be used, or `make` fails.
pub fn cached(kind: &str, key: &str, make: impl FnOnce(&Path, &Path) -> io::Result<()>) -> io::Result<Held> {
    let cache = cache();
    fs::create_dir_all(&cache)?;
    let lock = fs::File::create(cache.join("lock"))?;
    // Other test processes wait here; the kernel unlocks when this one ends.
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let wanted = cache.join(format!("{kind}-{key}"));
    if !wanted.is_dir() {
        for old in fs::read_dir(&cache)?.flatten() {
            // The tests of another checkout may be at work with theirs.
            if old.file_name().to_string_lossy().starts_with(&format!("{kind}-"))
                && old.file_type()?.is_dir()
                && let Ok(_unused) = Flock::lock(fs::File::open(old.path())?, FlockArg::LockExclusiveNonblock)
            {
                fs::remove_dir_all(old.path())?;
            }
        }
        make(&cache, &wanted)?;
    }
    share(wanted)
}

fn share(directory: PathBuf) -> io::Result<Held> {
    let held = Flock::lock(fs::File::open(&directory)?, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
    Ok((directory, held))
}

fn make(cache: &Path, seed: &Path) -> io::Result<()> {
    eprintln!("making the tests' images in {}; this takes some minutes, once", cache.display());
    let world = World::empty(Network::Host);
    let systemd = systemd_tarball(&world, cache)?;
    let small = world.directory().join("small.tar");
    for arguments in [
        &["kernel", "import", "debian"][..],
        &["image", "pull", DEBIAN],
        &["image", "import", &systemd.to_string_lossy(), SYSTEMD],
    ] {
        world.vm(arguments).within(DOWNLOAD).run().exits(0);
    }
    for (reference, write) in
        [(BUSYBOX, busybox_tree as fn(&mut Tarball) -> io::Result<()>), (STATIC, static_tree)]
    {
        let mut tar = tar::Builder::new(fs::File::create(&small)?);
        write(&mut tar)?;
        tar.into_inner()?.flush()?;
        world.vm(&["image", "import", &small.to_string_lossy(), reference]).within(DOWNLOAD).run().exits(0);
    }
    harvest(&world, seed)
}

/// Ends a world's daemon and moves its images, kernels and records to `seed`, all or nothing.
///
/// # Errors
/// They cannot be moved.
pub fn harvest(world: &World, seed: &Path) -> io::Result<()> {
    let state = &world.dirs().state;
    world.vm(&["daemon", "stop"]).run().exits(0);
    let ready = seed.with_extension("new");
    if ready.exists() {
        fs::remove_dir_all(&ready)?;
    }
    fs::create_dir(&ready)?;
    for part in ["images", "kernels", "vmd.db", WAL] {
        if part != WAL || state.join(part).exists() {
            fs::rename(state.join(part), ready.join(part))?;
        }
    }
    fs::rename(&ready, seed)
}

/// A tar archive that is being written.
pub type Tarball = tar::Builder<fs::File>;

/// Gives a new state directory the seed's content. Files that are never written to are linked; the daemon gets an identity
/// of its own.
///
/// # Panics
/// It cannot be done.
pub fn plant(seed: &Path, state: &Path) {
    let plant = || -> io::Result<()> {
        fs::create_dir_all(state)?;
        for part in ["images", "kernels"] {
            link_tree(&seed.join(part), &state.join(part))?;
        }
        for part in ["vmd.db", WAL] {
            if seed.join(part).exists() {
                fs::copy(seed.join(part), state.join(part))?;
            }
        }
        in_store(state, async |store| {
            // The plugins are those that come with the programs under test, not with whoever made the seed.
            for plugin in store.plugins().list().await? {
                store.plugins().delete(&plugin.name).await?;
            }
            store.meta().set("plugins_offered", "[]").await?;
            let instance = format!("{:04x}", fastrand::u16(..));
            store.meta().set(vm_store::meta::INSTANCE_ID, &instance).await
        })
    };
    plant().unwrap_or_else(|error| {
        panic!("{} cannot be copied to {}: {error}", seed.display(), state.display())
    });
}

/// Gives a new state directory an image and a kernel that do for fake guests: no download, nothing to copy.
///
/// # Panics
/// It cannot be done.
pub fn plant_tiny(state: &Path) {
    let digest = format!("sha256:{}", "7".repeat(64));
    let digest: ImageDigest = digest.parse().expect("a digest");
    let kernel: KernelId = "7".repeat(12).parse().expect("a kernel id");
    let layout = Layout { run: PathBuf::new(), state: state.into(), config: PathBuf::new() };
    let plant = || -> io::Result<()> {
        fs::create_dir_all(layout.images())?;
        fs::create_dir_all(layout.kernel(&kernel))?;
        // One block of data and a hole.
        let image = fs::File::create(layout.image_rootfs(&digest))?;
        (&image).write_all(&[7; 4096])?;
        image.set_len(1 << 20)?;
        for file in ["vmlinuz", "modules.cpio"] {
            fs::write(layout.kernel(&kernel).join(file), b"nothing that boots")?;
        }
        in_store(state, async |store| {
            let image = ImageRecord {
                digest,
                references: vec![format!("{TINY}:latest")],
                size_bytes: 1 << 20,
                used_bytes: 4096,
                created_at: 0,
                source: "tests".into(),
                config: ImageConfig::default(),
                origin: None,
                registered: None,
                kernel: None,
            };
            store.images().put(image).await?;
            let kernel = KernelRecord {
                id: kernel.clone(),
                release: "0-tiny".into(),
                source: "tests".into(),
                created_at: 0,
                default: true,
                of_image: false,
            };
            store.kernels().put(kernel).await
        })
    };
    plant().unwrap_or_else(|error| panic!("{} cannot be filled: {error}", state.display()));
}

/// The instance of the daemon whose state directory this is.
pub(crate) fn instance(state: &Path) -> Option<String> {
    in_store(state, async |store| store.meta().get(vm_store::meta::INSTANCE_ID).await).ok().flatten()
}

fn in_store<T>(state: &Path, work: impl AsyncFnOnce(&Store) -> Result<T, StoreError>) -> io::Result<T> {
    let store = Store::open(&state.join("vmd.db")).map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work(&store)).map_err(io::Error::other)
}

fn link_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            link_tree(&source, &target)?;
        } else if fs::hard_link(&source, &target).is_err() {
            // Another filesystem.
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}

fn key() -> io::Result<String> {
    let mut hash = Sha256::new();
    for text in [RECIPE, SYSTEMD_PACKAGES] {
        hash.update(text);
    }
    hash.update(fs::read(busybox())?);
    hash.update(fs::read(programs::test_program())?);
    for part in ["core/image/src", "core/store/src", "core/types/src/image.rs"] {
        hash_tree(&programs::source().join(part), &mut hash)?;
    }
    Ok(short(&hash.finalize()))
}

/// Enough of a digest for a name.
pub fn short(digest: &[u8]) -> String {
    digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Adds a file's content, or all names and contents below a directory.
///
/// # Errors
/// Something cannot be read.
pub fn hash_tree(path: &Path, hash: &mut Sha256) -> io::Result<()> {
    if !path.is_dir() {
        hash.update(fs::read(path)?);
        return Ok(());
    }
    let mut entries: Vec<_> = fs::read_dir(path)?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for entry in entries {
        hash.update(entry.file_name().unwrap_or_default().as_encoded_bytes());
        hash_tree(&entry, hash)?;
    }
    Ok(())
}

/// Kept beside the seeds, for it is the slowest part and depends on no code of ours.
fn systemd_tarball(world: &World, cache: &Path) -> io::Result<PathBuf> {
    let tag: String =
        Sha256::digest(SYSTEMD_PACKAGES).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let path = cache.join(format!("systemd-{tag}.tar"));
    if !path.exists() {
        let partial = cache.join("systemd.partial.tar");
        let include = format!("--include={SYSTEMD_PACKAGES}");
        let arguments = [
            "--variant=minbase",
            &include,
            "--customize-hook=chroot \"$1\" systemctl enable nftables.service ssh.service",
            "bookworm",
            &partial.to_string_lossy(),
        ];
        world.tool("mmdebstrap", &arguments).within(DOWNLOAD).run().exits(0);
        fs::rename(&partial, &path)?;
    }
    Ok(path)
}

/// Where the host's busybox is; empty where there is none.
pub fn busybox() -> PathBuf {
    ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.is_file())
        .unwrap_or_default()
}

/// Adds a busybox tree: no init, no libraries, no users.
///
/// # Errors
/// There is no busybox, or the archive cannot be written.
pub fn busybox_tree(tar: &mut Tarball) -> io::Result<()> {
    for (path, mode) in [("bin", 0o755), ("tmp", 0o1777), ("root", 0o700), ("etc", 0o755)] {
        directory(tar, path, mode)?;
    }
    file(tar, "bin/busybox", &busybox())?;
    let list = Command::new(busybox()).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&list.stdout)
        .lines()
        .filter(|name| !matches!(*name, "busybox" | "init" | "linuxrc"))
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    Ok(())
}

/// Adds `/prog`, the program for guests that have nothing else.
///
/// # Errors
/// It has not been built, or the archive cannot be written.
pub fn static_tree(tar: &mut Tarball) -> io::Result<()> {
    file(tar, "prog", &programs::test_program())
}

fn directory(tar: &mut Tarball, path: &str, mode: u32) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(mode);
    header.set_size(0);
    tar.append_data(&mut header, path, io::empty())
}

fn file(tar: &mut Tarball, path: &str, source: &Path) -> io::Result<()> {
    let content = fs::read(source)?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, path, content.as_slice())
}
