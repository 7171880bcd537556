//! What a component has: version, imports and the hooks it exports, found out once when it is loaded.

use std::borrow::Cow;

use wasmtime::{
    AsContextMut,
    component::{Component, Instance, InstancePre, Linker, Resource, types::ComponentItem},
};

use crate::{
    WIT_VERSION,
    bindings::exports::vm::plugin as hooks,
    broker::Call,
    call::Change,
    error::{LoadError, PluginError},
    hook::Hook,
    manifest::{World, version},
    runtime::Runtime,
    wasi,
};

/// A component, linked, with what it exports.
pub(crate) struct Parts {
    pub(crate) pre: InstancePre<Call>,
    preflight: Option<hooks::hook_preflight::GuestIndices>,
    contribute_guest: Option<hooks::hook_contribute_guest::GuestIndices>,
    contribute_machine: Option<hooks::hook_contribute_machine::GuestIndices>,
    prepare_host: Option<hooks::hook_prepare_host::GuestIndices>,
    post_start: Option<hooks::hook_post_start::GuestIndices>,
    config_change: Option<hooks::hook_config_change::GuestIndices>,
    cleanup: Option<hooks::hook_cleanup::GuestIndices>,
    doctor: Option<hooks::hook_doctor::GuestIndices>,
    pub(crate) resolver: Option<hooks::resolver::GuestIndices>,
    importer: Option<hooks::importer::GuestIndices>,
}

/// The component's own answer, in the host's words.
pub(crate) type Said = Result<Option<Change>, PluginError>;

/// A handle to what there is one of in each call.
fn one<T: 'static>() -> Resource<T> {
    Resource::new_borrow(0)
}

/// `vm:plugin/NAME@VERSION`, taken apart.
fn ours(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("vm:plugin/")?.split_once('@')
}

fn fits(theirs: &str) -> bool {
    let (theirs, ours) = (version(theirs), version(WIT_VERSION));
    // Within 0.1 everything fits; what is newer than the host is missed only when it is called.
    theirs.zip(ours).is_some_and(|(theirs, ours)| theirs[..2] == ours[..2])
}

/// Looks at the names before anything is linked, so that the answer can be in words.
fn look(runtime: &Runtime, plugin: &str, world: World, component: &Component) -> Result<(), LoadError> {
    let ty = component.component_type();
    let (mut imports, mut exports) = (Vec::new(), Vec::new());
    for (name, item) in ty.imports(&runtime.engine) {
        // A type alone gives nothing.
        if !matches!(item.ty, ComponentItem::Type(_)) {
            imports.push(name.to_owned());
        }
    }
    exports.extend(ty.exports(&runtime.engine).map(|(name, _)| name.to_owned()));
    for name in imports.iter().chain(&exports) {
        if let Some((_, theirs)) = ours(name)
            && !fits(theirs)
        {
            let theirs = theirs.to_owned();
            return Err(LoadError::Version { plugin: plugin.to_owned(), theirs, ours: WIT_VERSION });
        }
    }
    let given = |name: &str| {
        ours(name).is_some_and(|(interface, _)| world.imports().contains(&interface)) || wasi::given(name)
    };
    if let Some(import) = imports.into_iter().find(|name| !given(name)) {
        return Err(LoadError::Import { plugin: plugin.to_owned(), import });
    }
    Ok(())
}

/// The linker for a component: all components' own, but for those that import WASI.
fn linker_of<'a>(runtime: &'a Runtime, component: &Component) -> wasmtime::Result<Cow<'a, Linker<Call>>> {
    if !component.component_type().imports(&runtime.engine).any(|(name, _)| wasi::given(name)) {
        return Ok(Cow::Borrowed(&runtime.linker));
    }
    let mut linker = runtime.linker.clone();
    wasi::add(&mut linker, &runtime.engine, component)?;
    Ok(Cow::Owned(linker))
}

/// The linker, with a trap in the place of each function that the component imports and the host does not have.
fn with_traps(
    runtime: &Runtime,
    mut linker: Linker<Call>,
    component: &Component,
) -> wasmtime::Result<Linker<Call>> {
    linker.allow_shadowing(false);
    let ty = component.component_type();
    for (name, item) in ty.imports(&runtime.engine) {
        let (Some((interface, _)), ComponentItem::ComponentInstance(instance)) = (ours(name), item.ty) else {
            continue;
        };
        // The host's own version of it, where it has one: linking finds that for any version of 0.1.
        let mut ours = linker.instance(&format!("vm:plugin/{interface}@{WIT_VERSION}"))?;
        for (function, item) in instance.exports(&runtime.engine) {
            if matches!(item.ty, ComponentItem::ComponentFunc(_)) {
                let missing = format!("this host is too old to have {function} of {name}");
                // Fails for those that are there already, which is as it should be.
                let _ = ours.func_new(function, move |_, _, _, _| Err(wasmtime::Error::msg(missing.clone())));
            }
        }
    }
    Ok(linker)
}

