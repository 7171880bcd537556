//! Brings any directory into a guest: exactly its files, and nothing else. Of a git repository those that git does not ignore,
//! without its history.

use serde::Deserialize;
use vm_plugin_sdk::{Context, Importer, Job, Offers, Repo, Report, Result, Sandbox, Vm, importer, info};

const STRATEGY: &str = "files";

/// The last resort, and all there is for what is no git repository.
const SCORE: u32 = 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Copy {}

/// How much is brought, in words.
fn amount(files: u64, bytes: u64) -> String {
    let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let (scale, unit) = units.into_iter().find(|(scale, _)| bytes >= *scale).unwrap_or((1, "B"));
    // One decimal below ten, as sizes are read.
    let tenths = bytes.saturating_mul(10) / scale;
    if scale == 1 || tenths >= 100 {
        format!("{files}, {} {unit}", tenths / 10)
    } else {
        format!("{files}, {}.{} {unit}", tenths / 10, tenths % 10)
    }
}

impl Importer for Copy {
    fn probe(&self, _: &Context, repo: &Repo, offers: &Offers) -> Result {
        offers.add(STRATEGY, SCORE, &amount(repo.files(), repo.bytes()));
        if repo.is_git() {
            offers.warn(STRATEGY, "without the history: in the guest it is no git repository");
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
        let amount = amount(repo.files(), repo.bytes());
        job.make_room(sandbox)?;
        report.progress(&format!("sending {amount}"));
        sandbox.unpack(&repo.archive(&[])?, &destination, job.uid(), job.gid())?;
        info!("{} to {}: {amount}", repo.name(), vm.name());
        report.ok(&destination, &amount);
        Ok(())
    }
}

importer!(Copy);

#[cfg(test)]
mod tests {
    use super::amount;

    #[test]
    fn amounts_are_readable() {
        for (files, bytes, words) in [
            (0, 0, "0 files, 0 B"),
            (1, 1023, "1 file, 1023 B"),
            (2, 1024, "2 files, 1.0 KiB"),
            (3, 10 << 10, "3 files, 10 KiB"),
            (4, (1 << 30) - 1, "4 files, 1023 MiB"),
            (20_000, 3 << 29, "20000 files, 1.5 GiB"),
            (1, u64::MAX, "1 file, 1717986918 GiB"),
        ] {
            assert_eq!(amount(files, bytes), words);
        }
    }
}
