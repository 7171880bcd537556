//! From the component's exports to an author's type.

use core::marker::PhantomData;
use std::{any::Any, cell::OnceCell, panic, sync::Once};

use serde::de::DeserializeOwned;

use crate::{
    Answer, Cleanup, ConfigChange, Context, ContributeGuest, ContributeMachine, Doctor, Error, Facts,
    GuestConfig, HostPlan, Importer, Job, MachineConfig, Offers, Outcome, PostStart, Preflight, PrepareHost,
    Query, Repo, Report, Resolver, Result, Sandbox, Vm, Vms, bindings, log,
};

/// What is exported in the name of an author's type.
#[derive(Debug)]
pub struct Adapter<T>(PhantomData<T>);

/// A trap carries no message, so the panic's goes to the log.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| panic::set_hook(Box::new(|panic| log::write(log::Level::Error, &panic.to_string()))));
}

fn read<T: DeserializeOwned>(config: &str) -> Result<T> {
    serde_json::from_str(config).map_err(|error| {
        Error::new("config.type", format!("the configuration does not fit the plugin's type: {error}"))
            .with_hint("for the author: the schema in plugin.toml must allow only what the type can hold")
    })
}

fn plugin<T: DeserializeOwned>(context: &Context) -> Result<T> {
    keep_panics();
    read(&context.config())
}

macro_rules! hook {
    ($hook:ident, $module:ident, $interface:ident, ($($name:ident: $type:ty),*)) => {
        impl<T: $hook> bindings::$module::exports::vm::plugin::$interface::Guest for Adapter<T> {
            fn run(context: &Context, $($name: $type),*) -> Result {
                plugin::<T>(context)?.run(context, $($name),*)
            }
        }
    };
}

hook!(Preflight, preflight, hook_preflight, (vm: &Vm, facts: &Facts, report: &Report));
hook!(ContributeGuest, contribute_guest, hook_contribute_guest, (vm: &Vm, facts: &Facts, guest: &GuestConfig));
hook!(
    ContributeMachine,
    contribute_machine,
    hook_contribute_machine,
    (vm: &Vm, facts: &Facts, machine: &MachineConfig)
);
hook!(PrepareHost, prepare_host, hook_prepare_host, (vm: &Vm, facts: &Facts, plan: &HostPlan));
hook!(PostStart, post_start, hook_post_start, (vm: &Vm, facts: &Facts, sandbox: &Sandbox));
hook!(Cleanup, cleanup, hook_cleanup, (vm: &Vm, facts: &Facts));
hook!(Doctor, doctor, hook_doctor, (facts: &Facts, report: &Report));

impl<T: ConfigChange> bindings::config_change::exports::vm::plugin::hook_config_change::Guest for Adapter<T> {
    fn run(
        context: &Context,
        vm: &Vm,
        facts: &Facts,
        former: String,
        sandbox: Option<&Sandbox>,
    ) -> Result<Outcome> {
        let new: T = plugin(context)?;
        match read(&former) {
            Ok(former) => new.run(context, vm, facts, &former, sandbox),
            Err(_) => Ok(Outcome::NeedsRestart),
        }
    }
}

impl<T: Importer> bindings::importer::exports::vm::plugin::importer::Guest for Adapter<T> {
    fn probe(context: &Context, repo: &Repo, offers: &Offers) -> Result {
        plugin::<T>(context)?.probe(context, repo, offers)
    }

    fn run(context: &Context, vm: &Vm, job: &Job, repo: &Repo, sandbox: &Sandbox, report: &Report) -> Result {
        plugin::<T>(context)?.run(context, vm, job, repo, sandbox, report)
    }
}

thread_local! {
    // The resolver of this instance; a component has one thread and one type.
    static RESOLVER: OnceCell<Box<dyn Any>> = const { OnceCell::new() };
}

impl<T: Resolver> bindings::dns::exports::vm::plugin::resolver::Guest for Adapter<T> {
    fn zones(context: &Context, facts: &Facts) -> Result<Vec<String>> {
        let mut resolver: T = plugin(context)?;
        let zones = resolver.zones(context, facts)?;
        RESOLVER
            .with(|cell| cell.set(Box::new(resolver)))
            .map_err(|_| Error::new("dns.begun", "the zones were asked for before"))?;
        Ok(zones)
    }

    fn resolve(query: &Query, vms: &Vms) -> Result<Answer> {
        RESOLVER.with(|cell| match cell.get().and_then(|resolver| resolver.downcast_ref::<T>()) {
            Some(resolver) => resolver.resolve(query, vms),
            None => Err(Error::new("dns.not-begun", "a question came before the zones were asked for")),
        })
    }
}
