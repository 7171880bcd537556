//! Verbs about plugins, and plans: what they ask the daemon for, and how they tell what came of it.

use std::fs;

use serde_json::{Value, json};
use vm_api::{ErrorKind, Problem, VmPlan};

use crate::{
    host::{Host, json as parse, lines, stderr, stdout},
    stub::{Answers, End, Stub},
    terminal::on_a_terminal,
};

fn grant(index: usize, kind: &str, detail: &str, reason: &str, granted: bool) -> Value {
    json!({
        "index": index, "kind": kind, "detail": detail, "reason": reason, "granted": granted,
        "grant": {"kind": kind},
    })
}

fn schema() -> Value {
    json!({"type": "object", "properties": {
        "max-cpus": {"type": "integer"}, "labels": {"type": "array", "items": {"type": "string"}},
    }})
}

/// What the daemon says of a plugin that is not installed yet.
fn inspection(grants: &[Value]) -> Value {
    json!({
        "name": "nat", "version": "1.1.0", "description": "Lets VMs out", "world": "capability", "wit": "0.1.0",
        "required": true, "before": [], "after": ["limits"], "digest": "sha256:aa", "manifest_digest": "sha256:bb",
        "component_bytes": 70_000, "grants": grants, "config_schema": schema(), "installed": null,
        "source": "/plugins/nat",
    })
}

fn plugin(grants: &[Value]) -> Value {
    let granted = grants.iter().filter(|grant| grant["granted"] == true).count();
    json!({
        "name": "nat", "version": "1.1.0", "description": "Lets VMs out", "world": "capability",
        "digest": "sha256:aa", "state": "enabled", "required": true, "position": 2,
        "hooks": ["prepare-host"], "requested": grants.len(), "granted": granted, "calls": 12, "errors": 1,
        "wit": "0.1.0", "source": "/plugins/nat", "installed_at": 1_700_000_000, "before": [],
        "after": ["limits"], "grants": grants, "config": {"max-cpus": 4, "labels": []},
        "config_given": {"max-cpus": 4}, "config_schema": schema(),
        "stats": [{"hook": "prepare-host", "calls": 12, "errors": 1, "faults": 0, "mean_us": 41, "longest_us": 1790}],
        "disks": [], "blobs": ["key.pem"], "files_dir": "/var/lib/vmd/plugins/nat/files",
    })
}

fn nat() -> Vec<Value> {
    vec![
        grant(0, "firewall", "chains = [\"forward\"]", "what passes", false),
        grant(1, "forwarding", "", "that anything passes", false),
    ]
}

