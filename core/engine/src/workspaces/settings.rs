//! A workspace's own settings: `vm.toml` at its top.
//!
//! They are read from what may be anybody's repository, so they say only what is of no harm: which importer, where in the guest,
//! whose there. No path of the host and no command.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;
use vm_workspace::{Workspace, WorkspaceError};

use super::WorkspacesError;

/// Its name.
pub(super) const FILE: &str = "vm.toml";
/// More is refused, in bytes.
const LIMIT: u64 = 64 << 10;

/// What a workspace says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// Where it says so.
    pub(super) file: PathBuf,
    /// The importer, as `NAME` or `NAME/STRATEGY`.
    pub(super) importer: Option<Said>,
    /// The directory in the guest.
    pub(super) to: Option<Said>,
    /// The guest's user.
    pub(super) user: Option<Said>,
}

/// One of the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) value: String,
    /// The first line of the file is 1.
    line: usize,
}

impl Settings {
    /// The error that a value does not fit.
    pub(super) fn refused(&self, key: &str, said: &Said, why: &str) -> WorkspacesError {
        WorkspacesError::Settings {
            path: self.file.clone(),
            line: Some(said.line),
            message: format!("`{key}` is {:?}: {why}", said.value),
        }
    }
}

/// What the file may have.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    workspace: Table,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    importer: Option<Spanned<String>>,
    to: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
}

/// The settings of a workspace; `None` where it has no such file.
pub(super) fn of(workspace: &Workspace) -> Result<Option<Settings>, WorkspacesError> {
    let path = workspace.top().join(FILE);
    let bytes = match workspace.read_file(FILE.as_bytes(), LIMIT + 1) {
        Err(WorkspaceError::NoSuchFile { .. }) => return Ok(None),
        read => read?,
    };
    let failed = |(line, message)| WorkspacesError::Settings { path: path.clone(), line, message };
    if bytes.len() as u64 > LIMIT {
        return Err(failed((None, format!("it has more than {} KiB", LIMIT >> 10))));
    }
    let text = String::from_utf8(bytes).map_err(|_| failed((None, "it is no UTF-8".into())))?;
    let settings = parse(&text).map_err(failed)?;
    Ok(Some(Settings { file: path, ..settings }))
}

/// What is wrong, and in which line.
type Wrong = (Option<usize>, String);

fn parse(text: &str) -> Result<Settings, Wrong> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let document: Document = toml::from_str(text)
        .map_err(|error| (error.span().map(|span| line(span.start)), error.message().to_owned()))?;
    let said = |key: &str, value: Option<Spanned<String>>| {
        let Some(value) = value else { return Ok(None) };
        let (line, value) = (line(value.span().start), value.into_inner());
        if value.is_empty() {
            Err((Some(line), format!("`{key}` is empty")))
        } else {
            Ok(Some(Said { value, line }))
        }
    };
    let Table { importer, to, user } = document.workspace;
    Ok(Settings {
        file: PathBuf::new(),
        importer: said("importer", importer)?,
        to: said("to", to)?,
        user: said("user", user)?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a `vm.toml` of this text says.
    pub(in super::super) fn said(text: &str) -> Settings {
        Settings { file: "/src/vm.toml".into(), ..parse(text).unwrap() }
    }

    #[test]
    fn settings_say_what_they_may_and_nothing_else() {
        let settings = said("[workspace]\nimporter = \"copy\"\nto = \"/srv/x\"\nuser = \"dev\"\n");
        let is = |value: &str, line| Some(Said { value: value.to_owned(), line });
        assert_eq!(settings.importer, is("copy", 2));
        assert_eq!((settings.to, settings.user), (is("/srv/x", 3), is("dev", 4)));
        assert_eq!(parse(""), Ok(Settings::default()));
        for (wrong, line, named) in [
            ("[workspace]\ncommand = \"rm\"\n", 2, "command"),
            ("\n[run]\nx = 1\n", 2, "run"),
            ("[workspace]\nuser = \"u\"\nto = 1\n", 3, "string"),
            ("[workspace\n", 1, "table"),
            ("[workspace]\n\nto = \"\"\n", 3, "`to` is empty"),
        ] {
            let (at, error) = parse(wrong).unwrap_err();
            assert!(at == Some(line) && error.contains(named), "{wrong}: {at:?} {error}");
        }
    }

    #[test]
    fn an_error_names_file_line_and_key() {
        let settings = said("[workspace]\n\nto = \"srv\"\n");
        let error = settings.refused("to", settings.to.as_ref().unwrap(), "it is not absolute");
        assert_eq!(error.to_string(), "/src/vm.toml, line 3: `to` is \"srv\": it is not absolute");
        assert!(error.hint().unwrap().contains("[workspace]"));
    }
}
