//! What the nested host boots: Debian with systemd, what a daemon needs of a host, and in it this build with its tests.
//!
//! ```text
//!   mmdebstrap ──> debian-host-KEY ──────┬──> vm image import ──> nested-KEY (a seed, with that Debian's own kernel)
//!   this build, the tests' seed ─────────┘
//! ```
//!
//! The first part takes a minute and the network, once; the second some ten seconds for each build. So hundreds of megabytes get
//! into the host at the speed of a disk, and not at that of an emulated SSH session.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use sha2::{Digest, Sha256};
use vm_tests::{
    World,
    debian::{SUITE, bootstrap},
    fixtures::{self, DOWNLOAD, Held},
    namespaces::Network,
    programs, wait_until,
    world::SHORT,
};

use crate::say;

/// Its reference.
pub(crate) const IMAGE: &str = "nested-host";
/// The programs under test.
pub(crate) const PROGRAMS: &str = "/opt/vmd";
/// Firecracker's directory, where there is one; not on PATH, so that each test says which VMM it is about.
pub(crate) const FIRECRACKER: &str = "/opt/firecracker";
/// Test binaries as PACKAGE.TARGET, and `vm-test-world`.
pub(crate) const SUITES: &str = "/opt/tests";
/// A seed: what `VM_TEST_IMAGES` takes, and what a daemon's state directory starts from.
pub(crate) const SEED: &str = "/opt/seed";

const PACKAGES: &str = "systemd-sysv,systemd-resolved,dbus,udev,kmod,procps,iproute2,nftables,e2fsprogs,xfsprogs,btrfs-progs,\
                        dmsetup,ca-certificates,curl,openssh-client,qemu-system-x86,seabios,busybox-static,gzip";
/// The kernel's package without its scripts, which would make an initramfs that nobody boots.
const KERNEL_HOOK: &str = r#"
set -eu
cd "$1/tmp"
export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
apt-get -q download "$package"
dpkg-deb --fsys-tarfile linux-image-*.deb | tar -x -C "$1" --keep-directory-symlink
rm linux-image-*.deb
for release in "$1"/lib/modules/*; do chroot "$1" /usr/sbin/depmod "${release##*/}"; done
"#;
/// For daemons that have no use for any.
pub(crate) const NO_PLUGINS: &str = "version = 1\n[plugins]\nbundled = \"/nowhere\"\n";
/// Bumped when this file makes something else.
const RECIPE: &str = "1";

/// The seed of the nested host of this build.
pub(crate) fn seed() -> PathBuf {
    static MADE: OnceLock<Held> = OnceLock::new();
    let get = || make().unwrap_or_else(|error| panic!("the nested host cannot be made: {error}"));
    MADE.get_or_init(get).0.clone()
}

