//! Verbs that change VMs: what they ask the daemon for, and how they tell what came of it.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use vm_api::{ErrorKind, FailedAt, NetworkMode, Problem, Pruned, RestartPolicy, VmChanged, VmInfo, VmState};

use crate::{
    host::{Host, json as parse, stderr, stdout},
    stub::{Answers, End, Stub},
    terminal::{Shown, on_a_terminal},
};

pub(crate) fn vm(number: u8, name: &str) -> VmInfo {
    VmInfo {
        id: format!("{number:012x}").parse().unwrap(),
        name: name.parse().unwrap(),
        state: VmState::Stopped { last_exit: None },
        image: "debian:bookworm".to_owned(),
        image_digest: format!("sha256:{}", "a".repeat(64)).parse().unwrap(),
        kernel: "b".repeat(12).parse().unwrap(),
        cpus: 1,
        memory_mib: 1024,
        disk_bytes: 8 << 30,
        disk_used_bytes: 1 << 30,
        disk_bytes_per_second: None,
        disk_operations_per_second: None,
        network: NetworkMode::Nat,
        address: None,
        labels: BTreeMap::new(),
        restart: RestartPolicy::No,
        expires_at: None,
        idle_stop_seconds: None,
        needs_restart: Vec::new(),
        problem: None,
        ephemeral: false,
        created_at: 1_700_000_000,
        vmm: "qemu".to_owned(),
        vmm_metrics: None,
    }
}

fn answers(vms: &[&str]) -> Answers {
    let vms = vms.iter().zip(1..).map(|(name, number)| vm(number, name)).collect();
    Answers { vms, ..Answers::default() }
}

#[test]
fn several_vms_are_restarted_paused_and_resumed() {
    let host = Host::new();
    let mut answers = answers(&["a", "b", "c"]);
    let refusal = Problem::new(ErrorKind::WrongState, "VM b is stopped").hint("start it with `vm start b`");
    answers.ends.insert(("vm.pause", "b"), End::Problem(refusal));
    let stub = Stub::new(&host, answers);

    assert_eq!(stdout(&host.run("restart a b --grace 5"), 0), "a\nb\n");
    let grace = json!({"grace_seconds": 5});
    assert_eq!(stub.asked_for("vm.restart"), [json!(["a", grace]), json!(["b", grace])]);
    assert_eq!(stdout(&host.run("resume a"), 0), "a\n");
    assert_eq!(stub.asked_for("vm.resume").len(), 1);

    // One that fails does not spare the others.
    let output = host.run("pause a b c");
    assert_eq!(stdout(&output, 4), "a\nc\n");
    let text = stderr(&output, 4);
    assert!(text.contains("1 of 3 failed:\n    b: VM b is stopped") && text.contains("vm start b"), "{text}");
    let output = host.run("pause --json a nobody");
    assert_eq!(parse(stdout(&output, 3).as_bytes())[0]["name"], "a");
    assert_eq!(parse(&output.stderr)["error"]["kind"], "not_found");
}

#[test]
fn a_vm_is_made_with_its_policies() {
    let host = Host::new();
    let mut answers = answers(&[]);
    answers.ends.insert(("vm.create", "*"), End::Result(json!(vm(1, "web"))));
    let stub = Stub::new(&host, answers);
    let line = "create --name web --restart on-failure --ttl 1h30m --idle-stop 30m --disk-bandwidth 1.5M --disk-iops 500";
    assert_eq!(stdout(&host.run(line), 0), "web\n");
    let asked = &stub.asked_for("vm.create")[0][1];
    assert_eq!(asked["restart"], "on-failure");
    assert_eq!((&asked["ttl_seconds"], &asked["idle_stop_seconds"]), (&json!(5400), &json!(1800)));
    let limits =
        |asked: &Value| (asked["disk_bytes_per_second"].clone(), asked["disk_operations_per_second"].clone());
    assert_eq!(limits(asked), (json!(3 << 19), json!(500)));
    stdout(&host.run("create"), 0);
    let asked = &stub.asked_for("vm.create")[1][1];
    assert_eq!((&asked["restart"], &asked["ttl_seconds"]), (&Value::Null, &Value::Null));
    assert_eq!(limits(asked), (Value::Null, Value::Null));
    stdout(&host.run("create --disk-bandwidth unlimited --disk-iops unlimited"), 0);
    assert_eq!(limits(&stub.asked_for("vm.create")[2][1]), (json!(0), json!(0)));

    for (line, reason) in [
        ("create --ttl 0", "too short"),
        ("create --ttl 90", "write for example 90s"),
        ("run --idle-stop 30M -- true", "M is a month"),
        ("create --restart maybe", "on-failure"),
        ("create --disk-bandwidth 0", "no limit is unlimited"),
        ("run --disk-bandwidth 0M -- true", "no limit is unlimited"),
        ("create --disk-bandwidth 100", "write for example 512M"),
        ("create --disk-iops 0", "no limit is unlimited"),
        ("create --disk-iops 5k", "write for example 500"),
    ] {
        let text = stderr(&host.run(line), 2);
        assert!(text.contains(reason), "{line}: {text}");
    }
}

