//! What the SDK promises, with components that use all of it.

use serde_json::json;
use vm_plugin::{CallError, Hook, Input, call::Change};

use crate::host::{Guest, fixture, input, state};

const EVERY: &str = r#"
    name = "every"
    version = "0.1.0"
    world = "capability"
    wit = "0.1.0"
    grants = [
        { kind = "guest-environment", names = ["NUMBER"], reason = "test" },
        { kind = "machine-size", max-memory-bytes = 0, max-cpus = 7, reason = "test" },
        { kind = "forwarding", reason = "test" },
    ]
    [config]
    type = "object"
    additionalProperties = true
    [config.properties]
    number = { type = "integer", default = 7 }
    panics = { type = "boolean", default = false }
"#;

#[tokio::test]
async fn each_hook_that_is_named_is_exported_and_called() {
    let plugin = fixture("every", EVERY, json!({})).await;
    for hook in Hook::CAPABILITY {
        let input = Input {
            sandbox: Some(std::sync::Arc::new(Guest::default())),
            former_config: Some(json!({ "number": 6, "panics": false })),
            ..input()
        };
        let outcome =
            plugin.call(hook, input, &state()).await.unwrap_or_else(|error| panic!("{hook}: {error}"));
        assert!(outcome.log[0].message.starts_with(&hook.to_string()), "{hook}: {:?}", outcome.log);
        if hook == Hook::ConfigChange {
            assert_eq!(outcome.change, Some(Change::Applied));
            assert_eq!(outcome.log[1].message, "from 6 to 7");
        }
    }
}

#[tokio::test]
async fn a_panic_is_told_in_its_own_words() {
    let plugin = fixture("every", EVERY, json!({ "panics": true })).await;
    let error = plugin.call(Hook::Preflight, input(), &state()).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Trapped { reason, .. } if reason.contains("the number was 7")),
        "{error}"
    );
}

#[tokio::test]
async fn a_configuration_that_the_type_cannot_hold_is_an_error_and_a_former_one_needs_a_restart() {
    let plugin = fixture("every", EVERY, json!({ "number": -1 })).await;
    let error = plugin.call(Hook::Preflight, input(), &state()).await.unwrap_err();
    assert!(matches!(&error, CallError::Failed { error, .. } if error.code == "config.type"), "{error}");

    let plugin = fixture("every", EVERY, json!({})).await;
    let input = Input { former_config: Some(json!({ "count": 1 })), ..input() };
    let outcome = plugin.call(Hook::ConfigChange, input, &state()).await.unwrap();
    assert_eq!(outcome.change, Some(Change::NeedsRestart));
}

#[tokio::test]
async fn an_importer_is_one() {
    let manifest = r#"
        name = "bring"
        version = "0.1.0"
        world = "workspace-importer"
        wit = "0.1.0"
    "#;
    let plugin = fixture("bring", manifest, json!({})).await;
    assert!(plugin.has(Hook::Probe) && plugin.has(Hook::Import) && !plugin.has(Hook::Preflight));
}
