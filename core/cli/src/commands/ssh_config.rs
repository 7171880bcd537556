//! `vm ssh-config`

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;
use vm_api::rpc::VmClient;

use crate::{context::Context, daemon, errors::CliError};

/// Print the configuration by which OpenSSH reaches a VM
///
/// For example: vm ssh-config web >> ~/.ssh/config; ssh web. Run it as the user who will run ssh. The host key is asked
/// for at each connection, so it stays right when a VM of that name is made anew. Needs OpenSSH 8.5 or newer.
///
/// The guest has no SFTP server of its own. Copy files with vm cp, or with tar, as in: tar c dir | ssh web tar x.
#[derive(Debug, Args)]
pub(crate) struct SshConfigArgs {
    /// Name or id
    name: String,
    /// Log in as this user
    #[arg(long, default_value = "root")]
    user: String,
    /// Print the line of known_hosts instead
    #[arg(long)]
    known_hosts: bool,
}

impl SshConfigArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let access = client.access(self.name).await?;
        let name = access.name.as_str();
        let key = usable_key(&access.client_key)?;
        if self.known_hosts {
            let line = format!("{name} {}", access.host_key.trim());
            context.output.show(&json!({"known_hosts": line}), || line.clone())?;
            return Ok(0);
        }
        let program =
            std::env::current_exe().map_err(|source| CliError::Setup { what: "my own path", source })?;
        let mut words = vec![program.to_string_lossy().into_owned()];
        words.extend(
            daemon::directory_options(&context.layout).iter().map(|word| word.to_string_lossy().into_owned()),
        );
        let vm = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let config = format!(
            "Host {name}\n  User {}\n  ProxyCommand {vm} proxy {name}\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             HostKeyAlias {name}\n  StrictHostKeyChecking yes\n  UserKnownHostsFile none\n  GlobalKnownHostsFile none\n  \
             KnownHostsCommand {vm} ssh-config --known-hosts {name}\n",
            self.user,
            quoted(&key.to_string_lossy()),
        );
        context.output.show(&json!({"config": config}), || config.clone())?;
        Ok(0)
    }
}

/// A file with the client key that OpenSSH takes: the daemon's own, or a private copy of it, brought up to date.
///
/// OpenSSH refuses a key file that its user owns and others may read. Where the daemon shares the key with a group, that
/// concerns only the user the daemon runs as, often root.
fn usable_key(key: &Path) -> Result<PathBuf, CliError> {
    let unreadable = |source| CliError::File { path: key.to_owned(), source };
    let metadata = match fs::metadata(key) {
        Ok(metadata) => metadata,
        // Whoever may not look at it cannot own it; ssh will tell.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(key.to_owned()),
        Err(source) => return Err(unreadable(source)),
    };
    if metadata.mode() & 0o077 == 0 || metadata.uid() != nix::unistd::getuid().as_raw() {
        return Ok(key.to_owned());
    }
    let content = fs::read(key).map_err(unreadable)?;
    private_copy(key, &content, &user_state()?)
}

/// The user's state directory (XDG Base Directory Specification).
fn user_state() -> Result<PathBuf, CliError> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    std::env::var_os("XDG_STATE_HOME")
        .and_then(|dir| absolute(dir.into()))
        .or_else(|| Some(absolute(std::env::var_os("HOME")?.into())?.join(".local/state")))
        .ok_or_else(|| CliError::Usage {
            message: "the client key needs a private copy, and HOME is not set".to_owned(),
            hint: "set HOME or XDG_STATE_HOME".to_owned(),
        })
}

/// Keeps one copy for each path a key may have: daemons may be several.
fn private_copy(key: &Path, content: &[u8], state: &Path) -> Result<PathBuf, CliError> {
    let dir = state.join("vm");
    let name = key.to_string_lossy().trim_start_matches('/').replace('/', "-");
    let copy = dir.join(name);
    let current = || -> io::Result<bool> {
        Ok(fs::metadata(&copy)?.mode() & 0o077 == 0 && fs::read(&copy)? == content)
    };
    // Written again only if it must be: this runs at each connection.
    if !current().unwrap_or(false) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .and_then(|()| vm_host::files::write_atomic(&copy, 0o600, content))
            .map_err(|source| CliError::WriteFile { path: copy.clone(), source })?;
    }
    Ok(copy)
}

/// A word of ssh_config(5): `%` doubled, in double quotes where it holds blanks.
fn quoted(word: &str) -> String {
    let word = word.replace('%', "%%");
    if word.contains(char::is_whitespace) { format!("\"{word}\"") } else { word }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_copy_is_private_and_follows_its_original() {
        let state = tempfile::tempdir().unwrap();
        let key = Path::new("/some/where/client_key");
        let copy = private_copy(key, b"one", state.path()).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), b"one");
        assert_eq!(private_copy(key, b"two", state.path()).unwrap(), copy);
        assert_eq!(fs::read(&copy).unwrap(), b"two");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o640)).unwrap();
        private_copy(key, b"two", state.path()).unwrap();
        assert_eq!(fs::metadata(&copy).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(copy.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_ne!(private_copy(Path::new("/else/client_key"), b"one", state.path()).unwrap(), copy);
    }

    #[test]
    fn a_key_of_ones_own_is_copied_only_if_others_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(&key, "key").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(usable_key(&key).unwrap(), key);
        assert!(usable_key(&dir.path().join("none")).is_err());
    }

    /// Where OpenSSH is installed: it takes the copy of a key that it refuses.
    #[test]
    fn openssh_takes_the_copy() {
        use russh::keys::{Algorithm, PrivateKey, ssh_key::LineEnding};
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        let made = PrivateKey::random(&mut russh::keys::key::safe_rng(), Algorithm::Ed25519).unwrap();
        let content = made.to_openssh(LineEnding::LF).unwrap();
        fs::write(&key, content.as_bytes()).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let takes = |path: &Path| {
            let mut command = Command::new("ssh-keygen");
            command.arg("-y").arg("-f").arg(path).stdin(Stdio::null());
            command.output().map(|output| output.status.success())
        };
        let Ok(taken) = takes(&key) else { return };
        assert!(!taken, "OpenSSH has become less strict");
        let copy = private_copy(&key, content.as_bytes(), dir.path()).unwrap();
        assert!(takes(&copy).unwrap());
    }
}
