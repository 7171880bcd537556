//! An image from a registry, or one of its mirrors.

use std::sync::Arc;

use futures::TryStreamExt;
use oci_distribution::manifest::OciImageManifest;

use super::{Client, Scope, StreamExt, session::Session, stream, transfer::download};
use crate::{
    Artifact, ArtifactKind, Descriptor, Digest, Lease, OciError, ProgressSink, Pulled, Reference, Store,
    document::{self, Document, MAX_CONFIG, Manifest, Understand},
    image::Parts,
    progress::Progress,
    store::blocking,
};

/// How deep indexes are looked for in indexes.
const MAX_DEPTH: usize = 4;

/// What a reference leads to, for one platform.
pub(super) struct Resolved<T> {
    pub(super) document: Vec<u8>,
    pub(super) manifest: T,
    pub(super) index: Option<Digest>,
}

impl Client {
    /// Gets an image from its registry, or a mirror of it.
    ///
    /// Manifest and configuration come first and are judged; then layers that are not in the store, some at a time. Dropping the
    /// future cancels it; what has come so far is used by the next try.
    ///
    /// # Errors
    /// Of mirrors, none: the registry's own count.
    pub async fn pull(
        &self,
        reference: &Reference,
        store: &Store,
        progress: &ProgressSink,
    ) -> Result<Pulled, OciError> {
        let (places, resolved) = self.found(reference, &Manifest::of).await?;
        let Resolved { document, manifest, index } = resolved;
        let lease = store.lease();
        let blobs = manifest.blobs();
        progress(Progress::Begun { blobs: blobs.len(), bytes: manifest.total()? });
        let (config, layers) = (blobs[0], &blobs[1..]);
        get(&places, config, store, &lease, progress).await?;
        let (reader, digest) = (store.clone(), config.digest);
        let bytes = blocking(move || reader.read("image's configuration", &digest, MAX_CONFIG)).await?;
        let parts = Parts::of(&manifest, &bytes, &self.settings.platform)?;
        // Made before the stream: a closure in it would be general over lifetimes, which hides that all of this is `Send`.
        let transfers: Vec<_> =
            layers.iter().map(|layer| get(&places, layer, store, &lease, progress)).collect();
        stream::iter(transfers).buffer_unordered(self.settings.parallel.max(1)).try_collect::<()>().await?;
        let size = document.len() as u64;
        let digest = store.put(&lease, document).await?;
        Ok(parts.pulled(digest, size, index, &manifest, vec![reference.to_string()], lease))
    }

    /// Gets an artifact's layers, some at a time.
    pub(super) async fn pull_artifact(
        &self,
        reference: &Reference,
        kind: ArtifactKind,
        store: &Store,
        progress: &ProgressSink,
    ) -> Result<Artifact, OciError> {
        let understand = move |manifest: &OciImageManifest| kind.layers(manifest);
        let (places, resolved) = self.found(reference, &understand).await?;
        let Resolved { document, manifest: layers, .. } = resolved;
        let lease = store.lease();
        progress(Progress::Begun { blobs: layers.len(), bytes: layers.iter().map(|layer| layer.size).sum() });
        let transfers: Vec<_> =
            layers.iter().map(|layer| get(&places, layer, store, &lease, progress)).collect();
        stream::iter(transfers).buffer_unordered(self.settings.parallel.max(1)).try_collect::<()>().await?;
        Ok(Artifact { digest: Digest::of(&document), layers, store: store.clone(), _lease: Arc::new(lease) })
    }

    /// Where to look: mirrors, then the registry itself.
    fn places(&self, reference: &Reference) -> Vec<Session> {
        let mirrors = self.settings.mirrors.get(reference.registry()).into_iter().flatten();
        let places = mirrors.map(String::as_str).chain([reference.registry()]);
        places.map(|place| self.session(place, reference.repository(), Scope::Pull)).collect()
    }

    /// What a reference leads to at the first place that knows it, and the places from there on.
    pub(super) async fn found<T>(
        &self,
        reference: &Reference,
        understand: &Understand<T>,
    ) -> Result<(Vec<Session>, Resolved<T>), OciError> {
        let mut places = self.places(reference);
        loop {
            match self.resolve(&places[0], reference, understand).await {
                Ok(resolved) => return Ok((places, resolved)),
                Err(error) if places.len() == 1 => return Err(error),
                Err(error) => {
                    passed_over(&places[0], &error);
                    places.remove(0);
                }
            }
        }
    }

    async fn resolve<T>(
        &self,
        session: &Session,
        reference: &Reference,
        understand: &Understand<T>,
    ) -> Result<Resolved<T>, OciError> {
        let (mut wanted, mut what) = (reference.wanted(), reference.within());
        let (mut expected, mut index) = (reference.digest(), None);
        for _ in 0..MAX_DEPTH {
            let (document, digest, media_type) = session.manifest(&wanted, &what, expected).await?;
            match document::parse_as(&document, media_type.as_deref(), understand)? {
                Document::Image(manifest) => return Ok(Resolved { document, manifest, index }),
                Document::Index(entries) => {
                    index.get_or_insert(digest);
                    let chosen = document::choose(&entries, &self.settings.platform)?.digest;
                    (wanted, expected) = (chosen.to_string(), Some(chosen));
                    what = format!("{}@{chosen}", reference.repository());
                }
            }
        }
        let reason = "indexes lead to indexes only".to_owned();
        Err(OciError::Malformed { what: "image's index".to_owned(), reason })
    }
}

/// Gets a blob from the first place that has it.
pub(super) async fn get(
    places: &[Session],
    blob: &Descriptor,
    store: &Store,
    lease: &Lease,
    progress: &ProgressSink,
) -> Result<(), OciError> {
    let Some((last, mirrors)) = places.split_last() else { return Ok(()) };
    for mirror in mirrors {
        match download(mirror, blob, store, lease, progress).await {
            Ok(()) => return Ok(()),
            // Another place would help with none of these.
            Err(error @ (OciError::Store { .. } | OciError::Locked { .. } | OciError::Broken { .. })) => {
                return Err(error);
            }
            Err(error) => passed_over(mirror, &error),
        }
    }
    download(last, blob, store, lease, progress).await
}

fn passed_over(mirror: &Session, error: &OciError) {
    let error = vm_types::report::chain(error);
    tracing::warn!(mirror = mirror.registry, error, "a mirror is passed over");
}
