//! What the doctor says of plugins: how each is, and what each says of itself.

use std::{os::unix::fs::MetadataExt, sync::Arc};

use tokio::task::JoinSet;
use vm_api::{Finding, PluginState, Severity};
use vm_plugin::{Hook, Severity as Said, manifest};

use super::{
    bundled,
    entry::Entry,
    manager::{Manager, blocking},
    package, show,
};
use vm_engine::ports::{HookInput, Plugin as _};

fn finding(check: String, severity: Severity, message: String, fix: Option<String>) -> Finding {
    Finding { check, severity, message, fix }
}

/// How it is: version, world, content, what it may and what it did.
fn about(entry: &Entry) -> Finding {
    let summary = show::summary(entry, None);
    let check = format!("plugin.{}", summary.name);
    let name = &summary.name;
    let digest = summary.digest.strip_prefix("sha256:").unwrap_or(&summary.digest);
    let facts = format!(
        "{} {} ({}), world {}, {} of {} grants, {} calls, {} failed",
        summary.state.word(),
        summary.version,
        digest.get(..12).unwrap_or(digest),
        summary.world,
        summary.granted,
        summary.requested,
        summary.calls,
        summary.errors,
    );
    let worst = if summary.required { Severity::Error } else { Severity::Warning };
    match summary.state {
        PluginState::Enabled if summary.granted < summary.requested => {
            let kinds: Vec<_> = entry
                .loaded()
                .map(|plugin| plugin.grants().missing().map(|request| request.grant.kind()).collect())
                .unwrap_or_default();
            let message = format!("{facts}; not granted: {}", kinds.join(", "));
            let fix = format!("what needs them fails; `vm plugin show {name}` says what for");
            finding(check, Severity::Warning, message, Some(fix))
        }
        PluginState::Enabled => finding(check, Severity::Ok, facts, None),
        PluginState::Disabled => finding(
            check,
            Severity::Warning,
            facts,
            Some(format!("`vm plugin enable {name}`, or `vm plugin remove {name}`")),
        ),
        PluginState::Failed { failures, reason } => finding(
            check,
            worst,
            format!("{facts}; not called since it failed {failures} times in a row: {reason}"),
            Some(format!("see `vm plugin logs {name}`, then `vm plugin enable {name}`")),
        ),
        PluginState::Broken { reason, hint } => finding(
            check,
            worst,
            format!("{facts}; {reason}"),
            hint.or_else(|| Some(format!("install it again, or `vm plugin disable {name}`"))),
        ),
    }
}

/// What it says of itself.
async fn words(entry: Arc<Entry>) -> Vec<Finding> {
    let name = entry.record.name.clone();
    let hook = format!("plugin.{name}.doctor");
    if !entry.has(Hook::Doctor) || entry.loaded().is_none_or(|plugin| plugin.disabled().is_some()) {
        return Vec::new();
    }
    let input = HookInput { reason: "doctor".to_owned(), dry_run: true, ..HookInput::default() };
    // The host's limit for the hook is the time limit.
    let outcome = match entry.call(Hook::Doctor, input).await {
        Ok(outcome) => outcome,
        Err(failure) => return vec![finding(hook, Severity::Warning, failure.message, failure.hint)],
    };
    let word = |said: vm_plugin::Finding| {
        let severity = match said.severity {
            Said::Ok => Severity::Ok,
            Said::Warning => Severity::Warning,
            Said::Failure => Severity::Error,
        };
        let check = format!("plugin.{name}.{}", dotted(&said.subject));
        finding(check, severity, said.message, said.hint)
    };
    outcome.findings.into_iter().map(word).collect()
}

/// A plugin's subject as a part of a check's name.
fn dotted(subject: &str) -> String {
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c.to_ascii_lowercase() } else { '-' }
    };
    subject.chars().take(60).map(fit).collect()
}

