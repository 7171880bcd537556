//! `vm set`

use std::collections::BTreeMap;

use clap::Args;
use vm_api::{RestartPolicy, SetVm, VmChanged, VmInfo, rpc::VmClient};

use super::{
    machine::{Restart, UNLIMITED, bandwidth, iops, label},
    show::policy,
};
use crate::{
    context::Context,
    duration,
    errors::CliError,
    operations::{OnSignal, follow},
    output::{facts, until},
    progress::PATIENCE,
    size::{self, human},
};

/// Change a VM
///
/// Says what has changed. CPUs, memory and the disk's limits of a VM that is up change with its next start; all else does at
/// once. A disk only grows.
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// Name or id
    name: String,
    /// Virtual CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Memory, e.g. 512M or 2G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    memory: Option<u64>,
    /// Root disk, e.g. 20G
    #[arg(long, value_name = "SIZE", value_parser = size::disk_bytes)]
    disk: Option<u64>,
    /// The most bytes it reads and writes on its root disk in a second, e.g. 100M, or unlimited
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    disk_bandwidth: Option<u64>,
    /// The most reads and writes on its root disk in a second, e.g. 500, or unlimited
    #[arg(long, value_name = "N", value_parser = iops)]
    disk_iops: Option<u64>,
    /// Label to add or replace; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Label to remove; may be given several times
    #[arg(long = "unlabel", value_name = "KEY")]
    unlabels: Vec<String>,
    /// Whether it is started again when it ends by itself
    #[arg(long, value_name = "POLICY")]
    restart: Option<Restart>,
    /// Delete it so long from now, e.g. 2h, or never
    #[arg(long, value_name = "DURATION", value_parser = duration::seconds_or_never)]
    ttl: Option<u64>,
    /// Stop it after so long without an SSH connection, e.g. 30m, or never
    #[arg(long, value_name = "DURATION", value_parser = duration::seconds_or_never)]
    idle_stop: Option<u64>,
}

impl SetArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let (name, params) = self.into_request()?;
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let before = VmClient::get(&client, name).await?;
        // By its id: a VM that has got the name meanwhile is not the one that was looked at.
        let begun = VmClient::set(&client, before.id.to_string(), params).await?;
        let done =
            follow::<VmChanged>(&client, begun, context.output, PATIENCE, OnSignal::Leave, &mut interrupts)
                .await?;
        context.output.show(&done.result, || {
            if context.output.quiet { done.result.vm.name.to_string() } else { text(&before, &done.result) }
        })?;
        Ok(0)
    }

    fn into_request(self) -> Result<(String, SetVm), CliError> {
        let mut labels: BTreeMap<_, _> =
            self.labels.into_iter().map(|(key, value)| (key, Some(value))).collect();
        for key in self.unlabels {
            if let Some(Some(_)) = labels.insert(key.clone(), None) {
                return Err(CliError::Usage {
                    message: format!("label {key} is both to be set and to be removed"),
                    hint: "leave out --label or --unlabel for it".to_owned(),
                });
            }
        }
        let params = SetVm {
            cpus: self.cpus,
            memory_mib: self.memory,
            disk_bytes: self.disk,
            disk_bytes_per_second: self.disk_bandwidth,
            disk_operations_per_second: self.disk_iops,
            labels,
            restart: self.restart.map(RestartPolicy::from),
            ttl_seconds: self.ttl,
            idle_stop_seconds: self.idle_stop,
            keep: false,
        };
        if params == SetVm::default() {
            return Err(CliError::Usage {
                message: "nothing to change is given".to_owned(),
                hint: "give one of --cpus, --memory, --disk, --disk-bandwidth, --disk-iops, --label, --unlabel, --restart, \
                       --ttl, --idle-stop; `vm show` tells how it is"
                    .to_owned(),
            });
        }
        Ok((self.name, params))
    }
}

/// What changed, a line each; what waits for a restart says so, with the command that brings it.
fn text(before: &VmInfo, changed: &VmChanged) -> String {
    let (after, waiting) = (&changed.vm, &changed.needs_restart);
    let line = |name: &str, old: String, new: String| {
        let later = if waiting.iter().any(|waiting| waiting == name) { ", after a restart" } else { "" };
        (old != new).then(|| format!("{old} -> {new}{later}"))
    };
    let size = |mib: u64| human(mib << 20);
    let idle = |seconds: Option<u64>| seconds.map_or_else(|| "never".to_owned(), duration::human);
    let unlimited = || UNLIMITED.to_owned();
    let speed = |limit: Option<u64>| limit.map_or_else(unlimited, |bytes| format!("{}/s", human(bytes)));
    let number = |limit: Option<u64>| limit.map_or_else(unlimited, |limit| limit.to_string());
    let expires = (before.expires_at != after.expires_at)
        .then(|| after.expires_at.map_or_else(|| "never".to_owned(), until));
    let mut text = facts([
        ("cpus", line("cpus", before.cpus.to_string(), after.cpus.to_string())),
        ("memory", line("memory", size(before.memory_mib), size(after.memory_mib))),
        ("disk", line("disk", human(before.disk_bytes), human(after.disk_bytes))),
        (
            "disk bandwidth",
            line("disk-bandwidth", speed(before.disk_bytes_per_second), speed(after.disk_bytes_per_second)),
        ),
        (
            "disk iops",
            line(
                "disk-iops",
                number(before.disk_operations_per_second),
                number(after.disk_operations_per_second),
            ),
        ),
        ("labels", labels(&before.labels, &after.labels)),
        ("restart", line("restart", policy(before.restart).to_owned(), policy(after.restart).to_owned())),
        ("expires", expires),
        ("idle stop", line("idle_stop", idle(before.idle_stop_seconds), idle(after.idle_stop_seconds))),
    ]);
    if text.is_empty() {
        text = format!("{} was like this already\n", after.name);
    }
    if !waiting.is_empty() {
        text.push_str(&format!("\n{} needs a restart: vm restart {}\n", after.name, after.name));
    }
    text
}

fn labels(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Option<String> {
    let set = after.iter().filter(|(key, value)| before.get(*key) != Some(*value));
    let removed = before.keys().filter(|key| !after.contains_key(*key));
    let changes: Vec<_> = set
        .map(|(key, value)| format!("{key}={value}"))
        .chain(removed.map(|key| format!("{key} removed")))
        .collect();
    (!changes.is_empty()).then(|| changes.join(", "))
}
