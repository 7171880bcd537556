//! Requests to one repository at one place: who asks, what is tried again, and what an answer means.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use reqwest::{
    RequestBuilder, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER},
};

use super::{Scope, Settings, auth::Auth, document, resolver};
use crate::{Credentials, Descriptor, Digest, MAX_DOCUMENT, OciError, error::plain};

/// The most that is read of an answer that tells an error, in bytes.
const MAX_ERROR: u64 = 64 << 10;
/// A place that was never reached is most likely not there.
const UNREACHED: u32 = 2;

/// A repository at one place.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) http: reqwest::Client,
    pub(super) settings: Arc<Settings>,
    /// `HOST[:PORT]`, as messages name it.
    pub(super) registry: String,
    /// `https://HOST[:PORT]/v2/` and a mirror's path.
    pub(super) base: String,
    /// As its token service knows it.
    pub(super) repository: String,
    pub(super) scope: Scope,
    auth: Auth,
    /// Whether it ever answered.
    reached: AtomicBool,
}

/// Something that did not work once.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: OciError,
    /// Whether another try may do better.
    pub(super) again: bool,
    /// When, if the registry says.
    after: Option<Duration>,
}

impl From<OciError> for Failure {
    fn from(error: OciError) -> Self {
        Self { error, again: false, after: None }
    }
}

/// Counts tries and waits between them.
pub(super) struct Tries<'a> {
    session: &'a Session,
    failed: u32,
    /// Told of each wait.
    tell: &'a (dyn Fn(&str, Duration) + Send + Sync),
}

impl<'a> Tries<'a> {
    pub(super) fn new(session: &'a Session, tell: &'a (dyn Fn(&str, Duration) + Send + Sync)) -> Self {
        Self { session, failed: 0, tell }
    }

