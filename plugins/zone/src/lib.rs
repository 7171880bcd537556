//! Names of VMs: `NAME.vm` has its addresses, and its addresses have that name.

mod answers;
mod reverse;

use serde::Deserialize;
use vm_plugin_sdk::{Answer, Context, DnsRecord, Error, Facts, OrRefuse, Query, Resolver, Result, Vms, dns};

use answers::{Directory, Found};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Zone {
    zone: String,
    ttl_seconds: u32,
    subdomains: bool,
}

impl Directory for Vms {
    fn addresses(&self, name: &str) -> Vec<String> {
        Self::addresses(self, name)
    }

    fn name_of(&self, address: &str) -> Option<String> {
        Self::name_of(self, address)
    }
}

impl Resolver for Zone {
    fn zones(&mut self, _: &Context, facts: &Facts) -> Result<Vec<String>> {
        self.zone = self.zone.trim_matches('.').to_ascii_lowercase();
        if self.zone.is_empty() || self.zone == "arpa" || self.zone.ends_with(".arpa") {
            let message = format!("{:?} is no zone for names of VMs", self.zone);
            return Err(Error::new("zone.name", message).with_hint("set `zone` to a name like vm"));
        }
        let mut zones = vec![self.zone.clone()];
        if let Some(subnet) = facts.get("bridge.subnet") {
            let reverse = reverse::zones(&subnet);
            zones.extend(reverse.or_refuse("zone.subnet", format_args!("{subnet:?} is no network"))?);
        }
        Ok(zones)
    }

    fn resolve(&self, query: &Query, vms: &Vms) -> Result<Answer> {
        if query.query_class() != 1 {
            return Ok(Answer::Refused);
        }
        let name = query.name();
        Ok(match answers::find(&name, query.query_type(), &self.zone, self.subdomains, vms) {
            Found::NotMine => Answer::Pass,
            Found::NoName => Answer::Nxdomain,
            Found::Data(data) if data.is_empty() => Answer::Nodata,
            Found::Data(data) => Answer::Records(
                data.into_iter()
                    .map(|(record_type, data)| DnsRecord {
                        name: name.clone(),
                        record_type,
                        ttl_seconds: self.ttl_seconds,
                        data,
                    })
                    .collect(),
            ),
        })
    }
}

dns!(Zone);
