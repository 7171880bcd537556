//! Names of VMs in a zone: `NAME.lab` has the addresses of the VM NAME.

use serde::Deserialize;
use vm_plugin_sdk::{Answer, Context, DnsRecord, Facts, Query, Resolver, Result, Vms, dns};

/// Record types (RFC 1035, RFC 3596).
const A: u16 = 1;
const AAAA: u16 = 28;

/// The configuration. The host checks it against `[config]` in plugin.toml and fills in the defaults.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct {{Type}} {
    zone: String,
}

impl Resolver for {{Type}} {
    // Once; only questions at or below these zones come.
    fn zones(&mut self, _: &Context, _: &Facts) -> Result<Vec<String>> {
        self.zone = self.zone.trim_matches('.').to_ascii_lowercase();
        Ok(vec![self.zone.clone()])
    }

    fn resolve(&self, query: &Query, vms: &Vms) -> Result<Answer> {
        let name = query.name();
        let Some(vm) = self.vm(&name) else {
            return Ok(if name == self.zone {
                Answer::Nodata
            } else {
                Answer::Nxdomain
            });
        };
        let addresses = vms.addresses(vm);
        if addresses.is_empty() {
            return Ok(Answer::Nxdomain);
        }
        let fitting = addresses
            .into_iter()
            .filter(|address| record_type(address) == query.query_type());
        let records: Vec<_> = fitting
            .map(|data| DnsRecord {
                name: name.clone(),
                record_type: query.query_type(),
                ttl_seconds: 5,
                data,
            })
            .collect();
        Ok(if records.is_empty() {
            Answer::Nodata
        } else {
            Answer::Records(records)
        })
    }
}

impl {{Type}} {
    /// The VM that a name is about.
    fn vm<'a>(&self, name: &'a str) -> Option<&'a str> {
        let vm = name.strip_suffix(&self.zone)?.strip_suffix('.')?;
        (!vm.contains('.')).then_some(vm)
    }
}

fn record_type(address: &str) -> u16 {
    if address.contains(':') { AAAA } else { A }
}

dns!({{Type}});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_a_label_below_the_zone() {
        let plugin = {{Type}} {
            zone: "lab".to_owned(),
        };
        assert_eq!(plugin.vm("dev.lab"), Some("dev"));
        for name in ["lab", "api.dev.lab", "devlab", "dev.lab.example"] {
            assert_eq!(plugin.vm(name), None, "{name}");
        }
    }

    #[test]
    fn an_address_has_its_record_type() {
        assert_eq!(record_type("192.0.2.7"), A);
        assert_eq!(record_type("2001:db8::7"), AAAA);
    }
}
