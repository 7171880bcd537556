//! Components that behave.

use std::sync::Arc;

use serde_json::json;
use vm_plugin::{
    CallError, Change, Granted, Hook, LoadError, Plugin, Plugins, Severity,
    plan::{Answer, Condition, Content, GuestPart, HostEffect, MachinePart, RefName},
    ports::StateScope,
};

use crate::common::{FakeGuest, component, input, limits, manifest, plugin, plugin_with, runtime, state, vm};

#[tokio::test]
async fn a_component_with_one_hook_has_one_hook() {
    let runtime = runtime(limits());
    let plugin = plugin(&runtime, "only-preflight", json!({})).await;
    let has: Vec<_> = Hook::CAPABILITY.into_iter().filter(|hook| plugin.has(*hook)).collect();
    assert_eq!(has, [Hook::Preflight]);
    let outcome = plugin.call(Hook::PrepareHost, input(), &state()).await.unwrap();
    assert!(outcome.plan.is_empty() && plugin.stats().is_empty(), "an absent hook is not called");

    let outcome = plugin.call(Hook::Preflight, input(), &state()).await.unwrap();
    assert_eq!(outcome.refusals().count(), 0);
    let mut large = input();
    large.vm.as_mut().unwrap().memory_bytes = 2 << 30;
    let outcome = plugin.call(Hook::Preflight, large, &state()).await.unwrap();
    let refusal = outcome.refusals().next().unwrap();
    assert_eq!(refusal.hint.as_deref(), Some("give it less with --memory"));
    assert_eq!(plugin.stats()[&Hook::Preflight].calls, 2);
}

#[tokio::test]
async fn every_effect_arrives_as_it_was_planned() {
    let runtime = runtime(limits());
    let plugin = plugin(&runtime, "full", json!({})).await;
    let state = state();
    let guest = plugin.call(Hook::ContributeGuest, input(), &state).await.unwrap().plan.guest;
    assert_eq!(guest.len(), 9);
    let motd = GuestPart::File {
        path: "/etc/motd".to_owned(),
        content: Content::Bytes(b"Welcome to box\n".to_vec()),
        mode: 0o644,
        uid: 0,
        gid: 0,
    };
    assert_eq!(guest[0], motd);
    assert!(
        matches!(&guest[8], GuestPart::File { content: Content::Blob(name), uid: 1, gid: 2, .. } if name == "hello.txt")
    );

    let machine = plugin.call(Hook::ContributeMachine, input(), &state).await.unwrap().plan.machine;
    let source = RefName("work".to_owned());
    assert_eq!(machine[0], MachinePart::Drive { serial: "work".to_owned(), source, read_only: false });
    assert_eq!(machine.len(), 6);

    let host = plugin.call(Hook::PrepareHost, input(), &state).await.unwrap().plan.host;
    assert_eq!(host.len(), 8);
    let HostEffect::FirewallRule(rule) = &host[2] else { panic!("{:?}", host[2]) };
    assert_eq!((rule.conditions.len(), &rule.answer), (2, &Answer::Masquerade));
    let Condition::Source(network) = &rule.conditions[0] else { panic!("{rule:?}") };
    assert_eq!((network.address.to_string().as_str(), network.prefix), ("10.0.0.7", 32));
    // The same input gives the same plan.
    assert_eq!(plugin.call(Hook::PrepareHost, input(), &state).await.unwrap().plan.host, host);
}

#[tokio::test]
async fn an_effect_beyond_the_grants_fails_the_call_and_names_the_line() {
    let runtime = runtime(limits());
    let mut manifest = manifest("narrow", "capability");
    manifest.grants.retain(|request| !request.grant.line().contains("\"disk\""));
    let wasm = component("full");
    let narrow = Plugin::new(&runtime, manifest, &wasm, Granted::All, json!({})).await.unwrap();
    let error = narrow.call(Hook::PrepareHost, input(), &state()).await.unwrap_err();
    assert!(matches!(error, CallError::Denied { .. }) && error.to_string().contains("narrow"), "{error}");
    assert!(
        error.hint().contains("kind = \"disk\"") && error.hint().contains("1073741824"),
        "{}",
        error.hint()
    );
    assert!(!error.is_fault(), "what it may not do is no reason to disable it");

    let nothing = plugin_with(&runtime, "full", Granted::These(Vec::new()), json!({})).await;
    let error = nothing.call(Hook::PrepareHost, input(), &state()).await.unwrap_err();
    assert!(error.to_string().contains("operator"), "{error}");
    // What acts at once is refused at once.
    let mut live = input();
    live.sandbox = Some(Arc::new(FakeGuest::default()));
    let error = nothing.call(Hook::PostStart, live, &state()).await.unwrap_err();
    assert!(matches!(&error, CallError::Failed { error, .. } if error.code == "grant.missing"), "{error}");
}

