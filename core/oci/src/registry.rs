//! Registries: the OCI distribution protocol, and Docker's.
//! <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md>
//!
//! ```text
//!   Client ── open ──> Repository (one at one place: the registry, or a mirror)
//!     │                  │  session: requests, tokens, tries
//!     │                  ├─ manifest    documents, in memory, verified
//!     │                  └─ transfer    a blob into the store, going on where it broke off
//!     ├─ pull ── mirrors, then the registry ── manifest ── platform ── configuration ── layers, some at a time
//!     ├─ artifact ── the same, but of what is no image
//!     ├─ download ── a file by its address
//!     └─ push ── layers that are not there, configuration, manifest
//! ```
//!
//! The documents' types are those of the crate `oci-client`. Its requests are not used: it keeps answers to itself that say when to
//! try again, reads documents whatever their size, and does not tell a token service that is down from one that refuses.

mod address;
mod auth;
mod pull;
mod push;
mod resolver;
mod session;
mod settings;
mod transfer;

use std::{path::Path, sync::Arc};

use futures::{StreamExt, stream};

pub use self::address::{Address, Downloaded};
use self::session::Session;
pub use self::settings::Settings;
use crate::{
    Artifact, ArtifactKind, Credentials, Descriptor, Digest, ImageSource, OciError, ProgressSink, Pulled,
    Reference, Store, credentials, document, is_loopback, local, reference::api_host,
};

/// Speaks with registries. Clones share connections.
#[derive(Debug, Clone)]
pub struct Client {
    settings: Arc<Settings>,
    http: reqwest::Client,
    /// Without a proxy: nobody else reaches what listens on this host.
    direct: reqwest::Client,
}

/// A repository at one place, and who is speaking with it.
///
/// Obtained by [`Client::repository`], it reads documents and small blobs of artifacts that are no images.
#[derive(Debug)]
pub struct Repository {
    session: Session,
}

/// What somebody wants of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Pull,
    Push,
}

