//! Whether two processes are a VM's shim and VMM, and not others that have come to their pids.

use std::path::Path;

use vm_host::process::{alive, command_line};
use vm_types::{ProcessRef, VmPaths, shim::LaunchPlan};

use crate::{client, error::ShimError};

/// Whether `shim` is the running shim of this VM and `vmm` the VMM that it has started: pid and start time, the run
/// directory on the shim's command line, the VMM being the shim's child and running the program of its launch plan.
///
/// # Errors
/// A specification that is there and cannot be read. Where it is gone, all but the program is checked.
pub fn verify(paths: &VmPaths, shim: ProcessRef, vmm: ProcessRef) -> Result<bool, ShimError> {
    if !is_shim_of(shim, &paths.run) || parent(vmm.pid) != Some(shim.pid) {
        return Ok(false);
    }
    let runs = match client::spec(paths)? {
        Some(spec) => runs(&command_line(vmm.pid), &spec.launch),
        None => true,
    };
    // Both last: what was read above of a pid was read of this process if it has the pid still.
    Ok(runs && alive(vmm) && alive(shim))
}

/// Whether this very process runs and is a shim of `run_dir` by its command line.
pub(crate) fn is_shim_of(shim: ProcessRef, run_dir: &Path) -> bool {
    let command = command_line(shim.pid);
    let run_dir = run_dir.to_string_lossy();
    command.get(1).is_some_and(|mode| mode == "shim")
        && command.windows(2).any(|pair| pair[0] == "--run-dir" && pair[1] == run_dir)
        && alive(shim)
}

/// Whether a command line is that of the plan, or of a program to which the plan's own has handed it on: a script that
/// ends with `exec qemu-system-x86_64 … "$@"` is a fine VMM.
fn runs(command: &[String], launch: &LaunchPlan) -> bool {
    let Some((program, _)) = command.split_first() else { return false };
    // Empty arguments are not seen in a command line that was read.
    let planned: Vec<_> = launch.args.iter().filter(|argument| !argument.is_empty()).cloned().collect();
    Path::new(program) == launch.program || (!planned.is_empty() && command.ends_with(&planned))
}

/// Parent of a process (proc_pid_stat(5), field 4); the name before it, in brackets, may hold anything.
fn parent(pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_behind_a_script_is_known_by_its_arguments() {
        let launch = LaunchPlan {
            program: "/usr/bin/vmm".into(),
            args: ["-a", "", "b c"].map(str::to_owned).into(),
            channel: vm_types::shim::ChannelEndpoint::VirtioSerial { socket: "/s".into() },
            events: None,
            setup: None,
            last_words: None,
            inherited: Vec::new(),
            own_dir: None,
            jail: None,
        };
        let command = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        assert!(runs(&command(&["/usr/bin/vmm", "-a", "b c"]), &launch));
        assert!(runs(&command(&["/opt/vmm", "--more", "-a", "b c"]), &launch));
        assert!(!runs(&command(&["/opt/vmm", "-a", "b c", "d"]), &launch));
        assert!(!runs(&[], &launch));
        let bare = LaunchPlan { args: Vec::new(), ..launch };
        assert!(!runs(&command(&["/opt/vmm"]), &bare));
    }

    #[test]
    fn the_parent_is_the_one_who_started_it() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let found = parent(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Some(std::process::id()));
        assert_eq!(parent(0), None);
    }
}
