//! How registries are spoken with.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{CredentialStore, Platform};

/// How registries are spoken with. Change what should differ from the default.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What an image is chosen for.
    pub platform: Platform,
    /// Who the user is.
    pub credentials: CredentialStore,
    /// Registries, `HOST[:PORT]`, that are spoken with in plain HTTP. Those on loopback always are.
    pub insecure: BTreeSet<String>,
    /// Places to ask first, in order, for a registry's images: `HOST[:PORT][/PATH]`, where the path comes before the repository.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// How many layers are transferred at once.
    pub parallel: usize,
    /// Until there is a connection.
    pub connect_timeout: Duration,
    /// For how long a registry may be silent.
    pub stall_timeout: Duration,
    /// How often something is tried in a row without anything coming of it.
    pub attempts: u32,
    /// Wait before the second try; it doubles from one to the next, and is spread by chance.
    pub backoff: Duration,
    /// The longest wait between two tries.
    pub backoff_most: Duration,
    /// The longest wait that a registry may ask for; where it wants more, that is an error which says how long.
    pub retry_after_most: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            credentials: CredentialStore::new(CredentialStore::docker()),
            insecure: BTreeSet::new(),
            mirrors: BTreeMap::new(),
            parallel: 3,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            attempts: 6,
            backoff: Duration::from_millis(500),
            backoff_most: Duration::from_secs(15),
            retry_after_most: Duration::from_secs(60),
        }
    }
}
