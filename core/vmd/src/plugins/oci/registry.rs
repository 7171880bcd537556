//! A registry that speaks the OCI distribution protocol.
//!
//! Anonymous, or as the daemon's user has logged in. Plain HTTP is spoken with this host alone: nothing on the way could otherwise be
//! kept from reading a password. The client's own task may panic over a strange answer without harm to anything else.

use std::{collections::BTreeMap, env, path::PathBuf, time::Duration};

use oci_distribution::{
    Client, Reference, RegistryOperation,
    client::{ClientConfig, ClientProtocol},
    errors::{DigestError, OciDistributionError, OciErrorCode},
    manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE},
    secrets::RegistryAuth,
};
use tokio::io::AsyncReadExt;
use tokio_util::{io::StreamReader, task::AbortOnDropHandle};
use vm_api::PluginSignature;
use vm_types::report::chain;

use super::{
    OciError, Trust,
    artifact::{self, Artifact, Blob, MAX_DOCUMENT, Toml},
    credentials, is_loopback, plain,
    signature::{self, Judge, Key},
};
use crate::plugins::{
    PluginsError,
    manager::blocking,
    package::{self, Package},
};

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
            credentials: env::home_dir().map(|home| home.join(".docker/config.json")),
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
    let work = async move {
        let whole = settings.whole;
        match tokio::time::timeout(whole, pull(reference, settings, &keys)).await {
            Ok(pulled) => pulled,
            Err(_) => Err(OciError::Stalled { registry, what: "all of the artifact" }),
        }
    };
    // Whoever waits no longer ends it.
    let task = AbortOnDropHandle::new(tokio::spawn(work));
    let pulled = task.await.map_err(|source| PluginsError::Broken { source })??;
    blocking(move || {
        let files = pulled.files.as_deref().map_or(Ok(BTreeMap::new()), artifact::files)?;
        let package = Package::of(pulled.source, pulled.manifest, pulled.component, files)?;
        Ok(package.signed(pulled.signature))
    })
    .await
}

/// A reference that names its registry: no host is assumed.
fn parse(text: &str) -> Result<Reference, OciError> {
    let refused = |source| OciError::Reference { text: text.to_owned(), source };
    let (host, _) = text.split_once('/').ok_or_else(|| refused(None))?;
    if !host.contains(['.', ':']) && host != "localhost" {
        return Err(refused(None));
    }
    let reference: Reference = text.parse().map_err(|source| refused(Some(source)))?;
    match reference.digest() {
        Some(digest) if !artifact::is_digest(digest) => Err(refused(None)),
        _ => Ok(reference),
    }
}

/// One artifact at a registry.
struct Remote {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
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
    Ok(Pulled { source: remote.named(&digest), manifest, component, files, signature })
}

impl Remote {
    fn new(reference: Reference, settings: Settings) -> Result<Self, OciError> {
        let auth = match &settings.credentials {
            Some(path) => credentials::of(path, reference.registry())?,
            None => RegistryAuth::Anonymous,
        };
        // Where somebody has chosen one already, that one it is.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let variable = |name: &str| {
            let value = env::var(name).or_else(|_| env::var(name.to_lowercase())).ok();
            value.filter(|value| !value.is_empty())
        };
        let config = ClientConfig {
            protocol: if is_loopback(reference.registry()) {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            platform_resolver: None,
            connect_timeout: Some(settings.connect),
            read_timeout: Some(settings.read),
            user_agent: concat!("vmd/", env!("CARGO_PKG_VERSION")),
            https_proxy: variable("HTTPS_PROXY"),
            no_proxy: variable("NO_PROXY"),
            ..ClientConfig::default()
        };
        match Client::try_from(config) {
            Ok(client) => Ok(Self { client, reference, auth }),
            Err(error) => Err(OciError::Unreachable {
                registry: reference.registry().to_owned(),
                source: Box::new(error),
            }),
        }
    }

    /// Who has signed the artifact of this digest.
    async fn signature(&self, digest: &str, keys: &[Key]) -> Result<PluginSignature, OciError> {
        if keys.is_empty() {
            return Ok(PluginSignature::Unchecked);
        }
        let (registry, repository) = (self.registry(), self.reference.repository().to_owned());
        let place = Reference::with_tag(registry, repository, signature::tag(digest));
        let manifest = match self.document(&place, "manifest of the signatures").await {
            Err(OciError::NotFound { .. }) => return Ok(PluginSignature::Unsigned),
            manifest => manifest?,
        };
        let mut judge = Judge::new(digest, keys);
        for claim in signature::claims(&manifest)? {
            if let Some(good) = judge.look(&claim, &self.blob(&claim.payload).await?) {
                return Ok(good);
            }
        }
        Ok(judge.end())
    }

    /// An artifact's manifest as the registry has it.
    async fn document(&self, reference: &Reference, what: &'static str) -> Result<Vec<u8>, OciError> {
        let types = [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE];
        let (bytes, _) = self
            .client
            .pull_manifest_raw(reference, &self.auth, &types)
            .await
            .map_err(|error| self.failed(what, error))?;
        // The client has read it whole: what has limited it so far is the time.
        let size = bytes.len() as u64;
        if size > MAX_DOCUMENT {
            return Err(OciError::Large { what, bytes: size, most: MAX_DOCUMENT });
        }
        Ok(bytes.to_vec())
    }

