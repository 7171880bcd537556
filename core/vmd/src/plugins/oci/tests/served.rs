//! A registry of one repository, as far as it is asked for a plugin.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use super::{Made, refusal};
use crate::plugins::{
    PluginsError,
    oci::{
        OciError, Trust,
        registry::{self, Settings},
    },
    package::{Package, digest},
};

/// `ann:secret`, as `Basic` has it.
const ANN: &str = "YW5uOnNlY3JldA==";

/// Who is served.
#[derive(Clone, Copy, PartialEq)]
enum Login {
    Everybody,
    /// Those with a token; everybody gets one.
    Token,
    /// Those with a token; Ann gets one.
    TokenForAnn,
    /// Ann.
    Ann,
}

/// How the path that ends so is answered.
#[derive(Clone)]
enum Odd {
    /// Half of it, and then nothing more.
    Stalls(&'static str),
    /// With more and more.
    Endless(String),
}

struct Registry {
    address: SocketAddr,
    /// What was asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

struct Site {
    /// Documents and blobs by path.
    content: BTreeMap<String, Vec<u8>>,
    login: Login,
    odd: Option<Odd>,
}

impl Site {
    fn of(made: &Made) -> Self {
        let mut content: BTreeMap<_, _> = made
            .blobs
            .iter()
            .map(|(digest, bytes)| (format!("/v2/a/greet/blobs/{digest}"), bytes.clone()))
            .collect();
        for name in ["1.0", "latest", &made.digest()] {
            content.insert(format!("/v2/a/greet/manifests/{name}"), made.bytes());
        }
        Self { content, login: Login::Everybody, odd: None }
    }

    async fn serve(self) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (site, log) = (Arc::new(self), asked.clone());
        // Ends with the test's runtime.
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (site, log) = (site.clone(), log.clone());
                tokio::spawn(async move { site.answer(stream, address, &log).await });
            }
        });
        Registry { address, asked }
    }

    /// Answers one request; a client that goes away is its own affair.
    async fn answer(&self, stream: TcpStream, address: SocketAddr, log: &Mutex<Vec<String>>) -> Option<()> {
        let mut stream = BufReader::new(stream);
        let (mut line, mut authorization) = (String::new(), String::new());
        stream.read_line(&mut line).await.ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        loop {
            line.clear();
            stream.read_line(&mut line).await.ok()?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    value.clone_into(&mut authorization)
                }
                Some(_) => {}
                None => break,
            }
        }
        log.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        let (status, header, body) = self.content(&path, &authorization, address);
        let head = format!("HTTP/1.1 {status} x\r\nConnection: close\r\n{header}");
        match &self.odd {
            Some(Odd::Stalls(end)) if path.contains(end) => {
                let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
                stream.write_all(head.as_bytes()).await.ok()?;
                stream.write_all(&body[..body.len() / 2]).await.ok()?;
                stream.flush().await.ok()?;
                // Until the client gives up.
                stream.read_line(&mut line).await.ok()?;
            }
            Some(Odd::Endless(end)) if path.ends_with(end) => {
                stream
                    .write_all(format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes())
                    .await
                    .ok()?;
                loop {
                    stream.write_all(b"4\r\nmore\r\n").await.ok()?;
                }
            }
            _ => {
                let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
                stream.write_all(head.as_bytes()).await.ok()?;
                stream.write_all(&body).await.ok()?;
                stream.flush().await.ok()?;
            }
        }
        Some(())
    }

    fn content(&self, path: &str, authorization: &str, address: SocketAddr) -> (u16, String, Vec<u8>) {
        let ann = authorization == format!("Basic {ANN}");
        if path.starts_with("/token?") {
            let scoped =
                path.contains("scope=repository%3Aa%2Fgreet%3Apull") && path.contains("service=test");
            return match self.login {
                Login::TokenForAnn if !ann => (401, String::new(), b"who are you?".to_vec()),
                _ if !scoped => (400, String::new(), b"for what?".to_vec()),
                _ => (200, String::new(), b"{\"token\":\"let-me-in\"}".to_vec()),
            };
        }
        let allowed = match self.login {
            Login::Everybody => true,
            Login::Token | Login::TokenForAnn => authorization == "Bearer let-me-in",
            Login::Ann => ann,
        };
        if !allowed {
            let how = match self.login {
                Login::Ann => "Basic realm=\"test\"".to_owned(),
                _ => format!("Bearer realm=\"http://{address}/token\",service=\"test\""),
            };
            let body = b"{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"authentication required\"}]}";
            return (401, format!("WWW-Authenticate: {how}\r\n"), body.to_vec());
        }
        match self.content.get(path) {
            Some(body) => (200, String::new(), body.clone()),
            None if path == "/v2/" => (200, String::new(), b"{}".to_vec()),
            None => {
                let body = b"{\"errors\":[{\"code\":\"MANIFEST_UNKNOWN\",\"message\":\"manifest unknown\"}]}";
                (404, String::new(), body.to_vec())
            }
        }
    }
}

