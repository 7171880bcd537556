//! `vm version`

use clap::Args;
use serde_json::json;
use vm_api::{API_VERSION, rpc::DaemonClient};

use crate::{context::Context, daemon, errors::CliError, output::facts};

/// Show the versions of vm, of the interface and of the daemon
///
/// The daemon's is left out where none runs; none is started.
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {}

impl VersionArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let own = env!("CARGO_PKG_VERSION");
        // A daemon that cannot be reached has no version to show; that it cannot is for `vm daemon status` to tell.
        let status = match daemon::connect(&context.layout).await {
            Ok(Some(client)) => client.status().await.ok(),
            Ok(None) | Err(_) => None,
        };
        let document = json!({
            "version": own,
            "api_version": API_VERSION,
            "daemon": status.as_ref().map(|s| json!({"version": s.version, "api_version": s.api_version})),
        });
        context.output.show(&document, || {
            facts([
                ("vm", Some(own.to_owned())),
                ("interface", Some(API_VERSION.to_owned())),
                (
                    "vmd",
                    Some(status.map_or_else(
                        || "not running".to_owned(),
                        |s| format!("{} (interface {})", s.version, s.api_version),
                    )),
                ),
            ])
        })?;
        Ok(0)
    }
}
