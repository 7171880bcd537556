//! The examples in Python and JavaScript, built as their authors would and called in the real host. They need a network, for their tools.

use std::{fs, path::PathBuf, process::Command, time::Instant};

use serde_json::json;
use vm_plugin::{
    Granted, Hook,
    call::LogLevel,
    plan::{Content, GuestPart},
};

use crate::host::{built, input, load_from, scratch, state, workspace};

/// Builds an example. Its tools stay for the next time.
fn example(language: &str, needs: &[&str], packages: &str) -> PathBuf {
    let (program, arguments) = needs.split_first().unwrap();
    let there = Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success());
    assert!(there, "this test needs `{}`: install {packages}", needs.join(" "));
    let out = scratch().join("examples").join(language);
    let begin = Instant::now();
    let _ = fs::remove_file(out.join("greeting.wasm"));
    built(Command::new(workspace().join("../sdk/examples").join(language).join("build")).arg(&out));
    let size = fs::metadata(out.join("greeting.wasm")).unwrap().len();
    println!("{language}: {:.1} MiB, built in {:.0?}", size as f64 / f64::from(1 << 20), begin.elapsed());
    out
}

async fn greets(language: &str, directory: PathBuf) {
    let begin = Instant::now();
    let plugin = load_from(&directory, json!({}), Granted::All).await;
    println!("{language}: compiled and loaded in {:.1?}", begin.elapsed());
    let begin = Instant::now();
    load_from(&directory, json!({}), Granted::All).await;
    println!("{language}: loaded again in {:.1?}", begin.elapsed());
    let has: Vec<_> = Hook::CAPABILITY.into_iter().filter(|&hook| plugin.has(hook)).collect();
    assert_eq!(has, [Hook::Preflight, Hook::ContributeGuest]);

    let greeting = GuestPart::File {
        path: "/etc/motd".to_owned(),
        content: Content::Bytes(b"Welcome to dev\n".to_vec()),
        mode: 0o644,
        uid: 0,
        gid: 0,
    };
    for _ in 0..3 {
        let outcome = plugin.call(Hook::ContributeGuest, input(), &state()).await.unwrap();
        println!("{language}: called in {:.1?}", outcome.took);
        assert_eq!(outcome.plan.guest, std::slice::from_ref(&greeting));
        let said: Vec<_> = outcome.log.iter().map(|line| (line.level, line.message.as_str())).collect();
        assert_eq!(said, [(LogLevel::Debug, "greets dev")]);
    }

    let outcome = plugin.call(Hook::Preflight, input(), &state()).await.unwrap();
    assert_eq!(outcome.refusals().count(), 0);
    let two_lines = load_from(&directory, json!({ "greeting": "a\nb" }), Granted::All).await;
    let outcome = two_lines.call(Hook::Preflight, input(), &state()).await.unwrap();
    assert_eq!(outcome.refusals().next().unwrap().hint.as_deref(), Some("write it in one"));

    // What the language throws reaches people.
    let wrong = load_from(&directory, json!({ "path": "relative" }), Granted::All).await;
    let error = wrong.call(Hook::ContributeGuest, input(), &state()).await.unwrap_err();
    println!("{language}: {error}");
    assert!(error.to_string().contains("relative"), "{error}");
}

#[tokio::test]
#[ignore = "builds with componentize-py, which needs pip and a network"]
async fn python() {
    greets("python", example("python", &["python3", "-c", "import ensurepip"], "python3 and python3-venv"))
        .await;
}

#[tokio::test]
#[ignore = "builds with componentize-js, which needs npm and a network"]
async fn javascript() {
    let node = ["node", "-e", "process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)"];
    greets("javascript", example("javascript", &node, "Node.js 20 or later, with npm")).await;
}
