//! Tools of the host that a plugin's manifest names.

use std::path::Path;

use vm_host::{HostCommand, Runner};

use crate::EngineError;

/// The most that is kept of what a tool prints.
const LINE: usize = 4096;

/// Runs a tool to its end. The first line it prints, without control characters.
pub(super) async fn run(
    runner: &dyn Runner,
    program: &Path,
    arguments: &[String],
) -> Result<String, EngineError> {
    let command = HostCommand::new(program).args(arguments);
    let output =
        runner.run(command).await.map_err(|source| EngineError::Tool { program: program.into(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    Ok(line.chars().filter(|c| !c.is_control()).take(LINE).collect())
}
