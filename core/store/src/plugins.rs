//! Installed plugins and the state they keep.
//!
//! State goes with what it is about, in the same transaction: a VM's by a trigger on `vms`, a plugin's by a foreign key. A change that
//! comes after that is dropped, so that nothing is left of a VM or a plugin that is gone.

use std::collections::BTreeMap;

use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde_json::Value;
use vm_types::VmId;

use crate::{
    Store, StoreError,
    rows::{doing, from_json, to_i64, to_json, to_u64},
};

const READ: &str = "read plugins";
const UPDATE: &str = "update a plugin";
const READ_STATE: &str = "read a plugin's state";
const WRITE_STATE: &str = "keep a plugin's state";

/// A plugin as it was installed, and what the operator has said of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginRecord {
    /// Unique.
    pub name: String,
    /// Of the component, `sha256:…`.
    pub digest: String,
    /// Every installed file by its name, with its digest, `sha256:…`.
    pub files: BTreeMap<String, String>,
    /// Where it came from, for people.
    pub source: String,
    /// Who had signed it, when it was installed; the form is the daemon's.
    pub signature: Option<Value>,
    /// Whether it is called.
    pub enabled: bool,
    /// What was granted; the form is `vm-plugin`'s.
    pub granted: Value,
    /// Configuration without defaults.
    pub config: Value,
    /// Its place in the operator's order; none if it is not in there.
    pub position: Option<u32>,
    /// Seconds since the Unix epoch.
    pub installed_at: u64,
}

/// Why a plugin is not called though it is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginFailures {
    /// How often it failed in a row.
    pub failures: u32,
    /// The last of them, for people.
    pub last: String,
}

/// One change of a plugin's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    /// The VM it is about; none for the plugin's own.
    pub vm: Option<VmId>,
    /// The key.
    pub key: String,
    /// The new value; none removes it.
    pub value: Option<Vec<u8>>,
}

/// Which plugins there are.
#[derive(Debug, Clone, Copy)]
pub struct Plugins<'a>(pub(crate) &'a Store);

