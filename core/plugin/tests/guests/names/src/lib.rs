//! A name service of one zone.

wit_bindgen::generate!({ path: "../../../../../wit", world: "dns", generate_all });

use exports::vm::plugin::resolver::{Answer, Context, DnsRecord, Error, Facts, Guest, Query, Vms};

struct Component;

impl Guest for Component {
    fn zones(_: &Context, _: &Facts) -> Result<Vec<String>, Error> {
        Ok(vec!["vm".to_owned()])
    }

    fn resolve(query: &Query, vms: &Vms) -> Result<Answer, Error> {
        let name = query.name();
        let Some(host) = name.strip_suffix(".vm") else { return Ok(Answer::Pass) };
        if host == "trap" {
            panic!("asked for the trap");
        }
        if host == "spin" {
            loop {
                std::hint::black_box(0);
            }
        }
        let addresses = vms.addresses(host);
        if addresses.is_empty() {
            return Ok(Answer::Nxdomain);
        }
        let records: Vec<_> = addresses
            .into_iter()
            .filter(|address| query.query_type() == if address.contains(':') { 28 } else { 1 })
            .map(|data| DnsRecord {
                name: name.clone(),
                record_type: query.query_type(),
                ttl_seconds: 5,
                data,
            })
            .collect();
        Ok(if records.is_empty() { Answer::Nodata } else { Answer::Records(records) })
    }
}

export!(Component);
