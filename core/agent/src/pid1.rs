//! PID 1: boots, starts the agent, then becomes the image's init or stays as a small one.
//!
//! As a small init it does three things: it reaps orphans, restarts the agent, and takes the machine down when
//! the agent asks (see [`crate::link`]) or by the signals with which tools ask an init, see [`asked_by`].

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use vm_types::guest::{config::GuestConfig, control::ShutdownKind};

use crate::{
    agent,
    boot::{self, BootError},
    console, init,
    link::{Arguments, Message},
    machine,
};

/// What processes get between SIGTERM and SIGKILL when somebody inside asks for the end.
const OWN_GRACE: Duration = Duration::from_secs(5);

/// Before the agent is started again.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) fn main() -> ExitCode {
    let mut arguments = Arguments::default();
    match bring_up(&mut arguments.warnings) {
        Ok(config) => {
            arguments.image_init = (!config.agent_init).then(|| init::find(Path::new("/"))).flatten();
            if arguments.image_init.is_none() {
                machine::mount_cgroups();
            }
        }
        Err(error) => {
            let mut message = vm_types::report::chain(&error);
            console::error(format_args!("{message}"));
            if let Some(hint) = error.hint() {
                console::error(format_args!("hint: {hint}"));
                message.push_str("; ");
                message.push_str(&hint);
            }
            arguments.failure = Some((error.code().to_owned(), message));
        }
    }
    // Blocked before the agent starts, so that no death is missed. A child inherits this and undoes it.
    let mask = SigSet::all();
    let _ = mask.thread_block();
    let mut agent = Agent::start(&arguments);
    if let Some(path) = arguments.image_init.clone() {
        if let Some(agent) = &agent {
            agent.wait_for_go();
        }
        init::prepare(&path);
        let _ = SigSet::all().thread_unblock();
        let error = exec(&path);
        console::error(format_args!("cannot run {}: {error}; the agent stays init", path.display()));
        let _ = mask.thread_block();
        machine::mount_cgroups();
        if let Some(agent) = &agent {
            let _ = Message::Stay(error.to_string()).send(&agent.socket);
        }
        arguments.image_init = None;
        arguments.warnings.push(format!("cannot run {}: {error}", path.display()));
    }
    let Ok(signals) = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) else {
        machine::take_down(ShutdownKind::PowerOff, Duration::ZERO, None);
    };
    arguments.again = true;
    loop {
        let pid = agent.as_ref().map(|agent| agent.pid);
        match next_event(&signals, agent.as_ref()) {
            Event::AgentGone => {
                console::error("the agent process has ended; starting it again");
                agent = None;
            }
            Event::Pause => agent = Agent::start(&arguments),
            Event::Shutdown { kind, grace } => machine::take_down(kind, grace, pid),
        }
    }
}

fn bring_up(warnings: &mut Vec<String>) -> Result<GuestConfig, BootError> {
    boot::mount_kernel()?;
    rehearse();
    warnings.extend(boot::load_modules());
    let config = boot::read_config(Path::new("/"))?;
    boot::switch_root(&config)?;
    Ok(config)
}

/// Begins [`crate::ssh::warm`] where another processor can do it; whoever is PID 1 then collects it.
fn rehearse() {
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1) {
        let _ = Command::new("/proc/self/exe")
            .arg0(crate::ssh::warm::ARGV0)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
    }
}

/// Becomes the image's init; returns only on failure.
fn exec(path: &Path) -> std::io::Error {
    let _ = std::env::set_current_dir("/");
    let mut command = Command::new(path);
    command.env_clear().env("HOME", "/").env("TERM", "linux").env("PATH", crate::ssh::DEFAULT_PATH);
    command.exec()
}

struct Agent {
    pid: Pid,
    socket: OwnedFd,
}

impl Agent {
    fn start(arguments: &Arguments) -> Option<Self> {
        let attempt = || -> std::io::Result<Self> {
            let (ours, theirs) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            let child = Command::new("/proc/self/exe")
                .arg0(agent::ARGV0)
                .args(arguments.encode())
                .env_clear()
                .stdin(Stdio::from(theirs))
                .current_dir(if Path::new("/run").is_dir() { "/run" } else { "/" })
                .spawn()?;
            Ok(Self { pid: Pid::from_raw(child.id().cast_signed()), socket: ours })
        };
        attempt().inspect_err(|error| console::error(format_args!("cannot start the agent: {error}"))).ok()
    }

