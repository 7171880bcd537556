//! `vm workspace export` and `vm workspace diff`

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::Args;
use jsonrpsee::core::client::Client;
use nix::unistd::{AccessFlags, access};
use vm_api::{
    ErrorKind, ExportAs, ExportOutcome, ExportWorkspace, OperationId, SubmoduleBranch, WorkspaceExport,
    rpc::WorkspacesClient,
};

use super::{count, whole};
use crate::{
    context::Context,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    output::{for_stdout, printable},
    progress::PATIENCE,
    size::human,
};

/// Bring back what was done in a VM: as a patch, a branch, files, or applied to the workspace itself
///
/// It is what the guest has changed since the workspace was brought: its commits, and what it has not committed. What the host
/// has changed meanwhile is never overwritten: such files are named, left alone, and the exit code is 4. All is written
/// with the rights of whoever asks; as root, with those of the workspace's owner.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("as").required(true).args(["patch", "branch", "files", "apply"]))]
pub(crate) struct ExportArgs {
    /// The VM
    vm: String,
    /// The workspace, by its directory in the guest or that one's name; not needed if there is only one
    #[arg(long, value_name = "GUESTPATH")]
    at: Option<String>,
    /// Write a patch for `git apply`, to stdout or into a file
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    patch: Option<Option<PathBuf>>,
    /// Make a branch in the workspace's repository, or move one forward
    #[arg(long, value_name = "NAME")]
    branch: Option<String>,
    /// Write what was changed or made into a directory
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// Change the workspace's own files
    #[arg(long)]
    apply: bool,
    /// Show what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Of the commit for what the guest has not committed
    // Requirements do not count beside what excludes them.
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["patch", "files", "apply"])]
    message: Option<String>,
    /// Also files that git ignores in the guest
    #[arg(long, conflicts_with_all = ["patch", "branch", "apply"])]
    ignored: bool,
}

/// Show what was done in a VM, as a patch
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The VM
    vm: String,
    /// The workspace, by its directory in the guest or that one's name; not needed if there is only one
    #[arg(long, value_name = "GUESTPATH")]
    at: Option<String>,
}

impl DiffArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        run(context, self.vm, self.at, ExportTo::Patch { file: None }, false).await
    }
}

impl ExportArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let Self { vm, at, patch, branch, files, apply: _, dry_run, message, ignored } = self;
        let to = match (patch, branch, files) {
            (Some(file), ..) => ExportTo::Patch { file },
            (_, Some(name), _) => ExportTo::Branch { name, message },
            (_, _, Some(directory)) => ExportTo::Files { directory, ignored },
            // clap sees to it that there is one of them.
            (None, None, None) => ExportTo::Apply,
        };
        run(context, vm, at, to, dry_run).await
    }
}

async fn run(
    context: &Context,
    vm: String,
    at: Option<String>,
    to: ExportTo,
    dry_run: bool,
) -> Result<u8, CliError> {
    let (client, mut interrupts) = context.client_and_interrupts().await?;
    let request = to.request(vm, at, dry_run)?;
    let exported = Exported::bring(context, &client, request, PATIENCE, &mut interrupts).await?;
    let patch = match &to {
        ExportTo::Patch { file: Some(file) } if !dry_run => {
            exported.write_patch(&client, file).await?;
            None
        }
        ExportTo::Patch { file: None } if !dry_run && !context.output.json => {
            exported.show_patch(context, &client).await?;
            Some(())
        }
        _ => None,
    };
    match patch {
        // Stdout has the patch, and nothing else.
        Some(()) => exported.note(context),
        None => exported.show(context, &client, &to).await?,
    }
    exported.judge()
}

/// As what a guest's work is brought back, as people say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ExportTo {
    /// A patch in a file, or on stdout.
    Patch { file: Option<PathBuf> },
    /// A branch.
    Branch { name: String, message: Option<String> },
    /// Files in a directory.
    Files { directory: PathBuf, ignored: bool },
    /// The workspace's own files.
    Apply,
}

