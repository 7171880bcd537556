//! How far a long operation is, on stderr: a live line on a terminal; elsewhere plain lines, and only of what
//! takes long, so that a command's own stderr stays clean.

use std::{
    future::Future,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vm_api::OperationProgress;

use crate::output::{Output, printable};

/// How long an operation may take before plain lines tell of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// The same where stderr belongs to a command in the guest.
pub(crate) const SESSION_PATIENCE: Duration = Duration::from_secs(30);

/// Totals from here on are of bytes; whoever counts steps has fewer.
const BYTES: u64 = 64 << 10;

/// Between two frames of the live line.
const TICK: Duration = Duration::from_millis(120);

/// Shows one operation's progress.
#[derive(Debug)]
pub(crate) struct Progress(Kind);

#[derive(Debug)]
enum Kind {
    Silent,
    Live(ProgressBar),
    Lines { from: Instant, last: String },
}

impl Progress {
    /// Chooses how.
    pub(crate) fn new(quiet: bool, patience: Duration) -> Self {
        Self(if quiet {
            Kind::Silent
        } else if io::stderr().is_terminal() {
            // It does not tick, thus is not drawn, before there is something to show.
            Kind::Live(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
        } else {
            Kind::Lines { from: Instant::now() + patience, last: String::new() }
        })
    }

    /// A live line where there is a terminal, and nothing elsewhere.
    pub(crate) fn live(quiet: bool) -> Self {
        Self::new(quiet || !io::stderr().is_terminal(), Duration::ZERO)
    }

    /// Writes a text on stderr, above the live line if there is one.
    pub(crate) fn say(&self, text: &str) {
        let write = |text: &str| {
            let mut stderr = io::stderr().lock();
            // Nobody is left to tell if this fails.
            let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
        };
        match &self.0 {
            // The line is drawn where the text ends, so that has to end a line.
            Kind::Live(bar) => bar.suspend(|| {
                let text = printable(text);
                write(&text);
                if !text.ends_with('\n') {
                    write("\n");
                }
            }),
            Kind::Silent | Kind::Lines { .. } => write(text),
        }
    }

    /// Shows a state.
    pub(crate) fn show(&mut self, progress: &OperationProgress) {
        match &mut self.0 {
            Kind::Silent => {}
            Kind::Live(bar) => {
                // Templates are constants, so they parse; indicatif's own default would do too.
                let template = match progress.total {
                    Some(total) if total >= BYTES => {
                        "{spinner} {msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {percent}%"
                    }
                    Some(_) => "{spinner} {msg} {wide_bar} {percent}%",
                    None => "{spinner} {msg} {elapsed}",
                };
                let first = bar.message().is_empty();
                if bar.length() != progress.total || first {
                    bar.set_style(
                        ProgressStyle::with_template(template)
                            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
                    );
                }
                bar.set_message(progress.stage.clone());
                match progress.total {
                    Some(total) => bar.set_length(total),
                    None => bar.unset_length(),
                }
                bar.set_position(progress.done);
                if first {
                    bar.enable_steady_tick(TICK);
                }
            }
            Kind::Lines { from, last } => {
                if Instant::now() >= *from && *last != progress.stage {
                    last.clone_from(&progress.stage);
                    let _ = writeln!(io::stderr(), "vm: {}", progress.stage);
                }
            }
        }
    }

    /// Removes the live line.
    pub(crate) fn clear(&mut self) {
        if let Kind::Live(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Awaits a call that tells no progress of its own, and shows that it is at work on `stage`.
pub(crate) async fn waiting<T>(output: Output, stage: &str, work: impl Future<Output = T>) -> T {
    let mut progress = Progress::new(output.quiet || output.json, PATIENCE);
    let state = OperationProgress { stage: stage.to_owned(), ..OperationProgress::default() };
    let mut work = std::pin::pin!(work);
    // Long enough that what is quick shows nothing.
    let mut wait = Duration::from_millis(300);
    loop {
        // Cancel-safe: the work is kept from one turn to the next.
        match tokio::time::timeout(wait, &mut work).await {
            Ok(done) => return done,
            Err(_) => progress.show(&state),
        }
        wait = PATIENCE;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
