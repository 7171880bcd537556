//! `plugin.toml`: what a plugin is, what it may be configured with, and what it asks for.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    grant::{Grant, Request},
    schema::Schema,
};

/// Which world the component was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum World {
    /// Hooks around a VM's life.
    Capability,
    /// Answers of the name service.
    Dns,
    /// Brings repositories into guests.
    WorkspaceImporter,
}

impl World {
    /// The interfaces of `vm:plugin` a component of this world is given.
    pub(crate) fn imports(self) -> &'static [&'static str] {
        match self {
            Self::Capability => &["types", "log", "state", "host", "plan", "live"],
            Self::Dns => &["types", "log", "state", "host", "directory"],
            Self::WorkspaceImporter => &["types", "log", "state", "host", "live", "repository"],
        }
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capability => "capability",
            Self::Dns => "dns",
            Self::WorkspaceImporter => "workspace-importer",
        })
    }
}

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// No TOML, or a key is missing, unknown or of another type. The message has line and column.
    #[error("{0}")]
    Syntax(String),
    /// A value is not of its form.
    #[error("{key}: {reason}")]
    Value {
        /// Which.
        key: &'static str,
        /// Why.
        reason: String,
    },
    /// A grant is not one.
    #[error("grant {number}: {reason}")]
    Grant {
        /// Counted from 1.
        number: usize,
        /// Why.
        reason: String,
    },
    /// The configuration's schema is not one.
    #[error("[config] is no schema: {0}")]
    Schema(String),
}

impl ManifestError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Syntax(_) | Self::Value { .. } => {
                "`vm plugin new` writes a manifest to begin with".to_owned()
            }
            Self::Grant { .. } => {
                "each grant has a `kind`, a `reason` and what docs/plugins.md says of its kind".to_owned()
            }
            Self::Schema(_) => {
                "docs/plugins.md has the keywords of JSON Schema that a configuration can use".to_owned()
            }
        }
    }
}

/// A plugin's manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// 1 to 40 of a-z, 0-9 and `-`; unique among the plugins of a host.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// For people, one line.
    pub description: String,
    /// What the component was made for.
    pub world: World,
    /// The version of `vm:plugin` it was made against.
    pub wit: String,
    /// The component's file, beside the manifest.
    pub component: String,
    /// Whether a start fails when the plugin does.
    pub required: bool,
    /// Plugins that come after it.
    pub before: Vec<String>,
    /// Plugins that come before it.
    pub after: Vec<String>,
    /// What it can be configured with.
    pub config: Schema,
    /// What it asks for.
    pub grants: Vec<Request>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: String,
    version: String,
    #[serde(default)]
    description: String,
    world: World,
    wit: String,
    component: Option<String>,
    #[serde(default)]
    required: bool,
    #[serde(default)]
    before: Vec<String>,
    #[serde(default)]
    after: Vec<String>,
    config: Option<Value>,
    #[serde(default)]
    grants: Vec<Map<String, Value>>,
}

fn plugin_name(key: &'static str, name: &str) -> Result<(), ManifestError> {
    let form = (1..=40).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if form {
        return Ok(());
    }
    let reason = format!(
        "{name:?} is no plugin's name: 1 to 40 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
    );
    Err(ManifestError::Value { key, reason })
}

