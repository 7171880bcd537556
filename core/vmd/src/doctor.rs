//! Checks of the host: what a VM needs, whether it is there, and what to do where it is not. Changes nothing.

use std::{collections::HashSet, path::Path, sync::Arc};

use tokio::net::UnixStream;
use vm_api::{Finding, Severity};
use vm_disk::HostCow;
use vm_engine::{Engine, SubnetChoice};
use vm_host::{HostRunner, Runner};
use vm_locks::{Ctx, Unlocked};
use vm_net::{HostNet, Net};
use vm_types::{Layout, layout::SOCKET_PATH_MAX, vm::VmmKind};
use vm_vmm::{Accelerator, Availability, Jailing, VmmError};

use crate::{
    config::{Config, JailName},
    daemon::{self, Drivers},
    dns::NameService,
    plugins::Manager,
};

/// Less than this on the state directory's disk is worth a warning: an image and a few disks.
const LITTLE_SPACE: u64 = 4 << 30;

/// Programs that are run, what for, and the Debian package each is in.
const TOOLS: &[(&str, &str, &str)] = &[
    ("mke2fs", "formatting disks of plugins", "e2fsprogs"),
    ("nft", "the firewall", "nftables"),
    ("mmdebstrap", "acquiring debian:SUITE images", "mmdebstrap"),
    ("git", "workspaces that are repositories", "git"),
    ("dpkg-deb", "acquiring Debian's kernel", "dpkg"),
];

/// All checks, in a fixed order.
pub(crate) async fn check(layout: &Layout, config: &Config, running: Option<Running<'_>>) -> Vec<Finding> {
    let engine = running.map(|running| running.engine);
    let runner: Arc<dyn Runner> = Arc::new(HostRunner);
    let mut findings = vec![privileges(), socket(layout).await, group(config)];
    findings.extend(vmm(config, &runner).await);
    findings.push(agent(config));
    findings.extend(TOOLS.iter().map(|(tool, purpose, package)| program(tool, purpose, package)));
    findings.push(tun());
    findings.extend(network(layout, config, runner, engine).await);
    findings.push(space(layout));
    findings.push(backend(layout, config));
    findings.push(compiler());
    findings.extend(bundled(config.plugins.bundled.as_deref()));
    if let Some(engine) = engine {
        findings.push(recovery(engine));
        findings.push(leftovers(engine).await);
    }
    if let Some(Running { plugins, names, .. }) = running {
        findings.push(name_service(names).await);
        findings.extend(plugins.doctor().await);
    }
    findings
}

/// Parts of a daemon that runs.
#[derive(Clone, Copy)]
pub(crate) struct Running<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) plugins: &'a Manager,
    pub(crate) names: &'a NameService,
}

/// Where names are answered, and how that goes.
async fn name_service(names: &NameService) -> Finding {
    const CHECK: &str = "daemon.names";
    let listening: Vec<_> = names.listening().await.iter().map(ToString::to_string).collect();
    let stats = names.stats();
    let counts = format!(
        "{} answers from zones, {} forwarded, {} remembered; {} failures, {} refused",
        stats.zone,
        stats.forwarded,
        stats.cached,
        stats.resolver_failures + stats.upstream_failures + stats.overload,
        stats.strangers
    );
    let zones = match &vm_engine::ports::Names::domains(names)[..] {
        [] => "no zones".to_owned(),
        zones => format!("zones {}", zones.join(", ")),
    };
    if listening.is_empty() {
        let fix = "name a free address in names.listen in the configuration";
        return bad(Severity::Warning, CHECK, format!("answers nowhere; {zones}"), fix);
    }
    ok(CHECK, format!("answers on {}; {zones}; {counts}", listening.join(", ")))
}

fn ok(check: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding { check: check.into(), severity: Severity::Ok, message: message.into(), fix: None }
}

fn bad(
    severity: Severity,
    check: impl Into<String>,
    message: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding { check: check.into(), severity, message: message.into(), fix: Some(fix.into()) }
}

fn privileges() -> Finding {
    if nix::unistd::geteuid().is_root() {
        ok("daemon.privileges", "running as root")
    } else {
        bad(
            Severity::Warning,
            "daemon.privileges",
            "not running as root; some checks see less, and the daemon needs root",
            "run `sudo vm doctor`",
        )
    }
}

fn group(config: &Config) -> Finding {
    let check = "daemon.group";
    match (&config.group, config.group_id()) {
        (None, _) => ok(check, "only root may use the daemon (no group is configured)"),
        (Some(name), Ok(_)) => {
            ok(check, format!("members of group {name} may use the daemon; they are root-equivalent"))
        }
        (Some(name), Err(error)) => {
            bad(Severity::Error, check, error.to_string(), format!("groupadd --system {name}"))
        }
    }
}

