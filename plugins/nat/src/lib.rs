//! Lets VMs reach other networks: their packets leave with the host's address, and only answers come back.
//!
//! The rules name one VM's address each, so that they come and go with that VM. What nobody accepts, the host's own table does
//! not let through; published ports are the business of whoever publishes them.

mod rules;

use serde::Deserialize;
use vm_plugin_sdk::{
    ConfigChange, Context, Doctor, Error, Facts, HostPlan, Outcome, PrepareHost, Report, Result, Sandbox, Vm,
    capability,
};

use rules::{Answer, is_network, rules};

/// The kind of network, by the VM's own configuration, that this plugin makes work.
const NETWORK: &str = "nat";
/// RFC 3927. Packets to it are not to be forwarded; a host's own link may have a cloud's metadata service there.
const LINK_LOCAL: &str = "169.254.0.0/16";

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
struct Nat {
    /// Networks that VMs must not reach.
    deny: Vec<String>,
    /// Whether VMs reach link-local addresses, where clouds tell a host its credentials.
    link_local: bool,
}

impl Nat {
    /// All networks that VMs must not reach.
    fn denied(&self) -> Vec<String> {
        let link_local = (!self.link_local).then(|| LINK_LOCAL.to_owned());
        self.deny.iter().cloned().chain(link_local).collect()
    }

    /// What the schema cannot say.
    fn check(&self) -> Result {
        match self.deny.iter().find(|text| !is_network(text)) {
            None => Ok(()),
            Some(text) => {
                Err(Error::new("nat.network", format!("`deny` has {text:?}, which is no IPv4 network"))
                    .with_hint("write an address, or one with a prefix length: 192.0.2.0/24"))
            }
        }
    }
}

impl PrepareHost for Nat {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, plan: &HostPlan) -> Result {
        if vm.network() != NETWORK {
            return Ok(());
        }
        self.check()?;
        let addresses = vm.addresses();
        let denied = self.denied();
        let rules = rules(&addresses, &denied);
        if rules.is_empty() {
            let message = format!("{} has no IPv4 address", vm.name());
            return Err(Error::new("nat.no-address", message)
                .with_hint("a VM without a network is made with the network \"none\""));
        }
        plan.forwarding()?;
        for rule in rules {
            let built = plan.firewall_rule(rule.chain)?;
            if let Some(device) = rule.from {
                built.from_device(device)?;
            }
            if let Some(device) = rule.to {
                built.to_device(device)?;
            }
            if let Some(source) = rule.source {
                built.source(source)?;
            }
            if let Some(destination) = rule.destination {
                built.destination(destination)?;
            }
            if !rule.states.is_empty() {
                let states: Vec<_> = rule.states.iter().map(|&state| state.to_owned()).collect();
                built.connection_states(&states)?;
            }
            match rule.answer {
                Answer::Accept => built.accept()?,
                Answer::Reject => built.reject()?,
                Answer::Deny => built.deny()?,
                Answer::Masquerade => built.masquerade()?,
            }
        }
        Ok(())
    }
}

impl ConfigChange for Nat {
    /// Planning anew gives the new rules.
    fn run(&self, _: &Context, _: &Vm, _: &Facts, _: &Self, _: Option<&Sandbox>) -> Result<Outcome> {
        Ok(self.check().map_or_else(Outcome::Refused, |()| Outcome::Applied))
    }
}

impl Doctor for Nat {
    fn run(&self, _: &Context, _: &Facts, report: &Report) -> Result {
        let message = match self.denied().as_slice() {
            [] => "VMs may reach every network the host does".to_owned(),
            networks => format!("VMs may not reach {}", networks.join(", ")),
        };
        report.ok("reach", &message);
        Ok(())
    }
}

capability!(Nat: PrepareHost, ConfigChange, Doctor);
