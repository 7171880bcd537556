//! `debian:SUITE`: a root filesystem built on this host by mmdebstrap.
//!
//! What is in it: the variant `minbase` (apt works, with the suite's usual sources), certificates for HTTPS, and the tools
//! to look at network and processes. No init system: the agent is init. Documentation, manuals and translations are left
//! out, now and of what is installed later, because each VM pays for them; package lists and caches too.
//!
//! The tool runs in mount and process namespaces of its own, so that killing it takes every child and mount along.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use vm_host::{HostCommand, RunError, Runner};

use crate::{ImageError, ProgressSink, progress::Reporter, reference::Suite, scratch::Scratch};

/// A tar archive in a scratch directory; dropping it removes it.
#[derive(Debug)]
pub struct Tarball {
    path: PathBuf,
    _scratch: Scratch,
}

impl Tarball {
    /// Where it is, as long as this value lives.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

const TIMEOUT: Duration = Duration::from_secs(1800);
const PACKAGES: &str = "ca-certificates,iproute2,procps";
const LEFT_OUT: [&str; 5] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
];
/// What belongs to this host and this run: its name, its resolver, options for apt during the build, logs.
const CLEAN_UP: &str = r#"rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$1/var/cache/debconf/"*-old "$1/var/lib/dpkg/"*-old "$1/var/cache/ldconfig"
find "$1/var/log" -type f -delete"#;

/// mmdebstrap's own hook that merges /usr before the first package, in suites where that is due. Without it a package does so
/// afterwards, and brings all of Perl along: 55 MB that would be copied for every VM.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/maybe-merged-usr";

/// What mmdebstrap says when it begins a step, and what that is for people, in order.
const STEPS: [(&str, &str); 7] = [
    ("running apt-get update", "reading package lists"),
    ("downloading packages", "downloading packages"),
    ("extracting archives", "extracting packages"),
    ("installing essential", "installing essential packages"),
    ("installing remaining", "installing packages"),
    ("cleaning package lists", "cleaning up"),
    ("creating tarball", "packing"),
];

/// Builds a suite's root filesystem. Needs root, the network and some 500 MB in `scratch`; takes a minute or two.
///
/// # Errors
/// [`ImageError::UnknownSuite`], or mmdebstrap not being there or failing.
pub async fn pull(
    runner: &dyn Runner,
    suite: &Suite,
    scratch: &Path,
    progress: ProgressSink,
) -> Result<Tarball, ImageError> {
    let scratch = Scratch::new(scratch, "debian-")?;
    let path = scratch.join("rootfs.tar");
    let mut command = mmdebstrap(suite, &path);
    command.env.push(("TMPDIR".into(), scratch.join("").into()));
    command.env.push(("LC_ALL".into(), "C".into()));
    command.env.extend(proxies(runner).await);
    let reporter = Reporter::new(progress);
    reporter.report(STEPS[0].1, 0, Some(STEPS.len() as u64));
    command.on_stderr_line = Some(Arc::new(move |line: &str| {
        let step = STEPS.iter().position(|(said, _)| line.starts_with("I: ") && line[3..].starts_with(said));
        if let Some(step) = step {
            reporter.report(STEPS[step].1, step as u64, Some(STEPS.len() as u64));
        }
    }));
    match runner.run(command).await {
        Ok(_) => Ok(Tarball { path, _scratch: scratch }),
        Err(error) => {
            scratch.close().await;
            Err(match error {
                RunError::Failed { stderr_tail, .. } if says_unknown(&stderr_tail, suite) => {
                    ImageError::UnknownSuite { suite: suite.to_string() }
                }
                RunError::NotInstalled { program } if program == "unshare" => ImageError::Tool {
                    action: "building the root filesystem",
                    package: "util-linux",
                    source: RunError::NotInstalled { program },
                },
                source => {
                    ImageError::Tool { action: "building the root filesystem", package: "mmdebstrap", source }
                }
            })
        }
    }
}

fn mmdebstrap(suite: &Suite, out: &Path) -> HostCommand {
    let mut command = HostCommand::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--", "mmdebstrap"])
        .args(["--mode=root", "--variant=minbase", "--format=tar", "--include", PACKAGES])
        .args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Retries \"3\""])
        // The scratch directory is root's alone, so apt's unprivileged user could not write there.
        .arg("--aptopt=APT::Sandbox::User \"root\"")
        .timeout(TIMEOUT);
    for rule in LEFT_OUT {
        command = command.arg(format!("--dpkgopt={rule}"));
    }
    if Path::new(MERGED_USR).is_dir() {
        command = command.arg(format!("--hook-dir={MERGED_USR}"));
    }
    command.arg(format!("--customize-hook={CLEAN_UP}")).arg(suite.as_str()).arg(out)
}

/// What `unshare` says of a program that is not there looks like a failure of its own, so that is told apart by text.
fn says_unknown(stderr: &str, suite: &Suite) -> bool {
    let release = format!("{suite} Release' does not have a Release file");
    stderr.contains(&release) || stderr.contains(&format!("unknown suite {suite}"))
}

/// The proxies that the host's apt is set to use, for a tool that reads the environment only. Variables of the daemon's
/// own environment win.
async fn proxies(runner: &dyn Runner) -> Vec<(std::ffi::OsString, std::ffi::OsString)> {
    let mut found = Vec::new();
    for (variable, option) in
        [("http_proxy", "Acquire::http::Proxy"), ("https_proxy", "Acquire::https::Proxy")]
    {
        if std::env::var_os(variable).is_some() {
            continue;
        }
        let command = HostCommand::new("apt-config").args(["dump", "--format", "%v%n", option]);
        // A host without apt, or whose apt has no proxy, is none with a proxy.
        let Ok(output) = runner.run(command).await else { continue };
        let text = String::from_utf8_lossy(&output.stdout);
        if let Some(proxy) = text.lines().map(str::trim).find(|line| line.contains("://")) {
            found.push((variable.into(), proxy.into()));
        }
    }
    found
}
