//! Verbs that look on: events, operations, the daemon's status; and what becomes of an operation whose client is gone.

use std::{
    io::Read,
    process::{Child, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use vm_api::{
    ErrorKind, Event, EventKind, LockInfo, LockState, OperationId, OperationInfo, OperationKind,
    OperationProgress, OperationStatus, Problem, Resources,
};

use crate::{
    host::{Host, json as parse, lines, stderr, stdout},
    stub::{Answers, End, Stub},
};

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

fn event(sequence: u64, vm: Option<(u8, &str)>) -> Event {
    Event {
        sequence,
        at_ms: 1_700_000_000_000,
        kind: if vm.is_some() { EventKind::VmStarted } else { EventKind::DaemonStarted },
        vm: vm.map(|(number, _)| format!("{number:012x}").parse().unwrap()),
        name: vm.map(|(_, name)| name.parse().unwrap()),
        operation: None,
        message: "as told".to_owned(),
    }
}

fn history() -> Vec<Event> {
    vec![event(1, None), event(2, Some((1, "a"))), event(3, Some((2, "b"))), event(4, Some((1, "a")))]
}

#[test]
fn events_are_lines_for_people_and_programs() {
    let host = Host::new();
    let stub = Stub::new(&host, Answers { events: history(), ..Answers::default() });
    let text = stdout(&host.run("events"), 0);
    assert_eq!(text.lines().count(), 4);
    assert!(text.starts_with("1     2023-11-14T22:13:20Z  daemon_started"), "{text}");
    let text = stdout(&host.run("events --after 1 --vm a"), 0);
    assert_eq!(text.lines().map(|line| &line[..1]).collect::<Vec<_>>(), ["2", "4"]);
    assert_eq!(stub.asked_for("event.list"), [json!([0]), json!([1])]);
    let text = stdout(&host.run("events --json --vm 000000000002"), 0);
    let events: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events, [event(3, Some((2, "b")))]);
}

#[test]
fn events_are_followed_until_a_signal() {
    let host = Host::new();
    // Each subscription breaks off after two events, as one does whose client is too slow.
    let answers = Answers { events: history(), events_at_once: Some(2), ..Answers::default() };
    let stub = Stub::new(&host, answers);
    let mut child = host.command("events --follow --json").stdout(Stdio::piped()).spawn().unwrap();
    let lines = lines(child.stdout.take().unwrap());
    let sequences: Vec<Value> =
        lines.take(4).map(|line| parse(line.as_bytes())["sequence"].clone()).collect();
    assert_eq!(sequences, [1, 2, 3, 4], "none is lost and none comes twice");
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(stub.asked_for("event.subscribe")[..2], [json!([0]), json!([2])]);
}

#[test]
fn the_daemons_end_ends_the_events_with_the_way_to_go_on() {
    let host = Host::new();
    let mut stub = Stub::new(&host, Answers { events: history(), ..Answers::default() });
    let mut child =
        host.command("events -f --after 2").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = lines(child.stdout.take().unwrap());
    assert!(lines.next().unwrap().starts_with("3 "));
    assert!(lines.next().unwrap().starts_with("4 "));
    stub.end();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9), "{text}");
    assert!(text.contains("vm events --follow --after 4"), "{text}");
}

fn operation(id: u64, kind: OperationKind, status: OperationStatus) -> OperationInfo {
    let begun_at = 1_700_000_000;
    let ended_at = (!matches!(status, OperationStatus::Running { .. })).then_some(begun_at + 75);
    OperationInfo { id: OperationId(id), kind, subject: format!("vm{id}"), begun_at, ended_at, status }
}

fn operations() -> Vec<OperationInfo> {
    let progress = OperationProgress { stage: "unpacking".to_owned(), done: 30, total: Some(120) };
    let died = Problem::new(ErrorKind::VmmDied, "its VMM died\nconsole").hint("look at `vm logs vm3`");
    vec![
        operation(2, OperationKind::VmStart, OperationStatus::Succeeded { result: json!({"name": "vm2"}) }),
        operation(3, OperationKind::VmStart, OperationStatus::Failed { error: died }),
        operation(4, OperationKind::ImagePull, OperationStatus::Running { progress }),
    ]
}

#[test]
fn operations_are_listed_awaited_and_cancelled() {
    let host = Host::new();
    let stub = Stub::new(&host, Answers { operations: operations(), ..Answers::default() });
    let text = stdout(&host.run("operations"), 0);
    assert_eq!(text.lines().count(), 2, "only what is at work: {text}");
    assert!(text.contains("image_pull") && text.contains("unpacking, 25%"), "{text}");
    let text = stdout(&host.run("ops -a"), 0);
    assert!(text.contains("succeeded") && text.contains("failed: its VMM died "), "{text}");
    assert_eq!(text.matches("1m 15s").count(), 2, "what has ended took a while: {text}");
    let document = stdout(&host.run("operation ls --all --json"), 0);
    assert_eq!(serde_json::from_str::<Vec<OperationInfo>>(&document).unwrap(), operations());

    // The exit code and hint of the command that began it.
    assert_eq!(stdout(&host.run("operation wait 2"), 0), "operation 2 succeeded\n");
    assert_eq!(parse(stdout(&host.run("operation wait 2 --json"), 0).as_bytes())["name"], "vm2");
    assert!(stderr(&host.run("operation wait 3"), 6).contains("vm logs vm3"));
    assert!(stderr(&host.run("operation wait 99"), 3).contains("no operation 99"));

    let text = stderr(&host.run("operation cancel 2"), 4);
    assert!(text.contains("has already ended") && text.contains("vm operations --all"), "{text}");
    assert!(stub.asked_for("operation.cancel").is_empty());
    let output = host.run("ops cancel 99 4");
    assert_eq!(stdout(&output, 3), "4\n");
    assert!(stderr(&output, 3).contains("1 of 2 failed:\n    99: "), "{output:?}");
    assert_eq!(stub.asked_for("operation.cancel"), [json!([4])]);
}

