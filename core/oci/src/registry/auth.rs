//! Logins: what a registry that answers 401 wants to be shown.
//! <https://distribution.github.io/distribution/spec/auth/token/>

use http_auth::ChallengeRef;
use reqwest::{
    Response, Url,
    header::{CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::{
    Scope,
    session::{Failure, Session},
};
use crate::{Credentials, OciError, error::plain};

/// The most that a token service says, in bytes.
const MAX: usize = 1 << 20;

/// What is shown to a registry, once it has asked.
#[derive(Debug, Default)]
pub(super) struct Auth {
    shown: Mutex<Shown>,
    /// Looked up when a registry asks, for a helper may ask a person.
    credentials: OnceCell<Credentials>,
}

#[derive(Debug, Default)]
struct Shown {
    header: Option<HeaderValue>,
    /// Changes with it.
    version: u64,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Auth {
    pub(super) fn with(credentials: Credentials) -> Self {
        Self { shown: Mutex::default(), credentials: OnceCell::from(credentials) }
    }

    /// The header, and which one it is.
    pub(super) async fn current(&self) -> (Option<HeaderValue>, u64) {
        let shown = self.shown.lock().await;
        (shown.header.clone(), shown.version)
    }

    /// Whether the user has anything for this registry.
    pub(super) async fn is_known(&self, session: &Session) -> Result<bool, OciError> {
        Ok(*self.credentials(session).await? != Credentials::Anonymous)
    }

    async fn credentials(&self, session: &Session) -> Result<&Credentials, OciError> {
        let find = || session.settings.credentials.find(&session.registry);
        self.credentials.get_or_try_init(find).await
    }

    /// Does what a registry asks for that did not like header `version`; whether there is another one to show.
    ///
    /// Cancel-safe: the header changes when all is there. Those who ask at the same time wait, and take what the first one got.
    pub(super) async fn renew(
        &self,
        session: &Session,
        what: &str,
        version: u64,
        response: &Response,
    ) -> Result<bool, Failure> {
        let mut shown = self.shown.lock().await;
        if shown.version != version {
            return Ok(true);
        }
        let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let texts: Vec<&str> = headers.filter_map(|value| value.to_str().ok()).collect();
        let challenges: Vec<ChallengeRef<'_>> =
            texts.iter().filter_map(|text| http_auth::parse_challenges(text).ok()).flatten().collect();
        let find =
            |scheme: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        let credentials = self.credentials(session).await?;
        let header = match (find("bearer"), find("basic"), credentials) {
            (_, _, Credentials::Bearer(token)) => Some(bearer(session, token)?),
            (Some(challenge), ..) => Some(token(session, what, challenge, credentials).await?),
            (None, Some(_), Credentials::Basic { user, password }) => Some(basic(session, user, password)?),
            _ => None,
        };
        // The same again will not be liked any better.
        if header.is_none() || header == shown.header {
            return Ok(false);
        }
        *shown = Shown { header, version: version + 1 };
        Ok(true)
    }
}

fn secret(session: &Session, text: &str) -> Result<HeaderValue, OciError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| OciError::Answer {
        registry: session.registry.clone(),
        reason: "a token has characters that cannot be sent".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn bearer(session: &Session, token: &str) -> Result<HeaderValue, OciError> {
    secret(session, &format!("Bearer {token}"))
}

fn basic(session: &Session, user: &str, password: &str) -> Result<HeaderValue, OciError> {
    use base64::{Engine, prelude::BASE64_STANDARD};
    secret(session, &format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))))
}

/// Gets a token from the service that the registry names.
async fn token(
    session: &Session,
    what: &str,
    challenge: &ChallengeRef<'_>,
    credentials: &Credentials,
) -> Result<HeaderValue, Failure> {
    let answer = |reason: String| OciError::Answer { registry: session.registry.clone(), reason };
    let parameter = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    let realm =
        parameter("realm").ok_or_else(|| answer("it wants a token and does not say from whom".to_owned()))?;
    let mut url =
        Url::parse(&realm).map_err(|_| answer(format!("it wants a token from {:?}", plain(&realm))))?;
    // Whoever takes the password is as safe from listeners as the registry itself.
    let allowed = if session.base.starts_with("https:") { &["https"][..] } else { &["https", "http"] };
    if !allowed.contains(&url.scheme()) {
        return Err(answer(format!("it wants a token from {:?}, which is not safe", plain(&realm))).into());
    }
    let actions = if session.scope == Scope::Push { "pull,push" } else { "pull" };
    let mut query: Vec<(&str, String)> = Vec::new();
    query.extend(parameter("service").map(|service| ("service", service)));
    if !session.repository.is_empty() {
        query.push(("scope", format!("repository:{}:{actions}", session.repository)));
    }
    let request = match credentials {
        Credentials::Identity(token) => {
            query.extend([
                ("grant_type", "refresh_token".to_owned()),
                ("client_id", "vmd".to_owned()),
                ("refresh_token", token.clone()),
            ]);
            let mut form = url.clone();
            form.query_pairs_mut().clear().extend_pairs(&query);
            let body = form.query().unwrap_or_default().to_owned();
            session.http.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
        }
        _ => {
            url.query_pairs_mut().extend_pairs(&query);
            let request = session.http.get(url);
            match credentials {
                Credentials::Basic { user, password } => request.basic_auth(user, Some(password)),
                _ => request,
            }
        }
    };
    let what_token = format!("the token for {what}");
    let response = session.sent(&what_token, request).await?;
    if matches!(response.status().as_u16(), 400..=403) {
        return Err(session.unauthorized(what, *credentials != Credentials::Anonymous).into());
    }
    let mut response = session.judged(&what_token, response, false).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = session.chunk(&what_token, &mut response).await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > MAX {
            return Err(answer("its token is too large".to_owned()).into());
        }
    }
    let token: Option<Token> = serde_json::from_slice(&bytes).ok();
    let token = token.and_then(|token| token.token.filter(|text| !text.is_empty()).or(token.access_token));
    // What it says may be half of a token: it is not shown.
    let token = token.ok_or_else(|| answer("its token service gave no token".to_owned()))?;
    Ok(bearer(session, &token)?)
}
