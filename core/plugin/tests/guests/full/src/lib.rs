//! A component with every hook, which uses as much of the interface as it can.

wit_bindgen::generate!({
    path: "../../../../../wit",
    inline: "package test:full;
        world component {
            include vm:plugin/capability@0.1.0;
            export vm:plugin/hook-preflight@0.1.0;
            export vm:plugin/hook-contribute-guest@0.1.0;
            export vm:plugin/hook-contribute-machine@0.1.0;
            export vm:plugin/hook-prepare-host@0.1.0;
            export vm:plugin/hook-post-start@0.1.0;
            export vm:plugin/hook-config-change@0.1.0;
            export vm:plugin/hook-cleanup@0.1.0;
            export vm:plugin/hook-doctor@0.1.0;
        }",
    world: "test:full/component",
    generate_all,
});

use exports::vm::plugin as hooks;
use vm::plugin::{
    host::{Context, Facts, Report, Vm},
    live::Sandbox,
    log,
    plan::{GuestConfig, HostPlan, MachineConfig},
    state::{self, Scope},
    types::{Error, Lifetime, Outcome},
};

struct Component;

fn refuse(code: &str, message: String) -> Error {
    Error { code: code.to_owned(), message, hint: None, retryable: false }
}

fn config(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("the host gives JSON")
}

impl hooks::hook_preflight::Guest for Component {
    fn run(context: &Context, vm: &Vm, _: &Facts, report: &Report) -> Result<(), Error> {
        let most = config(&context.config())["most_cpus"].as_u64().unwrap_or(64);
        if u64::from(vm.cpus()) > most {
            report.failure("cpus", &format!("{} wants more than {most}", vm.name()), Some("ask for fewer"));
        }
        log::write(log::Level::Info, &format!("{} at {}", vm.name(), context.reason()));
        Ok(())
    }
}

impl hooks::hook_contribute_guest::Guest for Component {
    fn run(context: &Context, vm: &Vm, _: &Facts, guest: &GuestConfig) -> Result<(), Error> {
        guest.file("/etc/motd", format!("Welcome to {}\n", vm.name()).as_bytes(), 0o644, 0, 0)?;
        guest.environment("VM_NAME", &vm.name())?;
        guest.hosts_entry("192.0.2.9", &["proxy".to_owned()])?;
        guest.mount_drive("work", "/work", "ext4", &["noatime".to_owned()])?;
        guest.mount("tmpfs", "/scratch", &[])?;
        guest.kernel_module("overlay")?;
        guest.unit("hello.service", "[Service]\nExecStart=/bin/true\n")?;
        guest.boot_command(&["/bin/true".to_owned()])?;
        if let Ok(blob) = context.blob("hello.txt") {
            assert_eq!(blob.size(), 5);
            guest.file_from_blob("/etc/hello", &blob, 0o600, 1, 2)?;
        }
        Ok(())
    }
}

impl hooks::hook_contribute_machine::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, machine: &MachineConfig) -> Result<(), Error> {
        machine.drive("work", &context.reference("work")?, false)?;
        machine.kernel_argument("quiet")?;
        machine.memory_floor(256 << 20)?;
        machine.cpu_floor(1)?;
        machine.nic("second")?;
        machine.vsock()?;
        Ok(())
    }
}

impl hooks::hook_prepare_host::Guest for Component {
    fn run(_: &Context, vm: &Vm, _: &Facts, plan: &HostPlan) -> Result<(), Error> {
        let disk = plan.disk("work", 1 << 30, Some("ext4"), Lifetime::Kept)?;
        assert_eq!((disk.name().as_str(), disk.value()), ("work", None));
        plan.forwarding()?;
        let rule = plan.firewall_rule("postrouting")?;
        rule.source(&vm.addresses()[0])?;
        rule.to_device("elsewhere")?;
        rule.masquerade()?;
        plan.publish_port("web", "tcp", None, None, 80)?;
        plan.dns_record("git.vm", 1, 60, "192.0.2.7")?;
        plan.bridge_sysctl("ipv4/rp_filter", "2")?;
        plan.tool("greeting", "echo", &["hello".to_owned()])?;
        plan.file("notes/a.txt", b"a", 0o600, Lifetime::Vm)?;
        Ok(())
    }
}

impl hooks::hook_post_start::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, sandbox: &Sandbox) -> Result<(), Error> {
        let command = sandbox.command("cat")?;
        command.argument("-");
        command.input(b"through the guest");
        let output = command.run()?;
        if output.code() != Some(0) {
            return Err(refuse("guest.cat", String::from_utf8_lossy(&output.stderr()).into_owned()));
        }
        sandbox.write_file("/tmp/out", &output.stdout(), 0o644, 0, 0)?;
        let back = sandbox.read_file("/tmp/out", 1024)?;
        state::set(Scope::Vm, "seen", &back)?;
        let port = context.reference("web")?.value().unwrap_or_default();
        state::set(Scope::Plugin, "port", port.as_bytes())
    }
}

impl hooks::hook_config_change::Guest for Component {
    fn run(
        context: &Context,
        _: &Vm,
        _: &Facts,
        former: String,
        sandbox: Option<&Sandbox>,
    ) -> Result<Outcome, Error> {
        let (old, new) = (config(&former), config(&context.config()));
        Ok(match (sandbox, new["most_cpus"].as_u64() < old["most_cpus"].as_u64()) {
            (_, true) => Outcome::Refused(refuse("cpus.fewer", "it can only grow".to_owned())),
            (Some(_), _) => Outcome::Applied,
            (None, _) => Outcome::NeedsRestart,
        })
    }
}

impl hooks::hook_cleanup::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts) -> Result<(), Error> {
        for key in state::keys(Scope::Vm, "")? {
            state::delete(Scope::Vm, &key)?;
        }
        state::set(Scope::Plugin, "last-end", context.reason().as_bytes())
    }
}

impl hooks::hook_doctor::Guest for Component {
    fn run(context: &Context, facts: &Facts, report: &Report) -> Result<(), Error> {
        report.ok("facts", &facts.names().join(" "));
        match context.now() {
            Ok(now) => report.ok("clock", &now.to_string()),
            Err(error) => report.warning("clock", &error.message, error.hint.as_deref()),
        }
        match context.random(4) {
            Ok(bytes) => report.ok("random", &format!("{bytes:?}")),
            Err(error) => report.warning("random", &error.message, error.hint.as_deref()),
        }
        Ok(())
    }
}

export!(Component);
