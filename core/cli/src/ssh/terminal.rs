//! The local terminal: its size and modes, and the raw mode of an interactive session.

use std::{
    io,
    sync::{Mutex, Once, PoisonError},
};

use russh::Pty;
use rustix::termios::{
    InputModes, OptionalActions, SpecialCodeIndex as Code, Termios, tcgetattr, tcgetwinsize, tcsetattr,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What the terminal was before; present exactly while it is raw.
static COOKED: Mutex<Option<Termios>> = Mutex::new(None);

/// Size where there is no terminal to ask.
const DEFAULT_SIZE: (u32, u32) = (80, 24);

/// Columns and rows of the terminal on stdin.
pub(crate) fn size() -> (u32, u32) {
    match tcgetwinsize(io::stdin()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => DEFAULT_SIZE,
    }
}

/// Modes of the terminal on stdin, for the one in the guest (RFC 4254, section 8): the control characters and
/// whether it is UTF-8. The guest's defaults do for the rest.
pub(crate) fn modes() -> Vec<(Pty, u32)> {
    const CODES: [(Pty, Code); 12] = [
        (Pty::VINTR, Code::VINTR),
        (Pty::VQUIT, Code::VQUIT),
        (Pty::VERASE, Code::VERASE),
        (Pty::VKILL, Code::VKILL),
        (Pty::VEOF, Code::VEOF),
        (Pty::VEOL, Code::VEOL),
        (Pty::VSTART, Code::VSTART),
        (Pty::VSTOP, Code::VSTOP),
        (Pty::VSUSP, Code::VSUSP),
        (Pty::VREPRINT, Code::VREPRINT),
        (Pty::VWERASE, Code::VWERASE),
        (Pty::VLNEXT, Code::VLNEXT),
    ];
    let Ok(termios) = tcgetattr(io::stdin()) else { return Vec::new() };
    let code = |(mode, code): (Pty, Code)| {
        // RFC 4254 writes a disabled character as 255, Linux as 0.
        let value = termios.special_codes[code];
        (mode, if value == 0 { 255 } else { u32::from(value) })
    };
    let utf8 = u32::from(termios.input_modes.contains(InputModes::IUTF8));
    CODES.into_iter().map(code).chain([(Pty::IUTF8, utf8)]).collect()
}

/// The terminal on stdin in raw mode; restored when this is dropped, and before a panic's message.
#[derive(Debug)]
pub(crate) struct RawMode {
    raw: Termios,
    resized: Signal,
    continued: Signal,
}

impl RawMode {
    /// Makes it raw.
    pub(crate) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                report(panic);
            }));
        });
        let resized = signal(SignalKind::window_change())?;
        let continued = signal(SignalKind::from_raw(nix::libc::SIGCONT))?;
        let cooked = tcgetattr(io::stdin())?;
        let mut raw = cooked.clone();
        raw.make_raw();
        *COOKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(cooked);
        let mode = Self { raw, resized, continued };
        mode.apply()?;
        Ok(mode)
    }

    fn apply(&self) -> io::Result<()> {
        Ok(tcsetattr(io::stdin(), OptionalActions::Now, &self.raw)?)
    }

    /// Returns when the size may have changed; also makes the terminal raw again after a stop, where the shell had
    /// taken it over. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            _ = self.resized.recv() => {}
            _ = self.continued.recv() => {
                let _ = self.apply();
            }
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(cooked) = COOKED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &cooked);
    }
}
