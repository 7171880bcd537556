//! `vm ssh`

use std::{ffi::OsString, io, io::IsTerminal};

use clap::Args;

use super::session::{Finished, Session, environment, join};
use crate::{context::Context, errors::CliError};

/// Log in to a running VM, or run a command in it
///
/// Needs no network and no SSH server in the image. The command's words are joined by blanks and given to the user's
/// shell, as ssh does and unlike `vm run`: quote what that shell shall not take apart. Without a command it is the login
/// shell. On a terminal, Enter ~ . leaves the session.
#[derive(Debug, Args)]
pub(crate) struct SshArgs {
    /// Run on a terminal [default: where there is no command and stdin is one]
    #[arg(short = 't', long, overrides_with = "no_tty", conflicts_with = "json")]
    tty: bool,
    /// Do not run on a terminal
    #[arg(short = 'T', long, overrides_with = "tty")]
    no_tty: bool,
    /// Log in as this user of the guest
    #[arg(short, long, default_value = "root")]
    user: String,
    /// Set a variable; without a value, to our own value of it
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Name or id
    name: String,
    /// The command
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl SshArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let environment = environment(&self.env)?;
        let shell = self.command.is_empty();
        let wanted = self.tty || (shell && io::stdin().is_terminal());
        let session = Session {
            vm: self.name,
            user: self.user,
            command: (!shell).then(|| join(&self.command)),
            environment,
            terminal: wanted && !self.no_tty && !context.output.json,
        };
        let (client, mut interrupts) = context.client_and_interrupts().await?;
        let Finished { code, report } = session.run(context, &client, &mut interrupts).await?;
        if let Some(report) = report {
            context.output.show(&report, String::new)?;
        }
        Ok(code)
    }
}
