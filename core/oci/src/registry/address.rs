//! Files by their addresses: downloaded into the store, where they are verified on the way and taken up again where a transfer broke
//! off. What holds for registries holds for them: who is spoken with in the clear, proxies, logins, time-outs and tries.

use std::{fmt, path::PathBuf, sync::Arc};

use reqwest::Url;

use super::{
    Client, Scope,
    session::Session,
    transfer::{Blob, fetch},
};
use crate::{Digest, Lease, OciError, ProgressSink, Store, error::plain, is_loopback};

/// An address of a file that may be downloaded. It is shown without what may be secret in it.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(Url);

/// A file in the store. It is kept there as long as this lives, and is nobody's afterwards.
#[derive(Debug)]
pub struct Downloaded {
    /// Where it is.
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
    _lease: Arc<Lease>,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.0.scheme(), host(&self.0), self.0.path())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Address {
    /// Whether a text is meant as one.
    pub fn is_meant(text: &str) -> bool {
        text.contains("://")
    }

    /// What another text means that stands in a document of this address.
    ///
    /// # Errors
    /// [`OciError::Address`].
    pub fn join(&self, text: &str, client: &Client) -> Result<Self, OciError> {
        match self.0.join(text) {
            // Who writes documents elsewhere does not say what is asked of this host.
            Ok(url) if url.scheme() == "http" && self.0.scheme() != "http" => Err(OciError::Address {
                text: plain(without_user(text)),
                rule: "it leads from TLS to plain HTTP",
            }),
            Ok(url) => client.allowed(url),
            Err(_) => Err(OciError::Address { text: plain(text), rule: "it is no address" }),
        }
    }

    /// The last part of its path.
    pub fn file_name(&self) -> &str {
        self.0.path().rsplit('/').next().unwrap_or_default()
    }
}

/// `HOST[:PORT]`.
fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

impl Client {
    /// Reads an address.
    ///
    /// # Errors
    /// [`OciError::Address`] for what is none, or none that may be spoken with.
    pub fn address(&self, text: &str) -> Result<Address, OciError> {
        match Url::parse(text) {
            Ok(url) => self.allowed(url),
            // What is wrong with it may be that there is a password in it.
            Err(_) => Err(OciError::Address { text: plain(without_user(text)), rule: "it is no address" }),
        }
    }

    fn allowed(&self, url: Url) -> Result<Address, OciError> {
        let host = host(&url);
        let shown = Address(url);
        let refused = |rule| Err(OciError::Address { text: shown.to_string(), rule });
        let url = &shown.0;
        match url.scheme() {
            _ if url.host_str().is_none_or(str::is_empty) => refused("it names no host"),
            _ if !url.username().is_empty() || url.password().is_some() => {
                refused("it has a user in it, and would be kept and shown with that")
            }
            "https" => Ok(shown),
            "http" if is_loopback(&host) || self.settings.insecure.contains(&host) => Ok(shown),
            "http" => refused("plain HTTP is for this host and for what is configured as insecure"),
            _ => refused("only https is possible"),
        }
    }

    fn session_for(&self, address: &Address) -> Session {
        let host = host(&address.0);
        let http = if is_loopback(&host) { &self.direct } else { &self.http };
        Session::new(http.clone(), self.settings.clone(), &host, address.0.to_string(), "", Scope::Pull)
    }

    /// Downloads a file that has this digest into the store.
    ///
    /// Dropping the future cancels it; what has come so far is used by the next try.
    ///
    /// # Errors
    /// What speaking with a server has, [`OciError::Digest`] or [`OciError::Store`].
    pub async fn download(
        &self,
        address: &Address,
        digest: Digest,
        store: &Store,
        progress: &ProgressSink,
    ) -> Result<Downloaded, OciError> {
        let lease = store.lease();
        let session = self.session_for(address);
        let (url, what) = (address.0.as_str(), address.to_string());
        let blob = Blob { url, what: &what, digest, size: None };
        fetch(&session, blob, store, &lease, progress).await?;
        let size = store.size(&digest)?.ok_or(OciError::Gone { what: "file", digest })?;
        Ok(Downloaded { path: store.path(&digest), size, _lease: Arc::new(lease) })
    }

    /// A small document, in memory; nothing verifies it but the server's certificate.
    ///
    /// # Errors
    /// What speaking with a server has, or [`OciError::Large`].
    pub async fn document(&self, address: &Address, most: u64) -> Result<Vec<u8>, OciError> {
        let session = self.session_for(address);
        let (bytes, _) =
            session.small(&address.to_string(), most, || session.http.get(address.0.clone())).await?;
        Ok(bytes)
    }
}

/// An address without what stands before its host.
fn without_user(text: &str) -> &str {
    text.rsplit_once('@').map_or(text, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Settings;

    #[test]
    fn addresses_are_of_https_but_where_nobody_listens_in() {
        let settings = Settings { insecure: ["mirror.test:8080".to_owned()].into(), ..Settings::default() };
        let client = Client::new(settings).unwrap();
        for (text, shown) in [
            ("https://example.org/a/b.tar.zst?signature=secret#x", "https://example.org/a/b.tar.zst"),
            ("http://localhost:8080/x", "http://localhost:8080/x"),
            ("http://127.0.0.1/x", "http://127.0.0.1/x"),
            ("http://[::1]:80/x", "http://[::1]/x"),
            ("http://mirror.test:8080/x", "http://mirror.test:8080/x"),
        ] {
            assert_eq!(client.address(text).unwrap().to_string(), shown);
        }
        for (text, part) in [
            ("http://example.org/x", "plain HTTP"),
            ("http://mirror.test/x", "plain HTTP"),
            ("ftp://example.org/x", "only https"),
            ("file:///etc/passwd", "names no host"),
            ("https://me:secret@example.org/x", "user"),
            ("https://me:secret@", "no address"),
            ("https://", "no address"),
        ] {
            let error = client.address(text).unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let base = client.address("https://example.org/catalogue/list.toml").unwrap();
        assert_eq!(
            base.join("x.tar.zst", &client).unwrap().to_string(),
            "https://example.org/catalogue/x.tar.zst"
        );
        for leads in ["http://elsewhere.test/x", "http://localhost/x"] {
            assert!(base.join(leads, &client).unwrap_err().to_string().contains("from TLS"), "{leads}");
        }
        assert!(base.join("file:///etc/passwd", &client).is_err());
        assert_eq!(base.file_name(), "list.toml");
    }
}
