//! What wit-bindgen makes of the interfaces: the imports once, and a small world for each export. The documentation is in `wit/`.

/// Everything the host offers.
pub mod imports {
    wit_bindgen::generate!({ path: ["wit", "worlds"], world: "vm:sdk/imports", generate_all });
}

/// One export, with the types of [`imports`].
macro_rules! export {
    ($module:ident, $world:literal, $place:literal, $($interface:literal: $types:ident),+) => {
        pub mod $module {
            wit_bindgen::generate!({
                path: ["wit", "worlds"],
                world: $world,
                with: { $($interface: crate::bindings::imports::vm::plugin::$types),+ },
                pub_export_macro: true,
                default_bindings_module: $place,
            });
        }
    };
}

export!(preflight, "vm:sdk/preflight", "vm_plugin_sdk::bindings::preflight",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host);
export!(contribute_guest, "vm:sdk/contribute-guest", "vm_plugin_sdk::bindings::contribute_guest",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/plan@0.1.0": plan);
export!(contribute_machine, "vm:sdk/contribute-machine", "vm_plugin_sdk::bindings::contribute_machine",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/plan@0.1.0": plan);
export!(prepare_host, "vm:sdk/prepare-host", "vm_plugin_sdk::bindings::prepare_host",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/plan@0.1.0": plan);
export!(post_start, "vm:sdk/post-start", "vm_plugin_sdk::bindings::post_start",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/live@0.1.0": live);
export!(config_change, "vm:sdk/config-change", "vm_plugin_sdk::bindings::config_change",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/live@0.1.0": live);
export!(cleanup, "vm:sdk/cleanup", "vm_plugin_sdk::bindings::cleanup",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host);
export!(doctor, "vm:sdk/doctor", "vm_plugin_sdk::bindings::doctor",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host);
export!(dns, "vm:sdk/dns", "vm_plugin_sdk::bindings::dns",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/directory@0.1.0": directory);
export!(importer, "vm:sdk/importer", "vm_plugin_sdk::bindings::importer",
    "vm:plugin/types@0.1.0": types, "vm:plugin/host@0.1.0": host, "vm:plugin/live@0.1.0": live,
    "vm:plugin/repository@0.1.0": repository);
