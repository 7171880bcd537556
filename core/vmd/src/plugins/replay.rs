//! Making a recorded call again. The component gets what it got then, its state included, so the outcome is the same unless the
//! component is another one or is not deterministic. Nothing is changed, and the call counts for nothing.

use std::sync::Arc;

use vm_api::PluginReplay;
use vm_plugin::{Input, ports::StateStore};

use super::{
    PluginsError,
    calls::{self, Recorded},
    manager::{Manager, blocking},
    package,
};

impl Manager {
    /// Makes a recorded call again, with the component that is installed now.
    pub(crate) async fn replay(&self, name: &str, id: u64) -> Result<PluginReplay, PluginsError> {
        let entry = self.find(name)?;
        let recorded =
            entry.calls.get(id).ok_or_else(|| PluginsError::NoCall { name: name.to_owned(), id })?;
        if let Some(reason) = recorded.not_replayable() {
            return Err(PluginsError::NotReplayable { name: name.to_owned(), id, reason });
        }
        let dir = entry.dir();
        let (manifest, wasm) = blocking(move || {
            let manifest = package::manifest(&dir)?;
            let wasm = package::component(&dir, &manifest)?;
            Ok((manifest, wasm))
        })
        .await?;
        // An instance of its own: one that has failed too often can be called here, and what fails here is not counted.
        let plugin = self.plugin(manifest, &wasm, &entry.record).await?;
        let mut input = input(&recorded);
        input.blobs = entry.file_blobs();
        let state: Arc<dyn StateStore> = Arc::new(recorded.state.clone());
        let result = plugin.call(recorded.hook, input, &state).await;
        let replayed = calls::outcome(&result);
        Ok(PluginReplay {
            call: recorded.show(),
            same: replayed == recorded.outcome,
            same_component: plugin.digest() == recorded.digest,
            recorded: recorded.outcome.clone(),
            replayed,
        })
    }
}

fn input(recorded: &Recorded) -> Input {
    Input {
        reason: recorded.reason.clone(),
        vm: recorded.vm.clone(),
        facts: recorded.facts.clone(),
        references: recorded.references.clone(),
        config: Some(recorded.config.clone()),
        former_config: recorded.former_config.clone(),
        now_unix_ms: recorded.now_unix_ms,
        seed: recorded.seed,
        dry_run: true,
        ..Input::default()
    }
}
