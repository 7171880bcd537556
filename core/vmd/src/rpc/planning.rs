//! Where plugins and VMs meet: what plugins would do for a VM, and what becomes of VMs when a plugin changes.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;
use vm_api::{ConfigOutcome, HookFailed, HookPlan, PluginConfigured, VmName, VmPlan};
use vm_engine::{
    EngineError,
    ports::{HookFailure, Plugin},
    vm::{HookReport, cell::Cell},
};
use vm_types::plugin::{Change, VmFacts};

use super::server::Context;
use crate::plugins::{PluginsError, describe, parsed};

fn failed(failure: HookFailure) -> ConfigOutcome {
    ConfigOutcome::Failed { message: failure.message, hint: failure.hint }
}

/// What a plugin's answer for a VM means, before anything of it is done.
fn outcome(answer: Result<Option<Change>, HookFailure>) -> ConfigOutcome {
    match answer {
        Ok(Some(Change::Applied)) => ConfigOutcome::Applied,
        Ok(Some(Change::NeedsRestart) | None) => ConfigOutcome::NeedsRestart,
        Ok(Some(Change::Refused(error))) => {
            ConfigOutcome::Refused { message: error.message, hint: error.hint }
        }
        Err(failure) => failed(failure),
    }
}

impl Context {
    /// What a start of a VM would do.
    pub(super) async fn planned(&self, cell: Arc<Cell>) -> Result<VmPlan, EngineError> {
        let engine = self.engine.clone();
        let vm = cell.name().clone();
        let work = async move |mut ctx| {
            let facts = engine.vm_facts(&cell).await?;
            Ok::<_, EngineError>(engine.plan_start(&mut ctx, Some(&cell), facts).await)
        };
        let reports = self.engine.locks().root("request vm.plan", work).await?;
        Ok(self.plan(vm, reports))
    }

    /// The same of a VM that is not there.
    pub(super) async fn planned_anew(&self, facts: VmFacts) -> Result<VmPlan, EngineError> {
        let engine = self.engine.clone();
        let vm = facts.name.clone();
        let work = async move |mut ctx| engine.plan_start(&mut ctx, None, facts).await;
        let reports = self.engine.locks().root("request vm.plan_create", work).await;
        Ok(self.plan(vm, reports))
    }

    /// Reports of hooks as clients see them.
    pub(super) fn plan(&self, vm: VmName, reports: Vec<HookReport>) -> VmPlan {
        let (mut plugins, mut failures) = (Vec::new(), Vec::new());
        for HookReport { plugin, hook, outcome } in reports {
            let hook = hook.to_string();
            match outcome {
                Ok(outcome) if outcome.plan.is_empty() && outcome.findings.is_empty() => {}
                Ok(outcome) => plugins.push(HookPlan {
                    plugin,
                    hook,
                    effects: describe::effects(&outcome.plan),
                    findings: outcome.findings,
                }),
                Err(failure) => failures.push(HookFailed {
                    required: self.plugins.find(&plugin).is_ok_and(|entry| entry.required()),
                    plugin,
                    hook,
                    message: failure.message,
                    hint: failure.hint,
                }),
            }
        }
        VmPlan { vm, plugins, failures }
    }

    /// Asks a plugin about another configuration for each VM that is up; unless it refuses, that is in force from then on, and what can
    /// be applied at once is.
    pub(super) async fn configure_plugin(
        &self,
        name: &str,
        config: Value,
    ) -> Result<PluginConfigured, PluginsError> {
        let (old, new) = self.plugins.candidate(name, config).await?;
        let new = Arc::new(new);
        let Some(former) = old.loaded().map(|plugin| parsed(plugin.config())) else {
            let new = self.plugins.put_candidate(&old, &new).await?;
            let config = new.record.config.clone();
            return Ok(PluginConfigured { changed: true, config, vms: BTreeMap::new() });
        };
        let answers = self.engine.ask_about_change(new.clone() as Arc<dyn Plugin>, former.clone()).await?;
        let mut vms = BTreeMap::new();
        let mut at_once = Vec::new();
        for (cell, answer) in answers {
            let outcome = outcome(answer);
            vms.insert(cell.name().clone(), outcome.clone());
            if outcome == ConfigOutcome::Applied {
                at_once.push(cell);
            }
        }
        if vms.values().any(|outcome| matches!(outcome, ConfigOutcome::Refused { .. })) {
            return Ok(PluginConfigured { changed: false, config: former, vms });
        }
        let new = self.plugins.put_candidate(&old, &new).await?;
        for cell in at_once {
            let work = self.engine.replan(new.clone(), vec![cell.clone()])?;
            if let Err(error) = work.wait().await {
                let failure = HookFailure { message: error.chain(), hint: error.hint() };
                vms.insert(cell.name().clone(), failed(failure));
            }
        }
        let config = new.loaded().map(|plugin| parsed(plugin.config())).unwrap_or_default();
        Ok(PluginConfigured { changed: true, config, vms })
    }

    /// Calls a plugin no more, has all undone that it planned, and removes it. If a VM still needs what it made, it stays as it was.
    pub(super) async fn remove_plugin(&self, name: &str, purge: bool) -> Result<(), PluginsError> {
        let Ok(entry) = self.plugins.find(name) else {
            // What one has left that is gone already.
            return self.plugins.remove(name, purge).await;
        };
        let was_enabled = entry.record.enabled;
        if was_enabled {
            self.plugins.set_enabled(name, false).await?;
        }
        let plugin = entry.loaded().is_some().then(|| entry.clone() as Arc<dyn Plugin>);
        let undone = match self.engine.forget_plugin(name, plugin) {
            Ok(operation) => operation.wait().await,
            Err(error) => Err(Arc::new(error)),
        };
        if let Err(error) = undone {
            if was_enabled && let Err(error) = self.plugins.enable_again(name).await {
                tracing::warn!(plugin = name, "stays disabled: {}", vm_types::report::chain(&error));
            }
            return Err(PluginsError::Undo(error));
        }
        self.plugins.remove(name, purge).await
    }
}
