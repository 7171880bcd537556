//! Refuses VMs that are too big or lack a label. It only looks: it asks for no grant and changes nothing.

use serde::Deserialize;
use vm_plugin_sdk::{Context, Facts, Preflight, Report, Result, Vm, capability};

/// What is allowed; what is absent has no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
struct Limits {
    max_cpus: Option<u32>,
    max_memory_mib: Option<u64>,
    max_disk_gib: Option<u64>,
    /// Names of labels that a VM must have, with any value.
    required_labels: Vec<String>,
}

/// What the limits are about.
struct Wanted {
    cpus: u32,
    memory_bytes: u64,
    disk_bytes: u64,
    labels: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    subject: &'static str,
    message: String,
    hint: String,
}

impl Limits {
    fn refusals(&self, wanted: &Wanted) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut refuse = |subject, message, hint| refusals.push(Refusal { subject, message, hint });
        if let Some(most) = self.max_cpus.filter(|&most| wanted.cpus > most) {
            let message = format!("{} CPUs are more than the {most} allowed", wanted.cpus);
            refuse("cpus", message, format!("ask for at most {most} CPUs"));
        }
        for (subject, bytes, most, shift, unit) in [
            ("memory", wanted.memory_bytes, self.max_memory_mib, 20, "MiB"),
            ("disk", wanted.disk_bytes, self.max_disk_gib, 30, "GiB"),
        ] {
            let Some(most) = most.filter(|&most| bytes > most.saturating_mul(1 << shift)) else { continue };
            // Rounded up, for it is more than was allowed.
            let size = bytes.div_ceil(1 << shift);
            let message = format!("{size} {unit} of {subject} are more than the {most} {unit} allowed");
            refuse(subject, message, format!("ask for at most {most} {unit} of {subject}"));
        }
        for label in self.required_labels.iter().filter(|label| !wanted.labels.contains(label)) {
            refuse(
                "labels",
                format!("the label {label} is required here"),
                format!("give the VM a label {label}, with any value"),
            );
        }
        refusals
    }
}

impl Preflight for Limits {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, report: &Report) -> Result {
        let wanted = Wanted {
            cpus: vm.cpus(),
            memory_bytes: vm.memory_bytes(),
            disk_bytes: vm.disk_bytes(),
            labels: vm.label_names(),
        };
        let refusals = self.refusals(&wanted);
        for refusal in &refusals {
            report.failure(refusal.subject, &refusal.message, Some(&refusal.hint));
        }
        if refusals.is_empty() {
            report.ok("limits", "within the limits");
        }
        Ok(())
    }
}

capability!(Limits: Preflight);

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted { cpus: 4, memory_bytes: 2 << 30, disk_bytes: 20 << 30, labels: vec!["owner".to_owned()] }
    }

    fn limits() -> Limits {
        Limits {
            max_cpus: Some(4),
            max_memory_mib: Some(2048),
            max_disk_gib: Some(20),
            required_labels: vec!["owner".to_owned()],
        }
    }

    fn subjects(limits: &Limits, wanted: &Wanted) -> Vec<&'static str> {
        limits.refusals(wanted).into_iter().map(|refusal| refusal.subject).collect()
    }

    #[test]
    fn what_is_exactly_at_the_limit_is_allowed_and_no_limit_allows_all() {
        assert_eq!(limits().refusals(&wanted()), []);
        let huge =
            Wanted { cpus: u32::MAX, memory_bytes: u64::MAX, disk_bytes: u64::MAX, labels: Vec::new() };
        assert_eq!(Limits::default().refusals(&huge), []);
        assert_eq!(subjects(&limits(), &huge), ["cpus", "memory", "disk", "labels"]);
    }

    #[test]
    fn one_byte_too_many_is_told_in_a_number_that_is_more() {
        let refusals = limits().refusals(&Wanted { memory_bytes: (2 << 30) + 1, ..wanted() });
        assert_eq!(refusals.len(), 1);
        assert!(refusals[0].message.starts_with("2049 MiB of memory"), "{}", refusals[0].message);
        assert!(refusals[0].hint.contains("2048 MiB"));
    }

    #[test]
    fn each_missing_label_is_named() {
        let limits = Limits { required_labels: vec!["owner".to_owned(), "team".to_owned()], ..limits() };
        let refusals = limits.refusals(&wanted());
        assert_eq!(refusals.len(), 1);
        assert!(refusals[0].message.contains("team"));
    }
}
