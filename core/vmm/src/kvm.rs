//! Whether this host's KVM can run ordinary guest kernels.
//!
//! That `/dev/kvm` opens is not enough: there are hosts, themselves virtual, where it opens, VMs can be created and
//! ordinary guest kernels still die. There `/proc/cpuinfo` shows neither `vmx` nor `svm`.

use std::{fs::OpenOptions, io};

/// Whether hardware virtualisation is there, and how that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Hardware {
        /// Why, for people.
        reason: String,
    },
    /// It is not.
    Missing {
        /// Why, for people.
        reason: String,
    },
}

/// Looks at this host.
pub fn probe() -> Verdict {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    judge(device, &cpuinfo, std::env::consts::ARCH)
}

fn judge(device: io::Result<()>, cpuinfo: &str, arch: &str) -> Verdict {
    if let Err(error) = device {
        return Verdict::Missing { reason: format!("/dev/kvm cannot be opened: {error}") };
    }
    if arch == "aarch64" {
        return Verdict::Hardware { reason: "/dev/kvm opens on an arm64 CPU".to_owned() };
    }
    let flag = cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .flat_map(|(_, flags)| flags.split_ascii_whitespace())
        .find(|flag| matches!(*flag, "vmx" | "svm"));
    match flag {
        Some(flag) => Verdict::Hardware { reason: format!("/dev/kvm opens and the CPU has {flag}") },
        None => Verdict::Missing {
            reason: "/dev/kvm opens, but /proc/cpuinfo shows neither vmx nor svm, so guest kernels would die in it"
                .to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_counts_only_where_the_cpu_shows_it() {
        let hardware = |cpuinfo, arch| matches!(judge(Ok(()), cpuinfo, arch), Verdict::Hardware { .. });
        assert!(hardware("processor\t: 0\nflags\t\t: fpu vmx sse\n", "x86_64"));
        assert!(hardware("flags : fpu svm\n", "x86_64"));
        assert!(!hardware("flags : fpu sse\nvmx flags : vnmi\nbugs : svm\n", "x86_64"));
        assert!(hardware("Features : fp asimd\n", "aarch64"));
    }

    #[test]
    fn a_closed_device_says_why() {
        let verdict = judge(Err(io::ErrorKind::PermissionDenied.into()), "flags : vmx\n", "x86_64");
        let Verdict::Missing { reason } = verdict else { panic!("{verdict:?}") };
        assert!(reason.contains("permission denied"), "{reason}");
    }
}
