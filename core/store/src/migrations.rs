//! The schema and its history.
//!
//! Policy: **additive only**. A migration may add tables, indexes, columns that are nullable or have a default, and triggers that
//! write to tables of its own; it never renames, drops or reinterprets. Hence an older daemon works on a newer database (its
//! statements name their columns), and `user_version` beyond our own is no error. What cannot be
//! done additively goes to a new database file. Migrations are never edited once released.

use std::path::Path;

use rusqlite::Connection;
use rusqlite_migration::{M, Migrations};

use crate::StoreError;

/// `PRAGMA application_id` of our databases: "vmd" and a zero byte.
pub(crate) const APPLICATION_ID: i32 = 0x766d_6400;

const STEPS: &[M<'static>] = &[
    M::up(
        "CREATE TABLE meta (
        key   TEXT PRIMARY KEY NOT NULL,
        value TEXT NOT NULL
    ) STRICT;

    CREATE TABLE images (
        digest     TEXT PRIMARY KEY NOT NULL,
        size_bytes INTEGER NOT NULL,
        used_bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        source     TEXT NOT NULL
    ) STRICT;

    CREATE TABLE image_references (
        reference TEXT PRIMARY KEY NOT NULL,
        digest    TEXT NOT NULL REFERENCES images(digest) ON DELETE CASCADE
    ) STRICT;
    CREATE INDEX image_references_digest ON image_references(digest);

    CREATE TABLE kernels (
        id         TEXT PRIMARY KEY NOT NULL,
        release    TEXT NOT NULL,
        source     TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        is_default INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE UNIQUE INDEX kernels_one_default ON kernels(is_default) WHERE is_default = 1;

    CREATE TABLE vms (
        id             TEXT PRIMARY KEY NOT NULL,
        name           TEXT NOT NULL,
        image          TEXT NOT NULL REFERENCES images(digest),
        kernel         TEXT NOT NULL REFERENCES kernels(id),
        spec           TEXT NOT NULL,
        address        TEXT,
        created_at     INTEGER NOT NULL,
        complete       INTEGER NOT NULL DEFAULT 0,
        wanted_running INTEGER NOT NULL DEFAULT 0,
        failed_at      TEXT,
        failure        TEXT
    ) STRICT;
    CREATE UNIQUE INDEX vms_name ON vms(name);
    CREATE UNIQUE INDEX vms_address ON vms(address) WHERE address IS NOT NULL;
    CREATE INDEX vms_image ON vms(image);
    CREATE INDEX vms_kernel ON vms(kernel);",
    ),
    M::up(
        "CREATE TABLE plugins (
        name         TEXT PRIMARY KEY NOT NULL,
        digest       TEXT NOT NULL,
        files        TEXT NOT NULL,
        source       TEXT NOT NULL,
        enabled      INTEGER NOT NULL DEFAULT 1,
        granted      TEXT NOT NULL,
        config       TEXT NOT NULL,
        position     INTEGER,
        installed_at INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE plugin_state (
        plugin TEXT NOT NULL REFERENCES plugins(name) ON DELETE CASCADE,
        vm     TEXT NOT NULL,
        key    TEXT NOT NULL,
        value  BLOB NOT NULL,
        PRIMARY KEY (plugin, vm, key)
    ) STRICT;
    CREATE INDEX plugin_state_vm ON plugin_state(vm);

    -- Whoever deletes a VM, also a daemon that knows of no plugins, deletes what they kept for it.
    CREATE TRIGGER plugin_state_of_vm AFTER DELETE ON vms
    BEGIN
        DELETE FROM plugin_state WHERE vm = OLD.id;
    END;",
    ),
    // What was found when it was installed; a column of JSON, empty for those that were installed before.
    M::up("ALTER TABLE plugins ADD COLUMN signature TEXT;"),
    M::up(
        "CREATE TABLE plugin_failures (
        plugin   TEXT PRIMARY KEY NOT NULL REFERENCES plugins(name) ON DELETE CASCADE,
        failures INTEGER NOT NULL,
        last     TEXT NOT NULL
    ) STRICT;",
    ),
    // A column of JSON: what nothing is looked up by.
    M::up("ALTER TABLE images ADD COLUMN details TEXT NOT NULL DEFAULT '{}';"),
    M::up(
        "CREATE TABLE workspaces (
        vm      TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        path    TEXT NOT NULL,
        details TEXT NOT NULL,
        PRIMARY KEY (vm, path)
    ) STRICT;",
    ),
    M::up(
        "CREATE TABLE build_steps (
        key   TEXT PRIMARY KEY NOT NULL,
        step  TEXT NOT NULL
    ) STRICT;",
    ),
    M::up("ALTER TABLE kernels ADD COLUMN of_image INTEGER NOT NULL DEFAULT 0;"),
];

/// Brings a database up to our schema; one that is beyond it is left alone.
pub(crate) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let query = |source| StoreError::Query { action: "read the schema version", source };
    let version: u32 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(query)?;
    if usize::try_from(version).is_ok_and(|version| version > STEPS.len()) {
        tracing::info!(version, ours = STEPS.len(), "the database was written by a newer daemon");
        return Ok(());
    }
    Migrations::from_slice(STEPS)
        .to_latest(connection)
        .map_err(|source| StoreError::Migrate { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_is_valid_sql() {
        Migrations::from_slice(STEPS).validate().unwrap();
    }
}
