//! SSH keys: the daemon's own, with which `vm` logs in to guests, and each guest's host key.

use std::{os::unix::fs::PermissionsExt, path::Path};

use ssh_key::{Algorithm, LineEnding, PrivateKey};
use vm_host::files;

use crate::error::EngineError;

/// Makes the daemon's key if it has none; returns its `authorized_keys` line.
pub(crate) fn client(path: &Path, group: Option<u32>) -> Result<String, EngineError> {
    let failed = |source: std::io::Error| key_error("make", path, source);
    if !path.exists() {
        let (private, _) = generate("vmd")?;
        files::write_atomic(path, 0o600, private.as_bytes()).map_err(failed)?;
    }
    // Each time, since the configured group may be another than last time; closed first, so that no former group gets in between.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::os::unix::fs::chown(path, None, Some(group.unwrap_or(0))).map_err(failed)?;
    if group.is_some() {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o640)).map_err(failed)?;
    }
    public_of(path)
}

/// The public half of a private key file, as one OpenSSH line.
pub(crate) fn public_of(path: &Path) -> Result<String, EngineError> {
    let text = std::fs::read_to_string(path).map_err(|error| key_error("read", path, error))?;
    let key = PrivateKey::from_openssh(&text).map_err(|error| key_error("read", path, error))?;
    key.public_key().to_openssh().map_err(|error| key_error("read", path, error))
}

/// A fresh Ed25519 key: private half in OpenSSH's format, public half as one line.
pub(crate) fn generate(comment: &str) -> Result<(String, String), EngineError> {
    let error = |error| key_error("make", Path::new(comment), error);
    let mut key = PrivateKey::random(&mut rand_core::OsRng, Algorithm::Ed25519).map_err(error)?;
    key.set_comment(comment);
    let private = key.to_openssh(LineEnding::LF).map_err(error)?.to_string();
    let public = key.public_key().to_openssh().map_err(error)?;
    Ok((private, public))
}

/// `bytes` random bytes as lower-case hexadecimal.
pub(crate) fn random_hex(bytes: usize) -> Result<String, EngineError> {
    use std::io::Read;
    let mut buffer = vec![0; bytes];
    let path = Path::new("/dev/urandom");
    let filled = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut buffer));
    filled.map_err(|source| EngineError::File { action: "read", path: path.into(), source })?;
    Ok(buffer.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn key_error(
    action: &'static str,
    path: &Path,
    source: impl std::error::Error + Send + Sync + 'static,
) -> EngineError {
    EngineError::Key { action, path: path.into(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_key_follows_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        client(&path, None).unwrap();
        assert_eq!(mode(), 0o600);
        client(&path, Some(7)).unwrap();
        let group = std::os::unix::fs::MetadataExt::gid(&std::fs::metadata(&path).unwrap());
        assert_eq!((mode(), group), (0o640, 7));
        client(&path, None).unwrap();
        assert_eq!(mode(), 0o600);
    }

    #[test]
    fn the_client_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let first = client(&path, None).unwrap();
        assert!(first.starts_with("ssh-ed25519 "), "{first}");
        assert_eq!(client(&path, None).unwrap(), first);
    }
}
