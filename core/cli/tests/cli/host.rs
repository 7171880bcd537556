//! A place for `vm` to run in.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::mpsc,
    time::Duration,
};

use serde_json::Value;

/// A copy of `vm` in a directory of its own, with daemon directories beside it where nothing runs.
pub(crate) struct Host(tempfile::TempDir);

impl Host {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // By another process: a child that a test beside this one forks would inherit the open file, and a
        // program that is open for writing cannot be run.
        let vm = env!("CARGO_BIN_EXE_vm");
        assert!(Command::new("cp").arg(vm).arg(dir.path()).status().unwrap().success());
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts a daemon's program beside `vm`.
    pub(crate) fn install_vmd(&self, script: &str) {
        let text = self.path("script");
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        let install = Command::new("install").arg(text).arg(self.path("vmd")).status().unwrap();
        assert!(install.success());
    }

    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.path("vm"));
        command
            .args(line.split_whitespace())
            .env("VMD_RUN_DIR", self.path("run"))
            .env("VMD_STATE_DIR", self.path("state"))
            .env("VMD_CONFIG_DIR", self.path("etc"))
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }
}

/// No program here takes longer, on however busy a machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The lines of a running program, each awaited for so long at most.
pub(crate) fn lines(output: impl Read + Send + 'static) -> impl Iterator<Item = String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    std::iter::from_fn(move || match lines.recv_timeout(PATIENCE) {
        Ok(line) => Some(line),
        Err(mpsc::RecvTimeoutError::Disconnected) => None,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("there is no further line"),
    })
}

pub(crate) fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

/// Runs `vm`, and gives its stdout once its exit code is the expected one.
#[track_caller]
pub(crate) fn stdout(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The same for stderr.
#[track_caller]
pub(crate) fn stderr(output: &Output, code: i32) -> String {
    stdout(output, code);
    String::from_utf8(output.stderr.clone()).unwrap()
}
