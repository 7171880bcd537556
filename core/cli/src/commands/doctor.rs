//! `vm doctor`

use std::process::{Output as Ended, Stdio};

use clap::Args;
use vm_api::{Finding, Severity, rpc::DaemonClient};

use crate::{
    context::Context,
    daemon::{self, DaemonError},
    errors::CliError,
};

/// Check the host
///
/// Says what works, what works less well than it could, and what will not work, each with a fix. Asks the daemon
/// where one runs; starts none. Exits with 1 if something will not work.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {}

impl DoctorArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let findings = match daemon::connect(&context.layout).await? {
            Some(client) => client.doctor().await?,
            None => without_daemon(context).await?,
        };
        context.output.show(&findings, || text(&findings, context.output.quiet))?;
        match findings.iter().filter(|finding| finding.severity == Severity::Error).count() {
            0 => Ok(0),
            count => Err(CliError::Unhealthy { count }),
        }
    }
}

/// Has the daemon's program check the host and end.
async fn without_daemon(context: &Context) -> Result<Vec<Finding>, CliError> {
    let program = daemon::program()?;
    let spawn = |source| DaemonError::Spawn { program: program.clone(), source };
    let ended: Ended = tokio::process::Command::new(&program)
        .arg("doctor")
        .arg("--json")
        .args(daemon::directory_options(&context.layout))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(spawn)?;
    serde_json::from_slice(&ended.stdout).map_err(|source| {
        if ended.status.success() {
            return CliError::Answer { source };
        }
        let stderr = String::from_utf8_lossy(&ended.stderr);
        DaemonError::Check { status: ended.status.to_string(), stderr: daemon::tail_lines(&stderr, 10) }
            .into()
    })
}

fn text(findings: &[Finding], quiet: bool) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    findings
        .iter()
        .filter(|finding| !quiet || finding.severity != Severity::Ok)
        .map(|finding| {
            let mark = match finding.severity {
                Severity::Ok => "ok     ",
                Severity::Warning => "warning",
                Severity::Error => "ERROR  ",
            };
            let fix =
                finding.fix.as_ref().map(|fix| format!("{:indent$}fix: {fix}\n", "", indent = width + 11));
            format!("{mark}  {:width$}  {}\n{}", finding.check, finding.message, fix.unwrap_or_default())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fix_stands_under_its_finding() {
        let findings = [
            Finding { check: "vmm.qemu".into(), severity: Severity::Ok, message: "8.2".into(), fix: None },
            Finding {
                check: "kvm".into(),
                severity: Severity::Error,
                message: "no /dev/kvm".into(),
                fix: Some("modprobe kvm".into()),
            },
        ];
        assert_eq!(
            text(&findings, false),
            "ok       vmm.qemu  8.2\nERROR    kvm       no /dev/kvm\n                   fix: modprobe kvm\n"
        );
        assert!(!text(&findings, true).contains("8.2"));
    }
}
