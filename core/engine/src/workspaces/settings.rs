//! A workspace's own settings: `vm.toml` at its top.
//!
//! They are read from what may be anybody's repository, so they say only what is of no harm: which importer, where in the guest,
//! whose there. No path of the host and no command.

use serde::Deserialize;
use vm_workspace::{Workspace, WorkspaceError};

use super::WorkspacesError;

/// Its name.
pub(super) const FILE: &str = "vm.toml";
/// More is refused, in bytes.
const LIMIT: u64 = 64 << 10;

/// What a workspace says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Settings {
    /// The importer, as `NAME` or `NAME/STRATEGY`.
    pub(super) importer: Option<String>,
    /// The directory in the guest.
    pub(super) to: Option<String>,
    /// The guest's user.
    pub(super) user: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    workspace: Settings,
}

/// The settings of a workspace; `None` where it has no such file.
pub(super) fn of(workspace: &Workspace) -> Result<Option<Settings>, WorkspacesError> {
    let path = workspace.top().join(FILE);
    let bytes = match workspace.read_file(FILE.as_bytes(), LIMIT + 1) {
        Err(WorkspaceError::NoSuchFile { .. }) => return Ok(None),
        read => read?,
    };
    let failed = |message: String| WorkspacesError::Settings { path: path.clone(), message };
    if bytes.len() as u64 > LIMIT {
        return Err(failed(format!("it has more than {} KiB", LIMIT >> 10)));
    }
    let text = String::from_utf8(bytes).map_err(|_| failed("it is no UTF-8".into()))?;
    parse(&text).map(Some).map_err(failed)
}

fn parse(text: &str) -> Result<Settings, String> {
    let document: Document = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    Ok(document.workspace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_say_what_they_may_and_nothing_else() {
        let settings = parse("[workspace]\nimporter = \"copy\"\nto = \"/srv/x\"\nuser = \"dev\"\n").unwrap();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(settings, Settings { importer: text("copy"), to: text("/srv/x"), user: text("dev") });
        assert_eq!(parse("").unwrap(), Settings::default());
        for (wrong, named) in [
            ("[workspace]\ncommand = \"rm\"\n", "command"),
            ("[run]\nx = 1\n", "run"),
            ("[workspace]\nto = 1\n", "string"),
            ("[workspace\n", "line 1"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
