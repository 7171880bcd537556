//! The VMs.

use std::net::Ipv4Addr;

use rusqlite::{Row, Transaction, params};
use vm_types::{
    VmId, VmName,
    vm::{FailedAt, VmRecord, VmSpec},
};

use crate::{
    Store, StoreError,
    rows::{breaks_unique, doing, parse, to_i64, to_u64},
};

const READ: &str = "read VMs";
const UPDATE: &str = "update a VM";

/// What VMs there should be.
#[derive(Debug, Clone, Copy)]
pub struct Vms<'a>(pub(crate) &'a Store);

impl Vms<'_> {
    /// Adds a VM. Its image and kernel must be in their catalogues.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::AddressTaken`], [`StoreError::NoSuchImage`],
    /// [`StoreError::NoSuchKernel`], or the database failing.
    pub async fn insert(&self, vm: VmRecord) -> Result<(), StoreError> {
        const ACTION: &str = "insert a VM";
        self.0
            .transaction(ACTION, move |t| {
                check_catalogues(t, &vm.spec)?;
                let (failed_at, failure) = encode_failure(vm.failure)?;
                execute(
                    t,
                    "INSERT INTO vms (id, name, image, kernel, spec, address, created_at, complete,
                                      wanted_running, failed_at, failure)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                    params![
                        vm.id.as_str(),
                        vm.spec.name.as_str(),
                        vm.spec.image.as_str(),
                        vm.spec.kernel.as_str(),
                        encode_spec(&vm.spec)?,
                        vm.address.map(|address| address.to_string()),
                        to_i64(vm.created_at),
                        vm.complete,
                        vm.wanted_running,
                        failed_at,
                        failure
                    ],
                )
                .map_err(|source| explain(ACTION, source, Some(&vm.spec.name), vm.address))?;
                Ok(())
            })
            .await
    }

    /// The VM of an id.
    ///
    /// # Errors
    /// The database failing.
    pub async fn get(&self, id: &VmId) -> Result<Option<VmRecord>, StoreError> {
        let id = id.to_string();
        self.0.transaction(READ, move |t| Ok(select(t, "id = ?1", &[&id])?.pop())).await
    }

    /// The VM of a name.
    ///
    /// # Errors
    /// The database failing.
    pub async fn by_name(&self, name: &VmName) -> Result<Option<VmRecord>, StoreError> {
        let name = name.to_string();
        self.0.transaction(READ, move |t| Ok(select(t, "name = ?1", &[&name])?.pop())).await
    }

    /// All VMs, the oldest first.
    ///
    /// # Errors
    /// The database failing.
    pub async fn list(&self) -> Result<Vec<VmRecord>, StoreError> {
        self.0.transaction(READ, |t| select(t, "TRUE", &[])).await
    }

    /// Notes that the VM's disk and files were made.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_complete(&self, id: &VmId) -> Result<(), StoreError> {
        self.update(id, |t, id| execute(t, "UPDATE vms SET complete = 1 WHERE id = ?1", [id])).await
    }

    /// Notes that the VM is being taken apart: from now on nobody wants it to run, and it is to be removed, whatever happens.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_incomplete(&self, id: &VmId) -> Result<(), StoreError> {
        self.update(id, |t, id| {
            execute(t, "UPDATE vms SET complete = 0, wanted_running = 0 WHERE id = ?1", [id])
        })
        .await
    }

    /// Gives the VM an address, or takes it away.
    ///
    /// # Errors
    /// [`StoreError::AddressTaken`], [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_address(&self, id: &VmId, address: Option<Ipv4Addr>) -> Result<(), StoreError> {
        let text = address.map(|address| address.to_string());
        let statement = "UPDATE vms SET address = ?2 WHERE id = ?1";
        match self.update(id, move |t, id| execute(t, statement, params![id, text])).await {
            Err(StoreError::Query { action, source }) => Err(explain(action, source, None, address)),
            other => other,
        }
    }

    /// Notes whether somebody wants the VM to run.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_wanted_running(&self, id: &VmId, wanted: bool) -> Result<(), StoreError> {
        let statement = "UPDATE vms SET wanted_running = ?2 WHERE id = ?1";
        self.update(id, move |t, id| execute(t, statement, params![id, wanted])).await
    }

    /// Notes a failure, or with `None` that the last one is over.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_failure(
        &self,
        id: &VmId,
        failure: Option<(FailedAt, String)>,
    ) -> Result<(), StoreError> {
        let (failed_at, failure) = encode_failure(failure)?;
        let statement = "UPDATE vms SET failed_at = ?2, failure = ?3 WHERE id = ?1";
        self.update(id, move |t, id| execute(t, statement, params![id, failed_at, failure])).await
    }

    /// Notes in one transaction that the VM is up because somebody wants it: the last failure is over.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_started(&self, id: &VmId) -> Result<(), StoreError> {
        let statement = "UPDATE vms SET wanted_running = 1, failed_at = NULL, failure = NULL WHERE id = ?1";
        self.update(id, |t, id| execute(t, statement, [id])).await
    }

    /// Notes in one transaction that the VM has ended, whether somebody wants it to run nevertheless, and its failure if it ended by one.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn set_ended(
        &self,
        id: &VmId,
        wanted: bool,
        failure: Option<(FailedAt, String)>,
    ) -> Result<(), StoreError> {
        let (failed_at, failure) = encode_failure(failure)?;
        let statement = "UPDATE vms SET wanted_running = ?2, failed_at = ?3, failure = ?4 WHERE id = ?1";
        self.update(id, move |t, id| execute(t, statement, params![id, wanted, failed_at, failure])).await
    }

    /// Replaces the specification.
    ///
    /// # Errors
    /// As [`Vms::insert`], and [`StoreError::NoSuchVm`].
    pub async fn set_spec(&self, id: &VmId, spec: VmSpec) -> Result<(), StoreError> {
        let id = id.clone();
        self.0
            .transaction(UPDATE, move |t| {
                check_catalogues(t, &spec)?;
                let changed = execute(
                    t,
                    "UPDATE vms SET name = ?2, image = ?3, kernel = ?4, spec = ?5 WHERE id = ?1",
                    params![
                        id.as_str(),
                        spec.name.as_str(),
                        spec.image.as_str(),
                        spec.kernel.as_str(),
                        encode_spec(&spec)?
                    ],
                )
                .map_err(|source| explain(UPDATE, source, Some(&spec.name), None))?;
                if changed == 0 { Err(StoreError::NoSuchVm { id }) } else { Ok(()) }
            })
            .await
    }

    /// Forgets a VM. Tells whether there was one.
    ///
    /// # Errors
    /// The database failing.
    pub async fn delete(&self, id: &VmId) -> Result<bool, StoreError> {
        const ACTION: &str = "delete a VM";
        let id = id.to_string();
        self.0
            .transaction(ACTION, move |t| {
                let deleted = execute(t, "DELETE FROM vms WHERE id = ?1", [id]).map_err(doing(ACTION))?;
                Ok(deleted > 0)
            })
            .await
    }

    async fn update(
        &self,
        id: &VmId,
        change: impl FnOnce(&Transaction<'_>, &str) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<(), StoreError> {
        let id = id.clone();
        self.0
            .transaction(UPDATE, move |t| match change(t, id.as_str()).map_err(doing(UPDATE))? {
                0 => Err(StoreError::NoSuchVm { id }),
                _ => Ok(()),
            })
            .await
    }
}

