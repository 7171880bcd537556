//! What a user has for registries: in files as `docker login` writes them, or with the helpers that those files name.
//! <https://github.com/docker/cli/blob/master/man/src/config-json-5.md>

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{OciError, error::plain, reference::canonical_registry, store::blocking};

/// The most that is read of a file or a helper, in bytes.
const MAX: u64 = 1 << 20;
/// What Docker's own registry is called in these files, and to helpers.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// A helper that asks a person, or a daemon that is away, is not waited for longer.
const HELPER: Duration = Duration::from_secs(30);
/// What a helper says as user name where the secret is a token.
const TOKEN: &str = "<token>";

/// What is shown to a registry. `Debug` does not show secrets.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    Anonymous,
    /// Name and password, or an access token in its place.
    Basic {
        /// Name.
        user: String,
        /// Password.
        password: String,
    },
    /// A token that the registry itself takes.
    Bearer(String),
    /// A token that the registry's token service takes for another.
    Identity(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic",
            Self::Bearer(_) => "Bearer",
            Self::Identity(_) => "Identity",
        })
    }
}

/// Files with credentials, the first that knows a registry counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialStore {
    files: Vec<PathBuf>,
}

impl CredentialStore {
    /// These files; one that is not there knows no registry.
    pub fn new(files: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { files: files.into_iter().collect() }
    }

    /// The file of this process's user: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
    pub fn docker() -> Option<PathBuf> {
        let dir = env::var_os("DOCKER_CONFIG").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        dir.or_else(|| Some(env::home_dir()?.join(".docker"))).map(|dir| dir.join("config.json"))
    }

    /// The credentials for a registry, `HOST[:PORT]`. Helpers are asked only for registries that a file leaves to them.
    ///
    /// # Errors
    /// [`OciError::Credentials`] for a file that cannot be used, [`OciError::Helper`].
    pub async fn find(&self, registry: &str) -> Result<Credentials, OciError> {
        let registry = canonical_registry(registry);
        for path in &self.files {
            let (path, name) = (path.clone(), registry.clone());
            let found = blocking(move || look(&path, &name)).await?;
            let credentials = match found {
                Place::Here(credentials) => credentials,
                Place::Helper(helper) => ask(&helper, &registry).await?,
                Place::Nowhere => Credentials::Anonymous,
            };
            if credentials != Credentials::Anonymous {
                return Ok(credentials);
            }
        }
        Ok(Credentials::Anonymous)
    }
}

/// Where a file says that a registry's credentials are.
enum Place {
    Here(Credentials),
    Helper(String),
    Nowhere,
}

/// What is looked at of a file.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    auths: std::collections::BTreeMap<String, Entry>,
    creds_store: String,
    cred_helpers: std::collections::BTreeMap<String, String>,
}

/// One registry's. No `Debug`: it is secret.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    /// `USER:PASSWORD` in base64.
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> OciError + '_ {
    |source| OciError::Credentials { path: path.to_owned(), source }
}

fn look(path: &Path, registry: &str) -> Result<Place, OciError> {
    let Some(bytes) = read(path).map_err(failed(path))? else { return Ok(Place::Nowhere) };
    let config: Config = parse(&bytes).map_err(failed(path))?;
    let same = |key: &String| canonical_registry(host(key)) == registry;
    if let Some((_, helper)) = config.cred_helpers.iter().find(|(key, _)| same(key)) {
        return Ok(Place::Helper(helper.clone()));
    }
    let exact = config.auths.get(registry);
    let entry = exact.or_else(|| config.auths.iter().find(|(key, _)| same(key)).map(|(_, entry)| entry));
    let own = entry.map_or(Ok(Credentials::Anonymous), Entry::credentials).map_err(failed(path))?;
    Ok(match own {
        // `docker login` leaves an empty entry where the store has it.
        Credentials::Anonymous if !config.creds_store.is_empty() => Place::Helper(config.creds_store),
        Credentials::Anonymous => Place::Nowhere,
        own => Place::Here(own),
    })
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than 1 MiB"));
    }
    Ok(Some(bytes))
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    // Its own message would show a piece of what is secret.
    serde_json::from_slice(bytes).map_err(|error| {
        let place = format!("it is no such file: line {}, column {}", error.line(), error.column());
        io::Error::new(io::ErrorKind::InvalidData, place)
    })
}

