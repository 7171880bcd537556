//! Questions to the user: on stderr, answered on a terminal, and given up by a signal.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::{errors::CliError, interrupts::Interrupts, output::Output};

/// Whether there is somebody to ask.
pub(crate) fn can_ask(output: Output) -> bool {
    !output.json && io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Shows a text that ends in a question, and waits for the answer; no is the default. `left` says what a signal leaves.
pub(crate) async fn ask(text: &str, left: &str, interrupts: &mut Interrupts) -> Result<bool, CliError> {
    let mut stderr = io::stderr();
    stderr
        .write_all(format!("{text} [y/N] ").as_bytes())
        .and_then(|()| stderr.flush())
        .map_err(|source| CliError::Output { source })?;
    let (sender, answer) = tokio::sync::oneshot::channel();
    // On a thread of its own: nothing ends a read from a terminal before its line does.
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = sender.send(io::stdin().lock().read_line(&mut line).map(|_| line));
    });
    // Cancel-safe: a signal ends the verb, and the process with it.
    tokio::select! {
        answer = answer => {
            let line = answer.ok().and_then(Result::ok).unwrap_or_default();
            Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
        }
        signal = interrupts.next() => {
            let _ = writeln!(io::stderr());
            Err(CliError::Interrupted { signal, what: left.to_owned() })
        }
    }
}
