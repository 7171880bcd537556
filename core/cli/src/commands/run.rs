//! `vm run`

use std::{ffi::OsString, io, io::IsTerminal};

use clap::Args;
use jsonrpsee::core::client::Client;
use vm_api::{
    ErrorKind, VmInfo,
    rpc::{ImageClient, VmClient},
};
use vm_types::guest::{EXEC_ARGV_ENV, EXEC_CWD_ENV};

use super::{
    machine::MachineArgs,
    session::{Finished, Session, environment, quote},
};
use crate::{
    context::Context,
    errors::CliError,
    interrupts::Interrupts,
    operations::{Done, OnSignal, follow},
    progress::SESSION_PATIENCE,
};

/// Run a command in a new VM
///
/// Makes a VM, boots it, runs the command with this process's stdin, stdout, stderr and signals, and exits with the
/// command's own exit code. Without a command it is what the image runs by itself, else the login shell, on a terminal if stdin
/// is one. The image's variables, user and working directory hold unless others are given.
///
/// A VM without --name is deleted in the end, whatever happens to vm; one with --name is kept running.
///
/// Ctrl-C is passed on to the command; twice within two seconds leaves it. On a terminal, Enter ~ . leaves it.
/// With --json, stdout gets one document with the command's output and exit code in the end.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
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

        let (client, mut interrupts) = context.client_and_interrupts().await?;
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
        if let Some(dir) = self.workdir.or(image.working_dir) {
            environment.push((EXEC_CWD_ENV.to_owned(), dir));
        }
        let session = Session {
            vm: vm.id.to_string(),
            user: self.user.or(image.user).unwrap_or_else(|| "root".to_owned()),
            command: (!command.is_empty()).then(|| quote(&command)),
            environment,
            terminal,
        };
        let finished = match interrupted {
            // It was made before the cancellation arrived.
            Some(signal) => Err(CliError::Interrupted { signal, what: "cancelled".to_owned() }),
            None => session.run(context, &client, &mut interrupts).await,
        };
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
        Err(error) => context.output.warn(&format!("could not delete VM {}: {}", vm.name, error.message())),
    }
}
