//! `vm cp`
//!
//! ```text
//!  cp: what goes where ── place: names on the command line, and what is there
//!                      └─ transfer: the streams between the two sides
//! ```

mod place;
mod transfer;

use std::{
    ffi::{OsStr, OsString},
    io::{self, IsTerminal},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::Args;
use jsonrpsee::core::client::Client;
use serde::Serialize;
use vm_api::{OperationProgress, Problem};
use vm_types::guest::files::SeenKind;

use self::{
    place::{Item, Named, Side, Target},
    transfer::{Copied, Tasks},
};
use crate::{
    context::Context,
    errors::CliError,
    progress::{PATIENCE, Progress},
    size,
};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(200);

/// Copy files and directories between the host and VMs, or between VMs
///
/// VM:PATH is a path in a running VM, ./A:B a file of the host's with a colon in its name. A relative path in a VM begins at
/// the home of --user. As with cp -r, directories are copied with all that is in them; what is copied goes into DST if that
/// is a directory, and has its name otherwise; DIRECTORY/. is what is in a directory. Modes, times, symbolic and hard links
/// are kept, owners are not: what is made in a VM belongs to --user, on the host to who runs vm. On the host
/// set-user-ID bits are dropped.
///
/// Nothing is needed in the image, and the work in VMs is done as root. A file appears when it is whole, also where
/// Ctrl-C ends the copying. A link that is in the way is replaced; only DST itself is followed.
///
/// - is stdin or stdout: as the content of one file, or with --archive as a tar archive (for reading also with gzip or zstd).
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Who owns what is made in a VM, and from whose home relative paths count
    #[arg(short, long, visible_alias = "owner", value_name = "USER", default_value = "root")]
    user: String,
    /// Follow SRC where it is a symbolic link; those below it are kept
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Take - for a tar archive, not for the content of a file
    #[arg(long)]
    archive: bool,
    /// Done in any case
    #[arg(short = 'r', long, hide = true)]
    recursive: bool,
    /// VM:PATH, a path of the host's, or -
    #[arg(required = true, value_name = "SRC")]
    sources: Vec<OsString>,
    /// VM:PATH, a path of the host's, or -
    #[arg(value_name = "DST")]
    destination: OsString,
}

/// What the command line asks for.
struct Job {
    sources: Vec<Named>,
    destination: Named,
    archive: bool,
    follow: bool,
}

/// What was done, for programs.
#[derive(Debug, Default, Serialize)]
struct Summary {
    files: u64,
    bytes: u64,
    warnings: Vec<String>,
}

impl CpArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let user = self.user.clone();
        let job = self.job()?;
        let to_stdout = matches!(job.destination, Named::Stream);
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let tasks = Tasks::default();
        let work = Work { client: &client, user, tasks: &tasks, done: Arc::default() };
        let done = Arc::clone(&work.done);
        let mut progress = Progress::new(context.output.quiet || context.output.json, PATIENCE);
        let mut summary = Summary::default();
        let outcome = {
            let mut copying = std::pin::pin!(work.all(&job, &mut summary));
            loop {
                // Cancel-safe: the work is kept from one turn to the next, an unread signal stays in its queue.
                tokio::select! {
                    outcome = &mut copying => break outcome,
                    signal = interrupts.next() => {
                        break Err(CliError::Interrupted { signal, what: "interrupted; what was copied before stays".to_owned() });
                    }
                    () = tokio::time::sleep(TICK) => {
                        progress.show(&OperationProgress {
                            stage: stage(done.load(Ordering::Relaxed)),
                            ..OperationProgress::default()
                        });
                    }
                }
            }
        };
        progress.clear();
        // Who was writing removes what is not whole.
        tasks.end().await;
        outcome?;
        for warning in &summary.warnings {
            context.output.warn(warning);
        }
        if !to_stdout {
            context.output.show(&summary, String::new)?;
        }
        Ok(0)
    }

    fn job(self) -> Result<Job, CliError> {
        let sources = self.sources.iter().map(|text| Named::parse(text)).collect::<Result<Vec<_>, _>>()?;
        let destination = Named::parse(&self.destination)?;
        let job = Job { sources, destination, archive: self.archive, follow: self.follow_link };
        let usage = |message: &str, hint: &str| {
            Err(CliError::Usage { message: message.to_owned(), hint: hint.to_owned() })
        };
        let streams = job.sources.iter().filter(|source| matches!(source, Named::Stream)).count();
        let ways = job.sources.iter().map(|source| (source, &job.destination));
        for way in ways {
            if !matches!(way, (Named::Guest { .. }, _) | (_, Named::Guest { .. })) {
                return usage(
                    "neither side is in a VM",
                    "write VM:PATH for a path in a VM; a VM's home directory is VM:",
                );
            }
        }
        if job.sources.len() > 1 && (streams > 0 || matches!(job.destination, Named::Stream)) {
            return usage("- stands for one file, or one archive", "copy them one by one");
        }
        if job.archive && streams == 0 && !matches!(job.destination, Named::Stream) {
            return usage(
                "--archive says what - is, and there is none",
                "leave it out, or write - for SRC or DST",
            );
        }
        Ok(job)
    }
}

