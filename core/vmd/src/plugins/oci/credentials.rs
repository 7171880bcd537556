//! What the daemon's user has for registries, in the file where `docker login` and others leave it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use oci_distribution::secrets::RegistryAuth;
use serde::Deserialize;

use super::OciError;

const MAX: u64 = 1 << 20;

/// The names that Docker's own registry is known by.
const DOCKER: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// The file. What else is in it is of no use here.
#[derive(Deserialize, Default)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

/// One registry's. No `Debug`: it is secret.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    /// `USER:PASSWORD` in base64.
    auth: String,
    username: String,
    password: String,
    registrytoken: String,
}

/// The credentials for a registry, `HOST[:PORT]`; anonymous where the file has none, or is not there.
pub(super) fn of(path: &Path, registry: &str) -> Result<RegistryAuth, OciError> {
    let failed = |source| OciError::Credentials { path: path.to_owned(), source };
    let config = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(RegistryAuth::Anonymous),
        file => read(file.map_err(failed)?).map_err(failed)?,
    };
    let of_registry = |key: &&String| {
        let host = host(key);
        host == registry || (DOCKER.contains(&host) && DOCKER.contains(&registry))
    };
    let exact = config.auths.get(registry);
    let entry =
        exact.or_else(|| config.auths.iter().find(|(key, _)| of_registry(key)).map(|(_, entry)| entry));
    entry.map_or(Ok(RegistryAuth::Anonymous), |entry| entry.auth().map_err(failed))
}

fn read(file: File) -> io::Result<Config> {
    let mut bytes = Vec::new();
    file.take(MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than 1 MiB"));
    }
    // Its own message would show a piece of what is secret.
    serde_json::from_slice(&bytes).map_err(|error| {
        let place = format!("it is no such file: line {}, column {}", error.line(), error.column());
        io::Error::new(io::ErrorKind::InvalidData, place)
    })
}

/// The host of a key: `HOST`, `https://HOST` or, as long ago, `https://HOST/v1/`.
fn host(key: &str) -> &str {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key)
}

impl Entry {
    fn auth(&self) -> io::Result<RegistryAuth> {
        if !self.registrytoken.is_empty() {
            return Ok(RegistryAuth::Bearer(self.registrytoken.clone()));
        }
        if self.auth.is_empty() {
            if self.username.is_empty() {
                return Ok(RegistryAuth::Anonymous);
            }
            return Ok(RegistryAuth::Basic(self.username.clone(), self.password.clone()));
        }
        let decoded = BASE64_STANDARD.decode(&self.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let both =
            decoded.as_deref().map(|text| text.trim_end_matches('\0')).and_then(|text| text.split_once(':'));
        let (user, password) = both.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "an `auth` is not USER:PASSWORD in base64")
        })?;
        Ok(RegistryAuth::Basic(user.to_owned(), password.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_text(text: &str, registry: &str) -> Result<RegistryAuth, OciError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        of(&path, registry)
    }

    #[test]
    fn credentials_are_found_by_any_name_of_the_registry_and_for_no_other() {
        let pair = |user: &str, password: &str| RegistryAuth::Basic(user.into(), password.into());
        // "ann:pa:ss" and "bob:x".
        let text = r#"{
            "credsStore": "desktop",
            "auths": {
                "https://index.docker.io/v1/": { "auth": "Ym9iOng=" },
                "https://registry.example:5000": { "auth": "YW5uOnBhOnNz" },
                "helper.example": {},
                "token.example": { "registrytoken": "t" },
                "plain.example": { "username": "u", "password": "p" }
            }
        }"#;
        let found = |registry| of_text(text, registry).unwrap();
        assert_eq!(found("docker.io"), pair("bob", "x"));
        assert_eq!(found("registry.example:5000"), pair("ann", "pa:ss"));
        assert_eq!(found("registry.example"), RegistryAuth::Anonymous);
        assert_eq!(found("helper.example"), RegistryAuth::Anonymous);
        assert_eq!(found("token.example"), RegistryAuth::Bearer("t".into()));
        assert_eq!(found("plain.example"), pair("u", "p"));
        assert_eq!(of(Path::new("/no/such/file"), "a.example").unwrap(), RegistryAuth::Anonymous);
    }

    #[test]
    fn a_damaged_file_is_an_error_that_shows_nothing_of_it() {
        for text in
            [r#"{ "auths": { "a.example": { "auth": "c2VjcmV0" } } }"#, r#"{ "auths": { "secret": 7 } }"#]
        {
            let error = of_text(text, "a.example").unwrap_err();
            let said = vm_types::report::chain(&error);
            assert!(
                said.contains("config.json") && !said.contains("secret") && !said.contains("c2Vj"),
                "{said}"
            );
            assert!(error.hint().contains("docker login"));
        }
    }
}
