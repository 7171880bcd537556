//! The configuration file, `config.toml`: versioned, checked, complete in its defaults.

mod images;

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use vm_disk::BackendChoice;
use vm_engine::{Registries, Settings, SubnetChoice, admission::Limits};
use vm_types::vm::DiskLimits;
use vm_vmm::{Accelerator, JailUsers};

use self::images::ImagesConfig;
use crate::plugins::Trust;

/// The version this build reads.
const VERSION: u32 = 1;
/// A bridge has 1,024 ports at most, and most of them are for VMs that run.
const TAP_POOL_MAX: usize = 256;

/// A guest's memory that is promised so many times cannot be meant.
const OVERCOMMIT_MAX: f64 = 16.0;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// It cannot be read.
    #[error("could not read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// It is no TOML of ours.
    #[error("{} is not a valid configuration", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    /// It is of a version this build does not know.
    #[error("{} is of version {found}; this build reads version {VERSION}", path.display())]
    Version { path: PathBuf, found: u32 },
    /// A value is out of bounds.
    #[error("{}: {key} {rule}", path.display())]
    Value { path: PathBuf, key: &'static str, rule: String },
}

impl ConfigError {
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Read { .. } => Some("make it readable, or name another directory with --config-dir".into()),
            Self::Parse { .. } | Self::Value { .. } => {
                Some("docs/configuration.md has every key; `vmd config --config-dir /nonexistent` prints the defaults".into())
            }
            Self::Version { .. } => {
                Some("use a vmd that is as new as the file, or begin it with version = 1".into())
            }
        }
    }
}

/// The whole file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    version: u32,
    /// Group that may use the socket; left out, only root may. Root-equivalent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// The guest agent's binary; beside vmd if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<PathBuf>,
    vm: Vm,
    limits: LimitsConfig,
    network: Network,
    pub(crate) vmm: VmmConfig,
    pub(crate) disk: Disk,
    pub(crate) images: ImagesConfig,
    pub(crate) plugins: PluginsConfig,
    pub(crate) names: NamesConfig,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Vm {
    image: String,
    cpus: u32,
    memory_mib: u64,
    disk_mib: u64,
    /// A second; 0: no limit.
    disk_bandwidth_kib: u64,
    /// A second; 0: no limit.
    disk_iops: u64,
    start_timeout_seconds: u64,
    stop_grace_seconds: u64,
    console_log_kib: u64,
}

/// See [`Limits`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitsConfig {
    memory_overcommit: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_reserve_mib: Option<u64>,
    /// 0: no quota.
    disk_quota_mib: u64,
    /// 0: as many as there is room for.
    vms: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Network {
    /// `auto`, or an IPv4 subnet.
    subnet: Subnet,
    resolvers: Vec<IpAddr>,
    /// Taps that are made before a VM needs one.
    tap_pool: usize,
}

impl Default for Network {
    fn default() -> Self {
        Self { subnet: Subnet::Auto, resolvers: Vec::new(), tap_pool: 4 }
    }
}

/// See [`SubnetChoice`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
enum Subnet {
    #[default]
    Auto,
    Fixed(Ipv4Net),
}

impl TryFrom<String> for Subnet {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            text => text.parse().map(Self::Fixed).map_err(|_| {
                format!("{text:?} is no subnet: use \"auto\", or one in the form \"10.20.30.0/24\"")
            }),
        }
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        match subnet {
            Subnet::Auto => "auto".into(),
            Subnet::Fixed(subnet) => subnet.to_string(),
        }
    }
}

/// Which VMM and how.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct VmmConfig {
    /// What runs a VM that asks for none.
    pub(crate) driver: DriverName,
    /// Firecracker's binary; looked up if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) firecracker: Option<PathBuf>,
    /// QEMU's binary; looked up if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) qemu: Option<PathBuf>,
    /// QEMU's, `kvm` or `tcg`; found out if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) accelerator: Option<AcceleratorName>,
    /// Whether QEMU is locked in: a user of its own, its own files only.
    pub(crate) jail: JailName,
    /// User ids for that.
    jail_users: Users,
    /// The fake VMM's binary; for tests of builds that have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fake: Option<PathBuf>,
}

/// Whether VMMs are locked in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum JailName {
    /// Where the host allows it.
    #[default]
    Auto,
    /// Or they are not started.
    On,
    Off,
}

/// See [`JailUsers`]; written `FIRST-LAST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Users(JailUsers);

impl Default for Users {
    /// Above what systemd gives to containers, below what the kernel's signed types cannot count
    /// (<https://systemd.io/UIDS-GIDS/>).
    fn default() -> Self {
        Self(JailUsers { first: 0x7000_0000, last: 0x7FFF_FFFD })
    }
}

