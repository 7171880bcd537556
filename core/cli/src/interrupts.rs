//! The signals by which a user or supervisor asks `vm` to end.

use std::{fs, io};

use nix::libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::errors::CliError;

/// Receives SIGINT, SIGTERM, SIGHUP and SIGQUIT instead of dying of them.
#[derive(Debug)]
pub(crate) struct Interrupts {
    signals: [Option<Signal>; 4],
}

const NUMBERS: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

impl Interrupts {
    /// Begins to receive. A signal that was ignored when `vm` began stays so (nohup(1), background jobs of sh).
    pub(crate) fn new() -> Result<Self, CliError> {
        let ignored = ignored_signals();
        let mut signals = [const { None }; 4];
        for (slot, number) in signals.iter_mut().zip(NUMBERS) {
            if ignored & (1 << (number - 1)) == 0 {
                let listen = signal(SignalKind::from_raw(number));
                *slot = Some(listen.map_err(|source| CliError::Setup { what: "signal handling", source })?);
            }
        }
        Ok(Self { signals })
    }

    /// The next one's number. Cancel-safe: an unread signal stays for the next call.
    pub(crate) async fn next(&mut self) -> i32 {
        let [int, term, hup, quit] = &mut self.signals;
        tokio::select! {
            () = receive(int) => SIGINT,
            () = receive(term) => SIGTERM,
            () = receive(hup) => SIGHUP,
            () = receive(quit) => SIGQUIT,
        }
    }
}

async fn receive(signal: &mut Option<Signal>) {
    let received = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if received.is_none() {
        std::future::pending().await
    }
}

/// The mask of ignored signals (proc(5), `SigIgn`); none where it cannot be read.
fn ignored_signals() -> u64 {
    fn read() -> io::Result<Option<u64>> {
        let status = fs::read_to_string("/proc/self/status")?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        Ok(mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()))
    }
    read().ok().flatten().unwrap_or(0)
}
