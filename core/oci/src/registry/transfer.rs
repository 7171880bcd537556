//! A blob from a registry into the store.

use reqwest::{
    Response, StatusCode,
    header::{CONTENT_RANGE, RANGE},
};
use std::time::Duration;

use super::session::{Failure, Session, Tries};
use crate::{
    Descriptor, Digest, Lease, OciError, ProgressSink, Store,
    progress::Reporter,
    store::{Ingest, Rejected},
};

/// So many bytes at one go count as progress; fewer may be the same failure again and again.
const PROGRESS: u64 = 64 << 10;

/// What is to be fetched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blob<'a> {
    pub(super) url: &'a str,
    /// As messages name it.
    pub(super) what: &'a str,
    pub(super) digest: Digest,
    /// In bytes; where nobody has said it, the server may.
    pub(super) size: Option<u64>,
}

/// Fetches a blob of a repository, or what is missing of it, if it is not there. Verified when it returns.
///
/// Cancel-safe: what has come so far stays for the next try.
pub(super) async fn download(
    session: &Session,
    blob: &Descriptor,
    store: &Store,
    lease: &Lease,
    progress: &ProgressSink,
) -> Result<(), OciError> {
    let (url, what) = (session.url(&format!("blobs/{}", blob.digest)), format!("blob {}", blob.digest));
    let blob = Blob { url: &url, what: &what, digest: blob.digest, size: Some(blob.size) };
    fetch(session, blob, store, lease, progress).await
}

/// The same of any file with a digest.
pub(super) async fn fetch(
    session: &Session,
    mut blob: Blob<'_>,
    store: &Store,
    lease: &Lease,
    progress: &ProgressSink,
) -> Result<(), OciError> {
    let reporter = Reporter::new(progress, blob.digest, blob.size.unwrap_or_default());
    let tell = |reason: &str, wait: Duration| reporter.retry(reason.to_owned(), wait);
    let mut tries = Tries::new(session, &tell);
    let mut anew = false;
    loop {
        let Some(mut ingest) = store.ingest_of(lease, blob.digest, blob.size).await? else {
            reporter.done(!anew);
            return Ok(());
        };
        // Of several pieces, any may be the wrong one.
        let mut pieced = ingest.offset() > 0;
        // Beyond the furthest so far: what is fetched again is no progress.
        let mut furthest = ingest.offset();
        while blob.size != Some(ingest.offset()) {
            match rest(session, &mut blob, &mut ingest, &reporter).await {
                Ok(()) => break,
                Err(failure) => {
                    pieced |= ingest.offset() > 0;
                    if ingest.offset() >= furthest.saturating_add(PROGRESS) {
                        furthest = ingest.offset();
                        tries.progressed();
                    }
                    tries.again(failure).await?;
                }
            }
        }
        match ingest.finish(blob.what.to_owned()).await {
            Ok(()) => {
                reporter.done(false);
                return Ok(());
            }
            Err(Rejected { error, resumed }) => {
                if anew || !(pieced || resumed) {
                    return Err(error);
                }
                tracing::warn!(blob = %blob.digest, "what was there of a blob is no part of it: it is fetched anew");
                anew = true;
            }
        }
    }
}

/// One request for what is missing.
async fn rest(
    session: &Session,
    blob: &mut Blob<'_>,
    ingest: &mut Ingest,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let Blob { url, what, .. } = *blob;
    let offset = ingest.offset();
    let build = || match offset {
        0 => session.http.get(url),
        offset => session.http.get(url).header(RANGE, format!("bytes={offset}-")),
    };
    let mut response = match session.once(what, build).await {
        Err(Failure { error: OciError::Failing { status: 416, .. }, .. }) if offset > 0 => {
            ingest.restart().await?;
            return Err(session.truncated(what));
        }
        response => response?,
    };
    let continues = response.status() == StatusCode::PARTIAL_CONTENT;
    if continues && begins_at(&response) != Some(offset) {
        ingest.restart().await?;
        return Err(session.truncated(what));
    }
    if !continues && offset > 0 {
        // It does not know ranges, and gives all of it.
        ingest.restart().await?;
    }
    let size = |found, expected| OciError::Size { what: what.to_owned(), found, expected };
    if let Some(length) = response.content_length() {
        let whole = ingest.offset().saturating_add(length);
        match blob.size {
            Some(expected) if expected != whole => return Err(size(whole, expected).into()),
            Some(_) => {}
            None => {
                ingest.expect(whole).await?;
                blob.size = Some(whole);
                reporter.expect(whole);
            }
        }
    }
    while let Some(piece) = session.chunk(what, &mut response).await? {
        let end = ingest.offset() + piece.len() as u64;
        if let Some(expected) = blob.size.filter(|expected| end > *expected) {
            return Err(size(end, expected).into());
        }
        ingest.write(piece).await?;
        reporter.at(end);
    }
    match blob.size.is_none_or(|expected| ingest.offset() == expected) {
        true => Ok(()),
        false => Err(session.truncated(what)),
    }
}

/// <https://www.rfc-editor.org/rfc/rfc9110#name-content-range>
fn begins_at(response: &Response) -> Option<u64> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
