//! An image's configuration: how its command is to be run, and what it is made of.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.0/config.md>

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Digest, OciError, Platform, error::plain};

/// What an image says of itself. What it leaves out is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Processor, as Go names it: `amd64`, `arm64`. Old images leave it out.
    pub architecture: String,
    /// Operating system, `linux`.
    pub os: String,
    /// Variant of the processor, e.g. `v8`.
    pub variant: Option<String>,
    /// When it was made, RFC 3339, as it says.
    pub created: Option<String>,
    /// By whom.
    pub author: Option<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Directory that commands start in.
    pub working_dir: String,
    /// `USER[:GROUP]`, names or numbers.
    pub user: String,
    /// Comes before what the user runs.
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint where the user gives none.
    pub cmd: Vec<String>,
    /// By key.
    pub labels: BTreeMap<String, String>,
    /// `PORT[/PROTOCOL]`, sorted.
    pub exposed_ports: Vec<String>,
    /// Directories for data, sorted.
    pub volumes: Vec<String>,
    /// Name or number of the signal that ends it.
    pub stop_signal: Option<String>,
    /// How it was made, oldest first.
    pub history: Vec<History>,
    /// Digests of the unpacked layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// One step of how an image was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// When, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// A remark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether it made no layer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

impl ImageConfig {
    /// What runs where the user names no command; empty where the image has none either.
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }

    /// What the image is for, if it says so.
    pub fn platform(&self) -> Option<Platform> {
        (!self.architecture.is_empty()).then(|| Platform {
            os: if self.os.is_empty() { "linux".to_owned() } else { self.os.clone() },
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        })
    }

    /// Reads the document.
    ///
    /// # Errors
    /// [`OciError::Malformed`] for what is no configuration of an image.
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        let document: Document = serde_json::from_slice(bytes).map_err(|error| OciError::Malformed {
            what: "image's configuration".to_owned(),
            reason: plain(&error.to_string()),
        })?;
        let Run { env, working_dir, user, entrypoint, cmd, labels, exposed_ports, volumes, stop_signal } =
            document.config;
        Ok(Self {
            architecture: document.architecture,
            os: document.os,
            variant: document.variant.filter(|text| !text.is_empty()),
            created: document.created.filter(|text| !text.is_empty()),
            author: document.author.filter(|text| !text.is_empty()),
            env,
            working_dir,
            user,
            entrypoint,
            cmd,
            labels,
            exposed_ports: exposed_ports.into_keys().collect(),
            volumes: volumes.into_keys().collect(),
            stop_signal: stop_signal.filter(|text| !text.is_empty()),
            history: document.history,
            diff_ids: document.rootfs.diff_ids,
        })
    }
}

/// `null` is as good as absent: builders write both.
fn lenient<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
struct Document {
    #[serde(default, deserialize_with = "lenient")]
    architecture: String,
    #[serde(default, deserialize_with = "lenient")]
    os: String,
    variant: Option<String>,
    created: Option<String>,
    author: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    config: Run,
    #[serde(default, deserialize_with = "lenient")]
    history: Vec<History>,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    #[serde(default, deserialize_with = "lenient")]
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Run {
    #[serde(default, deserialize_with = "lenient")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "lenient")]
    working_dir: String,
    #[serde(default, deserialize_with = "lenient")]
    user: String,
    #[serde(default, deserialize_with = "lenient")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "lenient")]
    cmd: Vec<String>,
    #[serde(default, deserialize_with = "lenient")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "lenient")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(default, deserialize_with = "lenient")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    stop_signal: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_as_builders_write_it() {
        let diff = Digest::of(b"x");
        let text = format!(
            r#"{{ "architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z",
              "config": {{ "Env": ["PATH=/bin"], "WorkingDir": "/srv", "User": "1000:1000", "Entrypoint": ["/run"],
                "Cmd": ["-v"], "Labels": {{ "a": "b" }}, "ExposedPorts": {{ "80/tcp": {{}}, "53/udp": {{}} }}, "Volumes": null }},
              "history": [ {{ "created_by": "RUN x" }}, {{ "created_by": "CMD", "empty_layer": true }} ],
              "rootfs": {{ "type": "layers", "diff_ids": ["{diff}"] }}, "moby.buildkit.cache.v0": 1 }}"#
        );
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(config.command(), ["/run", "-v"]);
        assert_eq!(config.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.diff_ids, [diff]);
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("1000:1000", "/srv"));
        assert!(config.history[1].empty_layer && !config.history[0].empty_layer);
        assert_eq!(config.platform().unwrap().to_string(), "linux/amd64");
    }

    #[test]
    fn what_builders_leave_out_or_write_as_null_is_empty() {
        let text = r#"{ "config": { "Env": null, "Entrypoint": null, "Cmd": null, "Labels": null, "ExposedPorts": null,
            "User": null }, "history": null, "rootfs": { "diff_ids": null } }"#;
        assert_eq!(ImageConfig::parse(text.as_bytes()).unwrap(), ImageConfig::default());
        let text = r#"{ "config": null, "rootfs": {} }"#;
        assert_eq!(ImageConfig::parse(text.as_bytes()).unwrap(), ImageConfig::default());
        let error = ImageConfig::parse(br#"{ "rootfs": { "diff_ids": ["sha256:00"] } }"#).unwrap_err();
        assert!(error.to_string().contains("64 digits"), "{error}");
        assert!(ImageConfig::parse(b"{}").is_err(), "an artifact's empty config is no image's");
    }
}
