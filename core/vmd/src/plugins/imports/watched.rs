//! The guest as an importer has it: before it changes anything there, whoever watches is told, and where the destination has
//! something in it that nobody gave up, nothing is changed at all. That is not left to importers: what they begin counts as
//! theirs, and is thrown away by the next one.

use std::sync::Arc;

use jsonrpsee::core::async_trait;
use tokio::sync::OnceCell;
use vm_engine::ports::ImportWatch;
use vm_plugin::{
    PluginError,
    ports::{Blob, FileMode, GuestCommand, GuestOutput, Sandbox},
};

use super::super::sandbox::GuestFiles;

/// A guest whose first change is told of.
pub(super) struct Watched {
    guest: Arc<dyn GuestFiles>,
    watch: Arc<dyn ImportWatch>,
    destination: String,
    /// What is at the destination may be thrown away.
    replace: bool,
    /// Whether the destination has something in it that must stay; found out before anything is done in the guest.
    occupied: OnceCell<bool>,
    begun: OnceCell<()>,
}

impl Watched {
    pub(super) fn new(
        guest: Arc<dyn GuestFiles>,
        watch: Arc<dyn ImportWatch>,
        destination: &str,
        replace: bool,
    ) -> Self {
        let (occupied, begun) = (OnceCell::new(), OnceCell::new());
        Self { guest, watch, destination: destination.to_owned(), replace, occupied, begun }
    }

    /// Whether there is something at the destination that must stay.
    async fn occupied(&self) -> Result<bool, PluginError> {
        let look = || async { Ok(!self.replace && !self.guest.is_empty(&self.destination).await?) };
        self.occupied.get_or_try_init(look).await.copied()
    }

    /// The guest, to be changed.
    async fn to_change(&self) -> Result<&dyn GuestFiles, PluginError> {
        if self.occupied().await? {
            // In the words that the SDK has for importers that ask themselves.
            let message =
                format!("{} in the guest is not empty, and nobody knows what is in it", self.destination);
            return Err(PluginError::new("workspace.destination-not-empty", message)
                .hint("name another place, or have all that is in it thrown away: --replace"));
        }
        self.begin().await
    }

    /// The guest, whoever watches having been told.
    async fn begin(&self) -> Result<&dyn GuestFiles, PluginError> {
        let begin = || async {
            let begun = self.watch.begins().await;
            begun.map_err(|failure| PluginError {
                hint: failure.hint,
                ..PluginError::new(&failure.code, failure.message)
            })
        };
        self.begun.get_or_try_init(begin).await?;
        Ok(&*self.guest)
    }
}

#[async_trait]
impl Sandbox for Watched {
    async fn run(&self, command: GuestCommand, output_limit: usize) -> Result<GuestOutput, PluginError> {
        // Nobody knows what it does. Where the destination is somebody's, it is no beginning: what is there is not given up.
        let guest = if self.occupied().await? { &*self.guest } else { self.begin().await? };
        guest.run(command, output_limit).await
    }

    async fn write_file(
        &self,
        path: &str,
        content: Arc<dyn Blob>,
        mode: FileMode,
    ) -> Result<(), PluginError> {
        self.to_change().await?.write_file(path, content, mode).await
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        self.guest.read_file(path, limit).await
    }

    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError> {
        self.guest.fetch_file(path).await
    }

    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), PluginError> {
        self.to_change().await?.unpack(archive, directory, uid, gid).await
    }

    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError> {
        self.guest.is_empty(directory).await
    }

    async fn clear(&self, directory: &str) -> Result<(), PluginError> {
        self.to_change().await?.clear(directory).await
    }

    async fn remove(&self, path: &str) -> Result<(), PluginError> {
        self.to_change().await?.remove(path).await
    }
}
