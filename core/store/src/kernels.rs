//! The kernel catalogue.

use rusqlite::{Transaction, params};
use vm_types::{KernelId, image::KernelRecord};

use crate::{
    Store, StoreError,
    images::users,
    rows::{beyond, doing, is_hex_prefix, parse, to_i64, to_u64},
};

const READ: &str = "read kernels";

/// Kernels; at most one of them is the default.
#[derive(Debug, Clone, Copy)]
pub struct Kernels<'a>(pub(crate) &'a Store);

impl Kernels<'_> {
    /// Adds a kernel or updates the one with this id. One that says it is the default becomes so; one that does not, but
    /// is the default already, stays so. One that was brought by an image and by something else is not the image's.
    ///
    /// # Errors
    /// The database failing.
    pub async fn put(&self, kernel: KernelRecord) -> Result<(), StoreError> {
        const ACTION: &str = "add a kernel";
        self.0
            .transaction(ACTION, move |t| {
                t.execute(
                    "INSERT INTO kernels (id, release, source, created_at, of_image) VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT (id) DO UPDATE SET release = excluded.release, source = excluded.source,
                         of_image = min(of_image, excluded.of_image)",
                    params![
                        kernel.id.as_str(),
                        kernel.release,
                        kernel.source,
                        to_i64(kernel.created_at),
                        kernel.of_image
                    ],
                )
                .map_err(doing(ACTION))?;
                if kernel.default { make_default(t, &kernel.id) } else { Ok(()) }
            })
            .await
    }

    /// The kernel of an id, of a unique beginning of one, or of a release that only one kernel has.
    ///
    /// # Errors
    /// [`StoreError::Ambiguous`], or the database failing.
    pub async fn get(&self, what: &str) -> Result<Option<KernelRecord>, StoreError> {
        let what = what.to_owned();
        self.0
            .transaction(READ, move |t| {
                // A release never looks like an id's beginning: it has dots.
                let mut found = if is_hex_prefix(&what) {
                    select(t, "id >= ?1 AND id < ?2", &[&what, &beyond(&what)])?
                } else {
                    select(t, "release = ?1", &[&what])?
                };
                if found.len() > 1 {
                    let matches = found.iter().map(|kernel| kernel.id.to_string()).collect();
                    return Err(StoreError::Ambiguous { what: "kernel", given: what, matches });
                }
                Ok(found.pop())
            })
            .await
    }

    /// The kernel for VMs that name none.
    ///
    /// # Errors
    /// The database failing.
    pub async fn default(&self) -> Result<Option<KernelRecord>, StoreError> {
        self.0.transaction(READ, |t| Ok(select(t, "is_default = 1", &[])?.pop())).await
    }

    /// Makes a kernel the default instead of the present one.
    ///
    /// # Errors
    /// [`StoreError::NoSuchKernel`], or the database failing.
    pub async fn set_default(&self, id: &KernelId) -> Result<(), StoreError> {
        let id = id.clone();
        self.0.transaction("set the default kernel", move |t| make_default(t, &id)).await
    }

    /// All kernels, the newest first.
    ///
    /// # Errors
    /// The database failing.
    pub async fn list(&self) -> Result<Vec<KernelRecord>, StoreError> {
        self.0.transaction(READ, |t| select(t, "TRUE", &[])).await
    }

    /// Removes a kernel.
    ///
    /// # Errors
    /// [`StoreError::KernelInUse`], [`StoreError::NoSuchKernel`], or the database failing.
    pub async fn delete(&self, id: &KernelId) -> Result<(), StoreError> {
        const ACTION: &str = "delete a kernel";
        let id = id.clone();
        self.0
            .transaction(ACTION, move |t| {
                let vms = users(t, "SELECT name FROM vms WHERE kernel = ?1 ORDER BY name", id.as_str())?;
                if !vms.is_empty() {
                    return Err(StoreError::KernelInUse { id, vms });
                }
                match t.execute("DELETE FROM kernels WHERE id = ?1", [id.as_str()]) {
                    Ok(0) => Err(StoreError::NoSuchKernel { id }),
                    Ok(_) => Ok(()),
                    Err(source) => Err(StoreError::Query { action: ACTION, source }),
                }
            })
            .await
    }
}

fn make_default(t: &Transaction<'_>, id: &KernelId) -> Result<(), StoreError> {
    const ACTION: &str = "set the default kernel";
    t.execute("UPDATE kernels SET is_default = 0 WHERE is_default = 1", []).map_err(doing(ACTION))?;
    match t.execute("UPDATE kernels SET is_default = 1 WHERE id = ?1", [id.as_str()]) {
        Ok(0) => Err(StoreError::NoSuchKernel { id: id.clone() }),
        Ok(_) => Ok(()),
        Err(source) => Err(StoreError::Query { action: ACTION, source }),
    }
}

fn select(
    t: &Transaction<'_>,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<KernelRecord>, StoreError> {
    let text = format!(
        "SELECT id, release, source, created_at, is_default, of_image FROM kernels WHERE {condition}
         ORDER BY created_at DESC, id"
    );
    let mut statement = t.prepare_cached(&text).map_err(doing(READ))?;
    let mut rows = statement.query(values).map_err(doing(READ))?;
    let mut kernels = Vec::new();
    while let Some(row) = rows.next().map_err(doing(READ))? {
        kernels.push(KernelRecord {
            id: parse("kernels.id", row.get(0).map_err(doing(READ))?)?,
            release: row.get(1).map_err(doing(READ))?,
            source: row.get(2).map_err(doing(READ))?,
            created_at: to_u64(row.get(3).map_err(doing(READ))?),
            default: row.get(4).map_err(doing(READ))?,
            of_image: row.get(5).map_err(doing(READ))?,
        });
    }
    Ok(kernels)
}
