//! The program as a user without a daemon meets it.

use std::{path::Path, process::Stdio};

use serde_json::Value;

use crate::host::{Host, json};

#[test]
fn without_a_daemon_a_command_says_how_to_start_it() {
    let host = Host::new();
    let output = host.run("--no-start ls");
    assert_eq!(output.status.code(), Some(9));
    assert!(output.stdout.is_empty());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("vm: error: no daemon listens on "), "{stderr}");
    assert!(
        stderr.contains("hint: start it: vm --run-dir") && stderr.ends_with("daemon start\n"),
        "{stderr}"
    );
}

#[test]
fn errors_are_json_where_answers_are() {
    let host = Host::new();
    let output = host.run("--no-start run --json -- true");
    assert_eq!(output.status.code(), Some(125));
    let error = &json(&output.stderr)["error"];
    assert_eq!((&error["kind"], &error["exit_code"]), (&"host_failure".into(), &125.into()));
    assert!(error["hint"].as_str().unwrap().contains("daemon start"));

    let output = host.run("ls --json --bogus");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(json(&output.stderr)["error"]["kind"], "invalid_argument");

    // What follows `--` is the command's own.
    let output = host.run("run --bogus -- x --json");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stderr.starts_with(b"error: "));
}

#[test]
fn a_daemon_that_does_not_start_is_reported_with_the_end_of_its_log() {
    let host = Host::new();
    host.install_vmd("echo 'cannot open the database' >&2; exit 1");
    let output = host.run("ls");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(9), "{stderr}");
    assert!(stderr.contains("cannot open the database"), "{stderr}");
    assert!(stderr.contains(host.path("state/vmd.log").to_str().unwrap()), "{stderr}");
}

#[test]
fn the_doctor_works_without_a_daemon() {
    let host = Host::new();
    let ok = r#"{"check":"kvm","severity":"ok","message":"works","fix":null}"#;
    let bad = r#"{"check":"qemu","severity":"error","message":"absent","fix":"install it"}"#;
    let run_dir = host.path("run");
    let check = format!("[ \"$*\" = \"doctor --json --run-dir {} --state-dir", run_dir.display());
    // Answers only if it is asked as agreed.
    host.install_vmd(&format!(
        "{check} {} --config-dir {}\" ] && echo '[{ok}]'",
        host.path("state").display(),
        host.path("etc").display()
    ));
    let output = host.run("doctor --json");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(json(&output.stdout)[0]["check"], "kvm");

    host.install_vmd(&format!("echo '[{ok},{bad}]'; exit 1"));
    let output = host.run("doctor");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ERROR    qemu  absent\n") && text.contains("fix: install it"), "{text}");
    assert!(!Path::new(&run_dir).exists(), "a doctor's visit leaves nothing behind");
}

#[test]
fn a_daemon_that_is_not_there_is_stopped_already_and_its_status_is_3() {
    let host = Host::new();
    assert_eq!(host.run("daemon stop").status.code(), Some(0));
    let output = host.run("daemon status --json");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(json(&output.stdout)["running"], false);
    assert_eq!(json(&host.run("version --json").stdout)["daemon"], Value::Null);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let host = Host::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = host.command("completion bash").stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn help_tells_the_exit_codes() {
    let host = Host::new();
    for line in ["--help", "help exit-codes"] {
        let text = String::from_utf8(host.run(line).stdout).unwrap();
        assert!(text.contains("125    vm itself failed"), "{line}: {text}");
    }
}