/// What is shown meanwhile: elsewhere than on a terminal each stage is a line, so there is only one.
fn stage(done: u64) -> String {
    if done > 0 && io::stderr().is_terminal() {
        format!("copying ({})", size::human(done))
    } else {
        "copying".to_owned()
    }
}

/// What copying needs.
struct Work<'a> {
    client: &'a Client,
    user: String,
    tasks: &'a Tasks,
    /// Bytes that have passed.
    done: Arc<AtomicU64>,
}

impl Work<'_> {
    async fn all(&self, job: &Job, summary: &mut Summary) -> Result<(), CliError> {
        let destination = Side::of(&job.destination, self.client, &self.user).await?;
        for source in &job.sources {
            // A connection of its own also where both are one VM: while one waits for the other, all that goes over it waits.
            let from = Side::of(source, self.client, &self.user).await?;
            let copied = self.one(job, (source, &from), &destination).await?;
            summary.files += copied.files;
            summary.bytes += copied.bytes;
            summary.warnings.extend(copied.warnings);
            from.close().await;
        }
        destination.close().await;
        Ok(())
    }

    async fn one(&self, job: &Job, (source, from): (&Named, &Side), to: &Side) -> Result<Copied, CliError> {
        let transfer = transfer::Transfer { tasks: self.tasks, done: &self.done };
        match (source, &job.destination) {
            (Named::Stream, destination) if job.archive => {
                let directory = self.directory(to, destination).await?;
                transfer.archive_in(to, &directory).await
            }
            (Named::Stream, destination) => {
                let (path, mode) = self.file(to, destination).await?;
                transfer.content_in(to, &path, mode).await
            }
            (source, Named::Stream) => {
                let item = Item::find(from, source, job.follow || !job.archive).await?;
                if job.archive {
                    return transfer.archive_out(from, &item).await;
                }
                if item.kind != SeenKind::File {
                    let text = from.text(&item.path);
                    let problem =
                        Problem::new(vm_api::ErrorKind::InvalidArgument, format!("{text} is no file"));
                    return Err(problem.hint("for a directory use --archive, or name a file in it").into());
                }
                transfer.content_out(from, &item).await
            }
            (source, destination) => {
                let item = Item::find(from, source, job.follow).await?;
                let target = Target::find(to, destination, &item, job.sources.len() > 1).await?;
                target.must_not_be_within(from, to, &item)?;
                transfer.tree(from, to, &item, &target).await
            }
        }
    }

    /// Where an archive is unpacked.
    async fn directory(&self, to: &Side, destination: &Named) -> Result<String, CliError> {
        let everything = Item::nameless();
        let target = Target::find(to, destination, &everything, false).await?;
        Ok(target.whole().to_string_lossy().into_owned())
    }

    /// A file that is written, and its mode.
    async fn file(&self, to: &Side, destination: &Named) -> Result<(String, u32), CliError> {
        let target = Target::find(to, destination, &Item::content(), false).await?;
        Ok((target.whole().to_string_lossy().into_owned(), target.mode.unwrap_or(0o644)))
    }
}

/// A path's last name as it is written; none where it names what is in a directory, as `.` and `..` do.
fn last_name(path: &[u8]) -> Option<&OsStr> {
    use std::os::unix::ffi::OsStrExt;
    let end = path.iter().rposition(|byte| *byte != b'/')? + 1;
    let begin = path[..end].iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    match &path[begin..end] {
        b"." | b".." => None,
        name => Some(OsStr::from_bytes(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::CliError;

    fn job(arguments: &[&str], archive: bool) -> Result<Job, CliError> {
        let (destination, sources) = arguments.split_last().unwrap();
        let args = CpArgs {
            user: "root".to_owned(),
            follow_link: false,
            archive,
            recursive: false,
            sources: sources.iter().map(OsString::from).collect(),
            destination: destination.into(),
        };
        args.job()
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (arguments, archive) in [
            (&["a", "b"][..], false),
            (&["./a:b", "c"], false),
            (&["-", "b"], false),
            (&["-", "-"], false),
            (&["web:a", "b", "c"], false),
            (&["web:a", "web:b", "-"], false),
            (&["-", "a", "web:b"], false),
            (&["a", "web:b"], true),
        ] {
            assert!(matches!(job(arguments, archive), Err(CliError::Usage { .. })), "{arguments:?}");
        }
        for (arguments, archive) in [
            (&["a", "web:"][..], false),
            (&["a", "b", "web:c"], false),
            (&["web:a", "web:b"], false),
            (&["web:a", "db:b", "."], false),
            (&["-", "web:b"], true),
            (&["web:b", "-"], false),
        ] {
            assert!(job(arguments, archive).is_ok(), "{arguments:?}");
        }
    }

    #[test]
    fn last_names_are_as_they_are_written() {
        for (path, name) in [
            ("a", Some("a")),
            ("/a/b", Some("b")),
            ("/a/b//", Some("b")),
            ("a/.", None),
            ("..", None),
            ("a/../", None),
            ("/", None),
            ("", None),
            ("a/...", Some("...")),
        ] {
            assert_eq!(last_name(path.as_bytes()), name.map(OsStr::new), "{path}");
        }
    }
}