impl Registry {
    fn name(&self) -> String {
        format!("{}/a/greet", self.address)
    }

    async fn get(&self, which: &str) -> Result<Package, PluginsError> {
        registry::package(&format!("{}{which}", self.name()), settings(None), &Trust::default()).await
    }
}

/// As much time as a busy machine may need, and nothing of the user who runs the tests.
fn settings(credentials: Option<&Path>) -> Settings {
    let minute = Duration::from_secs(60);
    Settings { connect: minute, read: minute, whole: minute, credentials: credentials.map(Path::to_owned) }
}

#[tokio::test]
async fn a_registry_gives_a_plugin_and_its_digest() {
    let made = Made::new(b"component");
    let registry = Site::of(&made).serve().await;
    let package = registry.get(":1.0").await.unwrap();
    assert_eq!(package.source, format!("oci://{}:1.0@{}", registry.name(), made.digest()));
    assert_eq!(
        (package.component(), &package.digests()["files/key.pem"]),
        (&b"component"[..], &digest(b"key"))
    );
    let latest = registry.get("").await.unwrap();
    assert_eq!(latest.source, format!("oci://{}:latest@{}", registry.name(), made.digest()));
    let unasked = digest(b"a layer that nobody asks for");
    let asked = registry.asked.lock().unwrap().join("\n");
    assert!(asked.contains(&digest(b"component")) && !asked.contains(&unasked), "{asked}");
    let pinned = registry.get(&format!(":1.0@{}", made.digest())).await.unwrap();
    assert_eq!(pinned.source, package.source);
    assert_eq!(pinned.digests(), package.digests());
    // A registry whose answer is another than the one that was asked for.
    let other = Made::new(b"other").digest();
    let mut site = Site::of(&made);
    site.content.insert(format!("/v2/a/greet/manifests/{other}"), made.bytes());
    let error = refusal(site.serve().await.get(&format!(":1.0@{other}")).await);
    assert!(matches!(&error, OciError::Digest { expected, .. } if *expected == other), "{error}");
}

#[tokio::test]
async fn a_registry_that_asks_who_it_is_learns_what_the_user_left_for_it() {
    let made = Made::new(b"component");
    let serve = |login| Site { login, ..Site::of(&made) }.serve();
    let registry = serve(Login::Token).await;
    registry.get(":1.0").await.unwrap();
    assert!(registry.asked.lock().unwrap().iter().any(|path| path.starts_with("/token?")));
    for login in [Login::TokenForAnn, Login::Ann] {
        let registry = serve(login).await;
        let error = refusal(registry.get(":1.0").await);
        assert!(matches!(error, OciError::Unauthorized { known: false, .. }), "{error}");
        assert!(error.hint().contains(&format!("docker login {}", registry.address)), "{}", error.hint());

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let get = async |auth: &str| {
            let text = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{auth}\"}}}}}}", registry.address);
            fs::write(&path, text).unwrap();
            registry::package(&format!("{}:1.0", registry.name()), settings(Some(&path)), &Trust::default())
                .await
        };
        get(ANN).await.unwrap();
        // "bob:secret".
        let error = refusal(get("Ym9iOnNlY3JldA==").await);
        assert!(matches!(error, OciError::Unauthorized { known: true, .. }), "{error}");
        assert!(!format!("{error:?}").contains("secret"));
    }
}