#[test]
fn a_change_is_told_with_what_needs_a_restart() {
    let host = Host::new();
    let mut answers = answers(&["web"]);
    answers.vms[0].labels = BTreeMap::from([("old".to_owned(), "1".to_owned())]);
    answers.vms[0].disk_operations_per_second = Some(500);
    let changed = VmChanged {
        vm: VmInfo {
            cpus: 4,
            disk_bytes: 20 << 30,
            labels: BTreeMap::from([("team".to_owned(), "core".to_owned())]),
            restart: RestartPolicy::Always,
            idle_stop_seconds: Some(1800),
            disk_bytes_per_second: Some(100 << 20),
            ..vm(1, "web")
        },
        needs_restart: vec!["cpus".to_owned(), "disk-bandwidth".to_owned()],
    };
    answers.ends.insert(("vm.set", "web"), End::Result(json!(changed)));
    let stub = Stub::new(&host, answers);
    let line = "set web --cpus 4 --disk 20G --label team=core --unlabel old --restart always --idle-stop 30m \
                --ttl never --disk-bandwidth 100M --disk-iops unlimited";
    assert_eq!(
        stdout(&host.run(line), 0),
        "cpus:           1 -> 4, after a restart\n\
         disk:           8G -> 20G\n\
         disk bandwidth: unlimited -> 100M/s, after a restart\n\
         disk iops:      500 -> unlimited\n\
         labels:         team=core, old removed\n\
         restart:        no -> always\n\
         idle stop:      never -> 30m\n\
         \n\
         web needs a restart: vm restart web\n"
    );
    let asked = &stub.asked_for("vm.set")[0];
    // By the id, so that it is the VM that was looked at.
    assert_eq!(asked[0], "000000000001");
    let expected = json!({
        "cpus": 4, "memory_mib": null, "disk_bytes": 20_u64 << 30, "labels": {"team": "core", "old": null},
        "restart": "always", "ttl_seconds": 0, "idle_stop_seconds": 1800, "disk_bytes_per_second": 100 << 20,
        "disk_operations_per_second": 0,
    });
    assert_eq!(asked[1], expected);
    let document = parse(stdout(&host.run("set web --cpus 4 --json"), 0).as_bytes());
    assert_eq!(serde_json::from_value::<VmChanged>(document).unwrap(), changed);
    assert_eq!(stdout(&host.run("set web --cpus 4 -q"), 0), "web\n");
}

#[test]
fn a_change_that_is_none_is_refused_or_told() {
    let host = Host::new();
    let mut answers = answers(&["web"]);
    let changed = VmChanged { vm: vm(1, "web"), needs_restart: Vec::new() };
    answers.ends.insert(("vm.set", "web"), End::Result(json!(changed)));
    let stub = Stub::new(&host, answers);
    let text = stderr(&host.run("set web"), 2);
    assert!(text.contains("nothing to change") && text.contains("--idle-stop"), "{text}");
    let text = stderr(&host.run("set web --label a=1 --unlabel a"), 2);
    assert!(text.contains("label a is both"), "{text}");
    assert!(stub.asked().is_empty(), "the daemon was not asked");
    assert_eq!(stdout(&host.run("set web --cpus 1"), 0), "web was like this already\n");
    assert!(stderr(&host.run("set nobody --cpus 1"), 3).contains("vm ls"));
}

fn pruned(names: &[&str], failed: &[(&str, Problem)]) -> Pruned {
    Pruned {
        deleted: names.iter().map(|name| name.parse().unwrap()).collect(),
        failed: failed.iter().map(|(name, why)| (name.parse().unwrap(), why.clone())).collect(),
        freed_bytes: (names.len() as u64) << 30,
    }
}

#[test]
fn a_prune_without_a_terminal_needs_a_yes() {
    let host = Host::new();
    let mut answers = answers(&["a", "b"]);
    answers.ends.insert(("vm.prune", "*"), End::Result(json!(pruned(&["a", "b"], &[]))));
    let stub = Stub::new(&host, answers);
    let text = stderr(&host.run("prune --failed"), 2);
    assert!(text.contains("no terminal") && text.contains("say --yes"), "{text}");
    assert!(stub.asked().is_empty(), "nothing was begun");

    let line = "prune --dry-run --older-than 24h --label a=b --failed";
    assert_eq!(stdout(&host.run(line), 0), "a\nb\n2 VMs would be deleted, 2G freed\n");
    let params = json!({"older_than_seconds": 86400, "labels": {"a": "b"}, "failed": true, "dry_run": true});
    assert_eq!(stub.asked_for("vm.prune")[0][1], params);
    assert_eq!(stdout(&host.run("prune -y"), 0), "a\nb\n2 VMs deleted, 2G freed\n");
    let params = json!({"older_than_seconds": null, "labels": {}, "failed": false, "dry_run": false});
    assert_eq!(stub.asked_for("vm.prune")[1][1], params);
    let document = parse(stdout(&host.run("prune -y --json"), 0).as_bytes());
    assert_eq!(serde_json::from_value::<Pruned>(document).unwrap(), pruned(&["a", "b"], &[]));
    assert_eq!(stdout(&host.run("prune -y -q"), 0), "a\nb\n");
}

