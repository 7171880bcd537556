//! Plugins as clients see them.

use std::{os::unix::fs::MetadataExt, path::Path};

use serde_json::Value;
use vm_api::{
    HookCalls, InstalledVersion, PluginCheck, PluginDisk, PluginGrant, PluginInfo, PluginInspection,
    PluginLogLine, PluginSignature, PluginState, PluginSummary, VmName,
};
use vm_plugin::{Granted, Hook, Manifest, log::Logged};

use super::{
    PluginsError,
    entry::{Entry, Status},
    manager::{Manager, blocking},
    package::{self, FILES, Found, Package},
};

/// Hooks of all worlds, in the order of a VM's life.
const HOOKS: [Hook; 12] = [
    Hook::Preflight,
    Hook::ContributeGuest,
    Hook::ContributeMachine,
    Hook::PrepareHost,
    Hook::PostStart,
    Hook::ConfigChange,
    Hook::Cleanup,
    Hook::Doctor,
    Hook::Zones,
    Hook::Resolve,
    Hook::Probe,
    Hook::Import,
];

/// Whether a plugin is called.
pub(super) fn state(entry: &Entry) -> PluginState {
    match &entry.status {
        Status::Disabled => PluginState::Disabled,
        Status::Broken(fault) => {
            PluginState::Broken { reason: fault.reason.clone(), hint: fault.hint.clone() }
        }
        Status::Loaded(plugin) => match plugin.disabled() {
            None => PluginState::Enabled,
            Some(disabled) => PluginState::Failed { failures: disabled.failures, reason: disabled.last },
        },
    }
}

fn hooks(entry: &Entry) -> Vec<String> {
    let has = |hook: &Hook| entry.loaded().is_some_and(|plugin| plugin.has(*hook));
    HOOKS.iter().filter(|hook| has(hook)).map(ToString::to_string).collect()
}

fn stats(entry: &Entry) -> Vec<HookCalls> {
    let stats = entry.loaded().map(|plugin| plugin.stats()).unwrap_or_default();
    let us = |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    stats
        .into_iter()
        .map(|(hook, stats)| HookCalls {
            hook: hook.to_string(),
            calls: stats.calls,
            errors: stats.errors,
            faults: stats.faults,
            mean_us: us(stats.total).checked_div(stats.calls).unwrap_or_default(),
            longest_us: us(stats.longest),
        })
        .collect()
}

/// What a manifest asks for, and whether it is granted.
pub(super) fn grants(manifest: &Manifest, granted: Option<&Granted>) -> Vec<PluginGrant> {
    let requests = manifest.grants.iter().enumerate();
    requests
        .map(|(index, request)| PluginGrant {
            index,
            kind: request.grant.kind(),
            detail: request.grant.detail(),
            reason: request.reason.clone(),
            granted: granted.is_some_and(|granted| granted.includes(&request.grant)),
            grant: serde_json::to_value(&request.grant).unwrap_or_default(),
        })
        .collect()
}

fn granted(entry: &Entry) -> Option<Granted> {
    serde_json::from_value(entry.record.granted.clone()).ok()
}

/// Who had signed it when it was installed.
pub(super) fn signature(entry: &Entry) -> PluginSignature {
    let recorded = entry.record.signature.clone();
    recorded.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default()
}

/// A plugin as a list has it.
pub(super) fn summary(entry: &Entry, position: Option<usize>) -> PluginSummary {
    let manifest = entry.manifest.as_ref();
    let grants = manifest.map(|manifest| grants(manifest, granted(entry).as_ref())).unwrap_or_default();
    let stats = stats(entry);
    PluginSummary {
        name: entry.record.name.clone(),
        version: manifest.map(|manifest| manifest.version.clone()).unwrap_or_default(),
        description: manifest.map(|manifest| manifest.description.clone()).unwrap_or_default(),
        world: manifest.map(|manifest| manifest.world.to_string()).unwrap_or_default(),
        digest: entry.record.digest.clone(),
        state: state(entry),
        required: manifest.is_none_or(|manifest| manifest.required),
        position,
        hooks: hooks(entry),
        requested: grants.len(),
        granted: grants.iter().filter(|grant| grant.granted).count(),
        calls: stats.iter().map(|stats| stats.calls).sum(),
        errors: stats.iter().map(|stats| stats.errors).sum(),
    }
}

/// The disk images in a directory.
fn images(directory: &Path, vm: Option<&VmName>) -> Vec<PluginDisk> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut disks: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let about = entry.metadata().ok().filter(|about| about.is_file())?;
            (path.extension()? == "img").then(|| PluginDisk {
                name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
                vm: vm.cloned(),
                size_bytes: about.len(),
                used_bytes: about.blocks() * 512,
                path: path.display().to_string(),
            })
        })
        .collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    disks
}

/// A message as clients see it.
pub(crate) fn line(logged: &Logged) -> PluginLogLine {
    let level = serde_json::to_value(logged.line.level).unwrap_or_default();
    PluginLogLine {
        at_ms: logged.at_ms,
        hook: logged.hook.to_string(),
        level: level.as_str().unwrap_or_default().to_owned(),
        message: logged.line.message.clone(),
    }
}

