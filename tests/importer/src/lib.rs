//! Brings some directories of a repository and nothing else, leaves a note beside them that says where they came from, and runs a
//! command there, as the user they belong to.

use serde::{Deserialize, Serialize};
use vm_plugin_sdk::{Context, Error, Importer, Job, Offers, Repo, Report, Result, Sandbox, Vm, importer};

const STRATEGY: &str = "directories";
/// More than a plain copy, less than what knows git.
const SCORE: u32 = 40;
/// The note's name.
const NOTE: &str = "SLICE.json";
/// How much of a failed command's output is told, in bytes.
const TOLD: usize = 1000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    directories: Vec<String>,
    command: Vec<String>,
}

/// What the note says.
#[derive(Debug, Serialize)]
struct Note<'a> {
    repository: &'a str,
    commit: Option<&'a str>,
    files: usize,
}

impl Slice {
    /// The directories as prefixes of what is in them.
    fn prefixes(&self) -> Vec<String> {
        self.directories.iter().map(|directory| format!("{}/", directory.trim_end_matches('/'))).collect()
    }

    fn count(&self, repo: &Repo) -> Result<usize> {
        let counts = self.prefixes().into_iter().map(|prefix| Ok(repo.paths(&prefix)?.len()));
        counts.sum()
    }
}

/// The end of an output, where commands say what went wrong.
fn end(stderr: &[u8], stdout: &[u8]) -> String {
    let said = if stderr.trim_ascii().is_empty() { stdout } else { stderr }.trim_ascii();
    String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD)..]).into_owned()
}

impl Importer for Slice {
    fn probe(&self, _: &Context, repo: &Repo, offers: &Offers) -> Result {
        let files = self.count(repo)?;
        if files > 0 {
            offers.add(STRATEGY, SCORE, &format!("{files} files of {}", self.directories.join(", ")));
            offers.warn(STRATEGY, "all other directories stay on the host");
        }
        Ok(())
    }

    fn run(&self, _: &Context, _: &Vm, job: &Job, repo: &Repo, sandbox: &Sandbox, report: &Report) -> Result {
        let (destination, uid, gid) = (job.destination(), job.uid(), job.gid());
        let files = self.count(repo)?;
        if files == 0 {
            let message = format!("{} has none of {}", repo.name(), self.directories.join(", "));
            return Err(Error::new("slice.nothing", message)
                .with_hint("name directories that it has: vm plugin configure slice directories=[…]"));
        }
        job.make_room(sandbox)?;
        report.progress(&format!("sending {files} files"));
        sandbox.unpack(&repo.archive(&self.prefixes())?, &destination, uid, gid)?;
        let (name, commit) = (repo.name(), repo.head());
        let note = Note { repository: &name, commit: commit.as_deref(), files };
        sandbox.write_file(&format!("{destination}/{NOTE}"), &serde_json::to_vec(&note)?, 0o644, uid, gid)?;
        if let Some((program, arguments)) = self.command.split_first() {
            report.progress(&format!("running {program}"));
            let command = sandbox.command(program)?;
            arguments.iter().for_each(|argument| command.argument(argument));
            command.directory(&destination);
            command.user(&job.user());
            let output = command.run()?;
            if output.code() != Some(0) {
                let said = end(&output.stderr(), &output.stdout());
                return Err(Error::new("slice.command", format!("{program} failed: {said}"))
                    .with_hint("try it by hand: vm ssh"));
            }
        }
        report.ok(&destination, &format!("{files} files"));
        Ok(())
    }
}

importer!(Slice);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_meant_and_not_what_begins_like_it() {
        let slice = Slice { directories: vec!["src".to_owned(), "a/b/".to_owned()], command: Vec::new() };
        assert_eq!(slice.prefixes(), ["src/", "a/b/"]);
    }

    #[test]
    fn the_end_of_the_output_is_told() {
        assert_eq!(end(b"no rule\n", b"reading\n"), "no rule");
        assert_eq!(end(b"\n", b"FAILED\n"), "FAILED");
    }
}
