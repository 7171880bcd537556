//! A component with one hook.

wit_bindgen::generate!({
    path: "../../../../../wit",
    inline: "package test:only-preflight;
        world component { include vm:plugin/capability@0.1.0; export vm:plugin/hook-preflight@0.1.0; }",
    world: "test:only-preflight/component",
    generate_all,
});

use exports::vm::plugin::hook_preflight::{Context, Error, Facts, Guest, Report, Vm};

struct Component;

impl Guest for Component {
    fn run(_: &Context, vm: &Vm, facts: &Facts, report: &Report) -> Result<(), Error> {
        let host = facts.get("memory.total-bytes").and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0);
        if vm.memory_bytes() > host {
            report.failure(
                "memory",
                "the VM wants more than the host has",
                Some("give it less with --memory"),
            );
        } else {
            report.ok("memory", "fits");
        }
        Ok(())
    }
}

export!(Component);
