//! The command line: global options, the list of verbs, and the way from an outcome to an exit code.

use std::{env, path::PathBuf};

use clap::{
    Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind as ClapErrorKind},
};
use vm_types::Layout;

use crate::{
    commands::{
        completion::CompletionArgs, cp::CpArgs, create::CreateArgs, daemon::DaemonArgs, delete::DeleteArgs,
        doctor::DoctorArgs, events::EventsArgs, image::ImageArgs, kernel::KernelArgs, kill::KillArgs,
        logs::LogsArgs, ls::LsArgs, operation::OperationArgs, pause::PauseArgs, plan::PlanArgs,
        plugin::PluginArgs, proxy::ProxyArgs, prune::PruneArgs, restart::RestartArgs, resume::ResumeArgs,
        run::RunArgs, set::SetArgs, show::ShowArgs, ssh::SshArgs, ssh_config::SshConfigArgs,
        start::StartArgs, stop::StopArgs, system::SystemArgs, version::VersionArgs, workspace::WorkspaceArgs,
    },
    context::Context,
    daemon::{DEFAULT_CONFIG, DEFAULT_RUN, DEFAULT_STATE},
    errors::{CliError, EXIT_CODES},
    output::Output,
};

/// Disposable development VMs
#[derive(Debug, Parser)]
#[command(name = "vm", version, after_long_help = EXIT_CODES, max_term_width = 110)]
pub(crate) struct Cli {
    /// The daemon's run directory
    #[arg(long, global = true, env = "VMD_RUN_DIR", default_value = DEFAULT_RUN, value_name = "DIR", hide_env_values = true, help_heading = "Global options")]
    run_dir: PathBuf,
    /// The daemon's state directory
    #[arg(long, global = true, env = "VMD_STATE_DIR", default_value = DEFAULT_STATE, value_name = "DIR", hide_env_values = true, help_heading = "Global options")]
    state_dir: PathBuf,
    /// The daemon's configuration directory
    #[arg(long, global = true, env = "VMD_CONFIG_DIR", default_value = DEFAULT_CONFIG, value_name = "DIR", hide_env_values = true, help_heading = "Global options")]
    config_dir: PathBuf,
    /// Answer with one JSON document, and report errors as one on stderr
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// Show no progress, and names only
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
    /// Do not start the daemon where none runs
    #[arg(long, global = true, help_heading = "Global options")]
    no_start: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<RunArgs>),
    Create(CreateArgs),
    Start(StartArgs),
    Stop(StopArgs),
    Restart(RestartArgs),
    Pause(PauseArgs),
    Resume(ResumeArgs),
    Kill(KillArgs),
    Set(SetArgs),
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    Prune(PruneArgs),
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    Show(ShowArgs),
    Ssh(SshArgs),
    Cp(CpArgs),
    Proxy(ProxyArgs),
    SshConfig(SshConfigArgs),
    Logs(LogsArgs),
    Events(EventsArgs),
    Image(ImageArgs),
    Kernel(KernelArgs),
    #[command(visible_aliases = ["workspaces", "ws"])]
    Workspace(WorkspaceArgs),
    System(SystemArgs),
    #[command(visible_alias = "plugins")]
    Plugin(PluginArgs),
    Plan(PlanArgs),
    #[command(visible_aliases = ["operations", "ops"])]
    Operation(OperationArgs),
    Daemon(DaemonArgs),
    Doctor(DoctorArgs),
    Version(VersionArgs),
    Completion(CompletionArgs),
    /// Show what the exit codes mean
    #[command(hide = true, after_help = EXIT_CODES)]
    ExitCodes,
}

