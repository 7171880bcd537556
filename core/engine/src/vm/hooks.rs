//! Calling plugins around a VM: what they are told, in which order they are asked, and what follows when one fails.
//!
//! ```text
//!   preflight ─> contribute-guest ─> contribute-machine ─> prepare-host ─> (effects, boot) ─> post-start … cleanup
//! ```
//!
//! Each hook is asked of all plugins, in their order, before the next one is. No lock is held. A plugin that is required and fails
//! fails the start; any other is left out of all that is left of it, and that is told. Which plugins there are is asked once, at the
//! begin ([`Asked`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

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
    journal::{Entry, Step},
    ops::OpContext,
    ports::{HookFailure, HookInput, HookOutcome, Plugin},
    vm::start,
};

/// Hooks that plan, in their order.
pub(super) const PLANNING: [Hook; 3] = [Hook::ContributeGuest, Hook::ContributeMachine, Hook::PrepareHost];

/// What references of one plugin stand for.
pub(super) type Named = BTreeMap<RefName, String>;

/// The plugins of one start. One that is enabled after its begin has no part in it; one that is replaced or disabled meanwhile goes on.
#[derive(Debug)]
pub(super) struct Asked {
    /// In their order.
    pub(super) plugins: Vec<Arc<dyn Plugin>>,
    /// The VM.
    pub(super) facts: VmFacts,
    /// What each one's effects for the VM have come to, by plugin. Known from [`Engine::ask_for_plans`] on.
    pub(super) references: BTreeMap<String, Named>,
    reason: &'static str,
    /// Whether the failure of any is the whole's.
    all_required: bool,
    /// Those that have failed and are done without.
    left_out: BTreeSet<String>,
}

impl Asked {
    /// These, told `reason`.
    pub(super) fn new(plugins: Vec<Arc<dyn Plugin>>, facts: VmFacts, reason: &'static str) -> Self {
        let (references, left_out) = Default::default();
        Self { plugins, facts, references, reason, all_required: false, left_out }
    }

    /// The same, none of which can be done without.
    pub(super) fn all_required(self) -> Self {
        Self { all_required: true, ..self }
    }

    /// Those that are to be called in a hook.
    fn with(&self, hook: Hook) -> Vec<Arc<dyn Plugin>> {
        let called = |plugin: &&Arc<dyn Plugin>| plugin.has(hook) && !self.left_out.contains(plugin.name());
        self.plugins.iter().filter(called).cloned().collect()
    }

    /// What one is told.
    fn input(&self, plugin: &dyn Plugin) -> HookInput {
        HookInput {
            reason: self.reason.into(),
            vm: Some(self.facts.clone()),
            references: self.references.get(plugin.name()).cloned().unwrap_or_default(),
            ..HookInput::default()
        }
    }
}

