//! The process groups of running commands, which a machine that goes down ends first: an image's init knows
//! nothing of them and would wait for them, or kill them, at its very end.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::time::{Instant, sleep};

/// Of this process, as its children are.
static GROUPS: Mutex<BTreeSet<Pid>> = Mutex::new(BTreeSet::new());

fn groups() -> MutexGuard<'static, BTreeSet<Pid>> {
    GROUPS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A group's entry, until it is dropped.
pub(crate) struct Registered(Pid);

impl Drop for Registered {
    fn drop(&mut self) {
        groups().remove(&self.0);
    }
}

/// Enters the group of a command that has just started.
pub(crate) fn register(group: Pid) -> Registered {
    groups().insert(group);
    Registered(group)
}

/// How long a SIGHUP may be answered before the SIGTERM, which would cut that short.
const HANG_UP: Duration = Duration::from_millis(500);

/// Ends all groups: by SIGHUP, which ends a shell, then SIGTERM, after `grace` SIGKILL.
pub(crate) async fn end_all(grace: Duration) {
    let all: Vec<Pid> = groups().iter().copied().collect();
    end(all, grace).await;
}

async fn end(mut groups: Vec<Pid>, grace: Duration) {
    let tell = |groups: &[Pid], signal| {
        for group in groups {
            let _ = killpg(*group, signal);
        }
    };
    // A stopped process takes the others only when it goes on.
    tell(&groups, Signal::SIGHUP);
    tell(&groups, Signal::SIGCONT);
    let start = Instant::now();
    let deadline = start + grace;
    let mut term = Some(start + HANG_UP.min(grace / 2));
    loop {
        groups.retain(|group| killpg(*group, None).is_ok());
        if groups.is_empty() {
            return;
        }
        if term.is_some_and(|at| Instant::now() >= at) {
            tell(&groups, Signal::SIGTERM);
            term = None;
        }
        if Instant::now() >= deadline {
            return tell(&groups, Signal::SIGKILL);
        }
        sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn groups_end_gently_or_else_by_force() {
        let start = async |script: &str| {
            let mut child = tokio::process::Command::new("/bin/sh")
                .args(["-c", script])
                .process_group(0)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            child.stdout.as_mut().unwrap().read_u8().await.unwrap();
            child
        };
        let group = |child: &tokio::process::Child| Pid::from_raw(child.id().unwrap().cast_signed());
        // Each is reaped beside it, as the tasks of their sessions do. The one that goes by itself may take its time: it
        // is deaf to what would come next.
        let mut gentle = start("trap '' TERM; trap 'exit 9' HUP; echo; while :; do sleep 0.01; done").await;
        let (_, ended) = tokio::join!(end(vec![group(&gentle)], Duration::from_secs(60)), gentle.wait());
        assert_eq!(ended.unwrap().code(), Some(9));
        let mut deaf = start("trap '' HUP TERM; echo; while :; do sleep 0.01; done").await;
        let (_, ended) = tokio::join!(end(vec![group(&deaf)], Duration::from_millis(200)), deaf.wait());
        assert_eq!(ended.unwrap().signal(), Some(9));
    }
}