    /// The artifact and the digest of its manifest.
    async fn artifact(&self) -> Result<(String, Artifact), OciError> {
        let what = "artifact's manifest";
        // Asked for here, for a later request would leave out why there is no token.
        self.client
            .auth(&self.reference, &self.auth, RegistryOperation::Pull)
            .await
            .map_err(|error| self.failed("answer to the login", error))?;
        let bytes = self.document(&self.reference, what).await?;
        let digest = package::digest(&bytes);
        if let Some(expected) = self.reference.digest()
            && expected != digest
        {
            return Err(OciError::Digest { what, found: digest, expected: expected.to_owned() });
        }
        Ok((digest, Artifact::parse(&bytes)?))
    }

    /// A blob of the artifact's repository, and of no other place that its descriptor might name.
    async fn blob(&self, blob: &Blob) -> Result<Vec<u8>, OciError> {
        let what = blob.what();
        let stream = self
            .client
            .pull_blob_stream(&self.reference, blob.digest.as_str())
            .await
            .map_err(|error| self.failed(what, error))?;
        if let Some(length) = stream.content_length {
            blob.check_size(length)?;
        }
        let mut bytes = Vec::new();
        StreamReader::new(stream)
            .take(blob.size + 1)
            .read_to_end(&mut bytes)
            .await
            .map_err(|error| self.broken(what, error))?;
        blob.verified(bytes)
    }

    /// The source that stands for this content alone.
    fn named(&self, digest: &str) -> String {
        let reference = &self.reference;
        let tag = reference.tag().map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("oci://{}/{}{tag}@{digest}", reference.registry(), reference.repository())
    }

    /// What is asked for, as the registry itself would name it.
    fn within(&self) -> String {
        let whole = self.reference.to_string();
        whole.split_once('/').map(|(_, within)| within.to_owned()).unwrap_or(whole)
    }

    fn registry(&self) -> String {
        self.reference.registry().to_owned()
    }

    fn failed(&self, what: &'static str, error: OciDistributionError) -> OciError {
        let not_found = || OciError::NotFound { registry: self.registry(), reference: self.within() };
        match error {
            OciDistributionError::RequestError(error) => self.request(what, error),
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::ServerError { code: 401 | 403, .. } => self.unauthorized(),
            OciDistributionError::ImageManifestNotFoundError(_)
            | OciDistributionError::ServerError { code: 404, .. } => not_found(),
            OciDistributionError::RegistryError { envelope, .. } => {
                let has =
                    |codes: &[OciErrorCode]| envelope.errors.iter().any(|error| codes.contains(&error.code));
                if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    self.unauthorized()
                } else if has(&[
                    OciErrorCode::ManifestUnknown,
                    OciErrorCode::NameUnknown,
                    OciErrorCode::NotFound,
                    OciErrorCode::BlobUnknown,
                ]) {
                    not_found()
                } else {
                    self.answer(&envelope.to_string())
                }
            }
            OciDistributionError::DigestError(DigestError::VerificationError { expected, actual }) => {
                OciError::Digest { what, found: actual, expected }
            }
            error => self.answer(&chain(&error)),
        }
    }

    fn request(&self, what: &'static str, error: reqwest::Error) -> OciError {
        match error.status().map(|status| status.as_u16()) {
            Some(401 | 403) => return self.unauthorized(),
            Some(404) => {
                let reference = format!("{what} of {}", self.within());
                return OciError::NotFound { registry: self.registry(), reference };
            }
            _ => {}
        }
        if error.is_connect() {
            // The address is in our own message.
            return OciError::Unreachable { registry: self.registry(), source: error.without_url().into() };
        }
        if error.is_timeout() {
            return OciError::Stalled { registry: self.registry(), what };
        }
        self.answer(&chain(&error.without_url()))
    }

    /// What broke off in the middle.
    fn broken(&self, what: &'static str, error: std::io::Error) -> OciError {
        let error = match error.downcast::<reqwest::Error>() {
            Ok(error) => return self.request(what, error),
            Err(error) => error,
        };
        match error.downcast::<DigestError>() {
            Ok(DigestError::VerificationError { expected, actual }) => {
                OciError::Digest { what, found: actual, expected }
            }
            Ok(error) => self.answer(&chain(&error)),
            Err(error) => self.answer(&chain(&error)),
        }
    }

    fn unauthorized(&self) -> OciError {
        OciError::Unauthorized {
            registry: self.registry(),
            reference: self.within(),
            known: self.auth != RegistryAuth::Anonymous,
        }
    }

    fn answer(&self, reason: &str) -> OciError {
        OciError::Answer { registry: self.registry(), reason: plain(reason) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_registry() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for text in ["ghcr.io/a/b:1.0", "localhost:5000/a", "registry.example/a", "localhost/a"] {
            assert!(parse(text).is_ok(), "{text}");
            assert!(parse(&format!("{text}@{digest}")).is_ok(), "{text}");
        }
        assert_eq!(parse("registry.example/a").unwrap().tag(), Some("latest"));
        let upper = digest.replace('0', "A");
        for text in [
            "a",
            "a/b",
            "registry.example",
            "registry.example/A",
            "[::1]:5000/a",
            "a.b/c:",
            &format!("a.b/c@{upper}"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.hint().contains("oci://HOST"), "{text}: {error}");
        }
    }

    #[test]
    fn only_this_host_is_spoken_with_in_the_clear() {
        for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9"] {
            assert!(is_loopback(registry), "{registry}");
        }
        for registry in
            ["localhost.example", "128.0.0.1", "127.0.0.1.example", "10.0.0.1:5000", "registry.example"]
        {
            assert!(!is_loopback(registry), "{registry}");
        }
    }
}