#[test]
fn what_nobody_wants_without_its_client_is_cancelled_with_it() {
    for (line, with_client) in
        [("run -- true", true), ("run --name a -- true", true), ("create", false), ("start a", false)]
    {
        let host = Host::new();
        let mut answers = Answers::default();
        answers.ends.insert(("vm.create", "*"), End::Cancelled);
        answers.ends.insert(("vm.start", "*"), End::Cancelled);
        let stub = Stub::new(&host, answers);
        let mut child = host.command(line).spawn().unwrap();
        stub.wait_for("operation.watch", 1);
        child.kill().unwrap();
        child.wait().unwrap();
        stub.wait_for("closed", 1);
        assert_eq!(stub.asked_for("operation.watch"), [json!([1, with_client])], "{line}");
        assert!(stub.asked_for("operation.cancel").is_empty(), "a killed client cannot ask for that");
    }
}

#[test]
fn a_signal_cancels_or_leaves_the_operation() {
    let host = Host::new();
    let mut answers = Answers::default();
    answers.ends.insert(("vm.create", "*"), End::Cancelled);
    answers.ends.insert(("vm.restart", "*"), End::Cancelled);
    let stub = Stub::new(&host, answers);
    let interrupted = |line: &str, operations: usize| {
        let child = host.command(line).stderr(Stdio::piped()).spawn().unwrap();
        stub.wait_for("operation.watch", operations);
        signal(&child, Signal::SIGTERM);
        child.wait_with_output().unwrap()
    };
    let text = stderr(&interrupted("create", 1), 143);
    assert!(text.contains("cancelled"), "{text}");
    assert_eq!(stub.asked_for("operation.cancel"), [json!([1])]);
    // Half a restart would be a VM that is off.
    let text = stderr(&interrupted("restart a", 2), 143);
    assert!(text.contains("operation 2 goes on in the daemon (vm operation wait 2)"), "{text}");
    assert_eq!(stub.asked_for("operation.cancel").len(), 1);
}

#[test]
fn the_status_tells_resources_and_locks() {
    let host = Host::new();
    let lock = LockInfo {
        lock: "vm web".to_owned(),
        level: "vm".to_owned(),
        state: LockState::Held,
        holder: "vm_start web".to_owned(),
        operation: Some(OperationId(7)),
        age_ms: 12_345,
    };
    let waiting = LockInfo { state: LockState::Waiting, operation: None, age_ms: 20, ..lock.clone() };
    let resources = Resources {
        memory_mib: 3072,
        memory_limit_mib: 8192,
        disk_bytes: 20 << 30,
        disk_limit_bytes: Some(100 << 30),
        taps_ready: 8,
    };
    let answers =
        Answers { locks: vec![lock.clone(), waiting], resources: resources.clone(), ..Answers::default() };
    let _stub = Stub::new(&host, answers);
    let text = stdout(&host.run("daemon status"), 0);
    assert!(text.contains("3G of 8G committed") && text.contains("20G when full, of 100G allowed"), "{text}");
    assert!(text.contains("8 ready") && !text.contains("LOCK"), "{text}");
    let text = stdout(&host.run("daemon status --locks"), 0);
    let table: Vec<_> = text.lines().skip_while(|line| !line.starts_with("LOCK")).collect();
    let words = |line: &str| {
        line.split("   ").map(str::trim).filter(|w| !w.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(words(table[0]), ["LOCK", "LEVEL", "STATE", "HOLDER", "AGE"]);
    assert_eq!(words(table[1]), ["vm web", "vm", "held", "vm_start web (operation 7)", "12.3 s"]);
    assert_eq!(words(table[2]), ["vm web", "vm", "waiting", "vm_start web", "20 ms"]);

    let document = parse(stdout(&host.run("daemon status --locks --json"), 0).as_bytes());
    assert_eq!(document["locks"][0], json!(lock));
    assert_eq!(document["resources"], json!(resources));
    let document = parse(stdout(&host.run("daemon status --json"), 0).as_bytes());
    assert!(document.get("locks").is_none() && document["running"] == true);
    assert_eq!(document["api_version"], vm_api::API_VERSION);
}

#[test]
fn completions_know_the_new_verbs() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&host.run(&format!("completion {shell}")), 0);
        for word in ["restart", "prune", "operations", "idle-stop", "locks", "older-than"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}
