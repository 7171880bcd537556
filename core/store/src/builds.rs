//! What steps of image builds have made, by what they were made of: a build that comes to such a step again need not do it.

use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use vm_types::image::ImageLayer;

use crate::{
    Store, StoreError,
    rows::{doing, from_json, to_json},
};

/// What one step has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildStep {
    /// Absent where it has changed nothing.
    pub layer: Option<ImageLayer>,
    /// When, RFC 3339.
    pub made_at: String,
}

/// Steps by their keys.
#[derive(Debug, Clone, Copy)]
pub struct Builds<'a>(pub(crate) &'a Store);

impl Builds<'_> {
    /// What a step has made.
    ///
    /// # Errors
    /// The database failing.
    pub async fn get(&self, key: &str) -> Result<Option<BuildStep>, StoreError> {
        const ACTION: &str = "look for a step of a build";
        let key = key.to_owned();
        self.0
            .transaction(ACTION, move |t| {
                t.query_row("SELECT step FROM build_steps WHERE key = ?1", [key], |row| row.get(0))
                    .optional()
                    .map_err(doing(ACTION))?
                    .map(|text| from_json("build_steps.step", text))
                    .transpose()
            })
            .await
    }

    /// Keeps what a step has made; what it had made before is forgotten.
    ///
    /// # Errors
    /// The database failing.
    pub async fn put(&self, key: &str, step: &BuildStep) -> Result<(), StoreError> {
        const ACTION: &str = "keep a step of a build";
        let (key, step) = (key.to_owned(), to_json("build_steps.step", step)?);
        self.0
            .transaction(ACTION, move |t| {
                let statement = "INSERT INTO build_steps (key, step) VALUES (?1, ?2)
                                 ON CONFLICT (key) DO UPDATE SET step = excluded.step";
                t.execute(statement, params![key, step]).map(drop).map_err(doing(ACTION))
            })
            .await
    }

    /// All of them, with their keys.
    ///
    /// # Errors
    /// The database failing.
    pub async fn list(&self) -> Result<Vec<(String, BuildStep)>, StoreError> {
        const ACTION: &str = "list steps of builds";
        self.0
            .transaction(ACTION, |t| {
                let mut statement = t
                    .prepare_cached("SELECT key, step FROM build_steps ORDER BY key")
                    .map_err(doing(ACTION))?;
                let rows = statement
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                    .and_then(Iterator::collect::<Result<Vec<(String, String)>, _>>)
                    .map_err(doing(ACTION))?;
                rows.into_iter().map(|(key, step)| Ok((key, from_json("build_steps.step", step)?))).collect()
            })
            .await
    }

    /// Forgets some.
    ///
    /// # Errors
    /// The database failing.
    pub async fn forget(&self, keys: Vec<String>) -> Result<(), StoreError> {
        const ACTION: &str = "forget steps of builds";
        self.0
            .transaction(ACTION, move |t| {
                for key in keys {
                    t.execute("DELETE FROM build_steps WHERE key = ?1", [key]).map_err(doing(ACTION))?;
                }
                Ok(())
            })
            .await
    }
}
