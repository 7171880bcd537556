//! Components that do harm. Each fails its own call with its name, and leaves the host as it was: the next good call works.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use vm_plugin::{CallError, Excess, Hook, Limits, Outcome, Runtime, ports::StateScope};

use crate::common::{FakeGuest, brief, harm, input, limits, plugin, runtime, state, vm};

/// Calls the hostile component; whatever it does, it is named, and a good one works afterwards.
async fn hostile(runtime: &Arc<Runtime>, hook: Hook, what: &str) -> Result<Outcome, CallError> {
    let hostile = plugin(runtime, "hostile", harm(what)).await;
    let mut live = input();
    live.sandbox = Some(Arc::new(FakeGuest::default()));
    let result = hostile.call(hook, live, &state()).await;
    if let Err(error) = &result {
        let text = error.to_string();
        assert!(text.contains("test-hostile") && text.contains(&hook.to_string()), "{text}");
        assert!(text.len() < 4096 && !error.hint().is_empty(), "{text}");
    }
    let good = plugin(runtime, "only-preflight", json!({})).await;
    assert_eq!(good.call(Hook::Preflight, input(), &state()).await.unwrap().findings.len(), 1);
    result
}

async fn excess(hook: Hook, what: &str) -> Excess {
    match hostile(&runtime(limits()), hook, what).await {
        Err(CallError::Excess { excess, .. }) => excess,
        other => panic!("{what}: {other:?}"),
    }
}

#[tokio::test]
async fn an_endless_loop_ends() {
    let error = hostile(&runtime(brief()), Hook::Preflight, "spin").await.unwrap_err();
    assert!(matches!(error, CallError::Excess { excess: Excess::Processor(_), .. }), "{error:?}");
    assert!(error.to_string().contains("more than 100 ms of processor time"), "{error}");
}

#[tokio::test]
async fn a_good_call_goes_on_beside_an_endless_loop_on_the_same_thread() {
    // One thread: only if the loop yields can the other call end before it.
    let runtime = runtime(limits());
    let spinning = plugin(&runtime, "hostile", harm("spin")).await;
    let good = plugin(&runtime, "only-preflight", json!({})).await;
    let state = state();
    tokio::select! {
        _ = spinning.call(Hook::Preflight, input(), &state) => panic!("it has a minute"),
        outcome = async {
            tokio::task::yield_now().await;
            good.call(Hook::Preflight, input(), &state).await
        } => assert_eq!(outcome.unwrap().findings.len(), 1),
    }
}

#[tokio::test]
async fn recursion_ends() {
    assert_eq!(excess(Hook::ContributeGuest, "recurse").await, Excess::Stack);
}

#[tokio::test]
async fn a_memory_bomb_goes_off_in_its_own_memory() {
    assert_eq!(excess(Hook::Preflight, "memory").await, Excess::Memory(Limits::default().memory));
}

#[tokio::test]
async fn a_million_effects_are_too_many() {
    assert_eq!(excess(Hook::ContributeGuest, "effects").await, Excess::Effects(1000));
    assert_eq!(excess(Hook::ContributeGuest, "many-big-files").await, Excess::EffectBytes(32 << 20));
}

#[tokio::test]
async fn large_things_are_not_carried_over() {
    assert_eq!(excess(Hook::ContributeGuest, "big-file").await, Excess::Transfer(20 << 20));
    let error = hostile(&runtime(limits()), Hook::ContributeGuest, "gigabyte").await.unwrap_err();
    assert!(matches!(error, CallError::Trapped { .. } | CallError::Excess { .. }), "{error:?}");
}

#[tokio::test]
async fn handles_and_findings_are_counted() {
    assert_eq!(excess(Hook::Preflight, "handles").await, Excess::Handles(1024));
    assert_eq!(excess(Hook::Preflight, "report-flood").await, Excess::Findings(200));
}

#[tokio::test]
async fn a_flood_of_messages_is_cut_and_counted() {
    let outcome = hostile(&runtime(limits()), Hook::Preflight, "log-flood").await.unwrap();
    assert_eq!((outcome.log.len(), outcome.log_dropped), (200, 99_800));
    let outcome = hostile(&runtime(limits()), Hook::Preflight, "long-log").await.unwrap();
    assert!(outcome.log[0].message.len() < 5000, "{}", outcome.log[0].message.len());
}

#[tokio::test]
async fn state_has_a_quota() {
    let runtime = runtime(limits());
    let hostile = plugin(&runtime, "hostile", harm("state-flood")).await;
    let state = state();
    hostile.call(Hook::Preflight, input(), &state).await.unwrap();
    let sizes = state.sizes("test-hostile", &StateScope::Vm(vm().id)).await.unwrap();
    let bytes: usize = sizes.values().sum();
    assert!(
        sizes.len() <= 1000 && bytes <= 4 << 20 && bytes > 3 << 20,
        "{} keys, {bytes} bytes",
        sizes.len()
    );
}