impl Plugins<'_> {
    /// Adds a plugin, or replaces what is known of it; its state stays.
    ///
    /// # Errors
    /// The database failing.
    pub async fn put(&self, plugin: PluginRecord) -> Result<(), StoreError> {
        const ACTION: &str = "record a plugin";
        self.0
            .transaction(ACTION, move |t| {
                let statement = "INSERT INTO plugins (name, digest, files, source, enabled, granted, config,
                                                      position, installed_at, signature)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
                     ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, files = excluded.files,
                         source = excluded.source, enabled = excluded.enabled, granted = excluded.granted,
                         config = excluded.config, position = excluded.position,
                         installed_at = excluded.installed_at, signature = excluded.signature";
                let files = to_json("plugins.files", &plugin.files)?;
                let values = params![
                    plugin.name,
                    plugin.digest,
                    files,
                    plugin.source,
                    plugin.enabled,
                    plugin.granted.to_string(),
                    plugin.config.to_string(),
                    plugin.position,
                    to_i64(plugin.installed_at),
                    plugin.signature.map(|signature| signature.to_string()),
                ];
                t.prepare_cached(statement)
                    .and_then(|mut statement| statement.execute(values))
                    .map_err(doing(ACTION))?;
                Ok(())
            })
            .await
    }

    /// All, by name.
    ///
    /// # Errors
    /// The database failing.
    pub async fn list(&self) -> Result<Vec<PluginRecord>, StoreError> {
        self.0
            .transaction(READ, |t| {
                let mut statement = t
                    .prepare_cached(
                        "SELECT name, digest, files, source, enabled, granted, config, position, installed_at,
                                signature
                         FROM plugins ORDER BY name",
                    )
                    .map_err(doing(READ))?;
                let mut rows = statement.query([]).map_err(doing(READ))?;
                let mut plugins = Vec::new();
                while let Some(row) = rows.next().map_err(doing(READ))? {
                    plugins.push(record(row)?);
                }
                Ok(plugins)
            })
            .await
    }

    /// Forgets a plugin with all its state. Tells whether there was one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn delete(&self, name: &str) -> Result<bool, StoreError> {
        const ACTION: &str = "remove a plugin";
        self.change(ACTION, "DELETE FROM plugins WHERE name = ?1", name, None).await
    }

    /// Notes whether a plugin is called. Tells whether there is one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn set_enabled(&self, name: &str, enabled: bool) -> Result<bool, StoreError> {
        let value = if enabled { "1" } else { "0" };
        let statement = "UPDATE plugins SET enabled = CAST(?2 AS INTEGER) WHERE name = ?1";
        self.change(UPDATE, statement, name, Some(value.to_owned())).await
    }

    /// Notes that a plugin has failed too often to be called, or that it is called again. Of one that is gone nothing is kept.
    ///
    /// # Errors
    /// The database failing.
    pub async fn set_failures(&self, name: &str, failures: Option<PluginFailures>) -> Result<(), StoreError> {
        let name = name.to_owned();
        self.0
            .transaction(UPDATE, move |t| {
                match failures {
                    None => t.execute("DELETE FROM plugin_failures WHERE plugin = ?1", [name]),
                    Some(PluginFailures { failures, last }) => t.execute(
                        "INSERT INTO plugin_failures (plugin, failures, last)
                         SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM plugins WHERE name = ?1)
                         ON CONFLICT (plugin) DO UPDATE SET failures = excluded.failures, last = excluded.last",
                        params![name, failures, last],
                    ),
                }
                .map_err(doing(UPDATE))?;
                Ok(())
            })
            .await
    }

    /// What [`Self::set_failures`] has kept.
    ///
    /// # Errors
    /// The database failing.
    pub async fn failures(&self, name: &str) -> Result<Option<PluginFailures>, StoreError> {
        let name = name.to_owned();
        self.0
            .transaction(READ, move |t| {
                t.query_row("SELECT failures, last FROM plugin_failures WHERE plugin = ?1", [name], |row| {
                    Ok(PluginFailures { failures: row.get(0)?, last: row.get(1)? })
                })
                .optional()
                .map_err(doing(READ))
            })
            .await
    }

    /// Keeps a plugin's configuration. Tells whether there is one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn set_config(&self, name: &str, config: &Value) -> Result<bool, StoreError> {
        let statement = "UPDATE plugins SET config = ?2 WHERE name = ?1";
        self.change(UPDATE, statement, name, Some(config.to_string())).await
    }

    /// Keeps the operator's order; those that are not named lose their places.
    ///
    /// # Errors
    /// The database failing.
    pub async fn set_order(&self, names: &[String]) -> Result<(), StoreError> {
        let names = names.to_vec();
        self.0
            .transaction(UPDATE, move |t| {
                t.execute("UPDATE plugins SET position = NULL", []).map_err(doing(UPDATE))?;
                for (position, name) in names.iter().enumerate() {
                    let position = i64::try_from(position).unwrap_or(i64::MAX);
                    let statement = "UPDATE plugins SET position = ?2 WHERE name = ?1";
                    t.execute(statement, params![name, position]).map_err(doing(UPDATE))?;
                }
                Ok(())
            })
            .await
    }

    /// A value of a plugin's state.
    ///
    /// # Errors
    /// The database failing.
    pub async fn state(
        &self,
        plugin: &str,
        vm: Option<&VmId>,
        key: &str,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let (plugin, scope, key) = (plugin.to_owned(), scope(vm), key.to_owned());
        self.0
            .transaction(READ_STATE, move |t| {
                t.prepare_cached("SELECT value FROM plugin_state WHERE plugin = ?1 AND vm = ?2 AND key = ?3")
                    .and_then(|mut statement| {
                        statement.query_row([plugin, scope, key], |row| row.get(0)).optional()
                    })
                    .map_err(doing(READ_STATE))
            })
            .await
    }

    /// The keys of a plugin's state about one VM, or its own, with the sizes of their values in bytes.
    ///
    /// # Errors
    /// The database failing.
    pub async fn state_sizes(
        &self,
        plugin: &str,
        vm: Option<&VmId>,
    ) -> Result<BTreeMap<String, usize>, StoreError> {
        let values = [plugin.to_owned(), scope(vm)];
        self.0
            .transaction(READ_STATE, move |t| {
                let mut statement = t
                    .prepare_cached(
                        "SELECT key, length(value) FROM plugin_state WHERE plugin = ?1 AND vm = ?2",
                    )
                    .map_err(doing(READ_STATE))?;
                let rows = statement.query_map(values, |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)));
                let rows = rows.map_err(doing(READ_STATE))?;
                rows.map(|row| {
                    let (key, size) = row.map_err(doing(READ_STATE))?;
                    Ok((key, usize::try_from(size).unwrap_or(0)))
                })
                .collect()
            })
            .await
    }

    /// Carries out all of these changes or none. Those about a VM or a plugin that is gone are dropped.
    ///
    /// # Errors
    /// The database failing.
    pub async fn change_state(&self, plugin: &str, changes: &[StateChange]) -> Result<(), StoreError> {
        let (plugin, changes) = (plugin.to_owned(), changes.to_vec());
        self.0
            .transaction(WRITE_STATE, move |t| {
                changes.iter().try_for_each(|change| apply(t, &plugin, change).map_err(doing(WRITE_STATE)))
            })
            .await
    }

    async fn change(
        &self,
        action: &'static str,
        statement: &'static str,
        name: &str,
        value: Option<String>,
    ) -> Result<bool, StoreError> {
        let values = std::iter::once(name.to_owned()).chain(value).collect::<Vec<_>>();
        self.0
            .transaction(action, move |t| {
                let changed = t
                    .prepare_cached(statement)
                    .and_then(|mut statement| statement.execute(rusqlite::params_from_iter(values)));
                changed.map(|rows| rows > 0).map_err(doing(action))
            })
            .await
    }
}