async fn socket(layout: &Layout) -> Finding {
    let path = layout.socket();
    let check = "daemon.socket";
    if layout.longest_socket().as_os_str().len() > SOCKET_PATH_MAX {
        let message = format!("sockets below {} would have too long a path", layout.run.display());
        return bad(Severity::Error, check, message, "name a shorter --run-dir");
    }
    match UnixStream::connect(&path).await {
        Ok(_) => ok(check, format!("a daemon listens on {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => bad(
            Severity::Error,
            check,
            format!("no permission to use {}", path.display()),
            "use sudo, or become a member of the daemon's group",
        ),
        Err(_) => ok(check, format!("no daemon on {}; vm starts one when it needs it", path.display())),
    }
}

async fn vmm(config: &Config, runner: &Arc<dyn Runner>) -> Vec<Finding> {
    let check = "vmm.driver";
    let Drivers { vmm, why, jailing } = match daemon::drivers(config, runner).await {
        Ok(found) => found,
        Err(error) => {
            return vec![bad(Severity::Error, check, error.to_string(), error.hint().unwrap_or_default())];
        }
    };
    let preferred = vmm.preferred();
    let mut findings = vec![ok(check, format!("{preferred} runs VMs: {why}"))];
    for kind in [VmmKind::Firecracker, VmmKind::Qemu, VmmKind::Fake] {
        if let Ok(driver) = vmm.get(kind) {
            let mut found = driver.availability().await;
            if let Ok(found) = &mut found
                && jailing.as_ref().is_some_and(|jailing| jailing.obstacle.is_some())
            {
                // Told below, once for all.
                found.jail_obstacle = None;
            }
            findings.extend(driver_found(found, kind, kind == preferred));
        }
    }
    findings.extend(jail(config, preferred, jailing.as_ref()));
    findings
}

/// What is to be said of a driver; of one that is not needed, its absence is no fault.
fn driver_found(found: Result<Availability, VmmError>, kind: VmmKind, needed: bool) -> Vec<Finding> {
    let check = format!("vmm.{kind}");
    match found {
        Ok(found) => {
            let accelerator = match found.accelerator {
                Accelerator::Kvm => ok("vmm.kvm", found.reason),
                Accelerator::Tcg => bad(
                    Severity::Warning,
                    "vmm.kvm",
                    format!(
                        "no hardware virtualisation ({}): VMs work, but several times slower",
                        found.reason
                    ),
                    "enable VT-x or AMD-V in the firmware, or nested virtualisation where this host is a VM itself",
                ),
            };
            let unlocked = |why| {
                let message = format!("it runs as the daemon's user and sees all files: {why}");
                let severity = if needed { Severity::Warning } else { Severity::Ok };
                Finding {
                    severity,
                    ..bad(severity, format!("{check}.jail"), message, "remove what is in the way")
                }
            };
            let unlocked = found.jail_obstacle.map(unlocked);
            let mut findings = vec![ok(check.clone(), found.version)];
            findings.extend(needed.then_some(accelerator));
            findings.extend(unlocked);
            findings
        }
        Err(error) if needed => {
            let hint = error.hint().unwrap_or_else(|| "install QEMU: apt install qemu-system-x86".into());
            vec![bad(Severity::Error, check, vm_engine::EngineError::from(error).chain(), hint)]
        }
        Err(error) => vec![ok(check, format!("cannot be used: {}", vm_types::report::chain(&error)))],
    }
}

/// Whether VMMs are locked in on this host, and limited.
fn jail(config: &Config, preferred: VmmKind, jailing: Option<&Jailing>) -> Vec<Finding> {
    let check = "vmm.jail";
    let Some(jailing) = jailing else {
        let why = match config.vmm.jail {
            JailName::Off => "(vmm.jail is \"off\")".to_owned(),
            JailName::Auto | JailName::On => format!("(it is {preferred})"),
        };
        return vec![ok(check, format!("off: the VMM runs as the daemon's user and sees all files {why}"))];
    };
    if let Some(obstacle) = &jailing.obstacle {
        let (severity, what) = match jailing.required {
            true => (Severity::Error, "no VM can be started"),
            false => (Severity::Warning, "VMMs run as the daemon's user and see all files"),
        };
        let fix = "run vmd as root with all capabilities, on a host that allows namespaces and device nodes";
        return vec![bad(severity, check, format!("{what}: {obstacle}"), fix)];
    }
    let each = "each VM's VMM has a user and a root of its own and no capability, QEMU no network but its taps either";
    let limits = vm_engine::effects::limitable();
    let missing: Vec<_> =
        ["memory", "cpu", "pids"].into_iter().filter(|name| !limits.contains(name)).collect();
    let groups = "vmm.cgroup";
    let limited = match &missing[..] {
        [] => ok(groups, "memory, processors and processes of each VMM are limited"),
        missing => bad(
            Severity::Warning,
            groups,
            format!("VMMs are not limited in {}: there is no control group for it", missing.join(", ")),
            "mount the control groups writably; in version 2, enable these in /sys/fs/cgroup/cgroup.subtree_control",
        ),
    };
    vec![ok(check, each), limited]
}

fn agent(config: &Config) -> Finding {
    let path = config.agent();
    if path.is_file() {
        ok("guest.agent", path.display().to_string())
    } else {
        let message = format!("the guest agent {} is not there", path.display());
        bad(
            Severity::Error,
            "guest.agent",
            message,
            "install vm-agent beside vmd, or set `agent` in the configuration",
        )
    }
}

fn compiler() -> Finding {
    let check = "plugins.compiler";
    let path = daemon::compiler();
    if path.is_file() {
        return ok(check, path.display().to_string());
    }
    bad(
        Severity::Warning,
        check,
        format!("{} is not there; no plugin can be installed", path.display()),
        "install vm-plugin-compile beside vmd",
    )
}

/// What is to be said of a directory that the configuration names for the plugins that come with the daemon.
fn bundled(configured: Option<&Path>) -> Option<Finding> {
    let directory = configured?;
    let source = std::fs::read_dir(directory).err()?;
    let message = format!("no plugin can be installed from {}: {source}", directory.display());
    let fix = "mend `plugins.bundled` in the configuration, or take it out";
    Some(bad(Severity::Warning, "plugins.bundled", message, fix))
}

fn program(tool: &str, purpose: &str, package: &str) -> Finding {
    let check = format!("tools.{tool}");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        // Where administration tools are, though not on every user's PATH.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(tool))
        .find(|file| file.is_file());
    match found {
        Some(file) => ok(check, file.display().to_string()),
        None => bad(
            Severity::Error,
            check,
            format!("{tool} is not installed; it is needed for {purpose}"),
            format!("apt install {package}"),
        ),
    }
}

fn tun() -> Finding {
    if Path::new("/dev/net/tun").exists() {
        ok("network.tun", "/dev/net/tun is there")
    } else {
        bad(Severity::Error, "network.tun", "/dev/net/tun is not there", "modprobe tun")
    }
}

async fn network(
    layout: &Layout,
    config: &Config,
    runner: Arc<dyn Runner>,
    engine: Option<&Engine>,
) -> Vec<Finding> {
    let net = HostNet::new(runner);
    let (own, chosen) = known(layout, engine).await;
    // What the daemon will do: a subnet that was chosen once is kept while it is free.
    let wanted = match config.subnet() {
        SubnetChoice::Auto => chosen.map_or(SubnetChoice::Auto, SubnetChoice::Fixed),
        fixed => fixed,
    };
    let subnet = match wanted {
        SubnetChoice::Fixed(subnet) => match net.check_subnet(subnet, &own).await {
            Ok(()) => ok("network.subnet", format!("{subnet} is free")),
            Err(error) => clash(error),
        },
        SubnetChoice::Auto => match vm_net::pick_subnet(&net, &vm_net::subnet::candidates(), &own).await {
            Ok(subnet) => ok("network.subnet", format!("{subnet} can be used")),
            Err(error) => clash(error),
        },
    };
    let mut findings = vec![subnet];
    let bridge = if own.is_empty() { "vmbr-+" } else { &own };
    findings.push(match net.forwarding_blocked(&own).await {
        Ok(blockers) if blockers.is_empty() => {
            ok("network.forwarding", "no foreign firewall drops packets of VMs")
        }
        Ok(blockers) => {
            let mut fixes: Vec<_> = blockers.iter().flat_map(|blocker| blocker.fix(bridge)).collect();
            // One command may be for several chains.
            let mut seen = HashSet::new();
            fixes.retain(|fix| seen.insert(fix.clone()));
            bad(
                Severity::Warning,
                "network.forwarding",
                blockers.iter().map(vm_net::Blocker::explanation).collect::<Vec<_>>().join("; "),
                fixes.join("; "),
            )
        }
        Err(error) => bad(
            Severity::Warning,
            "network.forwarding",
            vm_engine::EngineError::from(error).chain(),
            "run `sudo vm doctor`",
        ),
    });
    findings
}

/// Name of the daemon's bridge and the subnet it chose: from the daemon if this is one, from its database if none runs.
async fn known(layout: &Layout, engine: Option<&Engine>) -> (String, Option<ipnet::Ipv4Net>) {
    if let Some(engine) = engine {
        let bridge = vm_net::names::bridge_name(engine.instance());
        return (bridge, engine.chosen_subnet().await.ok().flatten());
    }
    let database = layout.database();
    // Opening may bring the database up to date, which is a running daemon's own affair.
    if !database.is_file() || UnixStream::connect(layout.socket()).await.is_ok() {
        return Default::default();
    }
    let Ok(store) = vm_store::Store::open(&database) else { return Default::default() };
    let id = store.meta().get(vm_store::meta::INSTANCE_ID).await.ok().flatten();
    let bridge =
        id.and_then(|id| id.parse().ok()).map(|id| vm_net::names::bridge_name(&id)).unwrap_or_default();
    let subnet = store.meta().get(vm_store::meta::SUBNET).await.ok().flatten();
    (bridge, subnet.and_then(|text| text.parse().ok()))
}

fn clash(error: vm_net::NetError) -> Finding {
    let hint = error.hint().unwrap_or_else(|| "set network.subnet in the configuration".into());
    bad(Severity::Error, "network.subnet", vm_engine::EngineError::from(error).chain(), hint)
}

/// What the daemon found and did when it came up.
fn recovery(engine: &Engine) -> Finding {
    let check = "daemon.recovery";
    match engine.recovery() {
        Some(recovery) if recovery.failed > 0 => bad(
            Severity::Warning,
            check,
            format!("{}: {}", recovery.summary(), recovery.lines.join("; ")),
            "mend the cause, then delete the VM or restart the daemon (`vm daemon stop`)",
        ),
        Some(recovery) if !recovery.nothing_to_do() => {
            ok(check, format!("{}: {}", recovery.summary(), recovery.lines.join("; ")))
        }
        _ => ok(check, "the daemon found everything as it should be when it came up"),
    }
}

/// What carries the daemon's names and is in none of its journals.
async fn leftovers(engine: &Engine) -> Finding {
    let check = "daemon.leftovers";
    let look = async |mut ctx: Ctx<Unlocked>| engine.leftovers(&mut ctx).await;
    let left = engine.locks().root("request daemon.doctor", look).await;
    if left.is_empty() {
        return ok(check, "nothing of the daemon's is on the host that it does not know of");
    }
    let ids: Vec<_> = left.iter().map(|effect| effect.id().0).collect();
    bad(
        Severity::Warning,
        check,
        format!("in no journal of the daemon's: {}", ids.join(", ")),
        "restart the daemon, which reclaims them: `vm daemon stop`, then any command",
    )
}

/// The nearest directory above `path` that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}

fn space(layout: &Layout) -> Finding {
    let check = "disk.space";
    match vm_disk::free_bytes(existing(&layout.state)) {
        Ok(bytes) => {
            let message = format!("{} MiB free for {}", bytes >> 20, layout.state.display());
            if bytes < LITTLE_SPACE {
                bad(Severity::Warning, check, message, "free some space, or name another --state-dir")
            } else {
                ok(check, message)
            }
        }
        Err(error) => bad(
            Severity::Error,
            check,
            vm_engine::EngineError::from(error).chain(),
            "name a --state-dir that can be used",
        ),
    }
}

fn backend(layout: &Layout, config: &Config) -> Finding {
    let check = "disk.backend";
    let directory = existing(&layout.state);
    match HostCow::probe(config.disk.backend, directory, directory) {
        Ok(cow) => {
            let what = match vm_disk::Cow::backend(&cow) {
                vm_disk::Backend::Reflink => {
                    "reflink: a VM's disk is made at once and takes no space at first"
                }
                vm_disk::Backend::DmSnapshot => {
                    "dm-snapshot: a VM's disk is made at once and holds what differs from its image"
                }
                vm_disk::Backend::Copy => "sparse copy: each VM's disk begins with a copy of its image",
            };
            let why: Vec<_> =
                cow.passed_over().iter().map(|(backend, why)| format!("no {backend}: {why}")).collect();
            match why.is_empty() {
                true => ok(check, what),
                false => ok(check, format!("{what} ({})", why.join("; "))),
            }
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| "set disk.backend to auto".into());
            bad(Severity::Error, check, vm_engine::EngineError::from(error).chain(), hint)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_plugins_that_is_configured_and_missing_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert!(bundled(None).is_none() && bundled(Some(dir.path())).is_none());
        let missing = dir.path().join("plugins");
        let finding = bundled(Some(&missing)).unwrap();
        assert_eq!(finding.severity, Severity::Warning);
        assert!(finding.message.contains(missing.to_str().unwrap()), "{}", finding.message);
        assert!(finding.fix.unwrap().contains("plugins.bundled"));
    }
}
