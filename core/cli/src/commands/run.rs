//! `vm run`

use std::{
    ffi::OsString,
    io,
    io::IsTerminal,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use jsonrpsee::core::client::Client;
use vm_api::{
    ErrorKind, PrepareWorkspace, SetVm, VmInfo,
    rpc::{ImageClient, VmClient},
};
use vm_types::guest::{EXEC_ARGV_ENV, EXEC_CWD_ENV};

use super::{
    machine::MachineArgs,
    session::{Finished, Session, environment, quote},
    workspace::{ExportTo, Exported, ImportArgs, bring, check},
};
use crate::{
    context::Context,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    progress::SESSION_PATIENCE,
};

/// How long a daemon that is not there may take until it is again.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(30);
/// The same where only the VM is to be deleted, which the next daemon does in any case.
const CLEANUP_DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts to reach it.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// Run a command in a new VM
///
/// Makes a VM, boots it, runs the command with this process's stdin, stdout, stderr and signals, and exits with the
/// command's own exit code. Without a command it is what the image runs by itself, else the login shell, on a terminal if stdin
/// is one. The image's variables, user and working directory hold unless others are given.
///
/// A VM without --name is deleted in the end, whatever happens to vm; one with --name is kept running.
///
/// With PATH or --here, that directory is brought to /work/NAME in the VM before, and the command runs there; of a git repository
/// all of the working tree is meant. With --export its work comes back in the end, also if the command failed. Where that is not
/// possible, or not all of it, the VM is kept.
///
/// Ctrl-C is passed on to the command; twice within two seconds leaves it. On a terminal, Enter ~ . leaves it.
/// With --json, stdout gets one document with the command's output and exit code in the end.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("workspace").args(["path", "here"]))]
pub(crate) struct RunArgs {
    /// A directory of the host to bring along
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
    /// Bring along the current directory, or the repository it is in
    #[arg(long)]
    here: bool,
    #[command(flatten)]
    import: ImportArgs,
    /// Bring the work back in the end: apply, branch=NAME, patch=FILE or files=DIR
    #[arg(long, value_name = "HOW", value_parser = ExportTo::parse, requires = "workspace")]
    export: Option<ExportTo>,
    #[command(flatten)]
    machine: MachineArgs,
    /// Delete the VM in the end, though it has a name
    #[arg(long, conflicts_with = "keep")]
    rm: bool,
    /// Keep the VM running, though it has no name given
    #[arg(long)]
    keep: bool,
    /// Set a variable; without a value, to our own value of it
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run as this user of the guest, with UID, USER:GROUP and UID:GID too [default: the image's, else root]
    #[arg(short, long)]
    user: Option<String>,
    /// Run in this directory of the guest [default: the image's, else the user's home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run on a terminal
    #[arg(short, long, conflicts_with = "json")]
    tty: bool,
    /// Accepted for those used to docker; stdin is always passed on
    #[arg(short, long, hide = true)]
    interactive: bool,
    /// The command and its arguments, run without a shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl RunArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let ephemeral = self.rm || (self.machine.name.is_none() && !self.keep);
        let say_name = self.keep && self.machine.name.is_none();
        let mut environment = environment(&self.env)?;
        let unnamed = self.command.is_empty();
        let terminal = !context.output.json && (self.tty || (unnamed && io::stdin().is_terminal()));
        let workspace = match (self.path, self.here) {
            (Some(path), _) if !path.is_dir() => {
                return Err(CliError::Usage {
                    message: format!("there is no directory {}", path.display()),
                    hint: format!("a command goes behind --: vm run -- {} …", path.display()),
                });
            }
            (Some(path), _) => Some(self.import.request(&path)?),
            (None, true) => Some(self.import.request(Path::new("."))?),
            (None, false) if self.import.is_given() => {
                return Err(CliError::Usage {
                    message: "--to, --importer and --full are about a directory that is brought along"
                        .to_owned(),
                    hint: "name it, or say --here".to_owned(),
                });
            }
            (None, false) => None,
        };
        if let Some(to) = &self.export {
            to.beforehand()?;
        }

        let (client, mut interrupts) = context.client_and_interrupts().await?;
        if let Some(request) = &workspace {
            let request = PrepareWorkspace { user: self.user.clone(), ..request.clone() };
            check(context, &client, request, self.export.as_ref(), &mut interrupts).await?;
        }
        let begun = client.create(self.machine.into_request(ephemeral, true)).await?;
        let Done { result: vm, interrupted } = follow::<VmInfo>(
            &client,
            begun,
            context.output,
            SESSION_PATIENCE,
            OnSignal::CancelAsOurs,
            &mut interrupts,
        )
        .await?;
        // A daemon of before has no images with a configuration.
        let image = ImageClient::show(&client, vm.image_digest.to_string())
            .await
            .map(|image| image.config)
            .unwrap_or_default();
        let command = match unnamed {
            true => image.entrypoint.iter().chain(&image.cmd).map(OsString::from).collect(),
            false => self.command,
        };
        if !command.is_empty() {
            environment.push((EXEC_ARGV_ENV.to_owned(), "1".to_owned()));
        }
        let mut session = Session {
            vm: vm.id.to_string(),
            user: self.user.clone().or(image.user).unwrap_or_else(|| "root".to_owned()),
            command: (!command.is_empty()).then(|| quote(&command)),
            environment,
            terminal,
        };
        let mut directory = self.workdir.clone().or(image.working_dir);
        // Where the guest has the workspace, as soon as it has.
        let mut brought = None;
        let run = async {
            if let Some(signal) = interrupted {
                // It was made before the cancellation arrived.
                return Err(CliError::Interrupted { signal, what: "cancelled".to_owned() });
            }
            if let Some(request) = workspace {
                let request = PrepareWorkspace { vm: Some(session.vm.clone()), user: self.user, ..request };
                let done = bring(context, &client, request, SESSION_PATIENCE, &mut interrupts).await?;
                if let Some(signal) = done.interrupted {
                    return Err(CliError::Interrupted { signal, what: "cancelled".to_owned() });
                }
                let workspace = done.result.workspace;
                session.user = workspace.user;
                directory = Some(below(&workspace.path, self.workdir.as_deref()));
                brought = Some(workspace.path);
            }
            if let Some(directory) = directory {
                session.environment.push((EXEC_CWD_ENV.to_owned(), directory));
            }
            session.run(context, &client, &mut interrupts).await
        };
        let mut finished = run.await;
        let client = match (self.export.is_some() && brought.is_some(), ephemeral || interrupted.is_some()) {
            (true, _) => reconnected(context, client, RECONNECT_DEADLINE, &mut interrupts).await,
            (false, true) => reconnected(context, client, CLEANUP_DEADLINE, &mut interrupts).await,
            (false, false) => client,
        };
        if let (Some(to), Some(path)) = (&self.export, brought)
            && !matches!(finished, Err(CliError::Interrupted { .. }))
        {
            let export = Export { context, client: &client, vm: &vm, to, path };
            match export.back(&mut finished, &mut interrupts).await {
                Ok(()) => {}
                // The work is nowhere else.
                Err(error) => {
                    export.keep(&mut interrupts).await;
                    return Err(error);
                }
            }
        }
        if ephemeral || interrupted.is_some() {
            delete(context, &client, &vm, &mut interrupts).await;
        } else if say_name {
            context.output.note(&format!("kept as {}", vm.name));
        }
        let Finished { code, report } = finished?;
        if let Some(report) = report {
            context.output.show(&report, String::new)?;
        }
        Ok(code)
    }
}

/// A connection to the daemon for what is left to do. The daemon may have been restarted since, which the VM and the command
/// outlive. If none is to be had, the old one, whose next call tells why.
async fn reconnected(
    context: &Context,
    client: Client,
    deadline: Duration,
    interrupts: &mut Interrupts,
) -> Client {
    if client.is_connected() {
        return client;
    }
    let connect = async {
        loop {
            match context.client().await {
                Ok(client) => return client,
                Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
            }
        }
    };
    // Cancel-safe: the signal has done its work by ending the wait, and a daemon that is being started goes on without us.
    tokio::select! {
        again = tokio::time::timeout(deadline, connect) => again.unwrap_or(client),
        _ = interrupts.next() => client,
    }
}

/// A directory of the workspace, or any other one that is absolute.
fn below(workspace: &str, directory: Option<&str>) -> String {
    match directory {
        None => workspace.to_owned(),
        Some(absolute) if absolute.starts_with('/') => absolute.to_owned(),
        Some(relative) => format!("{workspace}/{relative}"),
    }
}

/// `--export`, once the command has ended.
struct Export<'a> {
    context: &'a Context,
    client: &'a Client,
    vm: &'a VmInfo,
    to: &'a ExportTo,
    path: String,
}