/// What one plugin planned for one start.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) plugin: Arc<dyn Plugin>,
    pub(super) plan: Plan,
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
    pub(crate) async fn facts_of(
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

    /// The plugins that are enabled now, for a start of this VM; `None` where there are none, and then nothing is looked up for them.
    ///
    /// # Errors
    /// The store.
    pub(super) async fn ask(&self, cell: &Cell) -> Result<Option<Asked>, EngineError> {
        let record = cell.record();
        self.ask_about(&record.id, &record.spec, record.address, "start").await
    }

    /// [`Self::ask`] about a VM that may not be there yet.
    ///
    /// # Errors
    /// The store.
    pub(super) async fn ask_about(
        &self,
        id: &VmId,
        spec: &VmSpec,
        address: Option<std::net::Ipv4Addr>,
        reason: &'static str,
    ) -> Result<Option<Asked>, EngineError> {
        let plugins = self.inner.hooks.enabled();
        if plugins.is_empty() {
            return Ok(None);
        }
        Ok(Some(Asked::new(plugins, self.facts_of(id, spec, address).await?, reason)))
    }

    /// What the applied effects of plugins for a VM stand for, by plugin.
    pub(super) async fn references(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell) -> BTreeMap<String, Named> {
        let fold = |entries: &[Entry]| {
            let mut all: BTreeMap<String, Named> = BTreeMap::new();
            for entry in entries.iter().filter(|entry| entry.step == Step::Applied) {
                if let Some(by) = &entry.by
                    && let Some(name) = &by.name
                    && let Some(value) = entry.value()
                {
                    all.entry(by.plugin.clone()).or_default().insert(name.clone(), value);
                }
            }
            all
        };
        cell.scope.look(ctx, fold).await
    }

    /// Asks whether a VM may start, or be made.
    ///
    /// # Errors
    /// [`EngineError::Forbidden`] with the first reason, or a required plugin failing.
    pub(super) async fn preflight(
        &self,
        _: &mut Ctx<Unlocked>,
        asked: &mut Asked,
    ) -> Result<(), EngineError> {
        for plugin in asked.with(Hook::Preflight) {
            match plugin.call(Hook::Preflight, asked.input(&*plugin)).await {
                Ok(outcome) => {
                    if let Some(no) = refusal(&outcome.findings) {
                        return Err(EngineError::Forbidden {
                            plugin: plugin.name().into(),
                            message: no.message.clone(),
                            hint: no.hint.clone(),
                        });
                    }
                }
                Err(failure) => self.leave_out(&*plugin, asked, failure)?,
            }
        }
        Ok(())
    }

    /// Asks plugins what guest, machine and host shall have. Nothing is changed.
    ///
    /// # Errors
    /// A required plugin failing.
    pub(super) async fn ask_for_plans(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        asked: &mut Asked,
    ) -> Result<Vec<Planned>, EngineError> {
        // It may have been moved to another subnet since.
        asked.facts.addresses =
            cell.with_record(|record| record.address).into_iter().map(Into::into).collect();
        asked.references = self.references(ctx, cell).await;
        let mut plans: BTreeMap<String, Plan> = BTreeMap::new();
        for hook in PLANNING {
            for plugin in asked.with(hook) {
                match plugin.call(hook, asked.input(&*plugin)).await {
                    Ok(outcome) => add(plans.entry(plugin.name().into()).or_default(), outcome.plan),
                    Err(failure) => {
                        self.leave_out(&*plugin, asked, failure)?;
                        plans.remove(plugin.name());
                    }
                }
            }
        }
        let planned = asked.plugins.iter().filter_map(|plugin| {
            let plan = plans.remove(plugin.name()).filter(|plan| !plan.is_empty())?;
            Some(Planned { plugin: plugin.clone(), plan })
        });
        Ok(planned.collect())
    }

    /// Lets plugins act in the guest that has just answered. Ends with the VM.
    ///
    /// # Errors
    /// A required plugin failing, or the VM ending meanwhile.
    pub(super) async fn post_start(
        &self,
        _: &mut Ctx<Unlocked>,
        cell: &Cell,
        live: Live,
        asked: &mut Asked,
        context: &OpContext,
    ) -> Result<(), EngineError> {
        let plugins = asked.with(Hook::PostStart);
        if plugins.is_empty() {
            return Ok(());
        }
        context.progress("setting up the guest", 0, None);
        for plugin in plugins {
            let input = HookInput { guest: Some(cell.paths()), ..asked.input(&*plugin) };
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
                self.leave_out(&*plugin, asked, failure)?;
            }
        }
        Ok(())
    }

    /// Tells plugins that a VM's run, or the VM, is over. What they planned is undone without them, so a failure is only told.
    pub(crate) async fn clean_up(&self, ctx: &mut Ctx<Unlocked>, cell: &Cell, reason: &str) {
        let mut plugins = self.inner.hooks.enabled();
        plugins.retain(|plugin| plugin.has(Hook::Cleanup));
        if plugins.is_empty() {
            return;
        }
        match self.vm_facts(cell).await {
            Ok(facts) => self.clean_up_by(ctx, &plugins, &facts, reason).await,
            Err(error) => tracing::warn!(vm = %cell.name(), error = %error.chain(), "no clean-up by plugins"),
        }
    }

    /// [`Self::clean_up`] by these.
    pub(super) async fn clean_up_by(
        &self,
        _: &mut Ctx<Unlocked>,
        plugins: &[Arc<dyn Plugin>],
        facts: &VmFacts,
        reason: &str,
    ) {
        for plugin in plugins.iter().filter(|plugin| plugin.has(Hook::Cleanup)) {
            let input = HookInput { reason: reason.into(), vm: Some(facts.clone()), ..HookInput::default() };
            if let Err(failure) = plugin.call(Hook::Cleanup, input).await {
                self.told(plugin.name(), facts, &failure.message);
            }
        }
    }

    /// What plugins would do at a VM's start, or where `facts` are of one that is not there, at its making. They are asked as at a
    /// start, but for what they keep of it. Changes nothing.
    pub async fn plan_start(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: Option<&Cell>,
        facts: VmFacts,
    ) -> Vec<HookReport> {
        let mut asked = Asked::new(self.inner.hooks.enabled(), facts, "start");
        let mut reports: Vec<HookReport> = Vec::new();
        for hook in [Hook::Preflight].into_iter().chain(PLANNING) {
            for plugin in asked.with(hook) {
                let input = HookInput { dry_run: true, ..asked.input(&*plugin) };
                let name = plugin.name().to_owned();
                let outcome = plugin.call(hook, input).await;
                if outcome.is_err() {
                    // The start fails, or goes on without it: then nothing of what it planned before happens.
                    for report in reports.iter_mut().filter(|report| report.plugin == name) {
                        if let Ok(before) = &mut report.outcome {
                            before.plan = Plan::default();
                        }
                    }
                    asked.left_out.insert(name.clone());
                }
                reports.push(HookReport { plugin: name, hook, outcome });
            }
            if hook == Hook::Preflight
                && let Some(cell) = cell
            {
                asked.references = self.references(ctx, cell).await;
            }
        }
        reports
    }

    /// Fails where a required plugin did; else tells of it, and goes on without it.
    pub(super) fn leave_out(
        &self,
        plugin: &dyn Plugin,
        asked: &mut Asked,
        failure: HookFailure,
    ) -> Result<(), EngineError> {
        if plugin.required() || asked.all_required {
            return Err(EngineError::Plugin(failure));
        }
        self.told(plugin.name(), &asked.facts, &failure.message);
        asked.left_out.insert(plugin.name().into());
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

/// Adds what one more hook planned.
fn add(plan: &mut Plan, more: Plan) {
    plan.machine.extend(more.machine);
    plan.guest.extend(more.guest);
    plan.host.extend(more.host);
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