#[tokio::test]
async fn what_a_registry_does_not_have_or_has_changed_is_told() {
    let made = Made::new(b"component");
    let error = refusal(Site::of(&made).serve().await.get(":2.0").await);
    assert!(matches!(&error, OciError::NotFound { reference, .. } if reference.ends_with(":2.0")), "{error}");

    let component = format!("/v2/a/greet/blobs/{}", digest(b"component"));
    let mut site = Site::of(&made);
    site.content.remove(&component);
    let error = refusal(site.serve().await.get(":1.0").await);
    assert!(matches!(error, OciError::NotFound { .. }), "{error}");

    for (content, same_size) in [(&b"cOmponent"[..], true), (b"longer component", false)] {
        let mut site = Site::of(&made);
        site.content.insert(component.clone(), content.to_vec());
        let error = refusal(site.serve().await.get(":1.0").await);
        assert_eq!(matches!(error, OciError::Digest { .. }), same_size, "{error}");
        assert_eq!(matches!(error, OciError::Size { .. }), !same_size, "{error}");
    }
    let site = Site { odd: Some(Odd::Endless(component)), ..Site::of(&made) };
    let error = refusal(site.serve().await.get(":1.0").await);
    assert!(matches!(error, OciError::Size { expected: 9, .. }), "{error}");

    let no_plugin = made.changed(|manifest| {
        manifest["layers"].as_array_mut().unwrap().remove(1);
    });
    let registry = Site::of(&no_plugin).serve().await;
    let error = refusal(registry.get(":1.0").await);
    assert!(matches!(error, OciError::Missing { what: "plugin.toml", .. }), "{error}");
    let asked = registry.asked.lock().unwrap().join("\n");
    assert!(!asked.contains("/blobs/"), "nothing is fetched of what is no plugin: {asked}");
}

#[tokio::test]
async fn a_registry_that_is_silent_or_not_there_is_not_waited_for() {
    let made = Made::new(b"component");
    for path in ["/manifests/", "/blobs/"] {
        let site = Site { odd: Some(Odd::Stalls(path)), ..Site::of(&made) };
        let registry = site.serve().await;
        let short = Settings { read: Duration::from_millis(300), ..settings(None) };
        let error =
            refusal(registry::package(&format!("{}:1.0", registry.name()), short, &Trust::default()).await);
        assert!(matches!(error, OciError::Stalled { .. }), "{error}");
        let short = Settings { whole: Duration::from_millis(300), ..settings(None) };
        let error =
            refusal(registry::package(&format!("{}:1.0", registry.name()), short, &Trust::default()).await);
        assert!(matches!(error, OciError::Stalled { .. }), "{error}");
    }
    // No program listens on the first port.
    let error =
        refusal(registry::package("127.0.0.1:1/a/greet:1.0", settings(None), &Trust::default()).await);
    assert!(matches!(error, OciError::Unreachable { .. }), "{error}");
    assert!(error.hint().contains("plain HTTP"));
}

#[tokio::test]
async fn signatures_are_looked_for_beside_the_artifact_where_keys_are_trusted() {
    use p256::pkcs8::{EncodePublicKey, LineEnding};
    let key = p256::ecdsa::SigningKey::from_slice(&[1; 32]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pub");
    fs::write(&path, key.verifying_key().to_public_key_pem(LineEnding::LF).unwrap()).unwrap();
    let trust = Trust { keys: vec![path], required: false };
    let made = Made::new(b"component");
    let place = format!("/v2/a/greet/manifests/{}.sig", made.digest().replace(':', "-"));

    let registry = Site::of(&made).serve().await;
    let text = format!("{}:1.0", registry.name());
    let package = registry::package(&text, settings(None), &trust).await.unwrap();
    assert_eq!(package.signature, vm_api::PluginSignature::Unsigned);
    assert!(registry.asked.lock().unwrap().contains(&place));
    registry.asked.lock().unwrap().clear();
    let package = registry.get(":1.0").await.unwrap();
    assert_eq!(package.signature, vm_api::PluginSignature::Unchecked);
    assert!(!registry.asked.lock().unwrap().contains(&place), "nobody asks who trusts nobody");

    // No signature is another thing than a registry that does not say.
    let mut site = Site::of(&made);
    site.content.insert(place, b"{}".to_vec());
    let registry = site.serve().await;
    let text = format!("{}:1.0", registry.name());
    let error = refusal(registry::package(&text, settings(None), &trust).await);
    assert!(matches!(error, OciError::Malformed { what: "manifest of the signatures", .. }), "{error}");
}