impl Cli {
    /// Parses the command line; a wrong one, `--help` and `--version` end the process.
    pub(crate) fn from_command_line() -> Self {
        Self::try_parse().unwrap_or_else(|mut error| {
            let tip = tip(&error, &env::args().skip(1).collect::<Vec<_>>());
            if let Some(tip) = &tip {
                let tip = vec![tip.clone().into()];
                error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tip));
            }
            let json = env::args_os().skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--json");
            if json
                && error.use_stderr()
                && error.kind() != ClapErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            {
                let text = error.to_string();
                let message = text.trim().trim_start_matches("error: ");
                Output { json, quiet: false }.problem(
                    message,
                    Some(tip.as_deref().unwrap_or("see --help")),
                    vm_api::ErrorKind::InvalidArgument,
                    2,
                );
                std::process::exit(2);
            }
            error.exit()
        })
    }

    /// Runs the verb; the exit code.
    pub(crate) fn run(self) -> u8 {
        let output = Output { json: self.json, quiet: self.quiet };
        let session = matches!(self.verb, Verb::Run(_) | Verb::Ssh(_));
        self.dispatch(output).unwrap_or_else(|error| {
            let code = error.exit_code(session);
            output.error(&error, code);
            code
        })
    }

    fn dispatch(self, output: Output) -> Result<u8, CliError> {
        let absolute =
            |path: PathBuf| std::path::absolute(&path).map_err(|source| CliError::File { path, source });
        let context = Context {
            layout: Layout {
                run: absolute(self.run_dir)?,
                state: absolute(self.state_dir)?,
                config: absolute(self.config_dir)?,
            },
            output,
            may_start: !self.no_start,
        };
        // One thread: the work is waiting, and the only heavy part, the session's cipher, is one stream.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| CliError::Setup { what: "the event loop", source })?;
        let result = runtime.block_on(Box::pin(self.verb.run(&context)));
        // Whatever still blocks has no part in the result.
        runtime.shutdown_background();
        result
    }
}

/// What to do about a wrong command line (without the program's name), where that can be told: a command of `vm run` that
/// stands where a directory does.
fn tip(error: &clap::Error, args: &[String]) -> Option<String> {
    let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg) else { return None };
    let is_run = args.iter().find(|arg| !arg.starts_with('-')).is_some_and(|verb| verb == "run");
    let is_word = error.kind() == ClapErrorKind::UnknownArgument && !unknown.starts_with('-');
    (is_run && is_word).then(|| {
        let words: Vec<_> = args.iter().skip_while(|arg| *arg != "run").skip(1).map(String::as_str).collect();
        let command = match words.iter().any(|word| word.starts_with('-')) {
            true => "make test".to_owned(),
            false => words.join(" "),
        };
        format!("a command goes behind --: vm run -- {command}")
    })
}

