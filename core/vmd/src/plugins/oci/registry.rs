//! A plugin of a registry.
//!
//! Anonymous, or as the daemon's user has logged in. How registries are spoken with is `vm-oci`'s affair.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use vm_api::PluginSignature;
use vm_oci::{Client, CredentialStore, Digest, Reference, Repository};

use super::{
    OciError, Trust,
    artifact::{self, Artifact, Blob, Toml},
    signature::{self, Judge, Key},
};
use crate::plugins::{PluginsError, manager::blocking, package::Package};

/// How often something is tried in a row: somebody waits for the answer.
const ATTEMPTS: u32 = 3;

/// How a registry is spoken with.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Until there is a connection.
    pub(super) connect: Duration,
    /// Until the next piece of an answer.
    pub(super) read: Duration,
    /// Until all is there: less than clients of the daemon wait for their own answer.
    pub(super) whole: Duration,
    /// The user's file of credentials, if there is a user.
    pub(super) credentials: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(20),
            whole: Duration::from_secs(100),
            credentials: CredentialStore::docker(),
        }
    }
}

/// What a registry has given, all of it verified.
struct Pulled {
    source: String,
    manifest: Vec<u8>,
    component: Vec<u8>,
    files: Option<Vec<u8>>,
    signature: PluginSignature,
}

/// The plugin of `HOST[:PORT]/NAME[:TAG][@DIGEST]`.
pub(super) async fn package(text: &str, settings: Settings, trust: &Trust) -> Result<Package, PluginsError> {
    let reference = parse(text)?;
    let trust = trust.clone();
    let keys = blocking(move || Ok(trust.read()?)).await?;
    let registry = reference.registry().to_owned();
    let whole = settings.whole;
    let pulled = match tokio::time::timeout(whole, Box::pin(pull(reference, settings, &keys))).await {
        Ok(pulled) => pulled?,
        Err(_) => return Err(OciError::Stalled { registry, what: "all of the artifact" }.into()),
    };
    blocking(move || {
        let files = pulled.files.as_deref().map_or(Ok(BTreeMap::new()), artifact::files)?;
        let package = Package::of(pulled.source, pulled.manifest, pulled.component, files)?;
        Ok(package.signed(pulled.signature))
    })
    .await
}

/// A reference that names its registry: no host is assumed.
fn parse(text: &str) -> Result<Reference, OciError> {
    match text.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => {
            text.parse().map_err(|error| OciError::of("reference", error))
        }
        _ => Err(OciError::Reference { text: text.to_owned(), source: None }),
    }
}

/// One artifact at a registry.
struct Remote {
    repository: Repository,
    reference: Reference,
}

async fn pull(reference: Reference, settings: Settings, keys: &[Key]) -> Result<Pulled, OciError> {
    let remote = Remote::new(reference, settings)?;
    let (digest, artifact) = remote.artifact().await?;
    let signature = remote.signature(&digest, keys).await?;
    remote.blob(&artifact.config).await?;
    let manifest = match artifact.manifest {
        Toml::Layer(layer) => remote.blob(&layer).await?,
        Toml::Annotation(text) => text,
    };
    let component = remote.blob(&artifact.component).await?;
    let files = match &artifact.files {
        Some(files) => Some(remote.blob(files).await?),
        None => None,
    };
    // The source that stands for this content alone.
    let source = format!("oci://{}", remote.reference.with_digest(digest));
    Ok(Pulled { source, manifest, component, files, signature })
}

impl Remote {
    fn new(reference: Reference, settings: Settings) -> Result<Self, OciError> {
        let settings = vm_oci::Settings {
            connect_timeout: settings.connect,
            stall_timeout: settings.read,
            attempts: ATTEMPTS,
            credentials: CredentialStore::new(settings.credentials),
            ..vm_oci::Settings::default()
        };
        let client = Client::new(settings).map_err(|error| OciError::of("client", error))?;
        Ok(Self { repository: client.repository(&reference), reference })
    }

    /// Who has signed the artifact of this digest.
    async fn signature(&self, digest: &Digest, keys: &[Key]) -> Result<PluginSignature, OciError> {
        if keys.is_empty() {
            return Ok(PluginSignature::Unchecked);
        }
        let (what, digest) = ("manifest of the signatures", digest.to_string());
        let failed = |error| OciError::of(what, error);
        let place = self.reference.with_tag(&signature::tag(&digest)).map_err(failed)?;
        let manifest = match self.repository.manifest(&place).await.map_err(failed) {
            Err(OciError::NotFound { .. }) => return Ok(PluginSignature::Unsigned),
            manifest => manifest?.0,
        };
        let mut judge = Judge::new(&digest, keys);
        for claim in signature::claims(&manifest)? {
            if let Some(good) = judge.look(&claim, &self.blob(&claim.payload).await?) {
                return Ok(good);
            }
        }
        Ok(judge.end())
    }

    /// The artifact and the digest of its manifest.
    async fn artifact(&self) -> Result<(Digest, Artifact), OciError> {
        let asked = self.repository.manifest(&self.reference).await;
        let (bytes, digest) = asked.map_err(|error| OciError::of("artifact's manifest", error))?;
        Ok((digest, Artifact::parse(&bytes)?))
    }

    /// A blob of the artifact's repository, and of no other place that its descriptor might name.
    async fn blob(&self, blob: &Blob) -> Result<Vec<u8>, OciError> {
        let read = self.repository.blob(blob.what(), &blob.descriptor).await;
        read.map_err(|error| OciError::of(blob.what(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_registry() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for text in
            ["ghcr.io/a/b:1.0", "localhost:5000/a", "registry.example/a", "localhost/a", "[::1]:5000/a"]
        {
            assert!(parse(text).is_ok(), "{text}");
            assert!(parse(&format!("{text}@{digest}")).is_ok(), "{text}");
        }
        assert_eq!(parse("registry.example/a").unwrap().tag(), Some("latest"));
        let upper = digest.replace('0', "A");
        for text in
            ["a", "a/b", "registry.example", "registry.example/A", "a.b/c:", &format!("a.b/c@{upper}")]
        {
            let error = parse(text).unwrap_err();
            assert!(error.hint().contains("oci://HOST"), "{text}: {error}");
        }
    }
}