impl TryFrom<String> for Users {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let ids = text.split_once('-').and_then(|(first, last)| {
            Some(JailUsers { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        match ids {
            Some(users @ JailUsers { first, last }) if first > 0 && first < last && last < u32::MAX => {
                Ok(Self(users))
            }
            _ => Err(format!(
                "{text:?} is no range of user ids: use the form \"1879048192-2147483645\", without 0"
            )),
        }
    }
}

impl From<Users> for String {
    fn from(Users(JailUsers { first, last }): Users) -> Self {
        format!("{first}-{last}")
    }
}

/// See [`vm_types::vm::VmmKind`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DriverName {
    /// Firecracker where it and hardware virtualisation are there, else QEMU.
    #[default]
    Auto,
    Firecracker,
    Qemu,
}

/// See [`Accelerator`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AcceleratorName {
    Kvm,
    Tcg,
}

impl From<AcceleratorName> for Accelerator {
    fn from(name: AcceleratorName) -> Self {
        match name {
            AcceleratorName::Kvm => Self::Kvm,
            AcceleratorName::Tcg => Self::Tcg,
        }
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Disk {
    /// `auto`, `reflink`, `dm-snapshot` or `copy`.
    pub(crate) backend: BackendChoice,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NamesConfig {
    /// Where the host itself asks for VMs' names; an address of the daemon's own if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<SocketAddr>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PluginsConfig {
    /// The directory of plugins that come with the daemon; found out if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bundled: Option<PathBuf>,
    /// Files of public keys; whoever holds one of them may sign plugins.
    trusted_keys: Vec<PathBuf>,
    /// Whether only signed plugins can be installed.
    require_signature: bool,
}

impl PluginsConfig {
    pub(crate) fn trust(&self) -> Trust {
        Trust { keys: self.trusted_keys.clone(), required: self.require_signature }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: VERSION,
            group: None,
            agent: None,
            vm: Vm::default(),
            limits: LimitsConfig::default(),
            network: Network::default(),
            vmm: VmmConfig::default(),
            disk: Disk::default(),
            images: ImagesConfig::default(),
            plugins: PluginsConfig::default(),
            names: NamesConfig::default(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            image: "debian:bookworm".into(),
            cpus: 2,
            memory_mib: 1024,
            disk_mib: 8 * 1024,
            disk_bandwidth_kib: 0,
            disk_iops: 0,
            start_timeout_seconds: 120,
            stop_grace_seconds: 60,
            console_log_kib: 1024,
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { memory_overcommit: 1.0, memory_reserve_mib: None, disk_quota_mib: 0, vms: 0 }
    }
}

/// Reads and checks the file; without one, the defaults.
pub(crate) fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Config::default()),
        Err(source) => return Err(ConfigError::Read { path: path.into(), source }),
    };
    parse(&text, path)
}

fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    #[derive(Deserialize)]
    struct VersionOnly {
        version: Option<u32>,
    }
    let failed = |source| ConfigError::Parse { path: path.into(), source: Box::new(source) };
    // First, so that a newer file is not called wrong for a key that this build does not know.
    let found = toml::from_str::<VersionOnly>(text).map_err(failed)?.version.unwrap_or(VERSION);
    if found != VERSION {
        return Err(ConfigError::Version { path: path.into(), found });
    }
    let config: Config = toml::from_str(text).map_err(failed)?;
    let bounds = [
        ("vm.cpus", config.vm.cpus.into(), 1, 255),
        ("vm.memory_mib", config.vm.memory_mib, 64, 1 << 24),
        ("vm.disk_mib", config.vm.disk_mib, 64, 1 << 24),
        ("vm.disk_bandwidth_kib", config.vm.disk_bandwidth_kib, 0, 1 << 30),
        ("vm.disk_iops", config.vm.disk_iops, 0, 1_000_000_000),
        ("vm.start_timeout_seconds", config.vm.start_timeout_seconds, 1, 3600),
        ("vm.stop_grace_seconds", config.vm.stop_grace_seconds, 0, 3600),
        ("vm.console_log_kib", config.vm.console_log_kib, 16, 1 << 20),
        ("network.tap_pool", config.network.tap_pool as u64, 0, TAP_POOL_MAX as u64),
        ("limits.memory_reserve_mib", config.limits.memory_reserve_mib.unwrap_or(0), 0, 1 << 30),
        ("limits.disk_quota_mib", config.limits.disk_quota_mib, 0, 1 << 40),
    ];
    for (key, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            let rule = format!("is {value}; {least} to {most} are possible");
            return Err(ConfigError::Value { path: path.into(), key, rule });
        }
    }
    let value = |key, rule| Err(ConfigError::Value { path: path.into(), key, rule });
    let overcommit = config.limits.memory_overcommit;
    // Not a number is in no range.
    if !(overcommit > 0.0 && overcommit <= OVERCOMMIT_MAX) {
        let rule = format!("is {overcommit}; more than 0 and at most {OVERCOMMIT_MAX} is possible");
        return value("limits.memory_overcommit", rule);
    }
    if let Subnet::Fixed(subnet) = config.network.subnet {
        let address = subnet.network();
        if !(8..=29).contains(&subnet.prefix_len()) {
            return value("network.subnet", format!("is {subnet}; /8 to /29 are possible"));
        }
        if address.is_loopback()
            || address.is_multicast()
            || address.is_link_local()
            // Of this network, and of no use yet (RFC 6890).
            || matches!(address.octets()[0], 0 | 240..)
        {
            return value("network.subnet", format!("is {subnet}, whose addresses no guest can have"));
        }
    }
    let one = [
        ("agent", &config.agent),
        ("vmm.firecracker", &config.vmm.firecracker),
        ("vmm.qemu", &config.vmm.qemu),
        ("vmm.fake", &config.vmm.fake),
        ("plugins.bundled", &config.plugins.bundled),
    ];
    let one = one.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?)));
    let keys = config.plugins.trusted_keys.iter().map(|path| ("plugins.trusted_keys", path));
    for (key, path) in one.chain(keys) {
        if !path.is_absolute() {
            return value(key, format!("is {}; it must be an absolute path", path.display()));
        }
    }
    if config.plugins.require_signature && config.plugins.trusted_keys.is_empty() {
        let rule = "is true, and plugins.trusted_keys names no key: nothing could be installed".to_owned();
        return value("plugins.require_signature", rule);
    }
    if let Some((key, rule)) = config.images.mistake() {
        return value(key, rule);
    }
    let defaults = vm_oci::ReferenceDefaults::default();
    if let Err(error) = config.vm.image.parse::<vm_image::Reference>()
        && vm_oci::Reference::parse(&config.vm.image, &defaults).is_err()
    {
        return value("vm.image", format!("cannot be used: {error}"));
    }
    Ok(config)
}

