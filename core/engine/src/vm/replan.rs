//! When a plugin itself changes: its configuration for VMs that are up, and its removal.

use std::{sync::Arc, time::Duration};

use vm_locks::{Ctx, Unlocked};
use vm_types::{
    Effect, EventKind, Hook, Layer, OperationId,
    operation::OperationKind,
    plan::Plan,
    plugin::{Change, VmFacts},
};

use super::{
    cell::{Activity, Admitted, Cell},
    hooks::{Asked, Planned},
    planned::{Extras, Where},
    state::Request,
};
use crate::{
    Engine, EngineError,
    journal::Phase,
    ops::Operation,
    ports::{HookFailure, HookInput, Plugin},
};

/// How long an agent may take to apply a configuration.
const APPLY: Duration = Duration::from_secs(30);

/// What a plugin says of a change for one VM; none where it has no hook for that, so that it is in force at the next start.
pub type Answer = (Arc<Cell>, Result<Option<Change>, HookFailure>);

impl Engine {
    /// Asks a plugin, which has its new configuration, what becomes of the change for each VM that is up. Nothing is planned or
    /// applied; what the plugin does in guests is done.
    pub async fn ask_about_change(
        &self,
        plugin: Arc<dyn Plugin>,
        former: serde_json::Value,
    ) -> Result<Vec<Answer>, EngineError> {
        let engine = self.clone();
        let asked = self.locks().root("plugin configuration", async move |mut ctx| {
            let mut answers = Vec::new();
            for cell in engine.all().into_iter().filter(|cell| cell.live().is_some()) {
                if !plugin.has(Hook::ConfigChange) {
                    answers.push((cell, Ok(None)));
                    continue;
                }
                let references = engine.references(&mut ctx, &cell).await.remove(plugin.name());
                let input = HookInput {
                    reason: "configured".into(),
                    vm: Some(engine.vm_facts(&cell).await?),
                    references: references.unwrap_or_default(),
                    guest: Some(cell.paths()),
                    former_config: Some(former.clone()),
                    ..HookInput::default()
                };
                let answer = plugin.call(Hook::ConfigChange, input).await.map(|outcome| outcome.change);
                answers.push((cell, answer));
            }
            Ok(answers)
        });
        asked.await
    }

    /// Asks a plugin's planning hooks anew for VMs that are up, and applies the difference to host and guest. The machine itself is
    /// as it was booted.
    ///
    /// # Errors
    /// [`EngineError::ShuttingDown`].
    pub fn replan(
        &self,
        plugin: Arc<dyn Plugin>,
        cells: Vec<Arc<Cell>>,
    ) -> Result<Operation<()>, EngineError> {
        let engine = self.clone();
        let name = plugin.name().to_owned();
        self.operations().begin(OperationKind::PluginChange, name, move |context, mut ctx| async move {
            let mut first = None;
            for cell in cells {
                context.progress(format!("planning {} anew", cell.name()), 0, None);
                if let Err(error) = engine.replan_one(&mut ctx, &plugin, &cell, context.id).await {
                    let message =
                        format!("plugin {} could not be planned anew: {}", plugin.name(), error.chain());
                    engine.event(EventKind::PluginFailed, &cell, Some(context.id), message);
                    first.get_or_insert(error);
                }
            }
            first.map_or(Ok(()), Err)
        })
    }

    async fn replan_one(
        &self,
        ctx: &mut Ctx<Unlocked>,
        plugin: &Arc<dyn Plugin>,
        cell: &Arc<Cell>,
        operation: OperationId,
    ) -> Result<(), EngineError> {
        let Admitted::Reserved(_reserved) =
            self.reserve(ctx, cell, Request::Set, Activity::Changing, operation).await?
        else {
            return Ok(());
        };
        if cell.live().is_none() {
            return Ok(());
        }
        let facts = self.vm_facts(cell).await?;
        // Whoever changes it is to know of its failure, and what it had planned before is to stay then.
        let mut asked = Asked::new(vec![plugin.clone()], facts.clone(), "configured").all_required();
        let planned = self.ask_for_plans(ctx, cell, &mut asked).await?.pop();
        let planned = planned.unwrap_or_else(|| Planned { plugin: plugin.clone(), plan: Plan::default() });
        let wanted = self.wanted(cell, &planned)?;
        let ids: Vec<_> = wanted.iter().map(|wanted| wanted.effect.id()).collect();
        let stale: Vec<_> = (cell.scope.entries(ctx).await.iter())
            .filter(|entry| entry.by.as_ref().is_some_and(|by| by.plugin == plugin.name()))
            .filter(|entry| entry.phase == Phase::Start && !ids.contains(&entry.effect.id()))
            // What the machine was booted with stays until it is off.
            .filter(|entry| {
                entry.effect.layer() == Layer::Network && !matches!(entry.effect, Effect::Tap { .. })
            })
            .map(|entry| entry.effect.id())
            .collect();
        if wanted.iter().any(|wanted| wanted.place == Where::Host || wanted.effect.layer() == Layer::Network)
        {
            self.ensure_network(ctx).await?;
        }
        for wanted in wanted {
            self.apply_wanted(ctx, cell, plugin.name(), wanted).await?;
        }
        cell.scope.unwind_these(ctx, &stale).await?;
        cell.scope.settle(ctx).await;
        if planned.plan.guest.is_empty() {
            return Ok(());
        }
        self.tell_guest(ctx, cell, facts, planned).await
    }

