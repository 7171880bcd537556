//! A rehearsal of one login, before anybody asks for one.
//!
//! The first key exchange of a boot touches code that is in no cache yet: pages, branch predictors, and under software emulation
//! every instruction has still to be translated, which makes it several times slower than the second. The VM boots on
//! one processor and this runs on another, in a process of its own with throw-away keys and no way in from outside.

use std::{process::ExitCode, sync::Arc, time::Duration};

use russh::{
    Preferred, cipher, client,
    keys::{
        Algorithm, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate,
        ssh_key::{LineEnding, rand_core::UnwrapErr},
    },
};
use vm_types::guest::config::SshConfig;

use super::{Settings, kex, run};

/// Name of the process.
pub(crate) const ARGV0: &str = "@vm-agent-rehearsal";
/// It only helps while the machine boots.
const LIMIT: Duration = Duration::from_secs(5);

struct Anyone;

impl client::Handler for Anyone {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// Its outcome is of no interest to anybody.
pub(crate) fn main() -> ExitCode {
    if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
        let _ = runtime.block_on(async { tokio::time::timeout(LIMIT, Box::pin(rehearse())).await });
    }
    ExitCode::SUCCESS
}

/// Logs in to a server of its own and opens a session; tells whether that succeeded.
async fn rehearse() -> Option<()> {
    let new_key =
        || PrivateKey::random(&mut UnwrapErr(russh::keys::key::safe_rng()), Algorithm::Ed25519).ok();
    let (host_key, key) = (new_key()?, new_key()?);
    let ssh = SshConfig {
        host_key: host_key.to_openssh(LineEnding::LF).ok()?.to_string(),
        authorized_keys: vec![key.public_key().to_openssh().ok()?],
    };
    let settings = Settings::new(&ssh, &std::collections::BTreeMap::new()).ok()?;
    let (near, far) = tokio::io::duplex(64 << 10);
    tokio::spawn(run(Arc::new(settings), far));
    // What `vm` prefers too.
    let config = client::Config {
        preferred: Preferred {
            kex: std::borrow::Cow::Borrowed(&[kex::CURVE25519]),
            cipher: std::borrow::Cow::Borrowed(&[cipher::AES_128_GCM]),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    };
    let mut session = client::connect_stream(Arc::new(config), near, Anyone).await.ok()?;
    let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
    session.authenticate_publickey("root", key).await.ok()?.success().then_some(())?;
    let channel = session.channel_open_session().await.ok()?;
    channel.close().await.ok()
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn the_rehearsal_reaches_a_session() {
        let done = tokio::time::timeout(std::time::Duration::from_secs(30), super::rehearse()).await;
        assert_eq!(done, Ok(Some(())));
    }
}
