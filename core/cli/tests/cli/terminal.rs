//! `vm` on a terminal.

use std::{
    fs::File,
    io::{Read, Write},
    process::{Command, Stdio},
};

use nix::pty::openpty;

/// What came of it.
pub(crate) struct Shown {
    pub(crate) stdout: String,
    /// What the terminal showed: stderr, and what was typed.
    pub(crate) terminal: String,
    pub(crate) code: Option<i32>,
}

/// Runs a command with stdin and stderr on a terminal, and answers its question.
pub(crate) fn on_a_terminal(mut command: Command, answer: &str) -> Shown {
    let terminal = openpty(None, None).unwrap();
    let mut child = command
        .stdin(Stdio::from(terminal.slave.try_clone().unwrap()))
        .stderr(Stdio::from(terminal.slave))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It holds the terminal's other end too.
    drop(command);
    let mut terminal = File::from(terminal.master);
    let mut shown = Vec::new();
    let mut buffer = [0; 4096];
    // The command holds the only other end: reading fails with EIO once it has ended.
    let mut answered = false;
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        shown.extend_from_slice(&buffer[..count]);
        if !answered && shown.windows(5).any(|window| window == b"[y/N]") {
            terminal.write_all(answer.as_bytes()).unwrap();
            answered = true;
        }
    }
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let code = child.wait().unwrap().code();
    Shown { stdout, terminal: String::from_utf8_lossy(&shown).into_owned(), code }
}