impl Config {
    /// Where the guest agent is: as configured, else beside this program.
    pub(crate) fn agent(&self) -> PathBuf {
        self.agent.clone().unwrap_or_else(|| {
            let own = std::env::current_exe().unwrap_or_default();
            own.with_file_name("vm-agent")
        })
    }

    /// The configured group's id.
    pub(crate) fn group_id(&self) -> std::io::Result<Option<u32>> {
        let Some(name) = &self.group else { return Ok(None) };
        match nix::unistd::Group::from_name(name)? {
            Some(group) => Ok(Some(group.gid.as_raw())),
            None => Err(std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("there is no group {name}; make it with `groupadd --system {name}`"),
            )),
        }
    }

    /// User ids for VMs.
    pub(crate) fn jail_users(&self) -> JailUsers {
        self.vmm.jail_users.0
    }

    pub(crate) fn subnet(&self) -> SubnetChoice {
        match self.network.subnet {
            Subnet::Auto => SubnetChoice::Auto,
            Subnet::Fixed(subnet) => SubnetChoice::Fixed(subnet.trunc()),
        }
    }

    /// Who is asked about names that are not VMs'; the host's resolvers if empty.
    pub(crate) fn resolvers(&self) -> &[IpAddr] {
        &self.network.resolvers
    }

    /// The engine's part.
    pub(crate) fn settings(&self, socket_group: Option<u32>, registries: Registries) -> Settings {
        Settings {
            default_image: self.vm.image.clone(),
            default_cpus: self.vm.cpus,
            default_memory_mib: self.vm.memory_mib,
            default_disk_bytes: self.vm.disk_mib << 20,
            default_disk_limits: self.disk_limits(),
            start_timeout: Duration::from_secs(self.vm.start_timeout_seconds),
            stop_grace: Duration::from_secs(self.vm.stop_grace_seconds),
            console_log_bytes: self.vm.console_log_kib << 10,
            subnet: self.subnet(),
            resolvers: self.network.resolvers.clone(),
            tap_pool: self.network.tap_pool,
            socket_group,
            agent: self.agent(),
            limits: self.limits(),
            registries,
        }
    }

    fn disk_limits(&self) -> DiskLimits {
        let (kib, iops) = (self.vm.disk_bandwidth_kib, self.vm.disk_iops);
        DiskLimits {
            bytes_per_second: (kib > 0).then_some(kib << 10),
            operations_per_second: (iops > 0).then_some(iops),
        }
    }

    fn limits(&self) -> Limits {
        let LimitsConfig { memory_overcommit, memory_reserve_mib, disk_quota_mib, vms } = self.limits;
        Limits {
            memory_overcommit,
            memory_reserve_mib,
            disk_quota_bytes: (disk_quota_mib > 0).then_some(disk_quota_mib << 20),
            vms: (vms > 0).then_some(vms as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        parse(text, Path::new("config.toml"))
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        let text = toml::to_string_pretty(&Config::default()).unwrap();
        let back = read(&text).unwrap();
        assert_eq!(toml::to_string_pretty(&back).unwrap(), text);
    }

    #[test]
    fn a_range_of_users_never_has_root_in_it() {
        let users = |range: &str| read(&format!("[vmm]\njail_users = \"{range}\""));
        assert_eq!(users("10-20").unwrap().jail_users(), JailUsers { first: 10, last: 20 });
        for wrong in ["0-20", "20-10", "10-10", "10", "-", "10-4294967295", "a-b"] {
            let error = users(wrong).unwrap_err();
            assert!(vm_types::report::chain(&error).contains("range of user ids"), "{wrong}: {error}");
        }
    }

    #[test]
    fn zero_is_no_limit_of_disks_and_vms() {
        let limits = |text| read(text).unwrap().limits();
        assert_eq!(limits(""), Limits::default());
        let some =
            limits("[limits]\nmemory_overcommit = 2\nmemory_reserve_mib = 0\ndisk_quota_mib = 3\nvms = 4");
        assert_eq!(
            some,
            Limits {
                memory_overcommit: 2.0,
                memory_reserve_mib: Some(0),
                disk_quota_bytes: Some(3 << 20),
                vms: Some(4)
            }
        );
    }

    #[test]
    fn zero_is_no_limit_of_a_disks_speed() {
        let limits = |text| read(text).unwrap().disk_limits();
        assert_eq!(limits(""), DiskLimits::default());
        assert_eq!(limits("[vm]\ndisk_bandwidth_kib = 0\ndisk_iops = 0"), DiskLimits::default());
        let expected = DiskLimits { bytes_per_second: Some(10 << 20), operations_per_second: Some(300) };
        assert_eq!(limits("[vm]\ndisk_bandwidth_kib = 10240\ndisk_iops = 300"), expected);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("version = 2\nnew = 1", "version 2"),
            ("[vm]\nmemry_mib = 5", "memry_mib"),
            ("[vm]\nmemory_mib = 5", "vm.memory_mib is 5"),
            ("[vm]\ndisk_bandwidth_kib = 2000000000", "vm.disk_bandwidth_kib is 2000000000"),
            ("[vm]\ndisk_iops = -1", "disk_iops"),
            ("[limits]\nmemory_overcommit = 0.0", "limits.memory_overcommit is 0"),
            ("[limits]\nmemory_overcommit = nan", "limits.memory_overcommit is NaN"),
            ("[limits]\nmemory_overcommit = 16.5", "limits.memory_overcommit is 16.5"),
            ("[limits]\nvms = -1", "vms"),
            ("[network]\nsubnet = \"10.0.0.0/33\"", "subnet"),
            ("[network]\nsubnet = \"127.0.0.0/8\"", "network.subnet"),
            ("[network]\nsubnet = \"0.0.0.0/0\"", "network.subnet"),
            ("[network]\nsubnet = \"240.0.0.0/24\"", "network.subnet"),
            ("[network]\ntap_pool = 257", "network.tap_pool is 257; 0 to 256"),
            ("[images]\ninsecure = [\"http://a.example\"]", "without http://"),
            ("[images.mirrors]\n\"docker.io\" = [\"https://a.example/x\"]", "images.mirrors has \"https"),
            ("[images.mirrors]\n\"docker.io\" = [\"a.example/x y\"]", "HOST[:PORT][/PATH]"),
            ("[images.mirrors]\n\"https://docker.io\" = []", "images.mirrors is about"),
            ("agent = \"vm-agent\"", "absolute"),
            ("[plugins]\nbundled = \"plugins\"", "plugins.bundled is plugins"),
            ("[plugins]\ntrusted_keys = [\"/a.pub\", \"b.pub\"]", "plugins.trusted_keys is b.pub"),
            ("[plugins]\nrequire_signature = true", "plugins.require_signature is true"),
            ("[vm]\nimage = \"De bian\"", "vm.image"),
            ("[images]\nregistry = \"a b\"", "images.registry"),
            ("[images]\nparallel = 0", "images.parallel is 0"),
            ("[images]\ncatalogues = [\"list.toml\"]", "images.catalogues has \"list.toml\""),
            ("[network]\nsubnet = \"10.0.0.0/31\"", "network.subnet"),
        ] {
            let error = read(text).unwrap_err();
            let mut all = error.to_string();
            if let Some(source) = std::error::Error::source(&error) {
                all += &source.to_string();
            }
            assert!(all.contains(part), "{all}");
            assert!(error.hint().is_some());
        }
    }
}