fn answers(ends: &[(&'static str, Value)]) -> Answers {
    let ends = ends.iter().map(|(method, value)| ((*method, "*"), End::Result(value.clone()))).collect();
    Answers { ends, ..Answers::default() }
}

/// A host, and a directory on it that may be a plugin.
fn host_with_plugin() -> (Host, String) {
    let host = Host::new();
    let dir = host.path("nat");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("plugin.toml"), "name = \"nat\"\n").unwrap();
    fs::write(dir.join("plugin.wasm"), "").unwrap();
    let dir = dir.to_str().unwrap().to_owned();
    (host, dir)
}

#[test]
fn an_installation_shows_what_is_asked_for_and_needs_a_word_where_nobody_can_be_asked() {
    let (host, dir) = host_with_plugin();
    let stub = Stub::new(&host, answers(&[("plugin.inspect", inspection(&nat()))]));
    let text = stderr(&host.run(&format!("plugin install {dir}")), 2);
    for part in [
        "nat 1.1.0, world capability",
        "firewall  chains = [\"forward\"]\n      allows: rules in these chains of the daemon's own firewall table\n      why:    what passes",
        "It cannot read files of this host, use the network of this host",
        "required:    yes: where it fails, VMs do not start",
        "no terminal",
        "hint: say --grant all, or which, e.g. --grant firewall,forwarding",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("change this host"), "it asks for changing the host: {text}");
    assert!(stderr(&host.run(&format!("plugin install {dir} --yes")), 2).contains("--yes grants nothing"));
    assert!(
        stderr(&host.run(&format!("plugin install {dir} --grant disk")), 2).contains("firewall, forwarding")
    );
    let output = host.run(&format!("plugin install {dir} --json"));
    assert_eq!(parse(stderr(&output, 2).as_bytes())["error"]["kind"], "invalid_argument");
    assert!(stub.asked_for("plugin.install").is_empty(), "nothing was begun");
}

#[test]
fn an_installation_hands_on_what_was_shown_granted_and_configured() {
    let (host, dir) = host_with_plugin();
    let mut granted = nat();
    granted[1]["granted"] = json!(true);
    let stub = Stub::new(
        &host,
        answers(&[("plugin.inspect", inspection(&nat())), ("plugin.install", plugin(&granted))]),
    );
    fs::write(host.path("config.json"), r#"{"labels": ["a"]}"#).unwrap();
    let config = host.path("config.json");
    let line =
        format!("plugin install {dir} --grant forwarding --config {} --config max-cpus=2", config.display());
    let text = stdout(&host.run(&line), 0);
    assert_eq!(
        text,
        "nat 1.1.0 is installed and enabled, 1 of 2 grants given\nnot granted: firewall; what needs it fails\n"
    );
    let expected = json!({
        "source": fs::canonicalize(&dir).unwrap(), "grants": {"kinds": ["forwarding"]},
        "config": {"labels": ["a"], "max-cpus": 2}, "upgrade": false, "disabled": false,
        "digest": "sha256:aa", "manifest_digest": "sha256:bb",
    });
    assert_eq!(stub.asked_for("plugin.install")[0][0], expected);
    let output = host.run(&format!("plugin install {dir} --grant all --disabled --json"));
    assert_eq!(parse(stdout(&output, 0).as_bytes())["name"], "nat");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let asked = &stub.asked_for("plugin.install")[1][0];
    assert_eq!(
        (&asked["grants"], &asked["config"], &asked["disabled"]),
        (&json!("all"), &Value::Null, &json!(true))
    );
    assert!(
        stderr(&host.run(&format!("plugin install {dir} --config cpus=2 --yes")), 2).contains("max-cpus")
    );
}

#[test]
fn on_a_terminal_an_installation_asks_and_no_is_the_default() {
    let (host, dir) = host_with_plugin();
    let stub = Stub::new(
        &host,
        answers(&[("plugin.inspect", inspection(&nat())), ("plugin.install", plugin(&nat()))]),
    );
    let install = || host.command(&format!("plugin install {dir}"));
    let shown = on_a_terminal(install(), "\n");
    assert!(shown.terminal.contains("Install nat and grant all of this? [y/N]"), "{}", shown.terminal);
    assert!(shown.terminal.contains("nothing was installed"), "{}", shown.terminal);
    assert_eq!((shown.code, stub.asked_for("plugin.install").len()), (Some(0), 0));

    let shown = on_a_terminal(install(), "y\n");
    assert_eq!(shown.code, Some(0), "{}", shown.terminal);
    assert!(shown.stdout.contains("nat 1.1.0 is installed"), "{}", shown.stdout);
    assert_eq!(stub.asked_for("plugin.install")[0][0]["grants"], "all");
}

#[test]
fn an_upgrade_asks_only_about_what_is_new() {
    let (host, dir) = host_with_plugin();
    let mut inspected = inspection(&nat());
    inspected["installed"] = json!({"version": "1.0.0", "digest": "sha256:99"});
    inspected["grants"][0]["granted"] = json!(true);
    let stub = Stub::new(
        &host,
        answers(&[
            ("plugin.inspect", inspected.clone()),
            ("plugin.get", plugin(&nat())),
            ("plugin.install", plugin(&nat())),
        ]),
    );
    let text = stderr(&host.run(&format!("plugin install {dir}")), 2);
    assert!(text.contains("replaces:    version 1.0.0"), "{text}");
    assert!(text.contains("[granted already]") && text.contains("forwarding  [new]"), "{text}");
    assert!(text.contains("--grant all, or which, e.g. --grant forwarding\n"), "{text}");
    stdout(&host.run(&format!("plugin install {dir} --grant forwarding --config labels=x")), 0);
    let asked = &stub.asked_for("plugin.install")[0][0];
    // Over what is configured already.
    assert_eq!(
        (&asked["upgrade"], &asked["config"]),
        (&json!(true), &json!({"max-cpus": 4, "labels": ["x"]}))
    );
    drop(stub);

    let (host, dir) = host_with_plugin();
    inspected["grants"][1]["granted"] = json!(true);
    let stub =
        Stub::new(&host, answers(&[("plugin.inspect", inspected), ("plugin.install", plugin(&nat()))]));
    stdout(&host.run(&format!("plugin install {dir}")), 0);
    assert_eq!(stub.asked_for("plugin.install")[0][0]["grants"], Value::Null, "nothing is new");
}

#[test]
fn an_authors_words_cannot_drive_the_terminal() {
    let (host, dir) = host_with_plugin();
    let mut inspected = inspection(&[grant(0, "clock", "", "\u{1b}[2Jno reason", false)]);
    inspected["description"] = json!("clears\u{1b}[2J the screen");
    let _stub = Stub::new(&host, answers(&[("plugin.inspect", inspected)]));
    let shown = on_a_terminal(host.command(&format!("plugin install {dir}")), "n\n");
    assert!(shown.terminal.contains("clears") && !shown.terminal.contains('\u{1b}'), "{:?}", shown.terminal);
}

#[test]
fn a_plugin_that_cannot_be_loaded_is_an_error_of_the_plugin() {
    let (host, dir) = host_with_plugin();
    let mut broken = plugin(&nat());
    broken["state"] = json!("broken");
    broken["reason"] = json!("zone comes before itself");
    broken["hint"] = json!("change the order");
    let ends = [
        ("plugin.inspect", inspection(&nat())),
        ("plugin.install", broken.clone()),
        ("plugin.enable", broken),
    ];
    let _stub = Stub::new(&host, answers(&ends));
    for line in [format!("plugin install {dir} --grant all"), "plugin enable nat".to_owned()] {
        let text = stderr(&host.run(&line), 10);
        assert!(text.contains("error: zone comes before itself\n  hint: change the order"), "{line}: {text}");
    }
}

#[test]
fn plugins_are_listed_shown_and_ordered() {
    let host = Host::new();
    let mut shown = plugin(&nat());
    shown["disks"] = json!([
        {"name": "work", "vm": "web", "path": "/disks/1", "size_bytes": 1_u64 << 30, "used_bytes": 1 << 20},
        {"name": "work", "vm": null, "path": "/disks/2", "size_bytes": 1_u64 << 30, "used_bytes": 2 << 20},
    ]);
    let stub = Stub::new(
        &host,
        answers(&[
            ("plugin.list", json!([plugin(&nat())])),
            ("plugin.get", shown),
            ("plugin.order", json!(["nat", "limits"])),
            ("plugin.disable", plugin(&nat())),
            ("plugin.remove", Value::Null),
        ]),
    );
    let text = stdout(&host.run("plugin ls"), 0);
    assert!(text.starts_with("#   NAME   VERSION"), "{text}");
    assert!(
        text.contains(
            "2   nat    1.1.0     capability   enabled   yes        0 of 2   12      1        Lets VMs out"
        ),
        "{text}"
    );
    assert_eq!(stdout(&host.run("plugin list -q"), 0), "nat\n");
    assert_eq!(parse(stdout(&host.run("plugin ls --json"), 0).as_bytes())[0]["state"], "enabled");

    let text = stdout(&host.run("plugin show nat"), 0);
    for part in [
        "world:       capability, of vm:plugin 0.1.0",
        "files:       /var/lib/vmd/plugins/nat/files (key.pem)",
        "  max-cpus = 4\n",
        "  labels = []  (default)\n",
        "  forwarding  [NOT GRANTED]",
        "  prepare-host   12      1        0        41 µs   1.7 ms",
        "  work   web          1G     1M     /disks/1",
        "  work   none, kept   1G     2M     /disks/2",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(stdout(&host.run("plugin order"), 0), "nat\n", "those that are called now");
    assert_eq!(stdout(&host.run("plugin order nat limits"), 0), "nat\nlimits\n");
    assert_eq!(stub.asked_for("plugin.order"), [json!([["nat", "limits"]])]);
    assert_eq!(stdout(&host.run("plugin disable nat"), 0), "nat is enabled\n", "as the daemon says");

    let output = host.run("plugin rm nat");
    assert_eq!(stdout(&output, 0), "nat\n");
    let text = stderr(&output, 0);
    assert!(text.contains("1 disk kept, with 2M; `vm plugin remove"), "{text}");
    assert!(text.contains("--purge` deletes what is kept:\n    /disks/2"), "{text}");
    assert!(text.contains("1 disk until the VM is deleted: web"), "{text}");
    let text = stderr(&host.run("plugin remove nat --purge"), 0);
    assert!(
        text.contains("1 disk deleted, 2M freed") && text.contains("until the VM is deleted: web"),
        "{text}"
    );
    assert_eq!(stub.asked_for("plugin.remove"), [json!(["nat", false]), json!(["nat", true])]);
}

#[test]
fn what_a_plugin_left_is_purged_after_it_was_removed() {
    let host = Host::new();
    let mut answers = answers(&[("plugin.remove", Value::Null)]);
    let gone = Problem::new(ErrorKind::NotFound, "no plugin is called nat");
    answers.ends.insert(("plugin.get", "*"), End::Problem(gone));
    let stub = Stub::new(&host, answers);
    assert!(stderr(&host.run("plugin remove nat"), 3).contains("no plugin is called nat"));
    assert!(stub.asked_for("plugin.remove").is_empty());
    assert!(stderr(&host.run("plugin remove nat --purge"), 0).contains("removed before"));
    assert_eq!(stub.asked_for("plugin.remove"), [json!(["nat", true])]);
}

#[test]
fn a_configuration_is_changed_by_keys_and_told_for_each_vm() {
    let host = Host::new();
    let configured = json!({"changed": true, "config": {}, "vms": {
        "a": {"outcome": "applied"}, "b": {"outcome": "needs_restart"},
    }});
    let stub = Stub::new(&host, answers(&[("plugin.get", plugin(&[])), ("plugin.configure", configured)]));
    assert_eq!(
        stdout(&host.run("plugin configure nat labels=x,y"), 0),
        "nat: configured\n  a: applied\n  b: needs a restart: vm restart b\n"
    );
    stdout(&host.run("plugin configure nat labels=z --unset max-cpus"), 0);
    stdout(&host.run("plugin configure nat --reset"), 0);
    fs::write(host.path("c.json"), r#"{"max-cpus": 9}"#).unwrap();
    stdout(&host.run(&format!("plugin configure nat --file {}", host.path("c.json").display())), 0);
    let configs: Vec<_> =
        stub.asked_for("plugin.configure").into_iter().map(|asked| asked[1].clone()).collect();
    assert_eq!(
        configs,
        [
            json!({"max-cpus": 4, "labels": ["x", "y"]}),
            json!({"labels": ["z"]}),
            json!({}),
            json!({"max-cpus": 9})
        ]
    );
    for (line, reason) in [
        ("plugin configure nat max-cpus=many", "is not an integer"),
        ("plugin configure nat cpus=1", "there is: labels, max-cpus"),
        ("plugin configure nat --unset cpus", "vm plugin show nat"),
        ("plugin configure nat", "required"),
    ] {
        let text = stderr(&host.run(line), 2);
        assert!(text.contains(reason), "{line}: {text}");
    }
    assert_eq!(stub.asked_for("plugin.configure").len(), 4, "what is wrong is not handed on");
}

#[test]
fn a_configuration_that_is_refused_or_fails_is_an_error() {
    for (changed, outcome, told, message) in [
        (false, "refused", "  a: refused: too few (hint: take 5)\n", "refuses this configuration for VM a"),
        (true, "failed", "  a: failed, waits for a restart: too few", "failed to change what a has"),
    ] {
        let host = Host::new();
        let configured = json!({"changed": changed, "config": {}, "vms": {
            "a": {"outcome": outcome, "message": "too few", "hint": "take 5"},
        }});
        let _stub =
            Stub::new(&host, answers(&[("plugin.get", plugin(&[])), ("plugin.configure", configured)]));
        let output = host.run("plugin configure nat max-cpus=1");
        assert!(stdout(&output, 10).contains(told));
        assert!(stderr(&output, 10).contains(message));
    }
}

#[test]
fn checks_are_told_and_one_that_failed_is_the_exit_code() {
    let (host, dir) = host_with_plugin();
    let good = json!([{"check": "loads", "ok": true, "detail": "as capability"}]);
    let bad = json!([
        {"check": "component", "ok": true, "detail": "sha256:aa"},
        {"check": "manifest", "ok": false, "detail": "was changed"},
    ]);
    let ends = [("plugin.test", good), ("plugin.verify", bad), ("plugin.list", json!([plugin(&[])]))];
    let stub = Stub::new(&host, answers(&ends));
    assert_eq!(stdout(&host.run(&format!("plugin test {dir}")), 0), "  ok      loads  as capability\n");
    assert_eq!(stub.asked_for("plugin.test")[0][0], json!(fs::canonicalize(&dir).unwrap()));
    let output = host.run("plugin verify");
    assert_eq!(stdout(&output, 1), "nat\n  ok      component  sha256:aa\n  FAILED  manifest   was changed\n");
    assert!(stderr(&output, 1).contains("1 of 2 checks failed"));
    assert_eq!(stdout(&host.run("plugin verify nat -q"), 1), "nat\n  FAILED  manifest   was changed\n");
    assert_eq!(parse(stdout(&host.run("plugin verify nat --json"), 1).as_bytes())["nat"][1]["ok"], false);
    let problem = stderr(&host.run("plugin test /no/such/plugin"), 3);
    assert!(problem.contains("/no/such/plugin"), "{problem}");
}

#[test]
fn messages_and_calls_are_listed_and_replayed() {
    let host = Host::new();
    let line =
        json!({"at_ms": 1_700_000_000_999_u64, "hook": "preflight", "level": "warn", "message": "a\nb"});
    let call = json!({
        "id": 7, "hook": "preflight", "reason": "start", "vm": "web", "at_ms": 1_700_000_000_000_u64, "took_us": 41,
        "effects": 2, "error": null, "not_replayable": null, "digest": "sha256:aa",
    });
    let replay = json!({
        "call": call, "same": false, "same_component": true, "recorded": {"plan": 1}, "replayed": {"plan": 2},
    });
    let ends = [
        ("plugin.logs", json!([line])),
        ("plugin.logs_subscribe", json!([line, line])),
        ("plugin.calls", json!([call])),
        ("plugin.replay", replay),
    ];
    let mut stub = Stub::new(&host, answers(&ends));
    let told = "2023-11-14T22:13:20.999Z  warn   preflight          a\n    b\n";
    assert_eq!(stdout(&host.run("plugin logs nat -n 3"), 0), told);
    assert_eq!(stub.asked_for("plugin.logs"), [json!(["nat", 3])]);

    let text = stdout(&host.run("plugin replay nat"), 0);
    assert!(
        text.contains("7      2023-11-14T22:13:20.000Z   preflight   web   start    41 µs   2         ok"),
        "{text}"
    );
    let output = host.run("plugin replay nat 7");
    let text = stdout(&output, 1);
    assert!(
        text.starts_with("call 7, preflight for web: another answer\nthen:\n")
            && text.contains("\"plan\": 2"),
        "{text}"
    );
    assert!(stderr(&output, 1).contains("hash map"));
    assert_eq!(stub.asked_for("plugin.replay"), [json!(["nat", 7])]);

    // Until the daemon ends.
    let mut follow =
        host.command("plugin logs nat -f --json").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut followed = lines(follow.stdout.take().unwrap());
    for _ in 0..2 {
        assert_eq!(parse(followed.next().unwrap().as_bytes())["hook"], "preflight");
    }
    stub.end();
    assert_eq!(follow.wait().unwrap().code(), Some(9));
}

fn plan(findings: Value, failures: Value) -> Value {
    let effects = json!([
        {"kind": "forwarding", "summary": "packets between bridge and other networks", "detail": {}},
        {"kind": "firewall-rule", "summary": "forward: from this VM, accept", "detail": {}},
    ]);
    json!({
        "vm": "a",
        "plugins": [
            {"plugin": "limits", "hook": "preflight", "effects": [], "findings": findings},
            {"plugin": "greet", "hook": "contribute-guest", "effects": [
                {"kind": "environment", "summary": "GREETING=hello, a", "detail": {}}], "findings": []},
            {"plugin": "nat", "hook": "prepare-host", "effects": effects, "findings": []},
        ],
        "failures": failures,
    })
}

#[test]
fn a_plan_is_told_by_plugin_an_effect_a_line() {
    let host = Host::new();
    let optional = json!([{"plugin": "greet", "hook": "prepare-host", "required": false, "message": "trapped", "hint": null}]);
    let warning = json!([{"severity": "warning", "subject": "cpus", "message": "many", "hint": "fewer"}]);
    let whole = plan(warning, optional);
    let nothing = json!({"vm": "b", "plugins": [], "failures": []});
    let stub = Stub::new(&host, answers(&[("vm.plan_create", whole.clone()), ("vm.plan", nothing)]));
    let output = host.run("plan create a --cpus 2 --label k=v");
    assert_eq!(
        stdout(&output, 0),
        "VM a: 3 effects of 2 plugins when it is made and started; nothing of it was done\n\
         \n\
         limits\n\
         \x20 preflight  warns    cpus: many (hint: fewer)\n\
         greet\n\
         \x20 contribute-guest  environment  GREETING=hello, a\n\
         \x20 prepare-host      is left out  trapped\n\
         nat\n\
         \x20 prepare-host  forwarding     packets between bridge and other networks\n\
         \x20 prepare-host  firewall-rule  forward: from this VM, accept\n"
    );
    let asked = &stub.asked_for("vm.plan_create")[0][0];
    assert_eq!((&asked["name"], &asked["cpus"], &asked["start"]), (&json!("a"), &json!(2), &json!(true)));
    stdout(&host.run("plan create --name a"), 0);
    assert_eq!(stub.asked_for("vm.plan_create")[1][0]["name"], "a");
    let document = parse(stdout(&host.run("plan create a --json"), 0).as_bytes());
    assert_eq!(document, whole);
    assert_eq!(stdout(&host.run("plan start b"), 0), "VM b: plugins would do nothing when it is started\n");
    assert!(stderr(&host.run("plan create a --name b"), 2).contains("cannot be used with"));
}

#[test]
fn a_plan_that_would_fail_has_the_exit_code_of_plugins() {
    let refusal =
        json!([{"severity": "failure", "subject": "cpus", "message": "8 are too many", "hint": "take 4"}]);
    let failed = json!([{"plugin": "nat", "hook": "prepare-host", "required": true, "message": "nat trapped", "hint": "see its log"}]);
    for (findings, failures, word, message, hint) in [
        (refusal, json!([]), "refuses", "plugin limits would refuse VM a: 8 are too many", "take 4"),
        (json!([]), failed, "fails", "the start of VM a would fail: nat trapped", "see its log"),
    ] {
        let host = Host::new();
        let plan: VmPlan = serde_json::from_value(plan(findings, failures)).unwrap();
        let _stub = Stub::new(&host, answers(&[("vm.plan", json!(plan))]));
        let output = host.run("plan start a");
        assert!(stdout(&output, 10).contains(word));
        let text = stderr(&output, 10);
        assert!(text.contains(message) && text.contains(&format!("hint: {hint}")), "{text}");
        assert_eq!(parse(stderr(&host.run("plan start a --json"), 10).as_bytes())["error"]["exit_code"], 10);
    }
}

#[test]
fn a_daemon_that_cannot_plan_says_so() {
    let host = Host::new();
    let mut answers = Answers::default();
    let problem = Problem::new(ErrorKind::NotFound, "there is no image x").hint("vm image pull x");
    answers.ends.insert(("vm.plan_create", "*"), End::Problem(problem));
    let _stub = Stub::new(&host, answers);
    assert!(stderr(&host.run("plan create a --image x"), 3).contains("hint: vm image pull x"));
    assert_eq!(host.run("plugin show gone").status.code(), Some(3));
}
