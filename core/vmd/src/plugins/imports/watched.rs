//! The guest as an importer has it: before it changes anything there, whoever watches is told.

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
    begun: OnceCell<()>,
}

impl Watched {
    pub(super) fn new(guest: Arc<dyn GuestFiles>, watch: Arc<dyn ImportWatch>) -> Self {
        Self { guest, watch, begun: OnceCell::new() }
    }

    /// The guest, to be changed.
    async fn to_change(&self) -> Result<&dyn GuestFiles, PluginError> {
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
        // Nobody knows what it does.
        self.to_change().await?.run(command, output_limit).await
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
