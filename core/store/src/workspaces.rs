//! The workspaces that were brought into VMs. They go with their VM.

use rusqlite::{OptionalExtension, params};
use vm_types::{VmId, workspace::WorkspaceRecord};

use crate::{
    Store, StoreError,
    rows::{doing, from_json, to_json},
};

const READ: &str = "read workspaces";

/// Workspaces, by VM and directory in it.
#[derive(Debug, Clone, Copy)]
pub struct Workspaces<'a>(pub(crate) &'a Store);

impl Workspaces<'_> {
    /// Records a workspace in place of what was recorded of its directory.
    ///
    /// # Errors
    /// [`StoreError::NoSuchVm`], or the database failing.
    pub async fn put(&self, vm: &VmId, workspace: WorkspaceRecord) -> Result<(), StoreError> {
        const ACTION: &str = "record a workspace";
        let vm = vm.clone();
        let details = to_json("workspaces.details", &workspace)?;
        self.0
            .transaction(ACTION, move |t| {
                let known: bool = t
                    .query_row("SELECT EXISTS (SELECT 1 FROM vms WHERE id = ?1)", [vm.as_str()], |row| {
                        row.get(0)
                    })
                    .map_err(doing(ACTION))?;
                if !known {
                    return Err(StoreError::NoSuchVm { id: vm });
                }
                t.execute(
                    "INSERT INTO workspaces (vm, path, details) VALUES (?1, ?2, ?3)
                     ON CONFLICT (vm, path) DO UPDATE SET details = excluded.details",
                    params![vm.as_str(), workspace.path, details],
                )
                .map_err(doing(ACTION))?;
                Ok(())
            })
            .await
    }

    /// The workspace in a directory of a VM.
    ///
    /// # Errors
    /// The database failing.
    pub async fn get(&self, vm: &VmId, path: &str) -> Result<Option<WorkspaceRecord>, StoreError> {
        let (vm, path) = (vm.clone(), path.to_owned());
        self.0
            .transaction(READ, move |t| {
                let details: Option<String> = t
                    .query_row(
                        "SELECT details FROM workspaces WHERE vm = ?1 AND path = ?2",
                        params![vm.as_str(), path],
                        |row| row.get(0),
                    )
                    .optional()
                    .map_err(doing(READ))?;
                details.map(|details| from_json("workspaces.details", details)).transpose()
            })
            .await
    }

    /// All of a VM, by directory.
    ///
    /// # Errors
    /// The database failing.
    pub async fn of(&self, vm: &VmId) -> Result<Vec<WorkspaceRecord>, StoreError> {
        let vm = vm.clone();
        self.0
            .transaction(READ, move |t| {
                let mut statement = t
                    .prepare_cached("SELECT details FROM workspaces WHERE vm = ?1 ORDER BY path")
                    .map_err(doing(READ))?;
                let rows = statement.query_map([vm.as_str()], |row| row.get(0)).map_err(doing(READ))?;
                rows.map(|details| from_json("workspaces.details", details.map_err(doing(READ))?)).collect()
            })
            .await
    }
}