#[tokio::test]
async fn a_panic_in_any_hook_fails_that_hook() {
    let runtime = runtime(limits());
    for hook in [Hook::Preflight, Hook::ContributeGuest, Hook::PrepareHost, Hook::PostStart] {
        let error = hostile(&runtime, hook, "panic").await.unwrap_err();
        assert!(matches!(error, CallError::Trapped { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn sleeping_in_the_host_ends_too() {
    let runtime = runtime(Limits { wall_live: Duration::from_millis(100), ..limits() });
    let error = hostile(&runtime, Hook::PostStart, "sleep").await.unwrap_err();
    assert!(matches!(error, CallError::TimedOut { .. }), "{error:?}");
}

#[tokio::test]
async fn an_error_cannot_write_to_the_terminal() {
    let error = hostile(&runtime(limits()), Hook::Preflight, "big-error").await.unwrap_err();
    let CallError::Failed { error, .. } = error else { panic!("{error:?}") };
    assert_eq!(error.code, "plugin.bad-code");
    assert!(error.message.len() < 2100);
    let hint = error.hint.unwrap();
    assert!(!hint.contains('\u{1b}') && hint.len() < 1100, "{hint:?}");
}

#[tokio::test]
async fn paths_and_rules_are_what_they_seem() {
    let runtime = runtime(limits());
    for path in ["../etc/passwd", "/etc/../../x", "/etc//x", "/etc/x\n", "etc/x", "/"] {
        let error = hostile(&runtime, Hook::ContributeGuest, &format!("path:{path}")).await.unwrap_err();
        assert!(matches!(&error, CallError::Failed { error, .. } if error.code == "bad.path"), "{error}");
    }
    let error =
        hostile(&runtime, Hook::ContributeGuest, "path:/root/.ssh/authorized_keys").await.unwrap_err();
    assert!(
        matches!(&error, CallError::Denied { .. }) && error.hint().contains("authorized_keys"),
        "{error}"
    );
    for (what, code) in [("nft", "bad.network"), ("escape", "bad.path")] {
        let error = hostile(&runtime, Hook::PrepareHost, what).await.unwrap_err();
        assert!(matches!(&error, CallError::Failed { error, .. } if error.code == code), "{error}");
    }
    let error = hostile(&runtime, Hook::PrepareHost, "no-answer").await.unwrap_err();
    assert!(
        matches!(&error, CallError::Impossible { reason, .. } if reason.contains("no answer")),
        "{error}"
    );
    let error = hostile(&runtime, Hook::PrepareHost, "tool").await.unwrap_err();
    assert!(matches!(error, CallError::Denied { .. }), "{error}");
    // A handle that is not given back is no way around anything, nor any harm.
    assert_eq!(hostile(&runtime, Hook::PrepareHost, "kept-rule").await.unwrap().plan.host.len(), 1);
}

#[tokio::test]
async fn faults_in_a_row_disable_it_and_errors_do_not() {
    let runtime = runtime(Limits { failures: 3, ..limits() });
    let state = state();
    let polite = plugin(&runtime, "hostile", harm("path:x")).await;
    for _ in 0..5 {
        let error = polite.call(Hook::ContributeGuest, input(), &state).await.unwrap_err();
        assert!(matches!(error, CallError::Failed { .. }), "{error}");
    }
    assert!(polite.disabled().is_none());

    let rude = plugin(&runtime, "hostile", harm("panic")).await;
    for _ in 0..3 {
        assert!(rude.call(Hook::Preflight, input(), &state).await.unwrap_err().is_fault());
    }
    let error = rude.call(Hook::Preflight, input(), &state).await.unwrap_err();
    assert!(matches!(error, CallError::Disabled { failures: 3, .. }), "{error}");
    let stats = rude.stats()[&Hook::Preflight];
    assert_eq!((stats.calls, stats.faults), (3, 3), "a disabled one is not called");
    rude.enable();
    // One that goes well ends the row.
    rude.call(Hook::Preflight, input(), &state).await.unwrap_err();
    let harmless = vm_plugin::Input { config: Some(json!({ "harm": "" })), ..input() };
    rude.call(Hook::Preflight, harmless, &state).await.unwrap();
    for _ in 0..2 {
        rude.call(Hook::Preflight, input(), &state).await.unwrap_err();
    }
    assert!(rude.disabled().is_none());
}
