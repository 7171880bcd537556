//! An importer that unpacks an archive.

wit_bindgen::generate!({ path: "../../../../../wit", world: "workspace-importer", generate_all });

use exports::vm::plugin::importer::{Context, Error, Guest, Job, Offers, Repo, Report, Sandbox, Vm};

struct Component;

impl Guest for Component {
    fn probe(_: &Context, repo: &Repo, offers: &Offers) -> Result<(), Error> {
        offers.add("archive", if repo.is_git() { 10 } else { 50 }, "all files as they are");
        Ok(())
    }

    fn run(
        _: &Context,
        _: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result<(), Error> {
        let archive = repo.archive(&[])?;
        sandbox.unpack(&archive, &job.destination(), 0, 0)?;
        report.ok(&job.destination(), &format!("{} bytes", archive.size()));
        Ok(())
    }
}

export!(Component);