    /// Something has come of it: the next failure is the first.
    pub(super) fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits until another try is due.
    ///
    /// # Errors
    /// The failure's own, where there should be none.
    pub(super) async fn again(&mut self, failure: Failure) -> Result<(), OciError> {
        self.failed += 1;
        let settings = &self.session.settings;
        let most = match self.session.reached.load(Ordering::Relaxed) {
            true => settings.attempts,
            false => settings.attempts.min(UNREACHED),
        };
        if !failure.again || self.failed >= most {
            return Err(failure.error);
        }
        let doubled =
            settings.backoff.saturating_mul(1 << (self.failed - 1).min(16)).min(settings.backoff_most);
        // Half of it by chance, so that many who failed together do not come back together.
        let wait = failure.after.unwrap_or_default().max(doubled.mul_f64(0.5 + fastrand::f64() / 2.0));
        let reason = vm_types::report::chain(&failure.error);
        tracing::debug!(reason, ?wait, "a registry is asked again");
        (self.tell)(&reason, wait);
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// For requests whose waits nobody is told of.
pub(super) fn untold(_: &str, _: Duration) {}

impl Session {
    pub(super) fn new(
        http: reqwest::Client,
        settings: Arc<Settings>,
        registry: &str,
        base: String,
        repository: &str,
        scope: Scope,
    ) -> Self {
        let (registry, repository) = (registry.to_owned(), repository.to_owned());
        Self {
            http,
            settings,
            registry,
            base,
            repository,
            scope,
            auth: Auth::default(),
            reached: AtomicBool::new(false),
        }
    }

    /// With these instead of what the user's files have.
    pub(super) fn with_credentials(mut self, credentials: Credentials) -> Self {
        self.auth = Auth::with(credentials);
        self
    }

    /// Where something of the repository is.
    pub(super) fn url(&self, rest: &str) -> String {
        let root = self.base.split_once("/v2/").map_or(self.base.as_str(), |(root, _)| root);
        format!("{root}/v2/{}/{rest}", self.repository)
    }

    /// Whether the registry lets this user in.
    pub(super) async fn check(&self) -> Result<(), OciError> {
        let url = self.base.clone();
        let mut tries = Tries::new(self, &untold);
        loop {
            match self.once("its API", || self.http.get(&url)).await {
                Ok(_) => return Ok(()),
                Err(failure) => tries.again(failure).await?,
            }
        }
    }

    /// A manifest, its digest, and its type.
    pub(super) async fn manifest(
        &self,
        wanted: &str,
        what: &str,
        expected: Option<Digest>,
    ) -> Result<(Vec<u8>, Digest, Option<String>), OciError> {
        let url = self.url(&format!("manifests/{wanted}"));
        let accept = document::ACCEPT.join(", ");
        let (bytes, media_type) =
            self.small(what, MAX_DOCUMENT, || self.http.get(&url).header(ACCEPT, &accept)).await?;
        let found = Digest::of(&bytes);
        match expected {
            Some(expected) if expected != found => {
                Err(OciError::Digest { what: "manifest".to_owned(), found, expected })
            }
            _ => Ok((bytes, found, media_type)),
        }
    }

    /// A small blob, verified.
    pub(super) async fn small_blob(&self, what: &str, blob: &Descriptor) -> Result<Vec<u8>, OciError> {
        let url = self.url(&format!("blobs/{}", blob.digest));
        let read = self.small(&format!("{what} {}", blob.digest), blob.size, || self.http.get(&url)).await;
        match read {
            Ok((bytes, _)) => blob.verified(what, bytes),
            // More than it says it has.
            Err(OciError::Large { bytes, .. }) => {
                Err(OciError::Size { what: what.to_owned(), found: bytes, expected: blob.size })
            }
            Err(error) => Err(error),
        }
    }

    /// An answer of at most so many bytes, and its type.
    pub(super) async fn small(
        &self,
        what: &str,
        most: u64,
        build: impl Fn() -> RequestBuilder + Send + Sync,
    ) -> Result<(Vec<u8>, Option<String>), OciError> {
        let mut tries = Tries::new(self, &untold);
        loop {
            let work = async {
                let response = self.once(what, &build).await?;
                let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
                let media_type =
                    media_type.map(|text| text.split(';').next().unwrap_or_default().trim().to_owned());
                Ok((self.body(what, response, most).await?, media_type))
            };
            match work.await {
                Ok(answer) => return Ok(answer),
                Err(failure) => tries.again(failure).await?,
            }
        }
    }

    async fn body(&self, what: &str, mut response: Response, most: u64) -> Result<Vec<u8>, Failure> {
        let large = |bytes| OciError::Large { what: what.to_owned(), bytes, most };
        if let Some(bytes) = response.content_length().filter(|bytes| *bytes > most) {
            return Err(large(bytes).into());
        }
        let mut bytes = Vec::new();
        while let Some(piece) = self.chunk(what, &mut response).await? {
            bytes.extend_from_slice(&piece);
            if bytes.len() as u64 > most {
                return Err(large(bytes.len() as u64).into());
            }
        }
        Ok(bytes)
    }

    /// The next piece of an answer.
    pub(super) async fn chunk(
        &self,
        what: &str,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, Failure> {
        match tokio::time::timeout(self.settings.stall_timeout, response.chunk()).await {
            Ok(piece) => piece.map_err(|error| self.broken(what, error)),
            Err(_) => Err(self.stalled(what)),
        }
    }

    /// One request, with a login where the registry asks for one; an answer that tells no error.
    pub(super) async fn once(
        &self,
        what: &str,
        build: impl Fn() -> RequestBuilder + Send + Sync,
    ) -> Result<Response, Failure> {
        let mut asked = false;
        loop {
            let (header, version) = self.auth.current().await;
            let known = header.is_some();
            let mut request = build();
            if let Some(header) = header {
                request = request.header(AUTHORIZATION, header);
            }
            let response = self.sent(what, request).await?;
            // Where a redirect leads is not asked who may know the password.
            let own =
                reqwest::Url::parse(&self.base).is_ok_and(|base| base.origin() == response.url().origin());
            if response.status() == StatusCode::UNAUTHORIZED && !asked && own {
                asked = true;
                if self.auth.renew(self, what, version, &response).await? {
                    continue;
                }
            }
            return self.judged(what, response, known).await;
        }
    }

    /// The request, with what the registry was last shown.
    pub(super) async fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match self.auth.current().await {
            (Some(header), _) => request.header(AUTHORIZATION, header),
            (None, _) => request,
        }
    }

    /// Sends a request as it is.
    pub(super) async fn sent(&self, what: &str, request: RequestBuilder) -> Result<Response, Failure> {
        let limit = self.settings.connect_timeout + self.settings.stall_timeout;
        match tokio::time::timeout(limit, request.send()).await {
            Ok(Ok(response)) => {
                self.reached.store(true, Ordering::Relaxed);
                Ok(response)
            }
            Ok(Err(error)) => Err(self.broken(what, error)),
            Err(_) => Err(self.stalled(what)),
        }
    }

    pub(super) fn stalled(&self, what: &str) -> Failure {
        let (registry, what) = (self.registry.clone(), what.to_owned());
        let error = OciError::Stalled { registry, what, within: self.settings.stall_timeout };
        Failure { error, again: true, after: None }
    }

    pub(super) fn broken(&self, what: &str, error: reqwest::Error) -> Failure {
        let registry = self.registry.clone();
        // The address is in our own message, and may have a signature in it.
        let error = error.without_url();
        let ours = error.is_builder() || error.is_redirect();
        // Names and hosts that were not there after seconds of asking will not be there in the next.
        let vain = error.is_connect()
            && !self.reached.load(Ordering::Relaxed)
            && (error.is_timeout() || resolver::failed(&error));
        let again = !ours && !vain;
        let error = if error.is_connect() {
            OciError::Unreachable { registry, source: Box::new(error) }
        } else if !ours {
            self.reached.store(true, Ordering::Relaxed);
            OciError::Interrupted { registry, what: what.to_owned(), source: Box::new(error) }
        } else {
            OciError::Answer { registry, reason: plain(&vm_types::report::chain(&error)) }
        };
        Failure { error, again, after: None }
    }

    /// What ended before its time.
    pub(super) fn truncated(&self, what: &str) -> Failure {
        let source = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        let (registry, what) = (self.registry.clone(), what.to_owned());
        Failure {
            error: OciError::Interrupted { registry, what, source: Box::new(source) },
            again: true,
            after: None,
        }
    }

    pub(super) fn unauthorized(&self, what: &str, known: bool) -> OciError {
        let (registry, what) = (self.registry.clone(), what.to_owned());
        OciError::Unauthorized { registry, what, known, push: self.scope == Scope::Push }
    }

    /// The answer, if it tells no error.
    pub(super) async fn judged(
        &self,
        what: &str,
        response: Response,
        known: bool,
    ) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let registry = self.registry.clone();
        let after = retry_after(&response);
        Err(match status.as_u16() {
            401 | 403 => {
                let known = known && self.auth.is_known(self).await?;
                self.unauthorized(what, known).into()
            }
            404 => OciError::NotFound { registry, what: what.to_owned() }.into(),
            429 => {
                let again = after.is_none_or(|wait| wait <= self.settings.retry_after_most);
                Failure { error: OciError::RateLimited { registry, wait: after }, again, after }
            }
            code => {
                let again = matches!(code, 408 | 500 | 502 | 503 | 504);
                // What it says is worth nothing if it does not come.
                let message =
                    self.body(what, response, MAX_ERROR).await.map(|body| message(&body)).unwrap_or_default();
                let after = after.filter(|wait| *wait <= self.settings.retry_after_most);
                Failure {
                    error: OciError::Failing { registry, what: what.to_owned(), status: code, message },
                    again,
                    after,
                }
            }
        })
    }
}

/// What registries say of an error. Their codes are more than any list has.
#[derive(serde::Deserialize)]
struct Envelope {
    errors: Vec<Complaint>,
}

#[derive(serde::Deserialize)]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// What an error's body says.
fn message(body: &[u8]) -> String {
    match serde_json::from_slice::<Envelope>(body) {
        Ok(envelope) => {
            let each =
                envelope.errors.into_iter().map(|Complaint { code, message }| match message.is_empty() {
                    true => code,
                    false => message,
                });
            plain(&each.collect::<Vec<_>>().join("; "))
        }
        Err(_) => String::new(),
    }
}

/// Seconds, or a date. <https://www.rfc-editor.org/rfc/rfc9110#name-retry-after>
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}
