//! `vm ssh-config`

use clap::Args;
use serde_json::json;
use vm_api::rpc::VmClient;

use crate::{context::Context, daemon, errors::CliError};

/// Print the configuration by which OpenSSH reaches a VM
///
/// For example: vm ssh-config web >> ~/.ssh/config; scp file web:. The host key is asked for at each connection, so
/// it stays right when a VM of that name is made anew. Needs OpenSSH 8.5 or newer.
#[derive(Debug, Args)]
pub(crate) struct SshConfigArgs {
    /// Name or id
    name: String,
    /// Log in as this user
    #[arg(long, default_value = "root")]
    user: String,
    /// Print the line of known_hosts instead
    #[arg(long)]
    known_hosts: bool,
}

impl SshConfigArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let access = client.access(self.name).await?;
        let name = access.name.as_str();
        if self.known_hosts {
            let line = format!("{name} {}", access.host_key.trim());
            context.output.show(&json!({"known_hosts": line}), || line.clone())?;
            return Ok(0);
        }
        let program =
            std::env::current_exe().map_err(|source| CliError::Setup { what: "my own path", source })?;
        let mut words = vec![program.to_string_lossy().into_owned()];
        words.extend(
            daemon::directory_options(&context.layout).iter().map(|word| word.to_string_lossy().into_owned()),
        );
        let vm = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let config = format!(
            "Host {name}\n  User {}\n  ProxyCommand {vm} proxy {name}\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             HostKeyAlias {name}\n  StrictHostKeyChecking yes\n  UserKnownHostsFile none\n  GlobalKnownHostsFile none\n  \
             KnownHostsCommand {vm} ssh-config --known-hosts {name}\n",
            self.user,
            quoted(&access.client_key.to_string_lossy()),
        );
        context.output.show(&json!({"config": config}), || config.clone())?;
        Ok(0)
    }
}

/// A word of ssh_config(5): `%` doubled, in double quotes where it holds blanks.
fn quoted(word: &str) -> String {
    let word = word.replace('%', "%%");
    if word.contains(char::is_whitespace) { format!("\"{word}\"") } else { word }
}
