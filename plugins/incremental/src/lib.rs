//! Brings what has changed on the host since a workspace was prepared in a guest: changed and new files, what is gone, and a history
//! that has grown. What only the guest has changed stays. What both have changed is the guest's work, and is overwritten only if
//! somebody says so.

use serde::Deserialize;
use vm_plugin_sdk::{
    Context, Error, Importer, Job, Offers, Repo, Report, Result, Sandbox, Vm, importer, info,
};

const STRATEGY: &str = "changes";

/// Before all others, for it does the least; it is offered only where there is something to compare with.
const SCORE: u32 = 95;

/// So many paths are named.
const NAMED: usize = 5;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Incremental {}

/// What changed, in words.
fn describe(changed: u64, removed: u64) -> String {
    match (changed, removed) {
        (0, 0) => "nothing has changed".to_owned(),
        (changed, 0) => format!("{changed} changed"),
        (0, removed) => format!("{removed} gone"),
        (changed, removed) => format!("{changed} changed, {removed} gone"),
    }
}

fn not_known(destination: &str) -> Error {
    let message =
        format!("{destination} in the guest was not made from this workspace, or not from all of it");
    Error::new("workspace.not-prepared", message)
        .with_hint("prepare it with another importer: vm workspace plan shows what there is")
}

fn guest_changed(paths: &[String]) -> Error {
    let mut named: Vec<_> = paths.iter().take(NAMED).map(|path| format!("{path:?}")).collect();
    let more = paths.len().saturating_sub(NAMED);
    if more > 0 {
        named.push(format!("and {more} more"));
    }
    let message = format!("host and guest have both changed {}", named.join(", "));
    Error::new("workspace.guest-changed", message)
        .with_hint("bring the guest's work out first: vm workspace export; or have it overwritten: --importer incremental --replace")
}

impl Importer for Incremental {
    fn probe(&self, _: &Context, repo: &Repo, offers: &Offers) -> Result {
        if repo.prepared() {
            offers.add(STRATEGY, SCORE, "only what has changed since it was prepared");
        }
        Ok(())
    }

    fn run(
        &self,
        _: &Context,
        vm: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result {
        if job.strategy() != STRATEGY {
            return Err(job.unknown_strategy());
        }
        let destination = job.destination();
        report.progress("comparing host and guest");
        let difference = repo.compare(sandbox, &destination)?;
        if !difference.known() {
            return Err(not_known(&destination));
        }
        let overwritten = difference.overwritten();
        if !overwritten.is_empty() && !job.replace() {
            return Err(guest_changed(&overwritten));
        }
        let what = describe(difference.changed(), difference.removed());
        report.progress(&format!("bringing it up to date: {what}"));
        difference.apply(job.uid(), job.gid())?;
        info!("{} to {}: {what}, {} bytes", repo.name(), vm.name(), difference.bytes());
        report.ok(&destination, &what);
        if !overwritten.is_empty() {
            let message = format!("{} paths that the guest had changed were overwritten", overwritten.len());
            report.warning(&destination, &message, None);
        }
        Ok(())
    }
}

importer!(Incremental);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_in_words() {
        assert_eq!(describe(0, 0), "nothing has changed");
        assert_eq!(describe(3, 0), "3 changed");
        assert_eq!(describe(0, 1), "1 gone");
        assert_eq!(describe(3, 1), "3 changed, 1 gone");
    }

    #[test]
    fn some_of_the_guests_work_is_named_and_all_of_it_is_counted() {
        let paths = |count: usize| (0..count).map(|number| format!("f{number}")).collect::<Vec<_>>();
        assert_eq!(guest_changed(&paths(2)).message, "host and guest have both changed \"f0\", \"f1\"");
        let many = guest_changed(&paths(12));
        assert!(many.message.ends_with("\"f4\", and 7 more"), "{}", many.message);
        assert_eq!(many.code, "workspace.guest-changed");
        assert!(many.hint.unwrap_or_default().contains("--replace"));
    }
}
