//! From a question to what is known.

use crate::reverse;

const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;
const ANY: u16 = 255;

/// The VMs.
pub(crate) trait Directory {
    fn addresses(&self, name: &str) -> Vec<String>;
    fn name_of(&self, address: &str) -> Option<String>;
}

/// What there is to a question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The name is of no zone of ours.
    NotMine,
    /// There is no such name.
    NoName,
    /// The name exists and has this of the type asked for: the type's number and the data. May be nothing.
    Data(Vec<(u16, String)>),
}

pub(crate) fn find(
    name: &str,
    query_type: u16,
    zone: &str,
    subdomains: bool,
    directory: &impl Directory,
) -> Found {
    match reverse::parse(name) {
        Some(reverse::Reverse::Part) => return Found::Data(Vec::new()),
        Some(reverse::Reverse::Not) => return Found::NoName,
        Some(reverse::Reverse::Address(address)) => {
            return match directory.name_of(&address.to_string()) {
                None => Found::NoName,
                Some(vm) if query_type == PTR || query_type == ANY => {
                    Found::Data(vec![(PTR, format!("{vm}.{zone}."))])
                }
                Some(_) => Found::Data(Vec::new()),
            };
        }
        None => {}
    }
    if name == zone {
        return Found::Data(Vec::new());
    }
    let Some(below) = name.strip_suffix(zone).and_then(|name| name.strip_suffix('.')) else {
        return Found::NotMine;
    };
    let vm = match below.rsplit_once('.') {
        None => below,
        Some((_, vm)) if subdomains => vm,
        Some(_) => return Found::NoName,
    };
    let addresses = directory.addresses(vm);
    if addresses.is_empty() {
        return Found::NoName;
    }
    let of_type = |address: String| {
        let record_type = if address.contains(':') { AAAA } else { A };
        (query_type == record_type || query_type == ANY).then_some((record_type, address))
    };
    Found::Data(addresses.into_iter().filter_map(of_type).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Two;

    impl Directory for Two {
        fn addresses(&self, name: &str) -> Vec<String> {
            match name {
                "dev" => vec!["192.0.2.7".to_owned(), "2001:db8::7".to_owned()],
                "four" => vec!["192.0.2.8".to_owned()],
                _ => Vec::new(),
            }
        }

        fn name_of(&self, address: &str) -> Option<String> {
            (address == "192.0.2.7" || address == "2001:db8::7").then(|| "dev".to_owned())
        }
    }

    fn ask(name: &str, query_type: u16) -> Found {
        find(name, query_type, "vm", false, &Two)
    }

    fn one(record_type: u16, data: &str) -> Found {
        Found::Data(vec![(record_type, data.to_owned())])
    }

    #[test]
    fn a_vm_has_its_addresses() {
        assert_eq!(ask("dev.vm", A), one(A, "192.0.2.7"));
        assert_eq!(ask("dev.vm", AAAA), one(AAAA, "2001:db8::7"));
        let Found::Data(all) = ask("dev.vm", ANY) else { panic!("nothing") };
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn no_such_name_and_no_such_type_differ() {
        assert_eq!(ask("gone.vm", A), Found::NoName);
        assert_eq!(ask("four.vm", AAAA), Found::Data(Vec::new()));
        assert_eq!(ask("dev.vm", 15), Found::Data(Vec::new()));
        assert_eq!(ask("vm", A), Found::Data(Vec::new()), "the zone itself exists");
    }

    #[test]
    fn names_that_only_look_alike_are_not_ours() {
        assert_eq!(ask("dev.notvm", A), Found::NotMine);
        assert_eq!(ask("devvm", A), Found::NotMine);
        assert_eq!(ask("dev.vm.example", A), Found::NotMine);
    }

    #[test]
    fn below_a_vm_there_is_something_only_if_asked_for() {
        assert_eq!(ask("api.dev.vm", A), Found::NoName);
        assert_eq!(find("a.api.dev.vm", A, "vm", true, &Two), one(A, "192.0.2.7"));
        assert_eq!(find("api.gone.vm", A, "vm", true, &Two), Found::NoName);
        assert_eq!(find("dev.lab.example", A, "lab.example", false, &Two), one(A, "192.0.2.7"));
    }

    #[test]
    fn an_address_has_its_vm() {
        assert_eq!(ask("7.2.0.192.in-addr.arpa", PTR), one(PTR, "dev.vm."));
        assert_eq!(ask("7.2.0.192.in-addr.arpa", A), Found::Data(Vec::new()));
        assert_eq!(ask("9.2.0.192.in-addr.arpa", PTR), Found::NoName);
        assert_eq!(ask("2.0.192.in-addr.arpa", PTR), Found::Data(Vec::new()), "names below it exist");
        assert_eq!(ask("x.2.0.192.in-addr.arpa", PTR), Found::NoName);
        let nibbles = "7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        assert_eq!(ask(nibbles, PTR), one(PTR, "dev.vm."));
    }
}