#[tokio::test]
async fn a_guest_is_acted_in_and_its_answers_are_kept() {
    let runtime = runtime(limits());
    let plugin = plugin(&runtime, "full", json!({})).await;
    let (state, guest) = (state(), Arc::new(FakeGuest::default()));
    let mut live = input();
    live.sandbox = Some(guest.clone());
    live.references.insert(RefName("web".to_owned()), "127.0.0.1:49152".to_owned());
    let mut dry = live.clone();
    dry.dry_run = true;
    plugin.call(Hook::PostStart, dry, &state).await.unwrap();
    assert_eq!(state.get("test-full", &StateScope::Plugin, "port").await.unwrap(), None);

    plugin.call(Hook::PostStart, live, &state).await.unwrap();
    assert_eq!(guest.files.lock().unwrap()["/tmp/out"], b"through the guest");
    let mine = StateScope::Vm(vm().id);
    assert_eq!(state.get("test-full", &mine, "seen").await.unwrap().unwrap(), b"through the guest");
    let port = state.get("test-full", &StateScope::Plugin, "port").await.unwrap();
    assert_eq!(port.unwrap(), b"127.0.0.1:49152", "a reference has its value once it was applied");

    let mut end = input();
    end.reason = "deleted".to_owned();
    plugin.call(Hook::Cleanup, end, &state).await.unwrap();
    assert_eq!(state.get("test-full", &mine, "seen").await.unwrap(), None);
    let last = state.get("test-full", &StateScope::Plugin, "last-end").await.unwrap();
    assert_eq!(last.unwrap(), b"deleted");
}

