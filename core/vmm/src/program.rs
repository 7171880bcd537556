//! Finding a VMM's program and asking it for its version.

use std::{
    ffi::OsStr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use vm_host::{HostCommand, Runner};
use vm_types::vm::VmmKind;

use crate::VmmError;

/// The absolute path of an executable named by a path or to be found in PATH.
///
/// # Errors
/// [`VmmError::NotInstalled`].
pub(crate) fn locate(vmm: VmmKind, program: &Path) -> Result<PathBuf, VmmError> {
    find(program, std::env::var_os("PATH").as_deref())
        .ok_or_else(|| VmmError::NotInstalled { vmm, program: program.display().to_string() })
}

/// What `program --version` prints.
///
/// # Errors
/// [`VmmError::Probe`].
pub(crate) async fn ask_version(runner: &dyn Runner, program: &Path) -> Result<String, VmmError> {
    let command = HostCommand::new(program).arg("--version").timeout(Duration::from_secs(20));
    let output = runner
        .run(command)
        .await
        .map_err(|source| VmmError::Probe { program: program.display().to_string(), source })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What was printed is none.
pub(crate) fn no_version(program: &Path, output: &str) -> VmmError {
    VmmError::NoVersion { program: program.display().to_string(), output: output.chars().take(200).collect() }
}

fn find(program: &Path, search: Option<&OsStr>) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let candidates: Vec<PathBuf> = if program.components().count() > 1 {
        vec![program.to_owned()]
    } else {
        std::env::split_paths(search?).map(|directory| directory.join(program)).collect()
    };
    std::path::absolute(candidates.into_iter().find(executable)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_executables_are_found_and_by_absolute_path() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("q"), "").unwrap();
        let search = Some(dir.path().as_os_str());
        assert_eq!(find(Path::new("q"), search), None);
        std::fs::set_permissions(dir.path().join("q"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(Path::new("q"), search), Some(dir.path().join("q")));
        assert_eq!(find(&dir.path().join("q"), None), Some(dir.path().join("q")));
    }
}
