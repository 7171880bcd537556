//! A trait for each hook. `self` is the configuration: checked against the manifest's schema, with its defaults filled in.
//!
//! What a hook can do is what the handles among its parameters can do.

use serde::de::DeserializeOwned;

use crate::{
    Answer, Context, Facts, GuestConfig, HostPlan, Job, MachineConfig, Offers, Outcome, Query, Repo, Report,
    Result, Sandbox, Vm, Vms,
};

/// Before anything is made for a start.
pub trait Preflight: DeserializeOwned {
    /// May this VM start here? A failure in the report says no.
    ///
    /// # Errors
    /// The plugin could not tell.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts, report: &Report) -> Result;
}

/// What the guest shall find when it boots.
pub trait ContributeGuest: DeserializeOwned {
    /// Adds to it.
    ///
    /// # Errors
    /// There is nothing sensible to add; the start fails if the plugin is required.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts, guest: &GuestConfig) -> Result;
}

/// What the virtual machine shall have.
pub trait ContributeMachine: DeserializeOwned {
    /// Adds to it.
    ///
    /// # Errors
    /// There is nothing sensible to add; the start fails if the plugin is required.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts, machine: &MachineConfig) -> Result;
}

/// What the host shall have before the VM runs.
pub trait PrepareHost: DeserializeOwned {
    /// Plans it.
    ///
    /// # Errors
    /// There is nothing sensible to plan; the start fails if the plugin is required.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts, plan: &HostPlan) -> Result;
}

/// The guest runs and answers.
pub trait PostStart: DeserializeOwned {
    /// Works in it.
    ///
    /// # Errors
    /// It did not work; the start fails if the plugin is required.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts, sandbox: &Sandbox) -> Result;
}

/// The plugin's configuration changes.
pub trait ConfigChange: DeserializeOwned {
    /// From `former` to `self`; the guest is given where it runs. A former configuration that this type cannot hold, as after
    /// an upgrade, is answered with [`Outcome::NeedsRestart`] without a call.
    ///
    /// # Errors
    /// The plugin could not tell.
    fn run(
        &self,
        context: &Context,
        vm: &Vm,
        facts: &Facts,
        former: &Self,
        sandbox: Option<&Sandbox>,
    ) -> Result<Outcome>;
}

/// The VM's run is over, or the plugin is removed: [`Context::reason`] says which.
pub trait Cleanup: DeserializeOwned {
    /// Cleans up the plugin's own state. What it planned is undone without its help.
    ///
    /// # Errors
    /// Reported; stops nothing.
    fn run(&self, context: &Context, vm: &Vm, facts: &Facts) -> Result;
}

/// Somebody asks how the plugin is.
pub trait Doctor: DeserializeOwned {
    /// Says it.
    ///
    /// # Errors
    /// The plugin could not tell.
    fn run(&self, context: &Context, facts: &Facts, report: &Report) -> Result;
}

/// World `dns`: answers questions. One value lives as long as its instance; questions come one after another.
pub trait Resolver: DeserializeOwned + 'static {
    /// The zones it answers for, e.g. `vm`. Called once, at the beginning, and may keep what it needs of facts.
    ///
    /// # Errors
    /// It cannot answer here.
    fn zones(&mut self, context: &Context, facts: &Facts) -> Result<Vec<String>>;

    /// Answers one question.
    ///
    /// # Errors
    /// It cannot answer this one: SERVFAIL.
    fn resolve(&self, query: &Query, vms: &Vms) -> Result<Answer>;
}

/// World `workspace-importer`: brings repositories into guests.
pub trait Importer: DeserializeOwned {
    /// Offers what could be done with a repository.
    ///
    /// # Errors
    /// The plugin could not tell.
    fn probe(&self, context: &Context, repo: &Repo, offers: &Offers) -> Result;

    /// Does what was chosen.
    ///
    /// # Errors
    /// It did not work.
    fn run(
        &self,
        context: &Context,
        vm: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result;
}
