//! Calling plugins around a VM: what they are told, in which order they are asked, and what follows when one fails.
//!
//! ```text
//!   preflight ─> contribute-guest ─> contribute-machine ─> prepare-host ─> (effects, boot) ─> post-start … cleanup
//! ```
//!
//! Each hook is asked of all plugins, in their order, before the next one is. No lock is held. A plugin that is required and fails
//! fails the start; any other is left out of it, and that is told.

use std::{collections::BTreeMap, sync::Arc};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    EventKind, Hook, VmId,
    plan::{Plan, RefName},
    plugin::{Finding, Severity, VmFacts},
    vm::{NetworkMode, VmSpec},
};

use super::cell::{Cell, Live};
use crate::{
    Engine, EngineError,
    ops::OpContext,
    ports::{HookFailure, HookInput, HookOutcome, Plugin},
    vm::start,
};

/// Hooks that plan, in their order.
pub(super) const PLANNING: [Hook; 3] = [Hook::ContributeGuest, Hook::ContributeMachine, Hook::PrepareHost];

/// What one plugin planned for one start.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) plugin: Arc<dyn Plugin>,
    pub(super) plan: Plan,
}

impl Planned {
    /// Adds what one more hook planned.
    pub(super) fn add(&mut self, more: Plan) {
        self.plan.machine.extend(more.machine);
        self.plan.guest.extend(more.guest);
        self.plan.host.extend(more.host);
    }
}

/// One plugin's answer to one hook, for whoever only wants to know.
#[derive(Debug, Clone)]
pub struct HookReport {
    /// The plugin.
    pub plugin: String,
    /// The hook.
    pub hook: Hook,
    /// What came of it.
    pub outcome: Result<HookOutcome, HookFailure>,
}

impl Engine {
    /// A VM as plugins see it.
    pub(super) async fn facts_of(
        &self,
        id: &VmId,
        spec: &VmSpec,
        address: Option<std::net::Ipv4Addr>,
    ) -> Result<VmFacts, EngineError> {
        let kernel = self.inner.store.kernels().get(spec.kernel.as_str()).await?;
        Ok(VmFacts {
            id: id.clone(),
            name: spec.name.clone(),
            image_reference: spec.image_reference.clone(),
            image_digest: spec.image.to_string(),
            image_properties: BTreeMap::from([("architecture".into(), std::env::consts::ARCH.into())]),
            kernel_release: kernel.map(|kernel| kernel.release).unwrap_or_default(),
            cpus: spec.cpus,
            memory_bytes: spec.memory_mib << 20,
            disk_bytes: spec.disk_bytes,
            network: match spec.network {
                NetworkMode::Nat => "nat".into(),
                NetworkMode::None => "none".into(),
            },
            addresses: address.into_iter().map(Into::into).collect(),
            labels: spec.labels.clone(),
            temporary: spec.owner.is_some(),
        })
    }

    /// [`Self::facts_of`] a VM that is there.
    ///
    /// # Errors
    /// The store.
    pub async fn vm_facts(&self, cell: &Cell) -> Result<VmFacts, EngineError> {
        let record = cell.record();
        self.facts_of(&record.id, &record.spec, record.address).await
    }

    /// What the applied effects of each plugin for a VM stand for.
    pub(super) async fn references(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        plugin: &str,
    ) -> BTreeMap<RefName, String> {
        let entries = cell.scope.entries(ctx).await;
        let named = entries.into_iter().filter_map(|entry| {
            let value = entry.value();
            let by = entry.by.filter(|by| by.plugin == plugin)?;
            Some((by.name?, value?))
        });
        named.collect()
    }

    /// Asks whether a VM may start, or be made.
    ///
    /// # Errors
    /// [`EngineError::Forbidden`] with the first reason, or a required plugin failing.
    pub(super) async fn preflight(
        &self,
        _: &mut Ctx<Unlocked>,
        facts: &VmFacts,
        reason: &str,
    ) -> Result<(), EngineError> {
        for plugin in self.inner.hooks.enabled() {
            if !plugin.has(Hook::Preflight) {
                continue;
            }
            let input = HookInput { reason: reason.into(), vm: Some(facts.clone()), ..HookInput::default() };
            match plugin.call(Hook::Preflight, input).await {
                Ok(outcome) => {
                    if let Some(no) = refusal(&outcome.findings) {
                        return Err(EngineError::Forbidden {
                            plugin: plugin.name().into(),
                            message: no.message.clone(),
                            hint: no.hint.clone(),
                        });
                    }
                }
                Err(failure) => self.tolerate(&*plugin, facts, failure)?,
            }
        }
        Ok(())
    }

