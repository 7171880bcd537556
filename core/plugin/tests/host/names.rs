//! A component that lives: the name service.

use std::{net::IpAddr, sync::Arc};

use serde_json::json;
use vm_plugin::{
    CallError, Granted, Input, Limits, Plugin, Query, ResolveError, Resolved, Resolver, Runtime,
    ports::Directory,
};

use crate::common::{brief, component, limits, manifest, runtime, state};

struct TwoVms;

impl Directory for TwoVms {
    fn names(&self) -> Vec<String> {
        vec!["box".to_owned(), "old".to_owned()]
    }
    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        match name {
            "box" => vec!["10.0.0.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
            "old" => vec!["10.0.0.8".parse().unwrap()],
            _ => Vec::new(),
        }
    }
    fn name_of(&self, _: IpAddr) -> Option<String> {
        None
    }
}

pub(crate) async fn resolver(runtime: &Arc<Runtime>) -> Resolver {
    let manifest = manifest("names", "dns");
    let plugin = Plugin::new(runtime, manifest, &component("names"), Granted::All, json!({})).await.unwrap();
    Resolver::start(Arc::new(plugin), Input::default(), state(), Arc::new(TwoVms)).await.unwrap()
}

pub(crate) fn query(name: &str, query_type: u16) -> Query {
    Query { name: name.to_owned(), query_type, query_class: 1, asker: None }
}

#[tokio::test]
async fn questions_get_their_kind_of_answer() {
    let resolver = resolver(&runtime(limits())).await;
    assert_eq!(resolver.zones(), ["vm"]);
    assert!(resolver.covers("box.vm") && resolver.covers("vm"));
    assert!(!resolver.covers("boxvm") && !resolver.covers("vm.example"));
    let Resolved::Records(records) = resolver.resolve(query("box.vm", 28)).await.unwrap() else { panic!() };
    assert_eq!((records.len(), records[0].data.as_str(), records[0].ttl_seconds), (1, "2001:db8::7", 5));
    assert_eq!(resolver.resolve(query("old.vm", 28)).await.unwrap(), Resolved::NoData);
    assert_eq!(resolver.resolve(query("new.vm", 1)).await.unwrap(), Resolved::NxDomain);
    assert_eq!(resolver.resolve(query("example.org", 1)).await.unwrap(), Resolved::Pass);
}

#[tokio::test]
async fn handles_do_not_add_up_over_a_long_life() {
    let few = Limits { handles: 16, ..limits() };
    let resolver = resolver(&runtime(few)).await;
    for _ in 0..1000 {
        assert!(matches!(resolver.resolve(query("box.vm", 1)).await.unwrap(), Resolved::Records(_)));
    }
}

#[tokio::test]
async fn after_a_trap_or_a_loop_the_next_question_is_answered() {
    let resolver = resolver(&runtime(brief())).await;
    for harm in ["trap.vm", "spin.vm"] {
        let error = resolver.resolve(query(harm, 1)).await.unwrap_err();
        assert!(
            error.to_string().contains("plugin names") && error.to_string().contains("resolve"),
            "{error}"
        );
        assert!(matches!(resolver.resolve(query("box.vm", 1)).await.unwrap(), Resolved::Records(_)));
    }
}

#[tokio::test]
async fn one_that_only_traps_is_asked_no_more() {
    let resolver = resolver(&runtime(Limits { failures: 2, ..limits() })).await;
    for _ in 0..2 {
        resolver.resolve(query("trap.vm", 1)).await.unwrap_err();
    }
    let error = resolver.resolve(query("box.vm", 1)).await.unwrap_err();
    assert!(matches!(error, ResolveError::Call(CallError::Disabled { .. })), "{error}");
    resolver.plugin().enable();
    assert!(matches!(resolver.resolve(query("box.vm", 1)).await.unwrap(), Resolved::Records(_)));
}