impl Parts {
    pub(crate) fn new(
        runtime: &Runtime,
        plugin: &str,
        world: World,
        component: &Component,
    ) -> Result<Self, LoadError> {
        look(runtime, plugin, world, component)?;
        let link = |source| LoadError::Link { plugin: plugin.to_owned(), source };
        let linker = linker_of(runtime, component).map_err(link)?;
        let pre = match linker.instantiate_pre(component) {
            Ok(pre) => pre,
            // A newer component may know functions that came later. It runs as long as it does not call them.
            Err(_) => {
                let linker = with_traps(runtime, linker.into_owned(), component).map_err(link)?;
                linker.instantiate_pre(component).map_err(link)?
            }
        };
        let parts = Self {
            preflight: hooks::hook_preflight::GuestIndices::new(&pre).ok(),
            contribute_guest: hooks::hook_contribute_guest::GuestIndices::new(&pre).ok(),
            contribute_machine: hooks::hook_contribute_machine::GuestIndices::new(&pre).ok(),
            prepare_host: hooks::hook_prepare_host::GuestIndices::new(&pre).ok(),
            post_start: hooks::hook_post_start::GuestIndices::new(&pre).ok(),
            config_change: hooks::hook_config_change::GuestIndices::new(&pre).ok(),
            cleanup: hooks::hook_cleanup::GuestIndices::new(&pre).ok(),
            doctor: hooks::hook_doctor::GuestIndices::new(&pre).ok(),
            resolver: hooks::resolver::GuestIndices::new(&pre).ok(),
            importer: hooks::importer::GuestIndices::new(&pre).ok(),
            pre,
        };
        let found = match world {
            World::Capability => Hook::CAPABILITY.into_iter().any(|hook| parts.has(hook)),
            World::Dns => parts.resolver.is_some(),
            World::WorkspaceImporter => parts.importer.is_some(),
        };
        if !found {
            return Err(LoadError::Empty { plugin: plugin.to_owned(), world });
        }
        Ok(parts)
    }

    pub(crate) fn has(&self, hook: Hook) -> bool {
        match hook {
            Hook::Preflight => self.preflight.is_some(),
            Hook::ContributeGuest => self.contribute_guest.is_some(),
            Hook::ContributeMachine => self.contribute_machine.is_some(),
            Hook::PrepareHost => self.prepare_host.is_some(),
            Hook::PostStart => self.post_start.is_some(),
            Hook::ConfigChange => self.config_change.is_some(),
            Hook::Cleanup => self.cleanup.is_some(),
            Hook::Doctor => self.doctor.is_some(),
            Hook::Zones | Hook::Resolve => self.resolver.is_some(),
            Hook::Probe | Hook::Import => self.importer.is_some(),
        }
    }

    /// Calls one hook of an instance.
    pub(crate) async fn call(
        &self,
        mut store: impl AsContextMut<Data = Call>,
        instance: &Instance,
        hook: Hook,
    ) -> wasmtime::Result<Said> {
        let absent = || wasmtime::Error::msg("the component does not have it");
        macro_rules! run {
            ($part:ident, $call:ident $(, $argument:expr)*) => {{
                let guest = self.$part.as_ref().ok_or_else(absent)?.load(&mut store, instance)?;
                let said = guest.$call(&mut store $(, $argument)*).await?;
                said.map_err(PluginError::from)
            }};
        }
        let nothing = |()| None;
        Ok(match hook {
            Hook::Preflight => run!(preflight, call_run, one(), one(), one(), one()).map(nothing),
            Hook::ContributeGuest => {
                run!(contribute_guest, call_run, one(), one(), one(), one()).map(nothing)
            }
            Hook::ContributeMachine => {
                run!(contribute_machine, call_run, one(), one(), one(), one()).map(nothing)
            }
            Hook::PrepareHost => run!(prepare_host, call_run, one(), one(), one(), one()).map(nothing),
            Hook::PostStart => run!(post_start, call_run, one(), one(), one(), one()).map(nothing),
            Hook::ConfigChange => {
                let input = store.as_context_mut().data().input.clone();
                let former = input.former_config.as_ref().map(ToString::to_string).unwrap_or_default();
                let sandbox = input.sandbox.is_some().then(one);
                let said = run!(config_change, call_run, one(), one(), one(), &former, sandbox);
                said.map(|outcome| Some(outcome.into()))
            }
            Hook::Cleanup => run!(cleanup, call_run, one(), one(), one()).map(nothing),
            Hook::Doctor => run!(doctor, call_run, one(), one(), one()).map(nothing),
            Hook::Probe => run!(importer, call_probe, one(), one(), one()).map(nothing),
            Hook::Import => run!(importer, call_run, one(), one(), one(), one(), one(), one()).map(nothing),
            Hook::Zones | Hook::Resolve => {
                return Err(wasmtime::Error::msg("asked of its own instance only"));
            }
        })
    }

    /// Asks a resolver for its zones.
    pub(crate) async fn zones(
        &self,
        mut store: impl AsContextMut<Data = Call>,
        instance: &Instance,
    ) -> wasmtime::Result<Result<Vec<String>, PluginError>> {
        let absent = || wasmtime::Error::msg("the component is no resolver");
        let guest = self.resolver.as_ref().ok_or_else(absent)?.load(&mut store, instance)?;
        Ok(guest.call_zones(&mut store, one(), one()).await?.map_err(PluginError::from))
    }

    /// Asks a resolver one question.
    pub(crate) async fn resolve(
        mut store: impl AsContextMut<Data = Call>,
        guest: &hooks::resolver::Guest,
    ) -> wasmtime::Result<Result<hooks::resolver::Answer, PluginError>> {
        Ok(guest.call_resolve(&mut store, one(), one()).await?.map_err(PluginError::from))
    }
}

impl From<crate::bindings::vm::plugin::types::Outcome> for Change {
    fn from(outcome: crate::bindings::vm::plugin::types::Outcome) -> Self {
        use crate::bindings::vm::plugin::types::Outcome;
        match outcome {
            Outcome::Applied => Self::Applied,
            Outcome::NeedsRestart => Self::NeedsRestart,
            Outcome::Refused(error) => Self::Refused(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_0_1_fits_and_nothing_else() {
        for good in ["0.1.0", "0.1.99", "0.1.3-rc.1"] {
            assert!(fits(good), "{good}");
        }
        for bad in ["0.2.0", "0.0.1", "1.1.0", "1.0.0", "", "0.1", "x"] {
            assert!(!fits(bad), "{bad}");
        }
    }
}
