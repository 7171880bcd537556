//! Changes of the set: install, remove, enable, disable, configure, order. Each is tried first, then recorded, then in force; a client that
//! leaves half way stops none of them. VMs that are up keep what they have.

use std::{path::PathBuf, sync::Arc};

use serde_json::{Value, json};
use vm_api::{GrantChoice, InstallPlugin};
use vm_plugin::{Grant, Granted, Manifest, log::Log};
use vm_store::PluginRecord;

use super::{
    PluginsError,
    calls::Calls,
    entry::{Entry, Status, now_ms},
    manager::{Manager, Set, blocking, is_content, order},
    package::{self, Package},
    source,
};

/// What a plugin that is removed leaves behind, unless it is to go too: the operator's files and disks that outlive VMs.
const KEPT: [&str; 2] = [package::FILES, "kept"];

/// Runs a change to its end, whoever waits for it.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, PluginsError>> + Send + 'static,
) -> Result<T, PluginsError> {
    tokio::spawn(work).await.map_err(|source| PluginsError::Broken { source })?
}

impl Manager {
    /// A package from where it comes.
    pub(crate) async fn package(&self, text: &str) -> Result<Package, PluginsError> {
        source::package(text, self.bundled.as_deref(), &self.trust).await
    }

    /// One that may be installed.
    pub(super) async fn trusted(&self, text: &str) -> Result<Package, PluginsError> {
        let package = self.package(text).await?;
        self.trust.judge(&package.source, &package.signature)?;
        Ok(package)
    }

    /// Installs a plugin, or another version of it.
    pub(crate) async fn install(self: &Arc<Self>, params: InstallPlugin) -> Result<Arc<Entry>, PluginsError> {
        let manager = self.clone();
        whole(async move {
            let package = manager.trusted(&params.source).await?;
            manager.install_package(package, params).await
        })
        .await
    }

    pub(super) async fn install_package(
        &self,
        package: Package,
        params: InstallPlugin,
    ) -> Result<Arc<Entry>, PluginsError> {
        let digest = package::digest(package.component());
        let asked = [
            ("component's digest", &digest, &params.digest),
            ("manifest's digest", &package.manifest_digest(), &params.manifest_digest),
        ];
        for (what, found, expected) in asked {
            if let Some(expected) = expected
                && expected != found
            {
                return Err(PluginsError::Digest { what, found: found.clone(), expected: expected.clone() });
            }
        }
        let name = package.manifest.name.clone();
        let _one = self.changing.lock().await;
        let old = self.find(&name).ok();
        if let Some(old) = &old
            && !params.upgrade
        {
            let version = old.manifest.as_ref().map(|manifest| manifest.version.clone()).unwrap_or_default();
            return Err(PluginsError::Installed { name, version });
        }
        let had = old.as_ref().and_then(|old| serde_json::from_value(old.record.granted.clone()).ok());
        let granted = granted(&package.manifest, params.grants.as_ref(), had.as_ref())?;
        let record = PluginRecord {
            name: name.clone(),
            digest,
            files: package.digests(),
            source: package.source.clone(),
            signature: serde_json::to_value(&package.signature).ok(),
            enabled: !params.disabled,
            granted: serde_json::to_value(granted).unwrap_or_default(),
            config: params
                .config
                .or_else(|| old.as_ref().map(|old| old.record.config.clone()))
                .unwrap_or_else(|| json!({})),
            position: old.as_ref().and_then(|old| old.record.position),
            installed_at: now_ms() / 1000,
        };
        let (log, calls) = self.former(&name, old.as_deref());
        // Compiled and linked before anything is recorded or replaced, also if it is not to be called yet.
        let plugin = self.plugin(package.manifest.clone(), package.component(), &record).await?;
        let entry = Entry {
            manifest: Some(package.manifest.clone()),
            status: if record.enabled {
                Status::Loaded(Arc::new(plugin.with_log(log.clone())))
            } else {
                Status::Disabled
            },
            log,
            calls,
            shared: self.shared.clone(),
            record: record.clone(),
        };
        order(self.others(&name).collect::<Vec<_>>().iter().chain([&entry]))?;
        let home = self.shared.home(&name);
        let former = old.as_ref().map(|old| old.dir());
        blocking(move || {
            package::make_dir(&home).map_err(|source| PluginsError::Write { path: home.clone(), source })?;
            let placed = package.place(&home)?;
            // Calls that are under way may still read files of the one before; older ones have no callers.
            for old in std::fs::read_dir(&home).into_iter().flatten().flatten() {
                let path = old.path();
                if is_content(&path) && path != placed && Some(&path) != former.as_ref() {
                    package::remove_dir(&path)?;
                }
            }
            Ok(())
        })
        .await?;
        self.store.plugins().put(record).await?;
        // Another one, or the same that somebody has chosen anew.
        self.store.plugins().set_failures(&name, None).await?;
        self.put(entry);
        if let Some(old) = &old
            && !self.uses(&old.record.digest)
        {
            self.forget(&old.record.digest);
        }
        tracing::info!(plugin = %name, "installed");
        self.find(&name)
    }

