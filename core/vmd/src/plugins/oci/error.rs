//! What can go wrong with artifacts.

use std::{io, path::PathBuf};

use vm_types::report::chain;

/// How an artifact is made, for hints.
const PUSH: &str = "docs/plugins.md has the command that pushes a plugin, under \"Registries\"";

/// An artifact that cannot be had, or is no plugin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OciError {
    #[error("{text:?} names no artifact of a registry")]
    Reference { text: String, source: Option<vm_oci::ReferenceProblem> },
    #[error("could not reach registry {registry}")]
    Unreachable { registry: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("registry {registry} is too slow: {what} was not there in time")]
    Stalled { registry: String, what: &'static str },
    #[error("registry {registry} has no {reference}")]
    NotFound { registry: String, reference: String },
    #[error("registry {registry} does not give {reference} to {}", if *known { "this user" } else { "everybody" })]
    Unauthorized { registry: String, reference: String, known: bool },
    #[error("registry {registry} gave no usable answer: {reason}")]
    Answer { registry: String, reason: String },
    #[error("could not read the registries' credentials in {}", path.display())]
    Credentials { path: PathBuf, source: io::Error },
    #[error("could not read {} of the image layout", path.display())]
    Layout { path: PathBuf, source: io::Error },
    #[error("{path} of the image layout leads out of it")]
    Outside { path: String },
    #[error("the image layout has {}", none(asked))]
    NoEntry { asked: String, there: Vec<String> },
    #[error("the image layout has more than one artifact")]
    Ambiguous { there: Vec<String> },
    #[error("the {what} cannot be understood: {reason}")]
    Malformed { what: &'static str, reason: String },
    #[error("it is an index of several artifacts, not one")]
    Index,
    #[error("it is no WASM artifact but {found}")]
    NotWasm { found: String },
    #[error("it has no layer {media_type}: {what} is missing")]
    Missing { what: &'static str, media_type: &'static str },
    #[error("it has several layers {media_type}, and may have one")]
    Several { media_type: &'static str },
    #[error("the {what} is of {bytes} bytes; the most is {most}")]
    Large { what: &'static str, bytes: u64, most: u64 },
    #[error("the {what} has {found} bytes; its descriptor says {expected}")]
    Size { what: &'static str, found: u64, expected: u64 },
    #[error("the {what} is {found}; its digest should be {expected}")]
    Digest { what: &'static str, found: String, expected: String },
    #[error("could not use the trusted key {}", path.display())]
    Key { path: PathBuf, source: io::Error },
    #[error("this daemon installs only plugins that are signed by a trusted key: {reason}")]
    Unsigned { reason: String, keys: Vec<String> },
    #[error("the layer with the plugin's files cannot be used: {reason}")]
    Files { reason: String },
}

fn none(asked: &str) -> String {
    if asked.is_empty() { "no artifact in it".to_owned() } else { format!("no {asked}") }
}

fn listed(there: &[String]) -> String {
    match there {
        [] => "there is none: push one to it first".to_owned(),
        some => format!("there is: {}", some.join(", ")),
    }
}

impl OciError {
    /// What went wrong with a part of an artifact on its way here.
    pub(super) fn of(what: &'static str, error: vm_oci::OciError) -> Self {
        use vm_oci::OciError as From;
        match error {
            From::Reference { text, problem } => Self::Reference { text, source: Some(problem) },
            From::Unreachable { registry, source } => Self::Unreachable { registry, source },
            From::Stalled { registry, .. } => Self::Stalled { registry, what },
            From::NotFound { registry, what } => Self::NotFound { registry, reference: what },
            From::Unauthorized { registry, what, known, .. } => {
                Self::Unauthorized { registry, reference: what, known }
            }
            From::Answer { registry, reason } => Self::Answer { registry, reason },
            From::Interrupted { ref registry, .. }
            | From::RateLimited { ref registry, .. }
            | From::Failing { ref registry, .. } => {
                Self::Answer { registry: registry.clone(), reason: super::plain(&chain(&error)) }
            }
            From::Credentials { path, source } => Self::Credentials { path, source },
            From::Helper { program, reason } => {
                Self::Credentials { path: program.into(), source: io::Error::other(reason) }
            }
            From::Read { path, source } => Self::Layout { path, source },
            From::NoPart { path, name } => {
                Self::Layout { path: path.join(name), source: io::ErrorKind::NotFound.into() }
            }
            From::Outside { path } => Self::Outside { path },
            From::NoEntry { asked, there } => Self::NoEntry { asked, there },
            From::Ambiguous { there } => Self::Ambiguous { there },
            From::Large { bytes, most, .. } => Self::Large { what, bytes, most },
            From::Size { found, expected, .. } => Self::Size { what, found, expected },
            From::Digest { found, expected, .. } => {
                Self::Digest { what, found: found.to_string(), expected: expected.to_string() }
            }
            From::Malformed { reason, .. } => Self::Malformed { what, reason },
            // Those of images and their store, which are none of a plugin's.
            other => Self::Malformed { what, reason: super::plain(&chain(&other)) },
        }
    }

    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Reference { .. } => {
                "write oci://HOST[:PORT]/NAME[:TAG], or @sha256:… in the place of the tag; names are in lower case".into()
            }
            Self::Unreachable { registry, .. } if vm_oci::is_loopback(registry) => {
                "does a registry listen there? This host is spoken with in plain HTTP".into()
            }
            Self::Unreachable { .. } => {
                "is the name right, and does it speak TLS with a certificate this host trusts? Plain HTTP is for loopback only"
                    .into()
            }
            Self::Stalled { .. } => {
                "try again; or fetch it to a directory by other means, and install it with oci-layout:DIR".into()
            }
            Self::NotFound { reference, .. } if reference.contains('@') => {
                "is the digest that of the artifact's manifest, and in this repository? What was deleted there is gone".into()
            }
            Self::NotFound { .. } => "are name and tag right? Without a tag it is `latest`".into(),
            Self::Unauthorized { known: false, registry, .. } => format!(
                "it is private, or not there; the daemon's user logs in with `docker login {registry}` (or `oras login`), \
                 which writes ~/.docker/config.json"
            ),
            Self::Unauthorized { known: true, registry, .. } => {
                format!("look at what ~/.docker/config.json of the daemon's user has for {registry}")
            }
            Self::Answer { .. } => "is it a registry, and does it work?".into(),
            Self::Credentials { .. } => {
                "`docker login` and `oras login` write it: {\"auths\": {\"HOST\": {\"auth\": BASE64}}}".into()
            }
            Self::Layout { .. } => {
                "an image layout is a directory with oci-layout, index.json and blobs; the daemon must be able to read it"
                    .into()
            }
            Self::Outside { .. } => "copy the layout with the files that its links lead to".into(),
            Self::NoEntry { there, .. } => listed(there),
            Self::Ambiguous { there } => {
                format!("name one, as oci-layout:DIR:TAG or oci-layout:DIR@sha256:…; {}", listed(there))
            }
            Self::Index => "name one of them by its digest: …@sha256:…".into(),
            Self::NotWasm { .. } => {
                format!("its config's type or its artifactType is {}; {PUSH}", super::artifact::CONFIG)
            }
            Self::Missing { what, .. } if *what == super::artifact::TOML => format!(
                "it may be a component, but no plugin of vm: those bring their manifest in a layer or an annotation; {PUSH}"
            ),
            Self::Missing { .. } | Self::Several { .. } => PUSH.into(),
            Self::Malformed { .. } | Self::Size { .. } | Self::Digest { .. } => {
                "it is damaged, or somebody has changed it; push it again".into()
            }
            Self::Key { .. } => {
                "plugins.trusted_keys in config.toml names files with public keys, as `cosign generate-key-pair` and \
                 `openssl ec -pubout` write them"
                    .into()
            }
            Self::Unsigned { keys, .. } => format!(
                "push it to a registry and sign it there, docs/plugins.md has the commands; trusted is {}. The rule is \
                 plugins.require_signature in config.toml",
                keys.join(", ")
            ),
            Self::Large { .. } => "files for guests belong into an image, or are fetched by the guest".into(),
            Self::Files { .. } => {
                "it is a tar file, not compressed, with the files at its top: tar -cf files.tar -C files .".into()
            }
        }
    }
}