/// Runs a statement that is prepared once in a connection's life.
fn execute(t: &Transaction<'_>, statement: &str, values: impl rusqlite::Params) -> rusqlite::Result<usize> {
    t.prepare_cached(statement)?.execute(values)
}

/// Foreign keys would refuse these too, but not say which one is missing.
fn check_catalogues(t: &Transaction<'_>, spec: &VmSpec) -> Result<(), StoreError> {
    let there = |statement: &str, key: &str| {
        t.prepare_cached(statement)
            .and_then(|mut s| s.exists([key]))
            .map_err(doing("look up image and kernel"))
    };
    if !there("SELECT 1 FROM images WHERE digest = ?1", spec.image.as_str())? {
        return Err(StoreError::NoSuchImage { digest: spec.image.clone() });
    }
    if !there("SELECT 1 FROM kernels WHERE id = ?1", spec.kernel.as_str())? {
        return Err(StoreError::NoSuchKernel { id: spec.kernel.clone() });
    }
    Ok(())
}

fn explain(
    action: &'static str,
    source: rusqlite::Error,
    name: Option<&VmName>,
    address: Option<Ipv4Addr>,
) -> StoreError {
    match (name, address) {
        (Some(name), _) if breaks_unique(&source, "vms.name") => StoreError::NameTaken { name: name.clone() },
        (_, Some(address)) if breaks_unique(&source, "vms.address") => StoreError::AddressTaken { address },
        _ => StoreError::Query { action, source },
    }
}

fn encode_spec(spec: &VmSpec) -> Result<String, StoreError> {
    serde_json::to_string(spec).map_err(|source| StoreError::Encode { what: "vms.spec", source })
}

fn encode_failure(
    failure: Option<(FailedAt, String)>,
) -> Result<(Option<String>, Option<String>), StoreError> {
    let Some((at, cause)) = failure else { return Ok((None, None)) };
    let at =
        serde_json::to_string(&at).map_err(|source| StoreError::Encode { what: "vms.failed_at", source })?;
    Ok((Some(at.trim_matches('"').to_owned()), Some(cause)))
}

fn select(
    t: &Transaction<'_>,
    condition: &str,
    values: &[&dyn rusqlite::ToSql],
) -> Result<Vec<VmRecord>, StoreError> {
    let text = format!(
        "SELECT id, spec, address, created_at, complete, wanted_running, failed_at, failure
         FROM vms WHERE {condition} ORDER BY created_at, name"
    );
    let mut statement = t.prepare_cached(&text).map_err(doing(READ))?;
    let mut rows = statement.query(values).map_err(doing(READ))?;
    let mut vms = Vec::new();
    while let Some(row) = rows.next().map_err(doing(READ))? {
        vms.push(vm(row)?);
    }
    Ok(vms)
}

fn vm(row: &Row<'_>) -> Result<VmRecord, StoreError> {
    let spec: String = row.get(1).map_err(doing(READ))?;
    let spec = serde_json::from_str(&spec).map_err(|error| StoreError::BadValue {
        what: "vms.spec",
        value: spec,
        source: Box::new(error),
    })?;
    let address: Option<String> = row.get(2).map_err(doing(READ))?;
    let failed_at: Option<String> = row.get(6).map_err(doing(READ))?;
    let cause: Option<String> = row.get(7).map_err(doing(READ))?;
    let failure = match failed_at {
        Some(text) => {
            let at = serde_json::from_value(serde_json::Value::String(text.clone())).map_err(|error| {
                StoreError::BadValue { what: "vms.failed_at", value: text, source: Box::new(error) }
            })?;
            Some((at, cause.unwrap_or_default()))
        }
        None => None,
    };
    Ok(VmRecord {
        id: parse("vms.id", row.get(0).map_err(doing(READ))?)?,
        spec,
        address: address.map(|text| parse("vms.address", text)).transpose()?,
        created_at: to_u64(row.get(3).map_err(doing(READ))?),
        complete: row.get(4).map_err(doing(READ))?,
        wanted_running: row.get(5).map_err(doing(READ))?,
        failure,
    })
}
