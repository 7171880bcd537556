//! A component that does, in any hook, whatever harm its configuration names.

wit_bindgen::generate!({
    path: "../../../../../wit",
    inline: "package test:hostile;
        world component {
            include vm:plugin/capability@0.1.0;
            export vm:plugin/hook-preflight@0.1.0;
            export vm:plugin/hook-contribute-guest@0.1.0;
            export vm:plugin/hook-prepare-host@0.1.0;
            export vm:plugin/hook-post-start@0.1.0;
        }",
    world: "test:hostile/component",
    generate_all,
});

use std::hint::black_box;

use exports::vm::plugin as hooks;
use vm::plugin::{
    host::{Context, Facts, Report, Vm},
    live::Sandbox,
    log,
    plan::{GuestConfig, HostPlan},
    state::{self, Scope},
    types::{Error, Lifetime},
};

struct Component;

#[expect(unconditional_recursion)]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1)) + 1)
}

fn harm(context: &Context) -> String {
    let harm = context.config();
    let harm: serde_json::Value = serde_json::from_str(&harm).expect("JSON");
    let harm = harm["harm"].as_str().unwrap_or_default().to_owned();
    match harm.as_str() {
        "spin" => loop {
            black_box(0);
        },
        "recurse" => {
            recurse(0);
        }
        "memory" => {
            let mut all = Vec::new();
            loop {
                all.push(black_box(vec![1_u8; 1 << 20]));
            }
        }
        "panic" => panic!("on purpose"),
        "log-flood" => {
            for number in 0..100_000 {
                log::write(log::Level::Info, &format!("message {number}"));
            }
        }
        "long-log" => log::write(log::Level::Info, &"x".repeat(8 << 20)),
        "handles" => {
            let mut all = Vec::new();
            for number in 0..1_000_000 {
                all.push(context.reference(&format!("r{number}")));
            }
            black_box(all);
        }
        "state-flood" => {
            for number in 0..1_000_000 {
                if state::set(Scope::Vm, &format!("key{number}"), &[0; 4096]).is_err() {
                    break;
                }
            }
        }
        "big-error" | "" => {}
        _ => {}
    }
    harm
}

impl hooks::hook_preflight::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, report: &Report) -> Result<(), Error> {
        match harm(context).as_str() {
            "report-flood" => {
                for number in 0..1_000_000 {
                    report.ok("x", &number.to_string());
                }
            }
            "big-error" => {
                return Err(Error {
                    code: "BAD CODE\n".to_owned(),
                    message: "m".repeat(4 << 20),
                    hint: Some("\u{1b}[31m".repeat(1000)),
                    retryable: true,
                });
            }
            _ => {}
        }
        Ok(())
    }
}

impl hooks::hook_contribute_guest::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, guest: &GuestConfig) -> Result<(), Error> {
        match harm(context).as_str() {
            "effects" => {
                for number in 0..1_000_000 {
                    let _ = guest.environment(&format!("V{number}"), "x");
                }
            }
            "gigabyte" => {
                // A string of a length that the memory does not have.
                let text = unsafe {
                    std::str::from_utf8_unchecked(std::slice::from_raw_parts(16 as *const u8, 1 << 30))
                };
                let _ = guest.environment("BIG", text);
            }
            "big-file" => guest.file("/big", &vec![0; 24 << 20], 0o600, 0, 0)?,
            "many-big-files" => {
                for number in 0..1000 {
                    let _ = guest.file(&format!("/big{number}"), &vec![0; 1 << 20], 0o600, 0, 0);
                }
            }
            path if path.starts_with("path:") => {
                guest.file(&path["path:".len()..], b"", 0o600, 0, 0)?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl hooks::hook_prepare_host::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, plan: &HostPlan) -> Result<(), Error> {
        match harm(context).as_str() {
            "nft" => {
                let rule = plan.firewall_rule("forward")?;
                rule.source("192.0.2.1 accept; flush ruleset")?;
            }
            "no-answer" => {
                plan.firewall_rule("forward")?.source("192.0.2.1")?;
            }
            "kept-rule" => {
                // A handle that is never given back.
                let rule = plan.firewall_rule("forward")?;
                rule.source("192.0.2.1")?;
                rule.accept()?;
                std::mem::forget(rule);
            }
            "escape" => {
                plan.file("../../../etc/passwd", b"", 0o600, Lifetime::Run)?;
            }
            "tool" => {
                plan.tool("t", "sh", &["-c".to_owned(), "id".to_owned()])?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl hooks::hook_post_start::Guest for Component {
    fn run(context: &Context, _: &Vm, _: &Facts, sandbox: &Sandbox) -> Result<(), Error> {
        if harm(context) == "sleep" {
            loop {
                let command = sandbox.command("sleep")?;
                command.argument("1000000");
                let _ = command.run();
            }
        }
        Ok(())
    }
}

export!(Component);
