//! The command line.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use vm_types::Layout;

use crate::{config, daemon, doctor};

/// Daemon for disposable development microVMs.
///
/// It owns the VMs, images and kernels below its state directory and offers them as JSON-RPC on
/// RUN-DIR/vmd.sock; `vm` is its client. Several daemons run side by side with different directories.
#[derive(Debug, Parser)]
#[command(name = "vmd", version, args_conflicts_with_subcommands = false)]
struct Options {
    #[command(flatten)]
    directories: Directories,
    #[command(subcommand)]
    mode: Option<Mode>,
}

/// Where a daemon keeps things.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Directories {
    /// Sockets, and what is void after a reboot.
    #[arg(long, env = "VMD_RUN_DIR", default_value = "/run/vmd", global = true)]
    run_dir: PathBuf,
    /// Database, disks, images.
    #[arg(long, env = "VMD_STATE_DIR", default_value = "/var/lib/vmd", global = true)]
    state_dir: PathBuf,
    /// Directory of config.toml.
    #[arg(long, env = "VMD_CONFIG_DIR", default_value = "/etc/vmd", global = true)]
    config_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Serve (the default).
    Serve,
    /// Check the host once and print the findings as JSON; needs no daemon.
    Doctor {
        /// Accepted for symmetry with `vm doctor`; the output always is JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the configuration in force, defaults included, as TOML.
    Config,
    /// Be a VM's parent (started by the daemon).
    #[command(hide = true)]
    Shim {
        /// File with what to do.
        #[arg(long)]
        spec: PathBuf,
    },
    /// Become a VMM that is locked in (started by the shim).
    #[command(hide = true)]
    Jail {
        /// File with what to do.
        #[arg(long, required_unless_present = "try_out")]
        spec: Option<PathBuf>,
        /// Only find out whether the host allows it, as this user.
        #[arg(long, value_name = "USER", conflicts_with = "spec")]
        try_out: Option<u32>,
    },
}

pub(crate) fn run() -> ExitCode {
    let options = Options::parse();
    if let Some(Mode::Shim { spec }) = &options.mode {
        return vm_shim::main(spec);
    }
    if let Some(Mode::Jail { spec, try_out }) = &options.mode {
        return match (spec, try_out) {
            (Some(spec), _) => vm_shim::jail::main(spec),
            (None, user) => match vm_shim::jail::try_out(user.unwrap_or_default()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error, None),
            },
        };
    }
    let filter = EnvFilter::try_from_env("VMD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Its finer messages have tokens of registries in them.
    let filter = match "oci_client=info".parse() {
        Ok(directive) => filter.add_directive(directive),
        Err(_) => filter,
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // A line that cannot be written, as on a full disk, would be told by a panic of whoever logs.
        .log_internal_errors(false)
        .init();
    let layout = match options.directories.layout() {
        Ok(layout) => layout,
        Err(error) => {
            return fail(&error, Some("name directories that can be used with --run-dir and --state-dir"));
        }
    };
    let config = match config::load(&layout.config_file()) {
        Ok(config) => config,
        Err(error) => return fail(&error, error.hint().as_deref()),
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, None),
    };
    match options.mode {
        None | Some(Mode::Serve) => match runtime.block_on(daemon::serve(layout, config)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.hint().as_deref()),
        },
        Some(Mode::Doctor { json: _ }) => {
            let findings = runtime.block_on(doctor::check(&layout, &config, None));
            match serde_json::to_string_pretty(&findings) {
                Ok(text) => println!("{text}"),
                Err(error) => return fail(&error, None),
            }
            ExitCode::SUCCESS
        }
        Some(Mode::Config) => match toml::to_string_pretty(&config) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error, None),
        },
        Some(Mode::Shim { .. } | Mode::Jail { .. }) => ExitCode::FAILURE,
    }
}

impl Directories {
    /// The directories, absolute, so that a shim of another working directory finds them too.
    fn layout(&self) -> std::io::Result<Layout> {
        Ok(Layout {
            run: std::path::absolute(&self.run_dir)?,
            state: std::path::absolute(&self.state_dir)?,
            config: std::path::absolute(&self.config_dir)?,
        })
    }
}

fn fail(error: &(dyn std::error::Error + 'static), hint: Option<&str>) -> ExitCode {
    use std::io::Write;
    let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
    // Nobody is left to tell if this fails.
    let _ = write!(std::io::stderr(), "vmd: {}\n{hint}", vm_types::report::chain(error));
    ExitCode::FAILURE
}
