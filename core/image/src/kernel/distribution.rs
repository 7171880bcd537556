//! The distribution's cloud kernel, by apt from the host's own package sources.
//!
//! apt gets state and cache directories of its own below the scratch directory, so it works before the host ever ran
//! `apt-get update`, whatever the host has installed, and changes nothing on it. The host's sources, keys, credentials and
//! proxy settings stay in force; its hooks do not.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use vm_host::{HostCommand, RunError, RunOutput, Runner};

use super::{KernelSource, import_files};
use crate::{ImageError, ProgressSink, progress::Reporter, scratch::Scratch};

/// Depends on the newest versioned package.
const PACKAGE: &str = "linux-image-cloud-amd64";
const STEPS: u64 = 4;

/// Fetches the distribution's cloud kernel. Needs the network and some 150 MB in `scratch`.
///
/// # Errors
/// No apt, no such package in the host's sources, or no network.
pub async fn import_debian(
    runner: &dyn Runner,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<KernelSource, ImageError> {
    let scratch = Scratch::new(scratch, "kernel-")?;
    match fetch(runner, &scratch, &Reporter::new(progress)).await {
        Ok(found) => Ok(KernelSource { _scratch: Some(scratch), ..found }),
        Err(error) => {
            scratch.close().await;
            Err(error)
        }
    }
}

async fn fetch(
    runner: &dyn Runner,
    scratch: &Scratch,
    reporter: &Reporter,
) -> Result<KernelSource, ImageError> {
    let root = scratch.join("");
    let config = prepare(&root).map_err(|source| ImageError::File {
        action: "prepare",
        path: root.clone(),
        source,
    })?;
    let apt = |program: &str, action: &'static str| {
        let mut command = HostCommand::new(program).arg("-c").arg(&config).timeout(Duration::from_secs(900));
        command.directory = Some(root.clone());
        command.env.push(("LC_ALL".into(), "C".into()));
        Tool { command, action, package: "apt" }
    };
    reporter.report("reading package lists", 0, Some(STEPS));
    apt("apt-get", "reading package lists").run(runner, &["-q", "update"]).await?;

    let no_package = || ImageError::NoKernelPackage { package: PACKAGE.into() };
    let depends = match apt("apt-cache", "looking for a kernel")
        .run(runner, &["depends", "--important", "--no-recommends", PACKAGE])
        .await
    {
        Err(ImageError::Tool { source: RunError::Failed { .. }, .. }) => return Err(no_package()),
        other => other?,
    };
    let package = versioned(&String::from_utf8_lossy(&depends.stdout)).ok_or_else(no_package)?;

    reporter.report("downloading the kernel", 1, Some(STEPS));
    apt("apt-get", "downloading the kernel").run(runner, &["-q", "download", &package]).await?;
    let deb = only_deb(&root).ok_or_else(no_package)?;

    reporter.report("unpacking the kernel", 2, Some(STEPS));
    let tree = scratch.join("tree");
    let command =
        HostCommand::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree).timeout(Duration::from_secs(300));
    Tool { command, action: "unpacking the kernel", package: "dpkg" }.run(runner, &[]).await?;

    reporter.report("checking the kernel", 3, Some(STEPS));
    let boot = tree.join("boot");
    let vmlinuz = starting(&boot, "vmlinuz-").ok_or_else(|| ImageError::NotAKernel {
        path: deb.clone(),
        reason: "the package has no boot/vmlinuz-*".into(),
    })?;
    let config = starting(&boot, "config-");
    let found = import_files(&vmlinuz, None, config.as_deref()).await?;
    let modules = ["usr/lib/modules", "lib/modules"]
        .into_iter()
        .map(|dir| tree.join(dir).join(&found.release))
        .find(|dir| dir.is_dir());
    reporter.report("checking the kernel", STEPS, Some(STEPS));
    Ok(KernelSource { modules, origin: format!("debian {package}"), ..found })
}

struct Tool {
    command: HostCommand,
    action: &'static str,
    package: &'static str,
}

impl Tool {
    async fn run(self, runner: &dyn Runner, args: &[&str]) -> Result<RunOutput, ImageError> {
        let Self { command, action, package } = self;
        runner.run(command.args(args)).await.map_err(|source| ImageError::Tool { action, package, source })
    }
}

/// Makes apt's directories and its configuration, which apt reads after the host's and so overrules it.
fn prepare(root: &Path) -> io::Result<PathBuf> {
    for dir in ["state/lists/partial", "cache/archives/partial", "log"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::write(root.join("status"), "")?;
    let quoted = |name: &str| root.join(name).to_string_lossy().into_owned();
    let text = format!(
        r#"#clear APT::Update;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
  MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
  flatMetaKey "Packages";
  ShortDescription "Packages";
  Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
  flatDescription "$(RELEASE) Packages";
  Optional "false";
}};
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "root";
APT::Architecture "amd64";
Dir::State "{state}";
Dir::State::lists "lists";
Dir::State::status "{status}";
Dir::Cache "{cache}";
Dir::Cache::archives "archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{log}";
"#,
        state = quoted("state"),
        status = quoted("status"),
        cache = quoted("cache"),
        log = quoted("log"),
    );
    let path = root.join("apt.conf");
    fs::write(&path, text)?;
    Ok(path)
}

/// The package that `apt-cache depends` names, of the newest version where there are several.
fn versioned(depends: &str) -> Option<String> {
    let mut names =
        depends.lines().filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "));
    names.find(|name| name.starts_with("linux-image-") && name.contains("cloud")).map(str::to_owned)
}

fn only_deb(directory: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    files.find(|path| path.extension().is_some_and(|end| end == "deb"))
}

fn starting(directory: &Path, start: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?.flatten();
    entries.find(|entry| entry.file_name().to_string_lossy().starts_with(start)).map(|entry| entry.path())
}
