//! Temporary directories that vanish however the work in them ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::ImageError;

/// A directory (mode 0700) below the scratch directory a caller gave. Dropping it removes it with all that is in it, on
/// a thread where there is a runtime to give one, since a root filesystem may hold very many files.
#[derive(Debug)]
pub(crate) struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    pub(crate) fn new(parent: &Path, prefix: &str) -> Result<Self, ImageError> {
        let make = || {
            fs::create_dir_all(parent)?;
            tempfile::Builder::new().prefix(prefix).tempdir_in(parent)
        };
        match make() {
            Ok(dir) => Ok(Self(Some(dir))),
            Err(source) => {
                Err(ImageError::File { action: "make a directory in", path: parent.to_owned(), source })
            }
        }
    }

    /// The path of something in it; the directory itself for an empty name.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.as_ref().map(|dir| dir.path().join(name)).unwrap_or_default()
    }
}

impl Scratch {
    /// Removes it and waits for that.
    pub(crate) async fn close(mut self) {
        if let Some(path) = self.0.take().map(tempfile::TempDir::keep) {
            // The thread is joined; should it panic, the directory is left to the daemon's next start.
            let _ = tokio::task::spawn_blocking(move || remove(&path)).await;
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(path) = self.0.take().map(tempfile::TempDir::keep) else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || remove(&path))),
            Err(_) => remove(&path),
        }
    }
}

/// Removes a directory. A killed tool or a cancelled thread may still be writing in it, so it
/// is tried a few times.
fn remove(path: &Path) {
    for attempt in 0..20 {
        match fs::remove_dir_all(path) {
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return,
            Err(error) if attempt == 19 => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a temporary directory");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
