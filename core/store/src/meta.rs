//! Facts about the daemon itself that must outlive it.

use rusqlite::{OptionalExtension, Transaction};

use crate::{Store, StoreError, rows::doing};

/// Key of the daemon's [`vm_types::InstanceId`].
pub const INSTANCE_ID: &str = "instance_id";
/// Key of the subnet the daemon chose for its bridge, e.g. `10.213.0.0/24`.
pub const SUBNET: &str = "subnet";

/// Key and value.
#[derive(Debug, Clone, Copy)]
pub struct Meta<'a>(pub(crate) &'a Store);

impl Meta<'_> {
    /// What is kept under a key.
    ///
    /// # Errors
    /// The database failing.
    pub async fn get(&self, key: &str) -> Result<Option<String>, StoreError> {
        let key = key.to_owned();
        self.0.transaction("read a setting", move |t| read(t, &key)).await
    }

    /// Keeps a value, replacing an older one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn set(&self, key: &str, value: &str) -> Result<(), StoreError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.0.transaction("keep a setting", move |t| write(t, &key, &value)).await
    }

    /// Keeps `value` unless there is one already; returns the one that holds.
    ///
    /// # Errors
    /// The database failing.
    pub async fn get_or_set(&self, key: &str, value: &str) -> Result<String, StoreError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.0
            .transaction("keep a setting", move |t| {
                if let Some(present) = read(t, &key)? {
                    return Ok(present);
                }
                write(t, &key, &value)?;
                Ok(value)
            })
            .await
    }
}

fn read(t: &Transaction<'_>, key: &str) -> Result<Option<String>, StoreError> {
    t.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
        .optional()
        .map_err(doing("read a setting"))
}

fn write(t: &Transaction<'_>, key: &str, value: &str) -> Result<(), StoreError> {
    let statement = "INSERT INTO meta (key, value) VALUES (?1, ?2)
                     ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    t.execute(statement, [key, value]).map(|_| ()).map_err(doing("keep a setting"))
}
