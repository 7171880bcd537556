//! Greets guests by the variable GREETING, and refuses VMs with too many CPUs.

use serde::Deserialize;
use vm_plugin_sdk::{
    Context, ContributeGuest, Facts, GuestConfig, Preflight, Report, Result, Vm, capability, info,
};

/// The configuration. The host checks it against `[config]` in plugin.toml and fills in the defaults.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct {{Type}} {
    greeting: String,
    max_cpus: Option<u32>,
}

// Before anything is made for a start: a failure in the report says no.
impl Preflight for {{Type}} {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, report: &Report) -> Result {
        if let Some(refusal) = self.refusal(vm.cpus()) {
            report.failure("cpus", &refusal, Some("ask for fewer: --cpus"));
        }
        Ok(())
    }
}

// What the guest shall find when it boots. This plans; nothing happens before the hook has returned.
impl ContributeGuest for {{Type}} {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, guest: &GuestConfig) -> Result {
        info!("greeting {}", vm.name());
        guest.environment("GREETING", &self.greeting(&vm.name()))
    }
}

impl {{Type}} {
    fn greeting(&self, vm: &str) -> String {
        format!("{}, {vm}", self.greeting)
    }

    /// Why a VM with so many CPUs may not start.
    fn refusal(&self, cpus: u32) -> Option<String> {
        let most = self.max_cpus.filter(|most| cpus > *most)?;
        Some(format!("{cpus} CPUs are more than the {most} allowed"))
    }
}

capability!({{Type}}: Preflight, ContributeGuest);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_greeted_by_its_name() {
        let plugin = {{Type}} {
            greeting: "hello".to_owned(),
            max_cpus: None,
        };
        assert_eq!(plugin.greeting("dev"), "hello, dev");
    }

    #[test]
    fn only_more_cpus_than_allowed_are_refused() {
        let mut plugin = {{Type}} {
            greeting: "hello".to_owned(),
            max_cpus: Some(4),
        };
        assert_eq!(plugin.refusal(4), None);
        assert!(plugin.refusal(5).is_some());
        plugin.max_cpus = None;
        assert_eq!(plugin.refusal(5), None);
    }
}