    /// Has the guest's agent apply what all plugins contribute now.
    async fn tell_guest(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Cell,
        facts: VmFacts,
        changed: Planned,
    ) -> Result<(), EngineError> {
        let mut plugins = self.inner.hooks.enabled();
        let place = plugins.iter().position(|plugin| plugin.name() == changed.plugin.name());
        let after = plugins.split_off(place.unwrap_or(plugins.len()));
        let others = |plugins| Asked::new(plugins, facts.clone(), "start");
        let mut all = self.ask_for_plans(ctx, cell, &mut others(plugins)).await?;
        all.push(changed);
        let after = after.into_iter().skip(usize::from(place.is_some())).collect();
        all.extend(self.ask_for_plans(ctx, cell, &mut others(after)).await?);
        let mut extras = Extras::default();
        for planned in &all {
            for part in &planned.plan.guest {
                self.guest_part(planned, part, &mut extras).await?;
            }
        }
        let network = match facts.addresses.is_empty() {
            true => None,
            false => Some(self.ensure_network(ctx).await?),
        };
        let mut config = self.guest_config(cell, network).await?;
        extras.extend_guest(&mut config);
        let guest = |source| EngineError::Guest { what: "apply its configuration", source };
        let (mut control, _) = vm_shim::connect_control(&cell.paths(), APPLY).await.map_err(guest)?;
        for warning in control.apply(config, APPLY).await.map_err(guest)? {
            tracing::warn!(vm = %cell.name(), %warning, "from the guest's agent");
        }
        Ok(())
    }

    /// Undoes what a plugin has planned for all VMs, and lets it clean up its own state if it can still be called. Kept disks and
    /// files stay.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] where a VM that is up has a disk of its; nothing was undone. [`EngineError::ShuttingDown`].
    pub fn forget_plugin(
        &self,
        name: &str,
        plugin: Option<Arc<dyn Plugin>>,
    ) -> Result<Operation<()>, EngineError> {
        let engine = self.clone();
        let name = name.to_owned();
        self.operations().begin(OperationKind::PluginChange, name.clone(), move |_, mut ctx| async move {
            let ctx = &mut ctx;
            let mut holders = Vec::new();
            for cell in engine.all() {
                // A start that has begun asks the plugins there were then, and may plan still.
                cell.free().await;
                let entries = cell.scope.entries(ctx).await;
                let is_disk = |effect: &Effect| effect.layer() == Layer::Block;
                let theirs = entries.iter().any(|entry| {
                    is_disk(&entry.effect) && entry.by.as_ref().is_some_and(|by| by.plugin == name)
                });
                if theirs && cell.live().is_some() {
                    holders.push(cell.name().to_string());
                }
            }
            if !holders.is_empty() {
                return Err(EngineError::InvalidArgument {
                    message: format!("a disk of plugin {name} is in use by {}", holders.join(", ")),
                    hint: format!("stop it first: vm stop {}", holders.join(" ")),
                });
            }
            let mut first = None;
            for cell in engine.all() {
                if let Err(error) = cell.scope.unwind_plugin(ctx, &name).await {
                    first.get_or_insert(error);
                }
                let Some(plugin) = plugin.as_ref().filter(|plugin| plugin.has(Hook::Cleanup)) else {
                    continue;
                };
                let facts = engine.vm_facts(&cell).await?;
                let input = HookInput {
                    reason: "plugin-removed".into(),
                    vm: Some(facts.clone()),
                    ..HookInput::default()
                };
                if let Err(failure) = plugin.call(Hook::Cleanup, input).await {
                    engine.told(&name, &facts, &failure.message);
                }
            }
            first.map_or(Ok(()), Err)
        })
    }
}