impl ExportTo {
    /// `apply`, `branch=NAME`, `patch=FILE` or `files=DIR`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (how, what) = text.split_once('=').unwrap_or((text, ""));
        match (how, what) {
            ("apply", "") if how == text => Ok(Self::Apply),
            ("branch", name) if !name.is_empty() => Ok(Self::Branch { name: name.to_owned(), message: None }),
            ("patch", file) if !file.is_empty() => Ok(Self::Patch { file: Some(file.into()) }),
            ("files", directory) if !directory.is_empty() => {
                Ok(Self::Files { directory: directory.into(), ignored: false })
            }
            _ => Err("it is apply, branch=NAME, patch=FILE or files=DIR".to_owned()),
        }
    }

    /// The request.
    pub(crate) fn request(
        &self,
        vm: String,
        at: Option<String>,
        dry_run: bool,
    ) -> Result<ExportWorkspace, CliError> {
        Ok(ExportWorkspace { vm, at, to: self.as_request()?, dry_run })
    }

    /// The same in a request.
    pub(crate) fn as_request(&self) -> Result<ExportAs, CliError> {
        Ok(match self {
            Self::Patch { .. } => ExportAs::Patch,
            Self::Branch { name, message } => {
                ExportAs::Branch { name: name.clone(), message: message.clone() }
            }
            Self::Files { directory, ignored } => {
                ExportAs::Files { directory: whole(directory)?, ignored: *ignored }
            }
            Self::Apply => ExportAs::Apply,
        })
    }

    /// Sees, before there is anything to bring back, what only this process can see: whether it can write the patch. Nothing is
    /// written.
    pub(crate) fn beforehand(&self) -> Result<(), CliError> {
        self.as_request()?;
        match self {
            Self::Patch { file: Some(file) } => {
                takes_patch(file).map_err(|source| CliError::WriteFile { path: file.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// Whether a patch can be written to a path.
fn takes_patch(file: &Path) -> io::Result<()> {
    let flags = match file.metadata() {
        Ok(about) if about.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(_) => return Ok(access(file, AccessFlags::W_OK)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => AccessFlags::W_OK | AccessFlags::X_OK,
        Err(error) => return Err(error),
    };
    let directory = file.parent().filter(|directory| !directory.as_os_str().is_empty());
    Ok(access(directory.unwrap_or(Path::new(".")), flags)?)
}

/// A guest's work that was brought back.
#[derive(Debug)]
pub(crate) struct Exported {
    operation: OperationId,
    pub(crate) export: WorkspaceExport,
}

impl Exported {
    /// Brings it back.
    pub(crate) async fn bring(
        context: &Context,
        client: &Client,
        request: ExportWorkspace,
        patience: Duration,
        interrupts: &mut Interrupts,
    ) -> Result<Self, CliError> {
        let begun = WorkspacesClient::export(client, request).await?;
        let operation = begun.operation;
        let Done { result: export, .. } = follow::<WorkspaceExport>(
            client,
            begun,
            context.output,
            patience,
            OnSignal::CancelAsOurs,
            interrupts,
        )
        .await?;
        Ok(Self { operation, export })
    }

    /// Writes the patch into a file of ours.
    pub(crate) async fn write_patch(&self, client: &Client, path: &Path) -> Result<(), CliError> {
        let failed = |source| CliError::WriteFile { path: path.to_owned(), source };
        let mut file = File::create(path).map_err(failed)?;
        self.each_piece(client, |piece| file.write_all(piece).map_err(failed)).await
    }

    async fn show_patch(&self, context: &Context, client: &Client) -> Result<(), CliError> {
        // What a guest wrote shall not drive the terminal.
        let tame = io::stdout().is_terminal();
        self.each_piece(client, |piece| match tame {
            true => context.output.raw(printable(&String::from_utf8_lossy(piece)).as_bytes()),
            false => context.output.raw(piece),
        })
        .await
    }

    async fn each_piece(
        &self,
        client: &Client,
        mut with: impl FnMut(&[u8]) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let mut offset = 0;
        loop {
            let piece = WorkspacesClient::read_patch(client, self.operation, offset).await?;
            let damaged = |error| CliError::Answer { source: serde::de::Error::custom(error) };
            let piece = BASE64_STANDARD.decode(piece.base64).map_err(damaged)?;
            if piece.is_empty() {
                return Ok(());
            }
            offset += piece.len() as u64;
            with(&piece)?;
        }
    }

    async fn show(&self, context: &Context, client: &Client, to: &ExportTo) -> Result<(), CliError> {
        let mut document =
            serde_json::to_value(&self.export).map_err(|source| CliError::Answer { source })?;
        if context.output.json && !self.export.dry_run && *to == (ExportTo::Patch { file: None }) {
            // One document has it all.
            let mut patch = Vec::new();
            self.each_piece(client, |piece| {
                patch.extend_from_slice(piece);
                Ok(())
            })
            .await?;
            let (name, value) = match String::from_utf8(patch) {
                Ok(text) => ("patch", text),
                Err(error) => ("patch_base64", BASE64_STANDARD.encode(error.as_bytes())),
            };
            document[name] = value.into();
        }
        self.note(context);
        context.output.show(&document, || for_stdout(self.text(to, context.output.quiet)))
    }

    /// Says on stderr what people should know of it.
    pub(crate) fn note(&self, context: &Context) {
        if !context.output.json {
            self.export
                .warnings
                .iter()
                .for_each(|warning| context.output.note(&format!("warning: {warning}")));
        }
    }

    /// One line or more for people.
    pub(crate) fn text(&self, to: &ExportTo, quiet: bool) -> String {
        let would = if self.export.dry_run { "would be " } else { "" };
        match &self.export.outcome {
            ExportOutcome::Patch { bytes: 0, .. } => "nothing has changed\n".to_owned(),
            ExportOutcome::Patch { bytes: size, .. } => match to {
                ExportTo::Patch { file: Some(file) } if quiet => format!("{}\n", file.display()),
                ExportTo::Patch { file: Some(file) } => {
                    format!("{} {would}written ({})\n", file.display(), human(*size))
                }
                _ => format!("a patch of {}\n", human(*size)),
            },
            ExportOutcome::Branch { branch, .. } if quiet => format!("{branch}\n"),
            ExportOutcome::Branch { branch, commit, before, commits, uncommitted, continues, submodules } => {
                let done = what_became(before.as_ref(), commit);
                let last = if *uncommitted { ", the last one for what was not committed" } else { "" };
                let astray =
                    if *continues { "" } else { "; its history does not go on from where it started" };
                let mut text = format!(
                    "branch {branch} {would}{done}: {}, {}{last}{astray}\n",
                    short(commit),
                    count(*commits, "commit")
                );
                text.extend(submodules.iter().map(|SubmoduleBranch { path, commit, before, commits }| {
                    let done = what_became(before.as_ref(), commit);
                    let commits = count(*commits, "commit");
                    format!(
                        "branch {branch} of submodule {path} {would}{done}: {}, {commits}\n",
                        short(commit)
                    )
                }));
                text
            }
            ExportOutcome::Files { directory, written, removed, unchanged, conflicts, failed } => {
                let lines = |mark: char, paths: &[String]| -> String {
                    paths.iter().map(|path| format!("{mark} {path}\n")).collect()
                };
                let mut text = lines('W', written) + &lines('D', removed) + &lines('C', conflicts);
                text.extend(failed.iter().map(|(path, why)| format!("E {path}: {why}\n")));
                if quiet {
                    return text;
                }
                text + &format!(
                    "{}: {} {would}written, {} {would}removed, {unchanged} as in the guest already{}\n",
                    directory.display(),
                    count(written.len() as u64, "path"),
                    removed.len(),
                    if conflicts.is_empty() {
                        String::new()
                    } else {
                        format!(", {} left alone", conflicts.len())
                    },
                )
            }
        }
    }

    /// The exit code: of what could not be brought back there is an error.
    pub(crate) fn judge(&self) -> Result<u8, CliError> {
        let named = |paths: &[String]| {
            let shown = paths.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            if paths.len() > 5 { format!("{shown} and {} more", paths.len() - 5) } else { shown }
        };
        let (summary, hint, kind) = match &self.export.outcome {
            outcome if outcome.whole() => return Ok(0),
            ExportOutcome::Files { failed, .. } if !failed.is_empty() => {
                let paths: Vec<_> = failed.iter().map(|(path, _)| path.clone()).collect();
                let why = failed.first().map(|(_, why)| why.as_str()).unwrap_or_default();
                let summary = format!("not written: {} ({why})", named(&paths));
                (
                    summary,
                    "look at the rights of those files and of their directories".to_owned(),
                    ErrorKind::HostFailure,
                )
            }
            ExportOutcome::Files { conflicts, .. } => (
                format!("the host has changed these meanwhile, they were left alone: {}", named(conflicts)),
                "export a --branch and merge it with git, or --files into another directory".to_owned(),
                ErrorKind::WrongState,
            ),
            ExportOutcome::Patch { left_out, .. } => (
                format!(
                    "the host has changed these meanwhile, they are not in the patch: {}",
                    named(left_out)
                ),
                "export --files into another directory".to_owned(),
                ErrorKind::WrongState,
            ),
            ExportOutcome::Branch { .. } => return Ok(0),
        };
        Err(CliError::Partly { summary, hint: Some(hint), kind })
    }
}

/// What an export has done with a branch.
fn what_became(before: Option<&String>, commit: &String) -> &'static str {
    match before {
        None => "made",
        Some(before) if before == commit => "left as it is",
        Some(_) => "moved",
    }
}

/// A commit's name, for people.
fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_that_cannot_be_written_is_told_before_there_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let to = |path: &str| ExportTo::Patch { file: Some(directory.path().join(path)) }.beforehand();
        to("new").unwrap();
        std::fs::write(directory.path().join("there"), "old").unwrap();
        to("there").unwrap();
        assert!(!directory.path().join("new").exists(), "it only looks");
        assert_eq!(std::fs::read(directory.path().join("there")).unwrap(), b"old");
        for (path, kind) in [
            ("", io::ErrorKind::IsADirectory),
            ("none/x", io::ErrorKind::NotFound),
            ("there/x", io::ErrorKind::NotADirectory),
        ] {
            match to(path) {
                Err(CliError::WriteFile { source, .. }) => assert_eq!(source.kind(), kind, "{path:?}"),
                other => panic!("{path:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn exports_of_a_run_are_said_in_one_word() {
        let branch = ExportTo::Branch { name: "fix/a=b".to_owned(), message: None };
        assert_eq!(ExportTo::parse("branch=fix/a=b"), Ok(branch));
        assert_eq!(ExportTo::parse("apply"), Ok(ExportTo::Apply));
        assert_eq!(ExportTo::parse("patch=a b"), Ok(ExportTo::Patch { file: Some("a b".into()) }));
        assert_eq!(
            ExportTo::parse("files=out"),
            Ok(ExportTo::Files { directory: "out".into(), ignored: false })
        );
        for wrong in ["", "patch", "patch=", "apply=", "apply=x", "branch", "files=", "all"] {
            assert!(ExportTo::parse(wrong).is_err(), "{wrong}");
        }
    }
}