    /// Asks all plugins what guest, machine and host shall have. Nothing is changed.
    ///
    /// # Errors
    /// A required plugin failing.
    pub(super) async fn ask_for_plans(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        facts: &VmFacts,
    ) -> Result<Vec<Planned>, EngineError> {
        let mut all: Vec<Planned> = (self.inner.hooks.enabled().into_iter())
            .map(|plugin| Planned { plugin, plan: Plan::default() })
            .collect();
        for hook in PLANNING {
            let mut index = 0;
            while let Some(planned) = all.get_mut(index) {
                index += 1;
                if !planned.plugin.has(hook) {
                    continue;
                }
                let references = self.references(ctx, cell, planned.plugin.name()).await;
                let input = HookInput {
                    reason: "start".into(),
                    vm: Some(facts.clone()),
                    references,
                    ..HookInput::default()
                };
                match planned.plugin.call(hook, input).await {
                    Ok(outcome) => planned.add(outcome.plan),
                    Err(failure) => {
                        self.tolerate(&*planned.plugin, facts, failure)?;
                        index -= 1;
                        all.remove(index);
                    }
                }
            }
        }
        all.retain(|planned| !planned.plan.is_empty());
        Ok(all)
    }

    /// Lets plugins act in the guest that has just answered. Ends with the VM.
    ///
    /// # Errors
    /// A required plugin failing, or the VM ending meanwhile.
    pub(super) async fn post_start(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        live: Live,
        made_up: &BTreeMap<String, BTreeMap<RefName, String>>,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let plugins: Vec<_> =
            self.inner.hooks.enabled().into_iter().filter(|plugin| plugin.has(Hook::PostStart)).collect();
        if plugins.is_empty() {
            return Ok(());
        }
        context.progress("setting up the guest", 0, None);
        let facts = self.vm_facts(cell).await?;
        for plugin in plugins {
            let mut references = self.references(ctx, cell, plugin.name()).await;
            references.extend(made_up.get(plugin.name()).cloned().unwrap_or_default());
            let input = HookInput {
                reason: "start".into(),
                vm: Some(facts.clone()),
                references,
                guest: Some(cell.paths()),
                ..HookInput::default()
            };
            // Cancel-safe: one arm only waits, and a call that is dropped ends what it does in the guest.
            let called = tokio::select! {
                biased;
                ended = start::ended(live.vmm, live.shim) => {
                    ended?;
                    return Err(start::died(&cell.paths()));
                }
                called = plugin.call(Hook::PostStart, input) => called,
            };
            if let Err(failure) = called {
                self.tolerate(&*plugin, &facts, failure)?;
            }
        }
        Ok(())
    }

    /// Tells plugins that a VM's run, or the VM, is over. What they planned is undone without them, so a failure is only told.
    pub(crate) async fn clean_up(&self, _: &mut Ctx<Unlocked>, cell: &Cell, reason: &str) {
        let plugins = self.inner.hooks.enabled();
        for plugin in plugins.iter().filter(|plugin| plugin.has(Hook::Cleanup)) {
            let facts = match self.vm_facts(cell).await {
                Ok(facts) => facts,
                Err(error) => {
                    tracing::warn!(vm = %cell.name(), error = %error.chain(), "no clean-up by plugins");
                    return;
                }
            };
            let input = HookInput { reason: reason.into(), vm: Some(facts.clone()), ..HookInput::default() };
            if let Err(failure) = plugin.call(Hook::Cleanup, input).await {
                self.told(plugin.name(), &facts, &failure.message);
            }
        }
    }

    /// What plugins would do at a VM's start, or where `facts` are of one that is not there, at its making. Changes nothing.
    ///
    /// # Errors
    /// The store.
    pub async fn plan_start(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: Option<&Cell>,
        facts: VmFacts,
    ) -> Result<Vec<HookReport>, EngineError> {
        let mut reports = Vec::new();
        let plugins = self.inner.hooks.enabled();
        for hook in [Hook::Preflight].into_iter().chain(PLANNING) {
            for plugin in plugins.iter().filter(|plugin| plugin.has(hook)) {
                let references = match cell {
                    Some(cell) => self.references(ctx, cell, plugin.name()).await,
                    None => BTreeMap::new(),
                };
                let input = HookInput {
                    reason: "start".into(),
                    vm: Some(facts.clone()),
                    references,
                    dry_run: true,
                    ..HookInput::default()
                };
                let outcome = plugin.call(hook, input).await;
                reports.push(HookReport { plugin: plugin.name().into(), hook, outcome });
            }
        }
        Ok(reports)
    }

    /// Fails where a required plugin did; tells of any other.
    pub(super) fn tolerate(
        &self,
        plugin: &dyn Plugin,
        facts: &VmFacts,
        failure: HookFailure,
    ) -> Result<(), EngineError> {
        if plugin.required() {
            return Err(EngineError::Plugin(failure));
        }
        self.told(plugin.name(), facts, &failure.message);
        Ok(())
    }

    pub(super) fn told(&self, plugin: &str, facts: &VmFacts, message: &str) {
        tracing::warn!(plugin, vm = %facts.name, "{message}");
        let message = format!("plugin {plugin} was left out: {message}");
        self.inner.events.record(EventKind::PluginFailed, Some((&facts.id, &facts.name)), None, message);
    }
}

fn refusal(findings: &[Finding]) -> Option<&Finding> {
    findings.iter().find(|finding| finding.severity == Severity::Failure)
}