    /// What stays from one version to the next.
    fn former(&self, name: &str, old: Option<&Entry>) -> (Log, Arc<Calls>) {
        match old {
            Some(old) => (old.log.clone(), old.calls.clone()),
            None => (Log::default(), Arc::new(Calls::open(self.shared.home(name).join("calls")))),
        }
    }

    fn uses(&self, digest: &str) -> bool {
        self.set().0.iter().any(|entry| entry.record.digest == digest)
    }

    /// Compiled code that nobody needs any more takes space and nothing else.
    fn forget(&self, digest: &str) {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        if let Err(error) = self.runtime.forget(hex) {
            tracing::warn!("{}", vm_types::report::chain(&error));
        }
    }

    /// What plugins that are not there any more have left behind: their names and the directories.
    pub(crate) fn left(&self) -> Vec<(String, Vec<PathBuf>)> {
        let entries = std::fs::read_dir(&self.shared.dir).into_iter().flatten().flatten();
        let named = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
        let mut left: Vec<_> = named
            .filter(|(name, _)| !name.starts_with('.') && self.find(name).is_err())
            .map(|(name, home)| (name, KEPT.map(|kept| home.join(kept)).into_iter().filter(|it| it.is_dir())))
            .map(|(name, kept)| (name, kept.collect::<Vec<_>>()))
            .filter(|(_, kept)| !kept.is_empty())
            .collect();
        left.sort();
        left
    }

    /// Removes a plugin with its state; with `purge` also what it would leave behind, or has left behind before. What it has planned for
    /// VMs is undone already.
    pub(crate) async fn remove(self: &Arc<Self>, name: &str, purge: bool) -> Result<(), PluginsError> {
        let (manager, name) = (self.clone(), name.to_owned());
        whole(async move {
            let _one = manager.changing.lock().await;
            match manager.find(&name) {
                Ok(entry) => {
                    manager.store.plugins().delete(&name).await?;
                    manager.swap(Set::arrange(manager.others(&name).collect()));
                    if !manager.uses(&entry.record.digest) {
                        manager.forget(&entry.record.digest);
                    }
                }
                // Compared with what is there, so that no name leads elsewhere.
                Err(_) if purge && manager.left().iter().any(|(left, _)| *left == name) => {}
                Err(error) => return Err(error),
            }
            let home = manager.shared.home(&name);
            blocking(move || {
                for inner in std::fs::read_dir(&home).into_iter().flatten().flatten() {
                    let path = inner.path();
                    if is_content(&path)
                        || path.ends_with("calls")
                        || (purge && KEPT.iter().any(|kept| path.ends_with(kept)))
                    {
                        package::remove_dir(&path)?;
                    }
                }
                // Not empty where something is kept.
                let _ = std::fs::remove_dir(&home);
                Ok(())
            })
            .await?;
            tracing::info!(plugin = %name, "removed");
            Ok(())
        })
        .await
    }

    /// Calls a plugin from now on, or no more.
    pub(crate) async fn set_enabled(
        self: &Arc<Self>,
        name: &str,
        enabled: bool,
    ) -> Result<Arc<Entry>, PluginsError> {
        self.switch(name, enabled, enabled).await
    }

