//! The plugins of a host, in order.

use std::{path::PathBuf, sync::Arc};

use serde_json::Value;

use crate::{
    error::LoadError,
    grant::Granted,
    hook::Hook,
    manifest::World,
    order::{OrderError, Wish, order},
    plugin::Plugin,
    runtime::Runtime,
};

/// An installed plugin: where it is, and what the operator said.
#[derive(Debug, Clone)]
pub struct Installed {
    /// The directory with manifest and component.
    pub dir: PathBuf,
    /// What was granted.
    pub granted: Granted,
    /// Its configuration, without defaults.
    pub config: Value,
}

/// One that could not be loaded.
#[derive(Debug)]
pub struct Unloaded {
    /// Where it is.
    pub dir: PathBuf,
    /// Why.
    pub error: LoadError,
}

/// Loaded plugins in the order they are called. Cheap to clone; one that is replaced goes on until its calls have ended.
#[derive(Debug, Clone, Default)]
pub struct Plugins(Arc<[Arc<Plugin>]>);

impl Plugins {
    /// Loads what is installed. One that cannot be loaded is told of and does not keep others from it.
    ///
    /// # Errors
    /// No order fits them.
    pub async fn load(
        runtime: &Arc<Runtime>,
        installed: &[Installed],
        explicit: &[String],
    ) -> Result<(Self, Vec<Unloaded>), OrderError> {
        let (mut loaded, mut unloaded) = (Vec::new(), Vec::new());
        for Installed { dir, granted, config } in installed {
            match Plugin::load(runtime, dir, granted.clone(), config.clone()).await {
                Ok(plugin) => loaded.push(Arc::new(plugin)),
                Err(error) => unloaded.push(Unloaded { dir: dir.clone(), error }),
            }
        }
        Ok((Self::new(loaded, explicit)?, unloaded))
    }

    /// Brings plugins into order.
    ///
    /// # Errors
    /// No order fits them.
    pub fn new(plugins: Vec<Arc<Plugin>>, explicit: &[String]) -> Result<Self, OrderError> {
        let wishes: Vec<_> = plugins
            .iter()
            .map(|plugin| {
                let manifest = plugin.manifest();
                Wish { name: &manifest.name, before: &manifest.before, after: &manifest.after }
            })
            .collect();
        let order = order(&wishes, explicit)?;
        Ok(Self(order.into_iter().map(|index| plugins[index].clone()).collect()))
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Plugin>> {
        self.0.iter()
    }

    /// Those with a hook, in order.
    pub fn with(&self, hook: Hook) -> impl Iterator<Item = &Arc<Plugin>> {
        self.0.iter().filter(move |plugin| plugin.has(hook))
    }

    /// Those of a world, in order.
    pub fn of(&self, world: World) -> impl Iterator<Item = &Arc<Plugin>> {
        self.0.iter().filter(move |plugin| plugin.manifest().world == world)
    }

    /// The one of a name.
    pub fn get(&self, name: &str) -> Option<&Arc<Plugin>> {
        self.0.iter().find(|plugin| plugin.name() == name)
    }
}
