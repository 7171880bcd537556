//! What the tests of workspaces take from Debian, made once and kept in the cache of [`fixtures`]: a guest that has git, and a source
//! package of thousands of files as a repository with a history.
//!
//! Both are had before a test makes its [`World`]: whoever makes one holds the cache and waits for a place of a world.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use sha2::{Digest, Sha256};

use crate::{
    World,
    fixtures::{self, DOWNLOAD, Held},
    namespaces::Network,
};

/// The reference of Debian with git.
pub const WITH_GIT: &str = "with-git";

/// The release that all of it is of.
pub const SUITE: &str = "bookworm";
const PACKAGES: &str = "git";
/// Git's own source: some 4,400 files, of which more than a thousand are executable, patches of Debian's, a link.
const SOURCE: &str = "git";
/// Where it is unpacked.
const UPSTREAM: &str = "upstream";
/// Bumped when this file makes something else.
const RECIPE: &str = "1";

/// Fetches and unpacks a source package, as dpkg-source does before it applies patches. The host's lists and settings of apt are left
/// alone, but for its proxies.
const FETCH: &str = r#"
cd "$1"
mkdir -p lists/partial cache "$4"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$keyring] http://deb.debian.org/debian $2 main" >sources.list
cat >apt.conf <<END
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "$PWD/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$PWD/lists";
Dir::Cache "$PWD/cache";
APT::Sandbox::User "root";
END
apt-config dump | grep -i '^Acquire::.*::Proxy' >>apt.conf || :
export APT_CONFIG=$PWD/apt.conf
apt-get -q update
apt-get -q source --download-only "$3"
tar -C "$4" --strip-components=1 -xf "$3"_*.orig.tar.*
tar -C "$4" -xf "$3"_*.debian.tar.*
"#;

/// Makes a repository of it: what upstream has in three commits, Debian's files, and a commit for each of its patches.
const COMMIT: &str = r#"
cd "$1"
git init -q -b main
commit() { git commit -q -m "$1"; }
git add -- ':!debian' ':!Documentation' ':!po' ':!t'; commit 'The program'
git add Documentation po; commit 'Its documentation and translations'
git add t; commit 'Its tests'
git add debian; commit 'Debian'
while read -r patch; do
    git apply --index "debian/patches/$patch"; commit "$patch"
done <debian/patches/series
git gc -q
"#;

/// A seed with one more image, [`WITH_GIT`].
///
/// # Panics
/// It cannot be made.
pub fn seed_with_git() -> PathBuf {
    static SEED: OnceLock<Held> = OnceLock::new();
    let get = || make_seed().unwrap_or_else(|error| panic!("an image with git cannot be made: {error}"));
    SEED.get_or_init(get).0.clone()
}

fn make_seed() -> io::Result<Held> {
    let base = fixtures::seed();
    // Its name is a digest.
    let base_name = base.file_name().unwrap_or_default().to_string_lossy();
    let key = key(&[RECIPE, SUITE, PACKAGES, &base_name]);
    fixtures::cached("git-seed", &key, |cache, seed| {
        let world = World::empty(Network::Host);
        let tarball = tarball(&world, cache)?;
        fixtures::plant(&base, &world.dirs().state);
        world.vm(&["image", "import", &tarball.to_string_lossy(), WITH_GIT]).within(DOWNLOAD).run().exits(0);
        fixtures::harvest(&world, seed)
    })
}

/// Kept beside the seeds, for it is the slowest part and depends on no code of ours.
fn tarball(world: &World, cache: &Path) -> io::Result<PathBuf> {
    let path = cache.join(format!("git-{}.tar", key(&[RECIPE, SUITE, PACKAGES])));
    if !path.exists() {
        let partial = cache.join("git.partial.tar");
        bootstrap(world, PACKAGES, None, &partial);
        fs::rename(&partial, &path)?;
    }
    Ok(path)
}

/// Makes a tarball of Debian without its documentation: the packages, separated by commas, and what a hook of mmdebstrap's adds.
///
/// # Panics
/// mmdebstrap fails.
#[track_caller]
pub fn bootstrap(world: &World, packages: &str, hook: Option<&str>, tarball: &Path) {
    let include = format!("--include={packages}");
    let hook = hook.map(|hook| format!("--customize-hook={hook}"));
    let mut arguments = vec![
        "--variant=minbase",
        &include,
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
    ];
    arguments.extend(hook.as_deref());
    let tarball = tarball.to_string_lossy();
    arguments.extend([SUITE, &tarball]);
    world.tool("mmdebstrap", &arguments).within(DOWNLOAD).run().exits(0);
}

/// Debian's source package of git as a repository: a branch `main` with a history, and nothing that is not committed. To be copied.
///
/// # Panics
/// It cannot be made.
pub fn source_package() -> PathBuf {
    static SOURCE_PACKAGE: OnceLock<Held> = OnceLock::new();
    let get = || make_source().unwrap_or_else(|error| panic!("a source package cannot be fetched: {error}"));
    SOURCE_PACKAGE.get_or_init(get).0.join(UPSTREAM)
}

fn make_source() -> io::Result<Held> {
    let key = key(&[RECIPE, SUITE, SOURCE, FETCH, COMMIT]);
    fixtures::cached("source", &key, |_, directory| {
        let partial = directory.with_extension("new");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir(&partial)?;
        let world = World::empty(Network::Host);
        let script = |script, arguments: &[&str]| {
            let arguments: Vec<_> = ["-euc", script, "sh"].iter().chain(arguments).copied().collect();
            let mut sh = world.tool("sh", &arguments).within(DOWNLOAD);
            for (name, value) in [
                ("GIT_CONFIG_GLOBAL", "/dev/null"),
                ("GIT_CONFIG_SYSTEM", "/dev/null"),
                ("GIT_AUTHOR_NAME", "A Person"),
                ("GIT_AUTHOR_EMAIL", "person@example.org"),
                ("GIT_COMMITTER_NAME", "A Person"),
                ("GIT_COMMITTER_EMAIL", "person@example.org"),
            ] {
                sh = sh.env(name, value);
            }
            sh.run().exits(0);
        };
        let upstream = partial.join(UPSTREAM);
        script(FETCH, &[&partial.to_string_lossy(), SUITE, SOURCE, UPSTREAM]);
        script(COMMIT, &[&upstream.to_string_lossy()]);
        // All else was needed to fetch it.
        for entry in fs::read_dir(&partial)?.flatten().filter(|entry| entry.path() != upstream) {
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::rename(&partial, directory)
    })
}

fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
        hash.update([0]);
    }
    fixtures::short(&hash.finalize())
}