#[test]
fn what_could_not_be_pruned_is_told() {
    let host = Host::new();
    let mut answers = answers(&[]);
    let busy = Problem::new(ErrorKind::InUse, "its disk is busy").hint("try again");
    let result = pruned(&["a"], &[("b", busy)]);
    answers.ends.insert(("vm.prune", "*"), End::Result(json!(result)));
    let _stub = Stub::new(&host, answers);
    let output = host.run("prune --yes");
    assert_eq!(stdout(&output, 4), "a\n1 VM deleted, 1G freed\n");
    let text = stderr(&output, 4);
    assert!(text.contains("1 of 2 could not be deleted:\n    b: its disk is busy"), "{text}");
    assert!(text.contains("hint: try again"), "{text}");
}

fn prune_on_a_terminal(host: &Host, answer: &str) -> (String, String) {
    let Shown { stdout, terminal, code } = on_a_terminal(host.command("prune"), answer);
    assert_eq!(code, Some(0), "{terminal}");
    (stdout, terminal)
}

#[test]
fn a_prune_on_a_terminal_lists_and_asks_and_deletes_no_others() {
    let host = Host::new();
    let mut answers = answers(&["a", "b", "c"]);
    answers.vms[1].state = VmState::Failed { at: FailedAt::Run, cause: "died".to_owned() };
    answers.ends.insert(("vm.prune", "*"), End::Result(json!(pruned(&["a", "b"], &[]))));
    answers.ends.insert(("vm.delete", "*"), End::Result(Value::Null));
    let stub = Stub::new(&host, answers);

    let (stdout, shown) = prune_on_a_terminal(&host, "n\n");
    assert!(shown.contains("Delete 2 VMs with 2G on disk?"), "{shown}");
    assert!(!shown.contains("0/0"), "no progress is shown before there is some: {shown}");
    assert!(shown.contains("b      failed") && shown.contains("nothing was deleted"), "{shown}");
    assert_eq!((stdout.as_str(), stub.asked_for("vm.delete").len()), ("", 0));

    let (stdout, _) = prune_on_a_terminal(&host, "y\n");
    assert_eq!(stdout, "a\nb\n2 VMs deleted, 2G freed\n");
    // Those that were shown, by id and not by force: whatever is off by now besides was not agreed to.
    assert_eq!(stub.asked_for("vm.delete"), [json!(["000000000001", false]), json!(["000000000002", false])]);
    assert!(stub.asked_for("vm.prune").iter().all(|asked| asked[1]["dry_run"] == true));
}

#[test]
fn listings_tell_the_policies() {
    let host = Host::new();
    let mut answers = answers(&["a", "b"]);
    let _stub = Stub::new(&host, answers.clone());
    assert!(!stdout(&host.run("ls"), 0).contains("EXPIRES"), "none has a time to live");

    let host = Host::new();
    // Beyond all that a clock will say while this runs.
    answers.vms[0].expires_at = Some(u64::from(u32::MAX) * 2);
    answers.vms[0].state = VmState::Paused { pid: 7, since: 1_700_000_000 };
    answers.vms[0].needs_restart = vec!["cpus".to_owned(), "memory".to_owned()];
    answers.vms[0].restart = RestartPolicy::OnFailure;
    answers.vms[0].disk_bytes_per_second = Some(3 << 19);
    answers.vms[0].disk_operations_per_second = Some(500);
    answers.vms[0].idle_stop_seconds = Some(5400);
    answers.vms[1].expires_at = Some(1);
    let _stub = Stub::new(&host, answers);
    let text = stdout(&host.run("ls"), 0);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].ends_with("EXPIRES"), "{text}");
    assert!(lines[1].contains("paused*") && lines[1].contains(" in ") && lines[2].ends_with("now"), "{text}");
    let text = stdout(&host.run("show a"), 0);
    for fact in [
        "paused, up for",
        "restart:       on-failure",
        "disk limits:   1.5M/s, 500 operations/s",
        "expires:       in ",
        "idle stop:     after 1h 30m without a connection",
        "needs restart: for cpus, memory: vm restart a",
    ] {
        assert!(text.contains(fact), "{fact}: {text}");
    }
    let shown: VmInfo = serde_json::from_slice(&host.run("show a --json").stdout).unwrap();
    assert_eq!((shown.idle_stop_seconds, shown.disk_bytes_per_second), (Some(5400), Some(3 << 19)));
    assert!(!stdout(&host.run("show b"), 0).contains("disk limits"));
}