impl Export<'_> {
    /// Brings the work back, all of it.
    async fn back(
        &self,
        finished: &mut Result<Finished, CliError>,
        interrupts: &mut Interrupts,
    ) -> Result<(), CliError> {
        let finished = match finished {
            Ok(finished) => finished,
            // The VM is lost, or nothing was run.
            Err(_) => return std::mem::replace(finished, Ok(Finished { code: 0, report: None })).map(drop),
        };
        let request = self.to.request(self.vm.id.to_string(), Some(self.path.clone()), false)?;
        let exported =
            Exported::bring(self.context, self.client, request, SESSION_PATIENCE, interrupts).await?;
        if let ExportTo::Patch { file: Some(file) } = self.to {
            exported.write_patch(self.client, file).await?;
        }
        exported.note(self.context);
        exported.judge()?;
        match &mut finished.report {
            Some(report) => report["export"] = serde_json::to_value(&exported.export).unwrap_or_default(),
            // Stdout is the command's.
            None => self.context.output.note_plain(exported.text(self.to, false).trim_end()),
        }
        Ok(())
    }

    /// Sees to it that the VM stays, and says so.
    async fn keep(&self, interrupts: &mut Interrupts) {
        let (output, name) = (self.context.output, &self.vm.name);
        let keep = async {
            let params = SetVm { keep: true, ..SetVm::default() };
            let begun = VmClient::set(self.client, self.vm.id.to_string(), params).await?;
            follow::<serde_json::Value>(
                self.client,
                begun,
                output,
                SESSION_PATIENCE,
                OnSignal::Leave,
                interrupts,
            )
            .await
        };
        match keep.await {
            Ok(_) => output.warn(&format!(
                "VM {name} is kept, with the work in {}: vm workspace export {name} …; vm delete --force {name}",
                self.path
            )),
            Err(error) => output.warn(&format!("VM {name} could not be kept: {}", error.message())),
        }
    }
}

/// Deletes the VM. A failure is told but changes no exit code, which is the command's; the daemon deletes an ephemeral
/// VM in any case once this process is gone.
async fn delete(context: &Context, client: &Client, vm: &VmInfo, interrupts: &mut Interrupts) {
    let delete = async {
        let begun = VmClient::delete(client, vm.id.to_string(), true).await?;
        follow::<serde_json::Value>(
            client,
            begun,
            context.output,
            SESSION_PATIENCE,
            OnSignal::Leave,
            interrupts,
        )
        .await
    };
    match delete.await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(_) if !client.is_connected() => context.output.warn(&match vm.ephemeral {
            true => format!(
                "VM {} is not deleted yet, as no daemon answers; the next one deletes it: vm daemon start",
                vm.name
            ),
            false => {
                format!(
                    "VM {name} is not deleted, as no daemon answers: vm rm --force {name}",
                    name = vm.name
                )
            }
        }),
        Err(error) => context.output.warn(&format!("could not delete VM {}: {}", vm.name, error.message())),
    }
}
