//! What the component model's interface looks like in Rust: made from `wit/`. The handles that a hook gets as parameters are
//! borrowed, so that they end with the call; those it makes itself are entries of the call's table.

wasmtime::component::bindgen!({
    path: "../../wit",
    inline: "
        package vm:everything;
        world everything {
            include vm:plugin/capability@0.1.0;
            include vm:plugin/dns@0.1.0;
            include vm:plugin/workspace-importer@0.1.0;
            export vm:plugin/hook-preflight@0.1.0;
            export vm:plugin/hook-contribute-guest@0.1.0;
            export vm:plugin/hook-contribute-machine@0.1.0;
            export vm:plugin/hook-prepare-host@0.1.0;
            export vm:plugin/hook-post-start@0.1.0;
            export vm:plugin/hook-config-change@0.1.0;
            export vm:plugin/hook-cleanup@0.1.0;
            export vm:plugin/hook-doctor@0.1.0;
        }
    ",
    world: "vm:everything/everything",
    imports: {
        "vm:plugin/live": async | trappable,
        "vm:plugin/state": async | trappable,
        "vm:plugin/host.[method]blob.size": async | trappable,
        "vm:plugin/host.[method]blob.digest": async | trappable,
        "vm:plugin/host.[method]blob.read": async | trappable,
        "vm:plugin/repository.[method]repo.paths": async | trappable,
        "vm:plugin/repository.[method]repo.submodules": async | trappable,
        "vm:plugin/repository.[method]repo.read-file": async | trappable,
        "vm:plugin/repository.[method]repo.archive": async | trappable,
        "vm:plugin/repository.[method]repo.bundle": async | trappable,
        "vm:plugin/repository.[method]repo.patch": async | trappable,
        "vm:plugin/repository.[method]repo.history": async | trappable,
        "vm:plugin/repository.[method]repo.compare": async | trappable,
        "vm:plugin/repository.[method]difference.apply": async | trappable,
        default: trappable,
    },
    exports: { default: async },
    trappable_error_type: { "vm:plugin/types.error" => crate::broker::Refusal },
    with: {
        "vm:plugin/host.context": crate::broker::Context,
        "vm:plugin/host.vm": crate::broker::Vm,
        "vm:plugin/host.facts": crate::broker::Facts,
        "vm:plugin/host.report": crate::broker::Report,
        "vm:plugin/host.reference": crate::broker::Reference,
        "vm:plugin/host.blob": crate::broker::BlobHandle,
        "vm:plugin/plan.machine-config": crate::broker::MachineConfig,
        "vm:plugin/plan.guest-config": crate::broker::GuestConfig,
        "vm:plugin/plan.host-plan": crate::broker::HostPlan,
        "vm:plugin/plan.rule": crate::broker::RuleHandle,
        "vm:plugin/live.sandbox": crate::broker::SandboxHandle,
        "vm:plugin/live.command": crate::broker::CommandHandle,
        "vm:plugin/live.output": crate::broker::OutputHandle,
        "vm:plugin/directory.vms": crate::broker::Vms,
        "vm:plugin/directory.query": crate::broker::QueryHandle,
        "vm:plugin/repository.repo": crate::broker::RepoHandle,
        "vm:plugin/repository.difference": crate::broker::DifferenceHandle,
        "vm:plugin/repository.offers": crate::broker::Offers,
        "vm:plugin/repository.job": crate::broker::JobHandle,
    },
});