impl Manager {
    /// Findings on all plugins, in their order.
    pub(crate) async fn doctor(&self) -> Vec<Finding> {
        let set = self.set();
        let mut asked = JoinSet::new();
        for (place, entry) in set.0.iter().enumerate() {
            let entry = entry.clone();
            asked.spawn(async move { (place, words(entry).await) });
        }
        let mut said: Vec<Vec<Finding>> = vec![Vec::new(); set.0.len()];
        while let Some(Ok((place, findings))) = asked.join_next().await {
            said[place] = findings;
        }
        let each = set.0.iter().zip(said);
        let mut findings: Vec<_> =
            each.flat_map(|(entry, said)| std::iter::once(about(entry)).chain(said)).collect();
        findings.extend(self.bundled_findings().await);
        findings.extend(self.left_findings());
        findings.extend(self.trust_findings().await);
        findings
    }

    /// Keys that cannot be used, and plugins that came before they were asked for.
    async fn trust_findings(&self) -> Vec<Finding> {
        let trust = self.trust.clone();
        let keys = blocking(move || Ok(trust.check()?)).await.err().map(|error| {
            let message = vm_types::report::chain(&error);
            finding("plugins.trusted-keys".to_owned(), Severity::Error, message, error.hint())
        });
        let set = self.set();
        let unsigned = set.0.iter().filter_map(|entry| {
            let name = &entry.record.name;
            let error = self.trust.judge(&entry.record.source, &show::signature(entry)).err()?;
            let fix = format!("install one that is signed, or `vm plugin remove {name}`");
            let message = format!("it was installed before the rule: {error}");
            Some(finding(format!("plugin.{name}.signature"), Severity::Warning, message, Some(fix)))
        });
        keys.into_iter().chain(unsigned).collect()
    }

    /// What plugins that were removed have left: as it should be, but nobody else would tell how to get rid of it.
    fn left_findings(&self) -> Vec<Finding> {
        let left = self.left().into_iter().map(|(name, kept)| {
            let entries = kept.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
            let blocks: u64 = entries.filter_map(|entry| Some(entry.metadata().ok()?.blocks())).sum();
            let kept: Vec<_> = kept.iter().map(|dir| dir.display().to_string()).collect();
            let message = format!(
                "it was removed and has left {} MiB in {}; `vm plugin remove {name} --purge` deletes that",
                (blocks * 512).div_ceil(1 << 20),
                kept.join(" and "),
            );
            finding(format!("plugin.{name}.left"), Severity::Ok, message, None)
        });
        left.collect()
    }

    /// What comes with the daemon and is not what is installed.
    async fn bundled_findings(&self) -> Vec<Finding> {
        let Some(directory) = self.bundled.clone() else { return Vec::new() };
        let look = move || {
            let default = bundled::default(&directory)?;
            let read = |name: String| {
                let manifest = package::manifest(&directory.join(&name));
                (name, manifest)
            };
            Ok((default, bundled::list(&directory).into_iter().map(read).collect::<Vec<_>>()))
        };
        let (default, there) = match blocking(look).await {
            Ok(found) => found,
            Err(error) => {
                let message = vm_types::report::chain(&error);
                return vec![finding("plugins.bundled".to_owned(), Severity::Warning, message, error.hint())];
            }
        };
        let mut findings = Vec::new();
        let check = |name: &str| format!("plugins.bundled.{name}");
        let missing = default.iter().filter(|name| !there.iter().any(|(other, _)| other == *name));
        for name in missing {
            let message = "it is to be installed by itself and does not come with the daemon".to_owned();
            findings.push(finding(
                check(name),
                Severity::Warning,
                message,
                Some("install vmd anew".to_owned()),
            ));
        }
        for (name, manifest) in there {
            let manifest = match manifest {
                Ok(manifest) => manifest,
                Err(error) => {
                    let message = vm_types::report::chain(&error);
                    findings.push(finding(check(&name), Severity::Warning, message, error.hint()));
                    continue;
                }
            };
            let installed = self.find(&manifest.name).ok();
            let version = installed.as_ref().and_then(|entry| Some(entry.manifest.as_ref()?.version.clone()));
            if let Some(version) = version
                && manifest::is_newer(&manifest.version, &version)
            {
                let message =
                    format!("version {} comes with this daemon, {version} is installed", manifest.version);
                let fix = format!("vm plugin install bundled:{name}");
                findings.push(finding(check(&name), Severity::Warning, message, Some(fix)));
            }
        }
        findings
    }
}
