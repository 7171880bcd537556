//! An importer that unpacks an archive, or what changed since.

wit_bindgen::generate!({ path: "../../../../../wit", world: "workspace-importer", generate_all });

use exports::vm::plugin::importer::{Context, Error, Guest, Job, Offers, Repo, Report, Sandbox, Vm};

struct Component;

impl Guest for Component {
    fn probe(_: &Context, repo: &Repo, offers: &Offers) -> Result<(), Error> {
        offers.add("archive", if repo.is_git() { 10 } else { 50 }, "all files as they are");
        offers.warn("archive", &format!("{} of {} bytes", repo.files(), repo.bytes()));
        offers.warn("another", "concerns nobody");
        if repo.prepared() {
            let changes = (repo.modified(), repo.deleted(), repo.untracked());
            offers.add("changes", 90, &format!("{changes:?} {:?}", repo.traits()));
        }
        Ok(())
    }

    fn run(
        context: &Context,
        _: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result<(), Error> {
        let destination = job.destination();
        if job.strategy() == "changes" {
            let difference = repo.compare(sandbox, &destination)?;
            let (changed, removed, bytes) = (difference.changed(), difference.removed(), difference.bytes());
            let overwritten = difference.overwritten();
            report.ok("known", &format!("{} {changed} {removed} {bytes} {overwritten:?}", difference.known()));
            return difference.apply(job.uid(), job.gid());
        }
        if !sandbox.is_empty(&destination)? && job.replace() {
            sandbox.clear(&destination)?;
            sandbox.remove(&format!("{destination}.old"))?;
        }
        report.progress(&format!("within {} ms", context.time_limit()));
        let archive = repo.archive(&[])?;
        sandbox.unpack(&archive, &destination, job.uid(), job.gid())?;
        if let Some(depth) = job.strategy().strip_prefix("history ") {
            repo.history(depth.parse().ok())?;
        }
        report.ok(&destination, &format!("{} bytes", archive.size()));
        Ok(())
    }
}

export!(Component);