/// Firecracker's binary: `VM_FIRECRACKER`, or the one on PATH.
pub(crate) fn firecracker() -> Option<PathBuf> {
    let named = env::var_os("VM_FIRECRACKER").filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = &named {
        assert!(path.is_file(), "VM_FIRECRACKER names no file: {}", path.display());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    named.or_else(|| env::split_paths(&path).map(|dir| dir.join("firecracker")).find(|file| file.is_file()))
}

fn make() -> io::Result<Held> {
    let inner = fixtures::seed();
    let content = Content::gather(&inner)?;
    let base = fixtures::cached("debian-host", &base_key(), make_base)?;
    let key = content.key(&inner, &base.0)?;
    fixtures::cached("nested", &key, |_, seed| make_image(&content, &base.0, seed))
}

fn base_key() -> String {
    let mut hash = Sha256::new();
    for text in [RECIPE, SUITE, PACKAGES, KERNEL_HOOK] {
        hash.update(text);
    }
    fixtures::short(&hash.finalize())
}

/// Debian's tarball, and its kernel and modules unpacked beside it.
fn make_base(_: &Path, base: &Path) -> io::Result<()> {
    say("nested: making the nested host's Debian; this takes a minute or two, once");
    let partial = base.with_extension("new");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir(&partial)?;
    let (tarball, hook) = (partial.join("root.tar"), partial.join("hook"));
    fs::write(&hook, KERNEL_HOOK)?;
    let world = World::empty(Network::Host);
    bootstrap(&world, PACKAGES, Some(&format!("sh {} \"$1\"", hook.display())), &tarball);
    let (from, to) = (tarball.to_string_lossy(), partial.to_string_lossy());
    world.tool("tar", &["-xf", &from, "-C", &to, "./boot", "./usr/lib/modules"]).run().exits(0);
    fs::rename(&partial, base)
}

/// What is put into the Debian: where it goes, and where it is.
struct Content {
    files: Vec<(String, PathBuf)>,
    scratch: tempfile::TempDir,
}

impl Content {
    fn gather(inner: &Path) -> io::Result<Self> {
        let mut this =
            Self { files: Vec::new(), scratch: tempfile::Builder::new().tempdir_in(fixtures::cache())? };
        let programs = programs::directory();
        for name in ["vm", "vmd", "vm-agent", "vm-plugin-compile"] {
            this.program(PROGRAMS, name, &programs.join(name))?;
        }
        this.tree(&format!("{PROGRAMS}/plugins"), &programs.join("plugins"))?;
        let suites = env::var_os("VM_TEST_SUITES").map(PathBuf::from).filter(|dir| dir.is_dir());
        let suites = suites.unwrap_or_else(|| {
            panic!("VM_TEST_SUITES is not set: run this by `make test` or `make test-nested`")
        });
        for suite in fs::read_dir(suites)? {
            let suite = suite?;
            this.program(SUITES, &suite.file_name().to_string_lossy(), &suite.path())?;
        }
        this.program(SUITES, "vm-test-world", &programs::world_holder())?;
        this.program(SUITES, "vm-test-prog", &programs::test_program())?;
        if let Some(found) = firecracker() {
            this.files.push((format!("{FIRECRACKER}/firecracker"), found));
        }
        this.tree(&format!("{SUITES}/plugins"), &programs::test_plugins())?;
        let state = this.scratch.path().join("seed");
        fixtures::plant(inner, &state);
        // The database is whole in its one file once its last user has closed it, which is on a thread of its own.
        wait_until("the database is closed", SHORT, || !state.join("vmd.db-wal").exists());
        this.tree(SEED, &state)?;
        this.files.sort();
        Ok(this)
    }

    /// A program without what debuggers want, which is most of it.
    fn program(&mut self, directory: &str, name: &str, source: &Path) -> io::Result<()> {
        let stripped = self.scratch.path().join(name);
        let done = Command::new("strip").arg("-o").args([&stripped, source]).status()?;
        if !done.success() {
            return Err(io::Error::other(format!("strip could not strip {}: {done}", source.display())));
        }
        self.files.push((format!("{directory}/{name}"), stripped));
        Ok(())
    }

    fn tree(&mut self, directory: &str, source: &Path) -> io::Result<()> {
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            let inside = format!("{directory}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                self.tree(&inside, &entry.path())?;
            } else {
                self.files.push((inside, entry.path()));
            }
        }
        Ok(())
    }

    fn key(&self, inner: &Path, base: &Path) -> io::Result<String> {
        let mut hash = Sha256::new();
        hash.update(RECIPE);
        // Their names are digests.
        for made in [inner, base] {
            hash.update(made.as_os_str().as_encoded_bytes());
        }
        for (inside, source) in self.files.iter().filter(|(inside, _)| !inside.starts_with(SEED)) {
            hash.update(inside);
            fixtures::hash_tree(source, &mut hash)?;
        }
        // How images and kernels are made decides what comes of it.
        fixtures::hash_tree(&programs::source().join("core/image/src"), &mut hash)?;
        Ok(fixtures::short(&hash.finalize()))
    }

    fn append(&self, tarball: File) -> io::Result<()> {
        let mut tar = tar::Builder::new(tarball);
        tar.mode(tar::HeaderMode::Deterministic);
        for (inside, source) in &self.files {
            let told = |error| io::Error::other(format!("{}: {error}", source.display()));
            let mut file = File::open(source).map_err(told)?;
            tar.append_file(inside.trim_start_matches('/'), &mut file).map_err(told)?;
        }
        tar.into_inner()?.flush()
    }
}

fn make_image(content: &Content, base: &Path, seed: &Path) -> io::Result<()> {
    say("nested: putting this build into the nested host's image");
    let world = World::empty(Network::Own);
    world.configure(NO_PLUGINS);
    let tarball = world.directory().join("host.tar");
    fs::copy(base.join("root.tar"), &tarball)?;
    let mut file = OpenOptions::new().read(true).write(true).open(&tarball)?;
    let end = end_of_entries(&mut file)?;
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    content.append(file)?;
    let only = |directory: &str| -> io::Result<PathBuf> {
        let mut entries = fs::read_dir(base.join(directory))?.flatten().map(|entry| entry.path());
        let found = entries.find(|path| directory != "boot" || path.to_string_lossy().contains("/vmlinuz-"));
        found.ok_or_else(|| io::Error::other(format!("nothing in {directory}")))
    };
    let (kernel, modules) = (only("boot")?, only("usr/lib/modules")?);
    let (kernel, modules) = (kernel.to_string_lossy(), modules.to_string_lossy());
    for arguments in [
        &["kernel", "import", "--kernel", &kernel, "--modules", &modules][..],
        &["image", "import", &tarball.to_string_lossy(), IMAGE],
    ] {
        world.vm(arguments).within(DOWNLOAD).run().exits(0);
    }
    fixtures::harvest(&world, seed)
}

/// Where a tarball's entries end and the zeros that say so begin.
fn end_of_entries(file: &mut File) -> io::Result<u64> {
    let mut end = 0;
    for entry in tar::Archive::new(&mut *file).entries_with_seek()? {
        let entry = entry?;
        let size = entry.header().entry_size()?;
        end = entry.raw_file_position() + size.next_multiple_of(512);
    }
    Ok(end)
}