/// The numbers of a version like `0.1.2`; anything after `-` or `+` is left out.
pub(crate) fn version(text: &str) -> Option<[u64; 3]> {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<u64> = core.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

/// Whether one version of a plugin is newer than another.
pub fn is_newer(this: &str, than: &str) -> bool {
    version(this).zip(version(than)).is_some_and(|(this, than)| this > than)
}

fn request(mut table: Map<String, Value>) -> Result<Request, String> {
    let reason = match table.remove("reason") {
        Some(Value::String(reason)) if !reason.trim().is_empty() => crate::error::tame(reason.trim(), 300),
        Some(_) => return Err("`reason` is a text that is not empty".to_owned()),
        None => {
            return Err(
                "`reason` is missing: the operator is asked to grant it and wants to know why".to_owned()
            );
        }
    };
    let kind = table.get("kind").cloned();
    let grant: Grant = serde_json::from_value(Value::Object(table)).map_err(|error| match kind {
        Some(kind) => format!("kind = {kind}: {error}"),
        None => error.to_string(),
    })?;
    if let Grant::Tool { program, .. } = &grant
        && !program.starts_with('/')
    {
        return Err(format!("{program:?}: a tool is named by its absolute path"));
    }
    Ok(Request { grant, reason })
}

impl FromStr for Manifest {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let raw: Raw = toml::from_str(text).map_err(|error| ManifestError::Syntax(error.to_string()))?;
        plugin_name("name", &raw.name)?;
        for (key, names) in [("before", &raw.before), ("after", &raw.after)] {
            names.iter().try_for_each(|name| plugin_name(key, name))?;
        }
        for (key, text) in [("version", &raw.version), ("wit", &raw.wit)] {
            if version(text).is_none() {
                let reason = format!("{text:?} is no version like 0.1.0");
                return Err(ManifestError::Value { key, reason });
            }
        }
        let component = raw.component.unwrap_or_else(|| "plugin.wasm".to_owned());
        if crate::forms::name(&component).is_err() {
            let reason = format!("{component:?} is no plain file name");
            return Err(ManifestError::Value { key: "component", reason });
        }
        let config = raw.config.unwrap_or_else(|| serde_json::json!({ "type": "object" }));
        let requests = raw.grants.into_iter().enumerate();
        let grants = requests
            .map(|(index, table)| {
                request(table).map_err(|reason| ManifestError::Grant { number: index + 1, reason })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: raw.name,
            version: raw.version,
            description: crate::error::tame(&raw.description, 200),
            world: raw.world,
            wit: raw.wit,
            component,
            required: raw.required,
            before: raw.before,
            after: raw.after,
            config: Schema::parse(config).map_err(ManifestError::Schema)?,
            grants,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grant::{Granted, Grants};
    use crate::plan::{GuestPart, HostEffect, Plan};

    const GOOD: &str = r#"
        name = "nat"
        version = "1.2.3"
        world = "capability"
        wit = "0.1.0"
        required = true
        after = ["zone"]

        [config]
        type = "object"
        properties.subnet = { type = "string", default = "10.0.0.0/8" }

        [[grants]]
        kind = "firewall"
        chains = ["postrouting", "forward"]
        reason = "to masquerade"

        [[grants]]
        kind = "publish-port"
        first = 8000
        last = 8999
        reason = "web servers"

        [[grants]]
        kind = "guest-file"
        paths = ["/etc/nat/*", "/etc/motd"]
        reason = "its own files"
    "#;

    #[test]
    fn a_manifest_says_what_it_says() {
        let manifest: Manifest = GOOD.parse().unwrap();
        assert!(manifest.required && manifest.component == "plugin.wasm" && manifest.grants.len() == 3);
        assert_eq!(manifest.grants[0].reason, "to masquerade");
        assert_eq!(manifest.config.fill(serde_json::json!({})).unwrap()["subnet"], "10.0.0.0/8");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, says) in [
            ("\"nat\"", "\"../nat\"", "no plugin's name"),
            ("required", "requires", "requires"),
            ("1.2.3", "1.2", "no version"),
            ("\"capability\"", "\"root\"", "unknown variant `root`"),
            ("kind = \"firewall\"", "kind = \"fire\"", "grant 1: kind = \"fire\""),
            ("chains", "chain", "grant 1: kind = \"firewall\""),
            ("reason = \"web servers\"", "", "grant 2: `reason` is missing"),
            ("\"/etc/nat/*\"", "\"*/nat/*\"", "more than one *"),
            ("type = \"object\"", "type = \"string\"", "[config] is no schema"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let error = text.parse::<Manifest>().unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert!(!error.hint().is_empty());
        }
    }

    fn file(path: &str) -> Plan {
        let content = crate::plan::Content::Bytes(Vec::new());
        let part = GuestPart::File { path: path.to_owned(), content, mode: 0o644, uid: 0, gid: 0 };
        Plan { guest: vec![part], ..Plan::default() }
    }

    #[test]
    fn manifest_and_operator_must_both_grant() {
        let requests = GOOD.parse::<Manifest>().unwrap().grants;
        let all = Grants::new(requests.clone(), Granted::All);
        all.check(&file("/etc/nat/a/b")).unwrap();
        let denial = all.check(&file("/etc/shadow")).unwrap_err();
        assert!(
            !denial.requested && denial.hint().contains(r#"paths = ["/etc/shadow"]"#),
            "{}",
            denial.hint()
        );
        // The hint's line is one that works.
        let line: Map<String, Value> =
            toml::from_str::<Map<String, Value>>(&format!("x = {}", denial.need.line())).unwrap()["x"]
                .as_object()
                .unwrap()
                .clone();
        let mut more = requests.clone();
        more.push(request(line).unwrap());
        Grants::new(more, Granted::All).check(&file("/etc/shadow")).unwrap();

        let some = Grants::new(requests.clone(), Granted::These(vec![requests[0].grant.clone()]));
        let denial = some.check(&file("/etc/motd")).unwrap_err();
        assert!(denial.requested && denial.to_string().contains("operator"), "{denial}");
        assert_eq!(some.missing().count(), 2);
        // An operator's word is not enough either.
        let beyond = Grant::Clock {};
        assert!(Grants::new(requests, Granted::These(vec![beyond.clone()])).permit(&beyond).is_err());
    }

    #[test]
    fn ports_and_tools_stay_within_their_patterns() {
        let requests = GOOD.parse::<Manifest>().unwrap().grants;
        let grants = Grants::new(requests, Granted::All);
        let port = |host_address: Option<&str>, host_port| Plan {
            host: vec![HostEffect::PublishPort {
                name: crate::plan::RefName("web".to_owned()),
                protocol: crate::plan::Transport::Tcp,
                host_address: host_address.map(|address| address.parse().unwrap()),
                host_port,
                guest_port: 80,
            }],
            ..Plan::default()
        };
        grants.check(&port(None, Some(8080))).unwrap();
        grants.check(&port(Some("127.0.0.1"), Some(8999))).unwrap();
        for (address, number) in
            [(None, Some(9000)), (None, Some(80)), (None, None), (Some("0.0.0.0"), Some(8080))]
        {
            assert!(grants.check(&port(address, number)).is_err(), "{address:?} {number:?}");
        }

        let mut tool = Map::new();
        tool.insert("kind".to_owned(), "tool".into());
        tool.insert("reason".to_owned(), "test".into());
        tool.insert("name".to_owned(), "ip".into());
        tool.insert("program".to_owned(), "/sbin/ip".into());
        tool.insert("arguments".to_owned(), vec!["route", "add", "*", "dev-*"].into());
        tool.insert("undo".to_owned(), vec!["route", "del", "{3}"].into());
        let grants = Grants::new(vec![request(tool).unwrap()], Granted::All);
        let call = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
            grants.tool("ip", &arguments).is_some()
        };
        assert!(call(&["route", "add", "192.0.2.1", "dev-a"]));
        // Another program under the same name has to be asked for.
        let (old, _) = grants.requests().next().unwrap();
        let mut other = old.grant.clone();
        let Grant::Tool { program, .. } = &mut other else { panic!("it is a tool") };
        *program = "/sbin/other".to_owned();
        assert!(!Granted::These(vec![old.grant.clone()]).includes(&other));
        assert!(Granted::These(vec![other.clone()]).includes(&other));
        for bad in [
            &["route", "add", "192.0.2.1"][..],
            &["route", "add", "-batch", "dev-a"],
            &["route", "add", "192.0.2.1", "dev-a/../b"],
            &["route", "add", "a b", "dev-a"],
            &["route", "del", "192.0.2.1", "dev-a"],
        ] {
            assert!(!call(bad), "{bad:?}");
        }
    }
}