/// The host of a key: `HOST`, `https://HOST` or, as long ago, `https://HOST/v1/`.
fn host(key: &str) -> &str {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key)
}

/// What the registry is called in a file, and to a helper.
fn key(registry: &str) -> &str {
    if registry == "docker.io" { DOCKER_KEY } else { registry }
}

impl Entry {
    fn credentials(&self) -> io::Result<Credentials> {
        if !self.registrytoken.is_empty() {
            return Ok(Credentials::Bearer(self.registrytoken.clone()));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Credentials::Identity(self.identitytoken.clone()));
        }
        if self.auth.is_empty() {
            let (user, password) = (self.username.clone(), self.password.clone());
            return Ok(match user.is_empty() {
                true => Credentials::Anonymous,
                false => Credentials::Basic { user, password },
            });
        }
        let decoded = BASE64_STANDARD.decode(&self.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let both =
            decoded.as_deref().map(|text| text.trim_end_matches('\0')).and_then(|text| text.split_once(':'));
        let (user, password) = both.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "an `auth` is not USER:PASSWORD in base64")
        })?;
        Ok(Credentials::Basic { user: user.to_owned(), password: password.to_owned() })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks a helper. Not through the seam for host commands, which keeps what a command says.
/// <https://github.com/docker/docker-credential-helpers>
async fn ask(helper: &str, registry: &str) -> Result<Credentials, OciError> {
    let program = format!("docker-credential-{}", plain(helper));
    let failed = |reason: String| OciError::Helper { program: program.clone(), reason };
    if helper.is_empty()
        || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(failed("its name is no program's".to_owned()));
    }
    let child = tokio::process::Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => failed("it is not installed".to_owned()),
        _ => failed(error.to_string()),
    })?;
    let work = async {
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read its input says why in its answer.
            let _ = stdin.write_all(key(registry).as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX).read_to_end(&mut said).await?;
        }
        io::Result::Ok((said, child.wait().await?))
    };
    let (said, status) = tokio::time::timeout(HELPER, work)
        .await
        .map_err(|_| failed(format!("it did not end within {} s", HELPER.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        let said = plain(&String::from_utf8_lossy(&said));
        // Its way of saying that it has nothing for this registry.
        if said.contains("credentials not found") {
            return Ok(Credentials::Anonymous);
        }
        return Err(failed(if said.is_empty() { status.to_string() } else { said }));
    }
    let Answer { username, secret } =
        parse(&said).map_err(|_| failed("its answer cannot be understood".to_owned()))?;
    Ok(match username.as_str() {
        TOKEN => Credentials::Identity(secret),
        "" => Credentials::Anonymous,
        _ => Credentials::Basic { user: username, password: secret },
    })
}

/// Keeps name and password for a registry in a file of this form, readable by its owner only. All else in the file stays.
/// [`crate::Client::login`] asks the registry first whether they are right.
///
/// # Errors
/// [`OciError::Credentials`].
pub fn remember(path: &Path, registry: &str, user: &str, password: &str) -> Result<(), OciError> {
    let auth = BASE64_STANDARD.encode(format!("{user}:{password}"));
    change(path, |auths| {
        let registry = canonical_registry(registry);
        auths.retain(|other, _| canonical_registry(host(other)) != registry);
        auths.insert(key(&registry).to_owned(), serde_json::json!({ "auth": auth }));
        true
    })
    .map(drop)
}

/// Removes what a file has for a registry, and the file if it has nothing else; whether there was something.
///
/// # Errors
/// [`OciError::Credentials`].
pub fn forget(path: &Path, registry: &str) -> Result<bool, OciError> {
    change(path, |auths| {
        let (registry, before) = (canonical_registry(registry), auths.len());
        auths.retain(|other, _| canonical_registry(host(other)) != registry);
        auths.len() < before
    })
}

fn change(path: &Path, change: impl FnOnce(&mut Map<String, Value>) -> bool) -> Result<bool, OciError> {
    let bytes = read(path).map_err(failed(path))?.filter(|bytes| !bytes.is_empty());
    let mut document: Map<String, Value> = match bytes {
        Some(bytes) => parse(&bytes).map_err(failed(path))?,
        None => Map::new(),
    };
    let auths = document.entry("auths").or_insert_with(|| Value::Object(Map::new()));
    let Value::Object(auths) = auths else {
        return Err(failed(path)(io::Error::new(io::ErrorKind::InvalidData, "its `auths` is no object")));
    };
    if !change(auths) {
        return Ok(false);
    }
    if auths.is_empty() && document.len() == 1 {
        return vm_host::files::remove_if_there(path).map_err(failed(path)).map(|()| true);
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed(path))?;
    }
    let text = serde_json::to_vec_pretty(&document).map_err(|error| failed(path)(error.into()))?;
    vm_host::files::write_atomic(path, 0o600, &text).map_err(failed(path))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic { user: user.to_owned(), password: password.to_owned() }
    }

    async fn of_text(text: &str, registry: &str) -> Result<Credentials, OciError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, text).unwrap();
        CredentialStore::new([path]).find(registry).await
    }

    #[tokio::test]
    async fn credentials_are_found_by_any_name_of_the_registry_and_for_no_other() {
        // "ann:pa:ss" and "bob:x".
        let text = r#"{
            "auths": {
                "https://index.docker.io/v1/": { "auth": "Ym9iOng=" },
                "https://registry.example:5000": { "auth": "YW5uOnBhOnNz" },
                "empty.example": {},
                "token.example": { "registrytoken": "t" },
                "identity.example": { "auth": "YW5uOg==", "identitytoken": "i" },
                "plain.example": { "username": "u", "password": "p" }
            }
        }"#;
        for (registry, expected) in [
            ("docker.io", basic("bob", "x")),
            ("registry-1.docker.io", basic("bob", "x")),
            ("registry.example:5000", basic("ann", "pa:ss")),
            ("registry.example", Credentials::Anonymous),
            ("empty.example", Credentials::Anonymous),
            ("token.example", Credentials::Bearer("t".into())),
            ("identity.example", Credentials::Identity("i".into())),
            ("plain.example", basic("u", "p")),
        ] {
            assert!(of_text(text, registry).await.unwrap() == expected, "{registry}");
        }
        assert_eq!(
            CredentialStore::new(["/no/such/file".into()]).find("a.example").await.unwrap(),
            Credentials::Anonymous
        );
    }

    #[tokio::test]
    async fn a_damaged_file_is_an_error_that_shows_nothing_of_it() {
        for text in
            [r#"{ "auths": { "a.example": { "auth": "c2VjcmV0" } } }"#, r#"{ "auths": { "secret": 7 } }"#]
        {
            let error = of_text(text, "a.example").await.unwrap_err();
            let said = format!("{} {error:?}", vm_types::report::chain(&error));
            assert!(
                said.contains("config.json") && !said.contains("secret") && !said.contains("c2Vj"),
                "{said}"
            );
            assert!(error.hint().contains("docker login"));
        }
    }

    #[tokio::test]
    async fn a_helper_that_is_not_there_or_has_an_odd_name_is_named() {
        let text = r#"{ "credsStore": "no-such-helper", "credHelpers": { "odd.example": "../../bin/sh" } }"#;
        let error = of_text(text, "a.example").await.unwrap_err();
        assert!(
            error.to_string().contains("docker-credential-no-such-helper failed: it is not installed"),
            "{error}"
        );
        assert!(error.hint().contains("docker-credential-no-such-helper get"));
        assert!(matches!(of_text(text, "odd.example").await, Err(OciError::Helper { .. })));
    }

    #[tokio::test]
    async fn what_is_remembered_is_found_by_its_owner_alone_and_forgotten_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/auth.json");
        let store = CredentialStore::new([path.clone()]);
        remember(&path, "registry.example", "ann", "pa:ss").unwrap();
        remember(&path, "docker.io", "bob", "x").unwrap();
        remember(&path, "registry.example", "ann", "newer").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(store.find("registry.example").await.unwrap() == basic("ann", "newer"));
        assert!(store.find("docker.io").await.unwrap() == basic("bob", "x"));
        assert!(fs::read_to_string(&path).unwrap().contains(DOCKER_KEY), "as docker itself looks for it");
        assert!(forget(&path, "index.docker.io").unwrap());
        assert!(!forget(&path, "docker.io").unwrap());
        assert_eq!(store.find("docker.io").await.unwrap(), Credentials::Anonymous);
        assert!(store.find("registry.example").await.unwrap() == basic("ann", "newer"));
        // What others keep in such a file stays.
        fs::write(&path, r#"{ "auths": {}, "credHelpers": { "a": "b" } }"#).unwrap();
        remember(&path, "c.example", "u", "p").unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("credHelpers"));
    }
}