    /// Blocks until the agent has applied the configuration or is gone.
    fn wait_for_go(&self) {
        let mut buffer = [0; 64];
        loop {
            match nix::unistd::read(&self.socket, &mut buffer) {
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
    }
}

enum Event {
    AgentGone,
    /// Without an agent for [`PAUSE`]: not in a tight circle, whatever the reason.
    Pause,
    Shutdown {
        kind: ShutdownKind,
        grace: Duration,
    },
}

fn next_event(signals: &SignalFd, agent: Option<&Agent>) -> Event {
    let start = Instant::now();
    loop {
        let mut ready = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        ready.extend(agent.map(|agent| PollFd::new(agent.socket.as_fd(), PollFlags::POLLIN)));
        let limit = match agent {
            Some(_) => PollTimeout::NONE,
            None => PAUSE.saturating_sub(start.elapsed()).try_into().unwrap_or(PollTimeout::ZERO),
        };
        let _ = poll(&mut ready, limit);
        if let Some(agent) = agent
            && ready[1].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
        {
            let mut buffer = [0; 64];
            if let Ok(length) = nix::unistd::read(&agent.socket, &mut buffer)
                && let Ok(text) = str::from_utf8(&buffer[..length])
                && let Some(Message::Shutdown { kind, grace_ms }) = Message::decode(text)
            {
                return Event::Shutdown { kind, grace: Duration::from_millis(grace_ms) };
            }
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            if let Some(kind) = asked_by(signal.ssi_signo.cast_signed()) {
                return Event::Shutdown { kind, grace: OWN_GRACE };
            }
        }
        let dead = reap();
        match agent {
            Some(agent) if dead.contains(&agent.pid) => return Event::AgentGone,
            None if start.elapsed() >= PAUSE => return Event::Pause,
            _ => {}
        }
    }
}

/// What a signal asks init for. BusyBox's `halt`, `poweroff` and `reboot` send SIGUSR1, SIGUSR2 and SIGTERM, and
/// control-alt-delete is SIGINT. Where systemd's tools are in an image without it as init, people and scripts send its own
/// (systemd(1), "Signals"): SIGRTMIN+3, 4 and 5, or 13, 14 and 15, for the same three. A machine cannot halt and be of use.
fn asked_by(signal: i32) -> Option<ShutdownKind> {
    /// As systemd's C library counts, which is not the one of this binary.
    const RTMIN: i32 = 34;
    const USR1: i32 = Signal::SIGUSR1 as i32;
    const USR2: i32 = Signal::SIGUSR2 as i32;
    const POWER: i32 = Signal::SIGPWR as i32;
    const TERM: i32 = Signal::SIGTERM as i32;
    const INT: i32 = Signal::SIGINT as i32;
    match signal {
        USR1 | USR2 | POWER => Some(ShutdownKind::PowerOff),
        TERM | INT => Some(ShutdownKind::Reboot),
        _ => match signal - RTMIN {
            3 | 4 | 13 | 14 => Some(ShutdownKind::PowerOff),
            5 | 15 => Some(ShutdownKind::Reboot),
            _ => None,
        },
    }
}

/// Collects every dead child there is.
pub(crate) fn reap() -> Vec<Pid> {
    let mut dead = Vec::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) => dead.push(pid),
            Ok(WaitStatus::StillAlive) | Err(_) => return dead,
            Ok(_) => {}
        }
    }
}

/// Polls `done` until it holds or the time is over.
pub(crate) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signals_of_common_tools_are_understood() {
        let asked = |signal: Signal| asked_by(signal as i32);
        assert_eq!(asked(Signal::SIGTERM), Some(ShutdownKind::Reboot));
        assert_eq!(asked(Signal::SIGUSR2), Some(ShutdownKind::PowerOff));
        assert_eq!((asked_by(38), asked_by(39)), (Some(ShutdownKind::PowerOff), Some(ShutdownKind::Reboot)));
        for other in [Signal::SIGCHLD, Signal::SIGHUP, Signal::SIGWINCH, Signal::SIGALRM] {
            assert_eq!(asked(other), None);
        }
        assert_eq!(asked_by(34), None);
    }
}