impl Manager {
    /// All plugins.
    pub(crate) fn list(&self) -> Vec<PluginSummary> {
        let set = self.set();
        let mut next = 0;
        let place = |entry: &Entry, next: &mut usize| {
            entry.loaded().is_some().then(|| {
                *next += 1;
                *next
            })
        };
        set.0.iter().map(|entry| summary(entry, place(entry, &mut next))).collect()
    }

    /// All of one plugin.
    pub(crate) async fn info(&self, name: &str) -> Result<PluginInfo, PluginsError> {
        let entry = self.find(name)?;
        let position = self.list().into_iter().find(|summary| summary.name == name).and_then(|s| s.position);
        let manifest = entry.manifest.as_ref();
        let config = match entry.loaded() {
            Some(plugin) => serde_json::from_str(plugin.config()).unwrap_or_default(),
            None => manifest
                .and_then(|manifest| manifest.config.fill(entry.record.config.clone()).ok())
                .unwrap_or_else(|| entry.record.config.clone()),
        };
        let blobs = {
            let entry = entry.clone();
            blocking(move || entry.blobs()).await?
        };
        Ok(PluginInfo {
            summary: summary(&entry, position),
            wit: manifest.map(|manifest| manifest.wit.clone()).unwrap_or_default(),
            source: entry.record.source.clone(),
            signature: signature(&entry),
            installed_at: entry.record.installed_at,
            before: manifest.map(|manifest| manifest.before.clone()).unwrap_or_default(),
            after: manifest.map(|manifest| manifest.after.clone()).unwrap_or_default(),
            grants: manifest.map(|manifest| grants(manifest, granted(&entry).as_ref())).unwrap_or_default(),
            config,
            config_given: entry.record.config.clone(),
            config_schema: manifest
                .and_then(|manifest| serde_json::to_value(&manifest.config).ok())
                .unwrap_or(Value::Null),
            stats: stats(&entry),
            disks: self.disks(name).await?,
            blobs: blobs.into_keys().collect(),
            files_dir: self.shared.home(name).join(FILES).display().to_string(),
        })
    }

    /// Its disks.
    async fn disks(&self, name: &str) -> Result<Vec<PluginDisk>, PluginsError> {
        let vms = self.store.vms().list().await?;
        let home = self.shared.home(name);
        blocking(move || {
            let mut disks = images(&home.join("kept"), None);
            for vm in vms {
                disks.extend(images(&home.join("vms").join(vm.id.as_str()), Some(&vm.spec.name)));
                disks.extend(images(&home.join("runs").join(vm.id.as_str()), Some(&vm.spec.name)));
            }
            Ok(disks)
        })
        .await
    }

    /// What an installation would bring.
    pub(crate) async fn inspect(&self, source: &str) -> Result<PluginInspection, PluginsError> {
        let package = self.trusted(source).await?;
        Ok(self.inspection(&package))
    }

    fn inspection(&self, package: &Package) -> PluginInspection {
        let manifest = &package.manifest;
        let old = self.find(&manifest.name).ok();
        PluginInspection {
            name: manifest.name.clone(),
            version: manifest.version.clone(),
            description: manifest.description.clone(),
            world: manifest.world.to_string(),
            wit: manifest.wit.clone(),
            required: manifest.required,
            before: manifest.before.clone(),
            after: manifest.after.clone(),
            digest: package::digest(package.component()),
            manifest_digest: package.manifest_digest(),
            component_bytes: package.component().len() as u64,
            grants: grants(manifest, old.as_deref().and_then(granted).as_ref()),
            config_schema: serde_json::to_value(&manifest.config).unwrap_or(Value::Null),
            installed: old.map(|old| InstalledVersion {
                version: old.manifest.as_ref().map(|manifest| manifest.version.clone()).unwrap_or_default(),
                digest: old.record.digest.clone(),
            }),
            source: package.source.clone(),
            signature: package.signature.clone(),
        }
    }

    /// Compares what is installed with what was recorded.
    pub(crate) async fn verify(&self, name: &str) -> Result<Vec<PluginCheck>, PluginsError> {
        let entry = self.find(name)?;
        let (dir, files) = (entry.dir(), entry.record.files.clone());
        let found = blocking(move || Ok(package::compare(&dir, &files))).await?;
        let mut checks: Vec<_> = found
            .into_iter()
            .map(|(check, found)| {
                let (ok, detail) = match found {
                    Found::Same => (true, entry.record.files.get(&check).cloned().unwrap_or_default()),
                    Found::Other(digest) => {
                        (false, format!("it is {digest}, which is not what was installed"))
                    }
                    Found::Unreadable(reason) => (false, reason),
                };
                PluginCheck { check, ok, detail }
            })
            .collect();
        let (runtime, digest) = (self.runtime.clone(), entry.record.digest.clone());
        let cached =
            blocking(move || Ok(runtime.is_compiled(digest.strip_prefix("sha256:").unwrap_or(&digest))))
                .await?;
        let (ok, detail) = match cached {
            Ok(true) => (true, "it is what was written".to_owned()),
            Ok(false) => (true, "it is not there, and is made when it is needed".to_owned()),
            Err(error) => (false, format!("{error}; it is made anew when it is needed")),
        };
        checks.push(PluginCheck { check: "compiled code".to_owned(), ok, detail });
        Ok(checks)
    }
}
