//! Finding a VMM's program and asking it for its version.

use std::{
    ffi::OsStr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
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

/// What tells a program's file from the one that was there before. `None` where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(program: &Path) -> Option<Self> {
        let about = program.metadata().ok()?;
        Some(Self {
            path: program.to_owned(),
            device: about.dev(),
            inode: about.ino(),
            size: about.size(),
            modified: (about.mtime(), about.mtime_nsec()),
        })
    }
}

/// What a program has said of its version, for as long as its file is the same.
#[derive(Debug, Default)]
pub(crate) struct Remembered(Mutex<Option<(Stamp, String)>>);

impl Remembered {
    /// What `program --version` prints.
    ///
    /// # Errors
    /// [`VmmError::Probe`].
    pub(crate) async fn ask_version(&self, runner: &dyn Runner, program: &Path) -> Result<String, VmmError> {
        // Looked at before it is asked: one that is replaced meanwhile is asked again.
        let stamp = Stamp::of(program);
        if let Some((known, text)) = &*self.lock()
            && stamp.as_ref() == Some(known)
        {
            return Ok(text.clone());
        }
        let text = ask_version(runner, program).await?;
        *self.lock() = stamp.map(|stamp| (stamp, text.clone()));
        Ok(text)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Stamp, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    #[derive(Debug, Default)]
    struct Counts(std::sync::atomic::AtomicU32);

    #[async_trait::async_trait]
    impl Runner for Counts {
        async fn run(&self, _: HostCommand) -> Result<vm_host::RunOutput, vm_host::RunError> {
            let asked = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            Ok(vm_host::RunOutput { stdout: format!("v{asked}").into(), stderr_tail: String::new() })
        }
    }

    #[tokio::test]
    async fn a_program_is_asked_again_when_it_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let (program, next) = (dir.path().join("q"), dir.path().join("next"));
        std::fs::write(&program, "").unwrap();
        let (counts, remembered) = (Counts::default(), Remembered::default());
        let ask = async || remembered.ask_version(&counts, &program).await.unwrap();
        assert_eq!((ask().await, ask().await), ("v1".to_owned(), "v1".to_owned()));
        std::fs::write(&next, "").unwrap();
        std::fs::rename(&next, &program).unwrap();
        assert_eq!((ask().await, ask().await), ("v2".to_owned(), "v2".to_owned()));
        std::fs::remove_file(&program).unwrap();
        assert_eq!((ask().await, ask().await), ("v3".to_owned(), "v4".to_owned()));
    }
}
