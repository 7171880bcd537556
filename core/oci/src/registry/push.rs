//! An image from the store into a registry.
//! <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#push>

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::TryStreamExt;
use reqwest::{
    Body, RequestBuilder, Response, Url,
    header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION},
};
use tokio_util::io::ReaderStream;

use super::{
    Client, Scope, StreamExt,
    session::{Failure, Session, Tries, untold},
    stream,
};
use crate::{
    Descriptor, Digest, MAX_DOCUMENT, OciError, ProgressSink, Pulled, Reference, Store,
    document::{self, Document},
    progress::{Progress, Reporter},
    store::blocking,
};

/// How much is read from disk at once.
const PIECE: usize = 128 << 10;
/// A registry that has all of a blob may have to copy it before it answers: so many times the wait for a byte.
const COMMIT: u32 = 10;

impl Client {
    /// Sends an image of the store to a repository, under the reference's tag. Blobs that are there already are not sent. The
    /// registry gets the very bytes of the manifest, so the image has the same digest there.
    ///
    /// # Errors
    /// What speaking with a registry has; [`OciError::Gone`] where the store lacks a blob; [`OciError::Digest`] where the reference
    /// has the digest of another image.
    pub async fn push(
        &self,
        image: &Pulled,
        store: &Store,
        reference: &Reference,
        progress: &ProgressSink,
    ) -> Result<Digest, OciError> {
        let digest = image.manifest_digest;
        if let Some(expected) = reference.digest()
            && expected != digest
        {
            return Err(OciError::Digest { what: "image".to_owned(), found: digest, expected });
        }
        let reader = store.clone();
        let bytes = blocking(move || reader.read("image's manifest", &digest, MAX_DOCUMENT)).await?;
        let Document::Image(manifest) = document::parse(&bytes, None)? else {
            let reason = "it is an index".to_owned();
            return Err(OciError::Malformed { what: "image's manifest".to_owned(), reason });
        };
        let session = self.session(reference.registry(), reference.repository(), Scope::Push);
        let blobs = manifest.blobs();
        progress(Progress::Begun { blobs: blobs.len(), bytes: manifest.total()? });
        let transfers: Vec<_> = blobs.iter().map(|blob| upload(&session, blob, store, progress)).collect();
        stream::iter(transfers).buffer_unordered(self.settings.parallel.max(1)).try_collect::<()>().await?;
        let wanted = reference.tag().map_or_else(|| reference.wanted(), str::to_owned);
        let media_type = media_type(&bytes);
        let (url, body) = (session.url(&format!("manifests/{wanted}")), bytes::Bytes::from(bytes));
        let what = reference.within();
        let mut tries = Tries::new(&session, &untold);
        let response = loop {
            let build = || session.http.put(&url).header(CONTENT_TYPE, &media_type).body(body.clone());
            match session.once(&what, build).await {
                Ok(response) => break response,
                Err(failure) => tries.again(failure).await?,
            }
        };
        let named = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if let Some(found) = named.and_then(|text| text.parse::<Digest>().ok())
            && found != digest
        {
            return Err(OciError::Digest {
                what: "manifest in the registry".to_owned(),
                found,
                expected: digest,
            });
        }
        Ok(digest)
    }
}

/// What the manifest says it is.
fn media_type(manifest: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        media_type: Option<String>,
    }
    let kind: Option<Kind> = serde_json::from_slice(manifest).ok();
    kind.and_then(|kind| kind.media_type).unwrap_or_else(|| document::MANIFEST.to_owned())
}

/// Sends a blob if the repository does not have it.
async fn upload(
    session: &Session,
    blob: &Descriptor,
    store: &Store,
    progress: &ProgressSink,
) -> Result<(), OciError> {
    let reporter = Reporter::new(progress, blob.digest, blob.size);
    let tell = |reason: &str, wait: Duration| reporter.retry(reason.to_owned(), wait);
    let what = format!("blob {}", blob.digest);
    let there = session.url(&format!("blobs/{}", blob.digest));
    let mut tries = Tries::new(session, &tell);
    loop {
        let once = async {
            match session.once(&what, || session.http.head(&there)).await {
                Ok(_) => return Ok(true),
                Err(Failure { error: OciError::NotFound { .. }, .. }) => {}
                Err(failure) => return Err(failure),
            }
            send(session, &what, blob, store, &reporter).await.map(|()| false)
        };
        match once.await {
            Ok(present) => {
                reporter.done(present);
                return Ok(());
            }
            Err(failure) => tries.again(failure).await?,
        }
    }
}

/// One upload, in one piece.
async fn send(
    session: &Session,
    what: &str,
    blob: &Descriptor,
    store: &Store,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let begin = session.url("blobs/uploads/");
    let begun = session.once(what, || session.http.post(&begin).header(CONTENT_LENGTH, 0)).await?;
    let target = target(session, &begun, blob)?;
    let (reader, digest) = (store.clone(), blob.digest);
    let file = blocking(move || reader.open_blob("blob", &digest)).await?;
    let sent = Arc::new(AtomicU64::new(0));
    let (counter, shown) = (sent.clone(), reporter.clone());
    let pieces =
        ReaderStream::with_capacity(tokio::fs::File::from_std(file), PIECE).inspect_ok(move |piece| {
            let before = counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
            shown.at(before + piece.len() as u64);
        });
    let request = session
        .http
        .put(target.clone())
        .header(CONTENT_LENGTH, blob.size)
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(Body::wrap_stream(pieces));
    // Who takes it at another host is told where by a signed address, and must not learn the token.
    let own = Url::parse(&session.base).is_ok_and(|base| base.origin() == target.origin());
    let request = if own { session.authorized(request).await } else { request };
    let response = watched(session, what, blob.size, request, &sent).await?;
    session.judged(what, response, own).await?;
    Ok(())
}

/// Where to send it.
fn target(session: &Session, begun: &Response, blob: &Descriptor) -> Result<Url, OciError> {
    let answer =
        |reason: &str| OciError::Answer { registry: session.registry.clone(), reason: reason.to_owned() };
    let location = begun.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location = location.ok_or_else(|| answer("it does not say where an upload goes"))?;
    let mut target =
        begun.url().join(location).map_err(|_| answer("it gives no usable address for an upload"))?;
    if session.base.starts_with("https:") && target.scheme() != "https" {
        return Err(answer("it wants an upload in the clear"));
    }
    target.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
    Ok(target)
}

/// Sends a request whose body may take as long as it moves on.
async fn watched(
    session: &Session,
    what: &str,
    size: u64,
    request: RequestBuilder,
    sent: &AtomicU64,
) -> Result<Response, Failure> {
    let stall = session.settings.stall_timeout;
    let stands = async {
        loop {
            let before = sent.load(Ordering::Relaxed);
            // The whole of it is there: now it is the registry's turn.
            tokio::time::sleep(if before == size { stall * COMMIT } else { stall }).await;
            if sent.load(Ordering::Relaxed) == before {
                return;
            }
        }
    };
    // Cancel-safe: whichever ends first, the upload is over; an unfinished one is the registry's to forget.
    tokio::select! {
        response = request.send() => response.map_err(|error| session.broken(what, error)),
        () = stands => Err(session.stalled(what)),
    }
}