impl Verb {
    async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self {
            Self::Run(args) => args.run(context).await,
            Self::Create(args) => args.run(context).await,
            Self::Start(args) => args.run(context).await,
            Self::Stop(args) => args.run(context).await,
            Self::Restart(args) => args.run(context).await,
            Self::Pause(args) => args.run(context).await,
            Self::Resume(args) => args.run(context).await,
            Self::Kill(args) => args.run(context).await,
            Self::Set(args) => args.run(context).await,
            Self::Delete(args) => args.run(context).await,
            Self::Prune(args) => args.run(context).await,
            Self::Ls(args) => args.run(context).await,
            Self::Show(args) => args.run(context).await,
            Self::Ssh(args) => args.run(context).await,
            Self::Cp(args) => args.run(context).await,
            Self::Proxy(args) => args.run(context).await,
            Self::SshConfig(args) => args.run(context).await,
            Self::Logs(args) => args.run(context).await,
            Self::Events(args) => args.run(context).await,
            Self::Image(args) => args.run(context).await,
            Self::Kernel(args) => args.run(context).await,
            Self::Workspace(args) => args.run(context).await,
            Self::System(args) => args.run(context).await,
            Self::Plugin(args) => args.run(context).await,
            Self::Plan(args) => args.run(context).await,
            Self::Operation(args) => args.run(context).await,
            Self::Daemon(args) => args.run(context).await,
            Self::Doctor(args) => args.run(context).await,
            Self::Version(args) => args.run(context).await,
            Self::Completion(args) => args.run(context),
            Self::ExitCodes => {
                context
                    .output
                    .show(&serde_json::json!({"exit_codes": EXIT_CODES}), || EXIT_CODES.to_owned())?;
                Ok(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_without_its_dashes_is_known() {
        let tip_of = |line: &str| {
            let args: Vec<_> = line.split(' ').skip(1).map(str::to_owned).collect();
            tip(&parse(line).unwrap_err(), &args)
        };
        assert_eq!(
            tip_of("vm run make test").as_deref(),
            Some("a command goes behind --: vm run -- make test")
        );
        let tip = tip_of("vm run --name a . make test").unwrap();
        assert_eq!(tip, "a command goes behind --: vm run -- make test");
        assert_eq!(tip_of("vm run --nmae a"), None);
        assert_eq!(tip_of("vm start a --x"), None);
    }

    #[test]
    fn a_command_keeps_its_own_options() {
        for line in [
            "vm run --memory 2G -e A=1 -t -- ls --json -q",
            "vm ssh web ls -l --json",
            "vm ssh web -- ls -l",
            "vm --json run --name web --rm",
            "vm kernel import debian",
            "vm kernel import --kernel bzImage --modules dir",
            "vm rm a b --force",
            "vm list -q",
            "vm run --ttl 2h --idle-stop 30m --restart on-failure -- true",
            "vm restart a b --grace 5",
            "vm set a --cpus 2 --ttl never --label k=v --unlabel x --idle-stop 1h30m",
            "vm prune --older-than 24h --label a=b --failed --dry-run",
            "vm events -f --after 7 --vm a",
            "vm ops",
            "vm operations --all",
            "vm ops cancel 3 4",
            "vm operation wait 3",
            "vm daemon status --locks",
            "vm plugin install . --grant firewall,disk --config a=1 --config b.json --yes",
            "vm plugins list -q",
            "vm plugin configure nat deny=a,b --unset x",
            "vm plugin configure nat --reset",
            "vm plugin replay nat 7",
            "vm plugin order",
            "vm plugin rm nat --purge",
            "vm plugin logs nat -f -n 5",
            "vm plan create a --cpus 2",
            "vm plan create --name a --memory 1G",
            "vm plan start a",
            "vm cp a b web:c",
            "vm run ./repo -- make test",
            "vm run . --name a --rm --export patch=out.patch --to /srv/x --importer git/full -- true",
            "vm run --here --export branch=work",
            "vm workspace plan",
            "vm ws prepare a . --full --replace --user dev",
            "vm workspace export a --patch",
            "vm workspace export a --patch file --dry-run",
            "vm workspace export a --branch b -m text",
            "vm workspace export a --files dir --ignored --at /work/x",
            "vm workspace diff a",
            "vm cp -rL --owner dev web:a .",
            "vm cp --archive - web:/srv",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
        assert!(!parse("vm ssh web ls --json").unwrap().json);
        assert!(parse("vm ls --json").unwrap().json);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_a_suggestion() {
        for line in [
            "vm run --rm --keep",
            "vm run --cpus 0",
            "vm run --memory 1X",
            "vm run --name Web_1",
            "vm run -t --json",
            "vm kernel import",
            "vm kernel import debian --kernel x",
            "vm kernel import --modules x",
            "vm delete",
            "vm restart",
            "vm create --ttl 0",
            "vm create --ttl never",
            "vm create --idle-stop 30",
            "vm create --restart sometimes",
            "vm set --cpus 2",
            "vm set a --disk 0",
            "vm set a --label k",
            "vm prune --older-than 1x",
            "vm events --after -1",
            "vm operation cancel",
            "vm operation wait x",
            "vm ops --all cancel 3",
            "vm plugin install",
            "vm plugin configure nat",
            "vm plugin configure nat --reset --file x",
            "vm plugin replay nat x",
            "vm plugin new --world kernel x",
            "vm plan create a --name b",
            "vm plan start",
            "vm cp web:a",
            "vm run ./repo --here",
            "vm run --export apply -- true",
            "vm run ./repo --export everything",
            "vm workspace export a",
            "vm workspace export a --apply --branch b",
            "vm workspace export a --apply -m text",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        assert!(parse("vm strat a").unwrap_err().to_string().contains("'start'"));
        assert!(parse("vm run --memry 1G").unwrap_err().to_string().contains("'--memory'"));
    }
}
