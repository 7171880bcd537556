//! Brings a repository into a guest: its files as they are, without its history.

use serde::Deserialize;
use vm_plugin_sdk::{Context, Importer, Job, Offers, Repo, Report, Result, Sandbox, Vm, importer};

/// The one way this plugin knows.
const FILES: &str = "files";

/// The configuration. The host checks it against `[config]` in plugin.toml and fills in the defaults.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct {{Type}} {
    score: u32,
}

impl Importer for {{Type}} {
    // What could be done with this repository? The highest score of all plugins wins.
    fn probe(&self, _: &Context, repo: &Repo, offers: &Offers) -> Result {
        offers.add(FILES, self.score, &offer(&repo.name(), repo.dirty()));
        Ok(())
    }

    // Do it. The archive goes from host to guest while it is made: only its handle passes through here.
    fn run(
        &self,
        _: &Context,
        _: &Vm,
        job: &Job,
        repo: &Repo,
        sandbox: &Sandbox,
        report: &Report,
    ) -> Result {
        if job.strategy() != FILES {
            return Err(job.unknown_strategy());
        }
        // Refuses where something is in the way, unless it may be thrown away.
        job.make_room(sandbox)?;
        report.progress(&format!("sending {} files", repo.files()));
        let archive = repo.archive(&[])?;
        sandbox.unpack(&archive, &job.destination(), job.uid(), job.gid())?;
        report.ok(&job.destination(), &format!("{} files", repo.files()));
        Ok(())
    }
}

fn offer(repository: &str, dirty: bool) -> String {
    let changes = if dirty {
        ", with changes that are not committed"
    } else {
        ""
    };
    format!("the files of {repository} as they are{changes}")
}

importer!({{Type}});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_says_what_would_be_brought() {
        assert_eq!(offer("web", false), "the files of web as they are");
        assert!(offer("web", true).ends_with("not committed"));
    }
}