impl Client {
    /// A client; no connection is made yet.
    ///
    /// # Errors
    /// [`OciError::Client`] where TLS or a proxy cannot be set up on this host.
    pub fn new(settings: Settings) -> Result<Self, OciError> {
        // Where somebody has chosen one already, that one it is.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            // A password or a layer that set out by TLS must not end up in the clear.
            let policy = reqwest::redirect::Policy::custom(|attempt| {
                let secure = attempt.previous().iter().any(|url| url.scheme() == "https");
                if secure && attempt.url().scheme() != "https" {
                    attempt.error("it leads from TLS to plain HTTP")
                } else if attempt.previous().len() > 10 {
                    attempt.error("it leads on and on")
                } else {
                    attempt.follow()
                }
            });
            reqwest::Client::builder()
                .user_agent(concat!("vmd/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(settings.connect_timeout)
                .dns_resolver(Arc::new(resolver::Resolver))
                .redirect(policy)
                // Blobs are hashed as they are.
                .no_gzip()
                .no_zstd()
                .no_brotli()
                .no_deflate()
        };
        let built = |builder: reqwest::ClientBuilder| {
            builder.build().map_err(|error| OciError::Client { source: Box::new(error) })
        };
        let (http, direct) = (built(builder())?, built(builder().no_proxy())?);
        Ok(Self { settings: Arc::new(settings), http, direct })
    }

    /// How it does what it does.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Gets an image from wherever it is: a registry, a layout or an archive.
    ///
    /// Dropping the future cancels it. What is there then is used by the next try.
    ///
    /// # Errors
    /// Any of [`OciError`] but those of exports.
    pub async fn fetch(
        &self,
        source: &ImageSource,
        store: &Store,
        progress: &ProgressSink,
    ) -> Result<Pulled, OciError> {
        match source {
            ImageSource::Registry(reference) => self.pull(reference, store, progress).await,
            local => local::load(local.clone(), store, &self.settings.platform, progress).await,
        }
    }

    /// Gets an artifact of a kind from a registry, one of its mirrors, or a layout.
    ///
    /// Dropping the future cancels it. What is there then is used by the next try.
    ///
    /// # Errors
    /// [`OciError::ArtifactType`] and [`OciError::MediaType`] for what is of another kind, or any of fetching images.
    pub async fn artifact(
        &self,
        source: &ImageSource,
        kind: ArtifactKind,
        store: &Store,
        progress: &ProgressSink,
    ) -> Result<Artifact, OciError> {
        match source {
            ImageSource::Registry(reference) => self.pull_artifact(reference, kind, store, progress).await,
            local => local::artifact(local.clone(), kind, store, &self.settings.platform, progress).await,
        }
    }

    /// The repository of a reference at its registry, for reading; mirrors are not asked.
    pub fn repository(&self, reference: &Reference) -> Repository {
        Repository { session: self.session(reference.registry(), reference.repository(), Scope::Pull) }
    }

    /// Asks a registry whether name and password are right, and keeps them in a file for [`crate::CredentialStore`] if so.
    ///
    /// # Errors
    /// [`OciError::LoginRefused`], [`OciError::Credentials`], or what speaking with a registry has.
    pub async fn login(
        &self,
        registry: &str,
        user: &str,
        password: &str,
        file: &Path,
    ) -> Result<(), OciError> {
        let credentials = Credentials::Basic { user: user.to_owned(), password: password.to_owned() };
        let session = self.session(registry, "", Scope::Pull).with_credentials(credentials);
        match session.check().await {
            Ok(()) => {}
            Err(OciError::Unauthorized { registry, .. }) => return Err(OciError::LoginRefused { registry }),
            Err(error) => return Err(error),
        }
        let (file, registry) = (file.to_owned(), registry.to_owned());
        let (user, password) = (user.to_owned(), password.to_owned());
        crate::store::blocking(move || credentials::remember(&file, &registry, &user, &password)).await
    }

    /// A session with what listens at `place`, `HOST[:PORT]`, maybe with a path.
    fn session(&self, place: &str, repository: &str, scope: Scope) -> Session {
        let (host, prefix) = place.split_once('/').unwrap_or((place, ""));
        let local = is_loopback(host);
        let scheme = if local || self.settings.insecure.contains(host) { "http" } else { "https" };
        let slash = if prefix.is_empty() { "" } else { "/" };
        let base = format!("{scheme}://{}/v2/{prefix}{slash}", api_host(host));
        let http = if local { &self.direct } else { &self.http };
        Session::new(
            http.clone(),
            self.settings.clone(),
            host,
            base,
            &format!("{prefix}{slash}{repository}"),
            scope,
        )
    }
}

impl Repository {
    /// The manifest or index that a reference names, as it is, and its digest, which is verified where the reference has one.
    ///
    /// # Errors
    /// What speaking with a registry has, [`OciError::Large`] or [`OciError::Digest`].
    pub async fn manifest(&self, reference: &Reference) -> Result<(Vec<u8>, Digest), OciError> {
        let (bytes, digest, _) =
            self.session.manifest(&reference.wanted(), &reference.within(), reference.digest()).await?;
        Ok((bytes, digest))
    }

    /// A small blob, in memory, verified; `what` is told in errors. Limit it by [`Descriptor::at_most`] first.
    ///
    /// # Errors
    /// What speaking with a registry has, [`OciError::Size`] or [`OciError::Digest`].
    pub async fn blob(&self, what: &str, blob: &Descriptor) -> Result<Vec<u8>, OciError> {
        self.session.small_blob(what, blob).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That it compiles is most of the test: whoever runs these in tasks needs it.
    #[tokio::test]
    async fn transfers_can_be_run_in_tasks_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let (store, client) = (Store::open(dir.path()).unwrap(), Client::new(Settings::default()).unwrap());
        let source = ImageSource::Path(dir.path().join("nothing"));
        let task = tokio::spawn(async move {
            let image = client.fetch(&source, &store, &crate::silent()).await?;
            let reference: Reference = "localhost/x".parse()?;
            client.push(&image, &store, &reference, &crate::silent()).await?;
            crate::export(&image, &store, crate::Form::Layout, &store.path(&image.config_digest), None)
                .await?;
            client.repository(&reference).manifest(&reference).await?;
            client.login("localhost", "user", "password", "auth.json".as_ref()).await
        });
        assert!(matches!(task.await.unwrap(), Err(OciError::Read { .. })));
    }
}
