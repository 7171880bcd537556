//! Points on both sides of every change of the host, where a test ends the daemon or makes the step fail.
//!
//! ```text
//!   intent ── effect.KIND.apply.before ── apply ── effect.KIND.apply.after ── applied
//!   undoing ─ effect.KIND.undo.before ─── undo ─── effect.KIND.undo.after ─── undone
//! ```
//!
//! KIND is the name of an [`EffectKind`]. Actions, in the `FAILPOINTS` of crate `fail`: `return(kill)` ends the daemon at once,
//! by SIGKILL; `return(ENOSPC)`, `return(EBUSY)` and `return(EPERM)` make the step fail with that error, at `after` although the
//! host has taken it.
//!
//! One more has nothing to do with the host: `workspace.import.time`, with `return(MILLISECONDS)`, is how long an import may take.

use std::{io, time::Duration};

use nix::{
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vm_types::{Effect, EffectKind};

use crate::EngineError;

/// Which side of the change.
#[derive(Debug, Clone, Copy, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Side {
    /// Journaled, not done.
    Before,
    /// Done, not journaled as done.
    After,
}

/// Which change.
#[derive(Debug, Clone, Copy, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Change {
    Apply,
    Undo,
}

/// Does what the point was told to.
///
/// # Errors
/// [`EngineError::Injected`].
///
/// # Panics
/// An action that is none of those above: a test that says it wrong must not pass.
pub(crate) fn reach(effect: &Effect, change: Change, side: Side) -> Result<(), EngineError> {
    let kind: &str = EffectKind::from(effect).into();
    let (change, side): (&str, &str) = (change.into(), side.into());
    let point = format!("effect.{kind}.{change}.{side}");
    let action = fail::eval(&point, |action| action.unwrap_or_default());
    let errno = match action.as_deref() {
        None => return Ok(()),
        Some("kill") => {
            let _ = kill(Pid::this(), Signal::SIGKILL);
            unreachable!("nobody survives SIGKILL")
        }
        Some("ENOSPC") => libc::ENOSPC,
        Some("EBUSY") => libc::EBUSY,
        Some("EPERM") => libc::EPERM,
        Some(other) => panic!("the failpoint {point} knows no action {other:?}"),
    };
    Err(EngineError::Injected { point, source: io::Error::from_raw_os_error(errno) })
}

/// What the time limit of an import shall be.
///
/// # Panics
/// It is no number: a test that says it wrong must not pass.
pub(crate) fn import_time() -> Option<Duration> {
    let point = "workspace.import.time";
    fail::eval(point, |action| {
        let text = action.unwrap_or_default();
        let milliseconds = text.parse().unwrap_or_else(|_| panic!("the failpoint {point} takes no {text:?}"));
        Duration::from_millis(milliseconds)
    })
}