#[tokio::test]
async fn a_failed_hook_changes_no_state() {
    let runtime = runtime(limits());
    let mut manifest = manifest("no-clue", "capability");
    manifest.grants.clear();
    let plugin = Plugin::new(&runtime, manifest, &component("full"), Granted::All, json!({})).await.unwrap();
    let state = state();
    let error = plugin.call(Hook::ContributeGuest, input(), &state).await.unwrap_err();
    assert!(matches!(error, CallError::Denied { .. }), "{error}");
    assert!(state.sizes("no-clue", &StateScope::Vm(vm().id)).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_change_of_configuration_has_three_answers() {
    let runtime = runtime(limits());
    let plugin = plugin(&runtime, "full", json!({})).await;
    let change = |from: u32, to: u32, live: bool| {
        let mut input = input();
        input.former_config = Some(json!({ "most_cpus": from }));
        input.config = Some(plugin.check_config(json!({ "most_cpus": to })).unwrap());
        input.sandbox = live.then(|| Arc::new(FakeGuest::default()) as _);
        input
    };
    let call = async |input| plugin.call(Hook::ConfigChange, input, &state()).await.unwrap().change.unwrap();
    assert_eq!(call(change(4, 8, true)).await, Change::Applied);
    assert_eq!(call(change(4, 8, false)).await, Change::NeedsRestart);
    let refused = call(change(8, 4, true)).await;
    assert!(matches!(&refused, Change::Refused(error) if error.code == "cpus.fewer"), "{refused:?}");
    assert!(plugin.check_config(json!({ "most": 1 })).unwrap_err().to_string().contains("most_cpus"));
}

#[tokio::test]
async fn time_and_chance_are_had_only_with_a_grant() {
    let runtime = runtime(limits());
    let wasm = component("full");
    let about = async |grants: &str| {
        let text = format!(
            "name = \"c\"\nversion = \"0.0.1\"\nworld = \"capability\"\nwit = \"0.1.0\"\ngrants = [{grants}]"
        );
        let plugin =
            Plugin::new(&runtime, text.parse().unwrap(), &wasm, Granted::All, json!({})).await.unwrap();
        let mut doctor = input();
        doctor.vm = None;
        plugin.call(Hook::Doctor, doctor, &state()).await.unwrap().findings
    };
    let without = about("").await;
    assert_eq!(without[0].message, "cpu.count memory.total-bytes");
    assert!(without[1..].iter().all(|finding| finding.severity == Severity::Warning), "{without:?}");
    let grants = r#"{ kind = "clock", reason = "r" }, { kind = "random", reason = "r" }"#;
    let with = about(grants).await;
    assert_eq!((with[1].message.as_str(), with[1].severity), ("1234", Severity::Ok));
    assert_eq!(with, about(grants).await, "the same call again sees the same");
}

#[tokio::test]
async fn what_a_hook_needs_is_asked_for_before_it_is_called() {
    let runtime = runtime(limits());
    let plugin = plugin(&runtime, "full", json!({})).await;
    let error = plugin.call(Hook::PostStart, input(), &state()).await.unwrap_err();
    assert!(matches!(error, CallError::Incomplete { what: "a running guest", .. }), "{error}");
}

#[tokio::test]
async fn another_version_another_world_and_another_system_are_refused_in_words() {
    let runtime = runtime(limits());
    let wasm = component("only-preflight");
    let newer = replace(&wasm, b"@0.1.0", b"@0.2.0");
    let load = async |world: &str, wasm: &[u8]| {
        Plugin::new(&runtime, manifest("p", world), wasm, Granted::All, json!({})).await.unwrap_err()
    };
    let error = load("capability", &newer).await;
    assert_eq!(error.to_string(), "plugin p speaks vm:plugin 0.2.0, this host speaks 0.1.0");
    assert!(matches!(load("dns", &wasm).await, LoadError::Empty { .. }));
    assert!(matches!(load("capability", &component("names")).await, LoadError::Import { .. }));
    let error = load("capability", b"\0asm\x01\0\0\0").await;
    assert!(matches!(error, LoadError::Compile { .. }) && error.hint().contains("core module"), "{error}");

    // A later version of 0.1 is welcome.
    let later = replace(&wasm, b"@0.1.0", b"@0.1.7");
    let plugin =
        Plugin::new(&runtime, manifest("p", "capability"), &later, Granted::All, json!({})).await.unwrap();
    assert_eq!(plugin.call(Hook::Preflight, input(), &state()).await.unwrap().findings.len(), 1);
}

#[tokio::test]
async fn a_component_newer_than_the_host_runs_until_it_calls_what_is_not_there() {
    let runtime = runtime(limits());
    // As if it were made for a version in which this method has been added.
    let wasm = replace(&component("full"), b"machine-config.vsock", b"machine-config.later");
    let newer = Plugin::new(&runtime, manifest("newer", "capability"), &wasm, Granted::All, json!({}));
    let newer = newer.await.unwrap();
    assert_eq!(newer.call(Hook::PrepareHost, input(), &state()).await.unwrap().plan.host.len(), 8);
    let error = newer.call(Hook::ContributeMachine, input(), &state()).await.unwrap_err();
    assert!(error.to_string().contains("machine-config.later"), "{error}");
}

fn replace<const N: usize>(bytes: &[u8], from: &[u8; N], to: &[u8; N]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let places: Vec<_> =
        bytes.windows(N).enumerate().filter(|(_, text)| text == from).map(|(at, _)| at).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + N].copy_from_slice(to);
    }
    bytes
}

#[tokio::test]
async fn plugins_are_called_in_order_and_a_broken_one_hinders_nobody() {
    let runtime = runtime(limits());
    let dir = tempfile::tempdir().unwrap();
    let install = |name: &str, more: &str, wasm: &[u8]| {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let text = format!(
            "name = \"{name}\"\nversion = \"0.0.1\"\nworld = \"capability\"\nwit = \"0.1.0\"\n{more}"
        );
        std::fs::write(dir.join("plugin.toml"), text).unwrap();
        std::fs::write(dir.join("plugin.wasm"), wasm).unwrap();
        vm_plugin::Installed { dir, granted: Granted::All, config: json!({}) }
    };
    let wasm = component("only-preflight");
    let installed = [
        install("a", "after = [\"c\"]", &wasm),
        install("b", "", b"garbage"),
        install("c", "", &wasm),
        install("d", "naem = 1", &wasm),
    ];
    let (plugins, unloaded) = Plugins::load(&runtime, &installed, &[]).await.unwrap();
    assert_eq!(plugins.with(Hook::Preflight).map(|plugin| plugin.name()).collect::<Vec<_>>(), ["c", "a"]);
    assert_eq!(plugins.with(Hook::Doctor).count(), 0);
    let broken: Vec<_> = unloaded.iter().map(|one| vm_plugin::error::chain(&one.error)).collect();
    assert!(broken[0].contains("plugin b") && broken[1].contains("naem"), "{broken:?}");
}