    /// Enables a plugin that was disabled for a moment. One that has failed too often is that still.
    ///
    /// # Errors
    /// As of [`Self::set_enabled`].
    pub(crate) async fn enable_again(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>, PluginsError> {
        self.switch(name, true, false).await
    }

    async fn switch(
        self: &Arc<Self>,
        name: &str,
        enabled: bool,
        pardon: bool,
    ) -> Result<Arc<Entry>, PluginsError> {
        let (manager, name) = (self.clone(), name.to_owned());
        whole(async move {
            let _one = manager.changing.lock().await;
            let old = manager.find(&name)?;
            if let Some(plugin) = old.loaded()
                && enabled
                && pardon
            {
                manager.store.plugins().set_failures(&name, None).await?;
                plugin.enable();
                // Also whoever could not begin with it.
                manager.tell();
                return Ok(old);
            }
            let record = PluginRecord { enabled, ..old.record.clone() };
            let entry = manager.reloaded(&old, record).await?;
            manager.store.plugins().set_enabled(&name, enabled).await?;
            if pardon {
                manager.store.plugins().set_failures(&name, None).await?;
            } else if let Some(plugin) = entry.loaded() {
                manager.recall_failures(plugin).await?;
            }
            manager.put(entry);
            manager.find(&name)
        })
        .await
    }

    /// A plugin with another record; one that cannot be loaded or ordered so is an error.
    async fn reloaded(&self, old: &Entry, record: PluginRecord) -> Result<Entry, PluginsError> {
        let name = record.name.clone();
        let (log, calls) = self.former(&name, Some(old));
        let entry = if record.enabled {
            let dir = old.dir();
            let (manifest, wasm) = blocking(move || {
                let manifest = package::manifest(&dir)?;
                let wasm = package::component(&dir, &manifest)?;
                Ok((manifest, wasm))
            })
            .await?;
            let plugin = self.plugin(manifest.clone(), &wasm, &record).await?.with_log(log.clone());
            let status = Status::Loaded(Arc::new(plugin));
            Entry { record, manifest: Some(manifest), status, log, calls, shared: self.shared.clone() }
        } else {
            self.load(record, log, calls).await
        };
        order(self.others(&name).collect::<Vec<_>>().iter().chain([&entry]))?;
        Ok(entry)
    }

    /// A plugin as it would be with another configuration, and as it is. Nothing is changed yet.
    ///
    /// # Errors
    /// There is no such plugin, or the configuration does not fit its schema.
    pub(crate) async fn candidate(
        &self,
        name: &str,
        config: Value,
    ) -> Result<(Arc<Entry>, Entry), PluginsError> {
        let old = self.find(name)?;
        let dir = old.dir();
        let manifest = blocking(move || package::manifest(&dir)).await?;
        let misfit = |reason| vm_plugin::LoadError::Config { plugin: name.to_owned(), reason };
        manifest.config.fill(config.clone()).map_err(misfit)?;
        let entry = self.reloaded(&old, PluginRecord { config, ..old.record.clone() }).await?;
        if let Some(disabled) = old.loaded().and_then(|plugin| plugin.disabled())
            && let Some(plugin) = entry.loaded()
        {
            // Only who enables it says that it may be called again.
            plugin.disable(disabled);
        }
        Ok((old, entry))
    }

    /// Puts a candidate in force, unless the plugin has been changed since.
    pub(crate) async fn put_candidate(
        self: &Arc<Self>,
        old: &Entry,
        new: &Arc<Entry>,
    ) -> Result<Arc<Entry>, PluginsError> {
        let (manager, before, entry) = (self.clone(), old.record.clone(), new.copied());
        whole(async move {
            let _one = manager.changing.lock().await;
            let name = entry.record.name.clone();
            if manager.find(&name)?.record != before {
                return Err(PluginsError::Changed { name });
            }
            manager.store.plugins().set_config(&name, &entry.record.config).await?;
            // It may have failed once too often while its new configuration was thought over.
            if let Some(plugin) = entry.loaded() {
                manager.recall_failures(plugin).await?;
            }
            manager.put(entry);
            manager.find(&name)
        })
        .await
    }

    /// The operator's order, and what it comes to.
    pub(crate) async fn order(self: &Arc<Self>, names: Vec<String>) -> Result<Vec<String>, PluginsError> {
        let manager = self.clone();
        whole(async move {
            let _one = manager.changing.lock().await;
            for (place, name) in names.iter().enumerate() {
                manager.find(name)?;
                if names[..place].contains(name) {
                    return Err(PluginsError::Twice { name: name.clone() });
                }
            }
            let mut entries: Vec<_> = manager.others("").collect();
            for entry in &mut entries {
                let place = names.iter().position(|name| *name == entry.record.name);
                entry.record.position = place.and_then(|place| u32::try_from(place).ok());
            }
            let order = order(entries.iter())?;
            manager.store.plugins().set_order(&names).await?;
            manager.swap(Set::arrange(entries));
            Ok(order)
        })
        .await
    }
}

/// What is granted: of the manifest's requests those that the version before had, and those that are chosen now. What it had and does not
/// ask for any more is not kept for later.
fn granted(
    manifest: &Manifest,
    choice: Option<&GrantChoice>,
    had: Option<&Granted>,
) -> Result<Granted, PluginsError> {
    let grants: Vec<&Grant> = manifest.grants.iter().map(|request| &request.grant).collect();
    let kinds: Vec<String> = grants.iter().map(|grant| grant.kind()).collect();
    let unknown = |given: String| {
        let there = kinds.iter().enumerate().map(|(index, kind)| format!("{index} {kind}"));
        PluginsError::Grant { given, there: there.collect::<Vec<_>>().join(", ") }
    };
    let chosen: Vec<bool> = match choice {
        None => vec![false; grants.len()],
        Some(GrantChoice::All) => vec![true; grants.len()],
        Some(GrantChoice::Indices(indices)) => {
            if let Some(index) = indices.iter().find(|index| **index >= grants.len()) {
                return Err(unknown(index.to_string()));
            }
            (0..grants.len()).map(|index| indices.contains(&index)).collect()
        }
        Some(GrantChoice::Kinds(chosen)) => {
            if let Some(kind) = chosen.iter().find(|kind| !kinds.contains(kind)) {
                return Err(unknown(kind.clone()));
            }
            kinds.iter().map(|kind| chosen.contains(kind)).collect()
        }
    };
    let given = grants
        .into_iter()
        .zip(chosen)
        .filter(|(grant, chosen)| *chosen || had.is_some_and(|had| had.includes(grant)));
    Ok(Granted::These(given.map(|(grant, _)| grant.clone()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(grants: &str) -> Manifest {
        format!(
            "name = \"a\"\nversion = \"0.1.0\"\nworld = \"capability\"\nwit = \"0.1.0\"\ngrants = [{grants}]"
        )
        .parse()
        .unwrap()
    }

    const DISK: &str = "{ kind = \"disk\", max-bytes = 10, reason = \"r\" }";
    const DRIVE: &str = "{ kind = \"drive\", reason = \"r\" }";

    #[test]
    fn an_upgrade_has_what_was_granted_and_nothing_else() {
        let old = granted(&manifest(&format!("{DISK}, {DRIVE}")), Some(&GrantChoice::All), None).unwrap();
        let larger = DISK.replace("10", "11");
        let new = manifest(&format!("{larger}, {DRIVE}, {{ kind = \"clock\", reason = \"r\" }}"));
        assert_eq!(granted(&new, None, Some(&old)).unwrap(), Granted::These(vec![Grant::Drive {}]));
        let clock = GrantChoice::Kinds(vec!["clock".to_owned()]);
        let Granted::These(both) = granted(&new, Some(&clock), Some(&old)).unwrap() else { panic!("a list") };
        assert_eq!(both, [Grant::Drive {}, Grant::Clock {}]);
        // What is not asked for any more is not there for the next upgrade either.
        let fewer = granted(&manifest(DISK), None, Some(&old)).unwrap();
        let again = granted(&manifest(DRIVE), None, Some(&fewer)).unwrap();
        assert_eq!(again, Granted::These(Vec::new()));
    }

    #[test]
    fn what_is_not_asked_for_cannot_be_granted() {
        let manifest = manifest(DISK);
        for choice in [GrantChoice::Indices(vec![0, 1]), GrantChoice::Kinds(vec!["drive".to_owned()])] {
            let error = granted(&manifest, Some(&choice), None).unwrap_err();
            assert_eq!(error.hint().unwrap(), "it asks for: 0 disk");
        }
        let none = granted(&manifest, None, None).unwrap();
        assert_eq!(none, Granted::These(Vec::new()));
    }
}