/// The plugin's own state is about no VM, and no VM's id is empty.
fn scope(vm: Option<&VmId>) -> String {
    vm.map(ToString::to_string).unwrap_or_default()
}

fn apply(t: &Transaction<'_>, plugin: &str, change: &StateChange) -> rusqlite::Result<()> {
    let scope = scope(change.vm.as_ref());
    match &change.value {
        None => t
            .prepare_cached("DELETE FROM plugin_state WHERE plugin = ?1 AND vm = ?2 AND key = ?3")?
            .execute(params![plugin, scope, change.key]),
        Some(value) => t
            .prepare_cached(
                "INSERT INTO plugin_state (plugin, vm, key, value)
                 SELECT ?1, ?2, ?3, ?4
                 WHERE EXISTS (SELECT 1 FROM plugins WHERE name = ?1)
                   AND (?2 = '' OR EXISTS (SELECT 1 FROM vms WHERE id = ?2))
                 ON CONFLICT (plugin, vm, key) DO UPDATE SET value = excluded.value",
            )?
            .execute(params![plugin, scope, change.key, value]),
    }
    .map(|_| ())
}

fn record(row: &Row<'_>) -> Result<PluginRecord, StoreError> {
    let text = |index| row.get::<_, String>(index).map_err(doing(READ));
    Ok(PluginRecord {
        name: text(0)?,
        digest: text(1)?,
        files: from_json("plugins.files", text(2)?)?,
        source: text(3)?,
        enabled: row.get(4).map_err(doing(READ))?,
        granted: from_json("plugins.granted", text(5)?)?,
        config: from_json("plugins.config", text(6)?)?,
        position: row.get(7).map_err(doing(READ))?,
        installed_at: to_u64(row.get(8).map_err(doing(READ))?),
        signature: match row.get::<_, Option<String>>(9).map_err(doing(READ))? {
            Some(text) => from_json("plugins.signature", text)?,
            None => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vm_types::{image::ImageRecord, vm::VmRecord};

    use super::*;

    fn plugin(name: &str) -> PluginRecord {
        PluginRecord {
            name: name.to_owned(),
            digest: "sha256:00".to_owned(),
            files: [("plugin.toml".to_owned(), "sha256:01".to_owned())].into(),
            source: "/plugins/a".to_owned(),
            signature: None,
            enabled: true,
            granted: json!("all"),
            config: json!({ "size": 3 }),
            position: None,
            installed_at: 1_700_000_000,
        }
    }

    async fn store(dir: &tempfile::TempDir) -> Store {
        Store::open(&dir.path().join("db")).unwrap()
    }

    async fn vm(store: &Store, number: u64) -> VmId {
        let digest = format!("sha256:{}", "a".repeat(64));
        let image: ImageRecord = serde_json::from_value(json!({
            "digest": digest, "references": [], "size_bytes": 1, "used_bytes": 1, "created_at": 1, "source": "test",
        }))
        .unwrap();
        let kernel = serde_json::from_value(json!({
            "id": "b".repeat(12), "release": "6.1", "source": "test", "created_at": 1, "default": true,
        }))
        .unwrap();
        store.images().put(image).await.unwrap();
        store.kernels().put(kernel).await.unwrap();
        let spec = serde_json::from_value(json!({
            "name": format!("vm{number}"), "image_reference": "a", "image": digest, "kernel": "b".repeat(12),
            "cpus": 1, "memory_mib": 64, "disk_bytes": 1, "network": "nat", "labels": {}, "owner": null,
            "restart": "no", "idle_stop_seconds": null, "expires_at": null,
        }))
        .unwrap();
        let id: VmId = format!("{number:012x}").parse().unwrap();
        let record = VmRecord {
            id: id.clone(),
            spec,
            address: None,
            created_at: 1,
            complete: true,
            wanted_running: false,
            failure: None,
        };
        store.vms().insert(record).await.unwrap();
        id
    }

    fn set(vm: Option<&VmId>, key: &str, value: &[u8]) -> StateChange {
        StateChange { vm: vm.cloned(), key: key.to_owned(), value: Some(value.to_vec()) }
    }

    #[tokio::test]
    async fn a_plugin_comes_back_as_it_was_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir).await;
        let plugins = store.plugins();
        let (a, mut b) = (plugin("a"), plugin("b"));
        plugins.put(b.clone()).await.unwrap();
        plugins.put(a.clone()).await.unwrap();
        assert_eq!(plugins.list().await.unwrap(), [a.clone(), b.clone()]);
        b.digest = "sha256:02".to_owned();
        b.signature = Some(json!({ "state": "unsigned" }));
        plugins.put(b.clone()).await.unwrap();
        assert!(plugins.set_enabled("b", false).await.unwrap());
        assert!(plugins.set_config("b", &json!({})).await.unwrap());
        plugins.set_order(&["b".to_owned(), "gone".to_owned(), "a".to_owned()]).await.unwrap();
        let listed = plugins.list().await.unwrap();
        assert_eq!((listed[0].position, listed[1].position), (Some(2), Some(0)));
        assert_eq!((&listed[0].signature, &listed[1].signature), (&None, &b.signature));
        assert_eq!(
            (listed[1].enabled, &listed[1].config, &*listed[1].digest),
            (false, &json!({}), "sha256:02")
        );
        assert!(plugins.delete("b").await.unwrap() && !plugins.delete("b").await.unwrap());
        assert!(!plugins.set_enabled("b", true).await.unwrap());
    }

    #[tokio::test]
    async fn failures_stay_until_they_are_forgiven_or_their_plugin_goes() {
        let dir = tempfile::tempdir().unwrap();
        let first = store(&dir).await;
        let failed = |failures| PluginFailures { failures, last: format!("the {failures}th") };
        first.plugins().set_failures("a", Some(failed(5))).await.unwrap();
        first.plugins().put(plugin("a")).await.unwrap();
        assert_eq!(first.plugins().failures("a").await.unwrap(), None, "it was not there when it failed");
        for number in [5, 6] {
            first.plugins().set_failures("a", Some(failed(number))).await.unwrap();
        }
        // Another version or configuration is no pardon by itself.
        first.plugins().put(PluginRecord { config: json!({}), ..plugin("a") }).await.unwrap();
        drop(first);
        let second = store(&dir).await;
        assert_eq!(second.plugins().failures("a").await.unwrap(), Some(failed(6)));
        second.plugins().set_failures("a", None).await.unwrap();
        assert_eq!(second.plugins().failures("a").await.unwrap(), None);
        second.plugins().set_failures("a", Some(failed(5))).await.unwrap();
        second.plugins().delete("a").await.unwrap();
        second.plugins().put(plugin("a")).await.unwrap();
        assert_eq!(second.plugins().failures("a").await.unwrap(), None);
    }

    #[tokio::test]
    async fn state_goes_with_its_vm_and_with_its_plugin() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir).await;
        let (plugins, one, two) = (store.plugins(), vm(&store, 1).await, vm(&store, 2).await);
        for name in ["a", "b"] {
            plugins.put(plugin(name)).await.unwrap();
            let changes = [set(None, "k", b"own"), set(Some(&one), "k", b"1"), set(Some(&two), "k", b"22")];
            plugins.change_state(name, &changes).await.unwrap();
        }
        assert!(store.vms().delete(&one).await.unwrap());
        assert_eq!(plugins.state("a", Some(&one), "k").await.unwrap(), None);
        assert_eq!(plugins.state("a", Some(&two), "k").await.unwrap(), Some(b"22".to_vec()));
        assert_eq!(plugins.state("b", None, "k").await.unwrap(), Some(b"own".to_vec()));
        // A call that was on its way leaves nothing behind.
        plugins.change_state("a", &[set(Some(&one), "late", b"1"), set(None, "kept", b"1")]).await.unwrap();
        assert_eq!(plugins.state_sizes("a", Some(&one)).await.unwrap(), BTreeMap::new());
        assert_eq!(plugins.state_sizes("a", None).await.unwrap().len(), 2);

        plugins.delete("a").await.unwrap();
        plugins.change_state("a", &[set(None, "late", b"1")]).await.unwrap();
        plugins.put(plugin("a")).await.unwrap();
        assert_eq!(plugins.state_sizes("a", None).await.unwrap(), BTreeMap::new());
        assert_eq!(plugins.state_sizes("b", Some(&two)).await.unwrap(), [("k".to_owned(), 2)].into());
    }

    #[tokio::test]
    async fn another_version_of_a_plugin_finds_its_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir).await;
        let plugins = store.plugins();
        plugins.put(plugin("a")).await.unwrap();
        let mut changes = vec![set(None, "k", b"1"), set(None, "gone", b"1")];
        plugins.change_state("a", &changes).await.unwrap();
        changes[1].value = None;
        plugins.change_state("a", &changes).await.unwrap();
        plugins.put(PluginRecord { digest: "sha256:02".to_owned(), ..plugin("a") }).await.unwrap();
        assert_eq!(plugins.state_sizes("a", None).await.unwrap(), [("k".to_owned(), 1)].into());
    }
}
