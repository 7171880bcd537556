//! The image catalogue.

use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use vm_types::{
    ImageDigest, KernelId, VmName,
    image::{ImageConfig, ImageOrigin, ImageRecord, RegisteredFile},
};

use crate::{
    Store, StoreError,
    rows::{beyond, doing, from_json, is_hex_prefix, parse, to_i64, to_json, to_u64},
};

const READ: &str = "read images";

/// What nothing is looked up by; a column of JSON.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Details {
    config: ImageConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<ImageOrigin>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registered: Option<RegisteredFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<KernelId>,
}

/// Images and the references they go by.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a>(pub(crate) &'a Store);

impl Images<'_> {
    /// Adds an image, or updates the one with this digest. Its references are added to those it
    /// has; one that another image had moves here.
    ///
    /// # Errors
    /// The database failing.
    pub async fn put(&self, image: ImageRecord) -> Result<(), StoreError> {
        const ACTION: &str = "add an image";
        let details = Details {
            config: image.config,
            origin: image.origin,
            registered: image.registered,
            kernel: image.kernel,
        };
        let details = to_json("images.details", &details)?;
        self.0
            .transaction(ACTION, move |t| {
                t.execute(
                    "INSERT INTO images (digest, size_bytes, used_bytes, created_at, source, details)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                     ON CONFLICT (digest) DO UPDATE SET size_bytes = excluded.size_bytes,
                        used_bytes = excluded.used_bytes, source = excluded.source, details = excluded.details",
                    params![
                        image.digest.as_str(),
                        to_i64(image.size_bytes),
                        to_i64(image.used_bytes),
                        to_i64(image.created_at),
                        image.source,
                        details
                    ],
                )
                .map_err(doing(ACTION))?;
                for reference in &image.references {
                    t.execute(
                        "INSERT INTO image_references (reference, digest) VALUES (?1, ?2)
                         ON CONFLICT (reference) DO UPDATE SET digest = excluded.digest",
                        params![reference, image.digest.as_str()],
                    )
                    .map_err(doing(ACTION))?;
                }
                Ok(())
            })
            .await
    }

    /// The image a reference names now.
    ///
    /// # Errors
    /// The database failing.
    pub async fn by_reference(&self, reference: &str) -> Result<Option<ImageRecord>, StoreError> {
        let reference = reference.to_owned();
        self.0
            .transaction(READ, move |t| {
                let digest: Option<String> = t
                    .query_row(
                        "SELECT digest FROM image_references WHERE reference = ?1",
                        [reference],
                        |row| row.get(0),
                    )
                    .optional()
                    .map_err(doing(READ))?;
                match digest {
                    Some(digest) => Ok(select(t, "digest = ?1", &[&digest])?.pop()),
                    None => Ok(None),
                }
            })
            .await
    }

    /// The image of a digest, with or without `sha256:`, or of a unique beginning of one. A text that can be no digest
    /// finds nothing.
    ///
    /// # Errors
    /// [`StoreError::Ambiguous`], or the database failing.
    pub async fn by_digest(&self, prefix: &str) -> Result<Option<ImageRecord>, StoreError> {
        let hex = prefix.strip_prefix("sha256:").unwrap_or(prefix).to_owned();
        if !is_hex_prefix(&hex) {
            return Ok(None);
        }
        self.0
            .transaction(READ, move |t| {
                let (from, to) = (format!("sha256:{hex}"), format!("sha256:{}", beyond(&hex)));
                let mut found = select(t, "digest >= ?1 AND digest < ?2", &[&from, &to])?;
                if found.len() > 1 {
                    let matches = found.iter().map(|image| image.digest.short().to_owned()).collect();
                    return Err(StoreError::Ambiguous { what: "image", given: hex, matches });
                }
                Ok(found.pop())
            })
            .await
    }

    /// All images, the newest first.
    ///
    /// # Errors
    /// The database failing.
    pub async fn list(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.0.transaction(READ, |t| select(t, "TRUE", &[])).await
    }

    /// Takes one reference away; the image stays. Tells whether there was one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn untag(&self, reference: &str) -> Result<bool, StoreError> {
        const ACTION: &str = "remove a reference";
        let reference = reference.to_owned();
        self.0
            .transaction(ACTION, move |t| {
                t.execute("DELETE FROM image_references WHERE reference = ?1", [reference])
                    .map(|count| count > 0)
                    .map_err(doing(ACTION))
            })
            .await
    }

    /// Removes an image with its references.
    ///
    /// # Errors
    /// [`StoreError::ImageInUse`], [`StoreError::NoSuchImage`], or the database failing.
    pub async fn delete(&self, digest: &ImageDigest) -> Result<(), StoreError> {
        const ACTION: &str = "delete an image";
        let digest = digest.clone();
        self.0
            .transaction(ACTION, move |t| {
                let vms = users(t, "SELECT name FROM vms WHERE image = ?1 ORDER BY name", digest.as_str())?;
                if !vms.is_empty() {
                    return Err(StoreError::ImageInUse { digest, vms });
                }
                match t.execute("DELETE FROM images WHERE digest = ?1", [digest.as_str()]) {
                    Ok(0) => Err(StoreError::NoSuchImage { digest }),
                    Ok(_) => Ok(()),
                    Err(source) => Err(StoreError::Query { action: ACTION, source }),
                }
            })
            .await
    }
}

/// Names of the VMs that a statement with one parameter finds.
pub(crate) fn users(t: &Transaction<'_>, statement: &str, key: &str) -> Result<Vec<VmName>, StoreError> {
    const ACTION: &str = "look for VMs in use of it";
    let mut statement = t.prepare_cached(statement).map_err(doing(ACTION))?;
    let names = statement.query_map([key], |row| row.get::<_, String>(0)).map_err(doing(ACTION))?;
    names.map(|name| parse("vms.name", name.map_err(doing(ACTION))?)).collect()
}

fn select(
    t: &Transaction<'_>,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<ImageRecord>, StoreError> {
    let text = format!(
        "SELECT digest, size_bytes, used_bytes, created_at, source, details FROM images WHERE {condition}
         ORDER BY created_at DESC, digest"
    );
    let mut statement = t.prepare_cached(&text).map_err(doing(READ))?;
    let mut rows = statement.query(values).map_err(doing(READ))?;
    let mut images = Vec::new();
    while let Some(row) = rows.next().map_err(doing(READ))? {
        images.push(image(t, row)?);
    }
    Ok(images)
}

fn image(t: &Transaction<'_>, row: &Row<'_>) -> Result<ImageRecord, StoreError> {
    let digest: String = row.get(0).map_err(doing(READ))?;
    let mut statement = t
        .prepare_cached("SELECT reference FROM image_references WHERE digest = ?1 ORDER BY reference")
        .map_err(doing(READ))?;
    let references = statement
        .query_map([&digest], |row| row.get(0))
        .and_then(Iterator::collect::<Result<Vec<String>, _>>)
        .map_err(doing(READ))?;
    let details: Details = from_json("images.details", row.get(5).map_err(doing(READ))?)?;
    Ok(ImageRecord {
        digest: parse("images.digest", digest)?,
        references,
        size_bytes: to_u64(row.get(1).map_err(doing(READ))?),
        used_bytes: to_u64(row.get(2).map_err(doing(READ))?),
        created_at: to_u64(row.get(3).map_err(doing(READ))?),
        source: row.get(4).map_err(doing(READ))?,
        config: details.config,
        origin: details.origin,
        registered: details.registered,
        kernel: details.kernel,
    })
}
