//! The rules as plain values.

use std::net::Ipv4Addr;

/// A rule's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Accept,
    Reject,
    Deny,
    Masquerade,
}

/// One rule; conditions that are absent are not made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rule<'a> {
    pub(crate) chain: &'static str,
    pub(crate) from: Option<&'static str>,
    pub(crate) to: Option<&'static str>,
    pub(crate) source: Option<&'a str>,
    pub(crate) destination: Option<&'a str>,
    pub(crate) states: &'static [&'static str],
    pub(crate) answer: Answer,
}

const BRIDGE: Option<&str> = Some("bridge");
const ELSEWHERE: Option<&str> = Some("elsewhere");

/// The rules for a VM with these addresses, in the order in which they are asked. None for one without an IPv4 address: IPv6 from
/// guests goes nowhere, for there is no network to go by.
pub(crate) fn rules<'a>(addresses: &'a [String], deny: &'a [String]) -> Vec<Rule<'a>> {
    let mut rules = Vec::new();
    for address in addresses.iter().filter(|address| !address.contains(':')) {
        let leaving = |destination, states, answer| Rule {
            chain: "forward",
            from: BRIDGE,
            to: ELSEWHERE,
            source: Some(address.as_str()),
            destination,
            states,
            answer,
        };
        let coming = |states, answer| Rule {
            chain: "forward",
            from: ELSEWHERE,
            to: BRIDGE,
            source: None,
            destination: Some(address.as_str()),
            states,
            answer,
        };
        // A guest's answer that comes too late belongs to no connection, so it would leave with an address of its own.
        rules.push(leaving(None, &["invalid"], Answer::Deny));
        rules.extend(deny.iter().map(|network| leaving(Some(network.as_str()), &["new"], Answer::Reject)));
        rules.push(leaving(None, &[], Answer::Accept));
        rules.push(coming(&["established", "related"], Answer::Accept));
        rules.push(Rule {
            chain: "postrouting",
            from: None,
            to: ELSEWHERE,
            source: Some(address),
            destination: None,
            states: &[],
            answer: Answer::Masquerade,
        });
    }
    rules
}

/// Whether a rule about an IPv4 address can name this as the other end: an IPv4 address, or one with a prefix length.
pub(crate) fn is_network(text: &str) -> bool {
    let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
    let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
    address.parse::<Ipv4Addr>().is_ok() && digits && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn every_rule_is_about_the_vm_and_other_networks_only() {
        let (addresses, deny) = (texts(&["192.0.2.7", "2001:db8::7"]), texts(&["198.51.100.0/24"]));
        let rules = rules(&addresses, &deny);
        for rule in &rules {
            let mine = rule.source == Some("192.0.2.7") || rule.destination == Some("192.0.2.7");
            assert!(mine && (rule.from == ELSEWHERE || rule.to == ELSEWHERE), "{rule:?}");
        }
    }

    #[test]
    fn only_answers_come_in() {
        let addresses = texts(&["192.0.2.7"]);
        let rules = rules(&addresses, &[]);
        let coming: Vec<_> = rules.iter().filter(|rule| rule.to == BRIDGE).collect();
        assert_eq!(coming.len(), 1);
        assert_eq!((coming[0].states, coming[0].answer), (&["established", "related"][..], Answer::Accept));
        let masqueraded = rules.iter().filter(|rule| rule.answer == Answer::Masquerade).collect::<Vec<_>>();
        assert_eq!(masqueraded.len(), 1);
        assert_eq!((masqueraded[0].chain, masqueraded[0].source), ("postrouting", Some("192.0.2.7")));
    }

    #[test]
    fn what_is_denied_is_asked_before_all_is_accepted() {
        let (addresses, deny) = (texts(&["192.0.2.7"]), texts(&["10.0.0.0/8"]));
        let rules = rules(&addresses, &deny);
        let place = |wanted: Answer| rules.iter().position(|rule| rule.answer == wanted).unwrap();
        assert!(place(Answer::Reject) < place(Answer::Accept));
        assert_eq!(rules[place(Answer::Reject)].destination, Some("10.0.0.0/8"));
    }

    #[test]
    fn without_ipv4_there_is_nothing_to_do() {
        assert_eq!(rules(&texts(&["2001:db8::7"]), &[]), []);
    }

    #[test]
    fn what_is_denied_must_be_a_network_that_a_guest_could_reach() {
        for good in ["192.0.2.1", "192.0.2.0/24", "0.0.0.0/0"] {
            assert!(is_network(good), "{good}");
        }
        for bad in ["", "192.0.2.0/", "192.0.2.0/33", "192.0.2.0/+8", "2001:db8::/32", "example.org"] {
            assert!(!is_network(bad), "{bad}");
        }
    }
}
