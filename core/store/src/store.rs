//! The thread that owns the connection, and the handle to it.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use crate::{Builds, Images, Kernels, Meta, Plugins, StoreError, Vms, Workspaces, migrations, rows::doing};

/// How long another process may hold the database before a statement fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests that may wait; beyond that callers wait to send.
const QUEUE: usize = 64;
/// Statements that stay prepared: more than this crate has.
const STATEMENTS: usize = 64;

type Request = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle to the store. Clones share one connection; the last one dropped closes it.
#[derive(Debug, Clone)]
pub struct Store {
    requests: mpsc::Sender<Request>,
}

impl Store {
    /// Opens the database, making it (mode 0600) and bringing its schema up to date as needed. Blocks
    /// for a few file operations: meant for a daemon's start.
    ///
    /// # Errors
    /// The file cannot be opened, is damaged, or belongs to another program.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = open(path)?;
        let (requests, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || serve(connection, queue))
            .map_err(|source| StoreError::Thread { source })?;
        Ok(Self { requests })
    }

    /// The VMs.
    pub fn vms(&self) -> Vms<'_> {
        Vms(self)
    }

    /// The image catalogue.
    pub fn images(&self) -> Images<'_> {
        Images(self)
    }

    /// The kernel catalogue.
    pub fn kernels(&self) -> Kernels<'_> {
        Kernels(self)
    }

    /// What steps of builds have made.
    pub fn builds(&self) -> Builds<'_> {
        Builds(self)
    }

    /// The installed plugins.
    pub fn plugins(&self) -> Plugins<'_> {
        Plugins(self)
    }

    /// The workspaces in VMs.
    pub fn workspaces(&self) -> Workspaces<'_> {
        Workspaces(self)
    }

    /// Facts about the daemon itself.
    pub fn meta(&self) -> Meta<'_> {
        Meta(self)
    }

    /// Runs `work` in one transaction that commits if it returns `Ok`. Not undone by dropping the future: a request that was
    /// accepted by the queue is carried out.
    pub(crate) async fn transaction<R: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Transaction<'_>) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let (reply, answer) = oneshot::channel();
        let request: Request = Box::new(move |connection| {
            let run = |connection: &mut Connection| {
                // Immediate: the write lock is taken at the start, where waiting for it is safe.
                let transaction = connection
                    .transaction_with_behavior(TransactionBehavior::Immediate)
                    .map_err(doing(action))?;
                let result = work(&transaction)?;
                transaction.commit().map_err(doing(action))?;
                Ok(result)
            };
            // Nobody listening any more is fine.
            let _ = reply.send(run(connection));
        });
        self.requests.send(request).await.map_err(|_| StoreError::Gone)?;
        answer.await.map_err(|_| StoreError::Gone)?
    }
}

/// Runs requests until every handle is gone. A panic costs its own request only: the transaction rolled back when it was unwound.
fn serve(mut connection: Connection, mut queue: mpsc::Receiver<Request>) {
    while let Some(request) = queue.blocking_recv() {
        if catch_unwind(AssertUnwindSafe(|| request(&mut connection))).is_err() {
            tracing::error!("a request to the store panicked");
        }
    }
}

fn open(path: &Path) -> Result<Connection, StoreError> {
    // SQLite would make the file with the umask's permissions.
    let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let connection =
        Connection::open(path).map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    prepare(connection, path).map_err(|error| classify(error, path))
}

fn prepare(mut connection: Connection, path: &Path) -> Result<Connection, StoreError> {
    let action = "prepare the database";
    connection.busy_timeout(BUSY_TIMEOUT).map_err(doing(action))?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    let id: i32 =
        connection.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(doing(action))?;
    if id != 0 && id != migrations::APPLICATION_ID {
        return Err(StoreError::NotOurs { path: path.to_owned(), application_id: id });
    }
    // The database is small: looking at all of it now beats finding damage half way through a start.
    let check: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(doing(action))?;
    if check != "ok" {
        return Err(StoreError::Corrupt { path: path.to_owned(), detail: check });
    }
    connection.pragma_update(None, "journal_mode", "WAL").map_err(doing(action))?;
    // In WAL mode FULL is what makes a commit outlast a power cut; writes are rare here.
    connection.pragma_update(None, "synchronous", "FULL").map_err(doing(action))?;
    migrations::migrate(&mut connection, path)?;
    connection.pragma_update(None, "foreign_keys", true).map_err(doing(action))?;
    if id == 0 {
        connection
            .pragma_update(None, "application_id", migrations::APPLICATION_ID)
            .map_err(doing(action))?;
    }
    Ok(connection)
}

/// Tells damage and files that cannot be opened from other failures while opening.
fn classify(error: StoreError, path: &Path) -> StoreError {
    let StoreError::Query { source, action } = error else { return error };
    match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Corrupt { path: path.to_owned(), detail: source.to_string() }
        }
        Some(
            ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::DiskFull,
        ) => StoreError::Open { path: path.to_owned(), source },
        _ => StoreError::Query { source, action },
    }
}
