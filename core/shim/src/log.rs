//! A log of bounded size that never stops its writer.
//!
//! It is two files: `NAME` and the older `NAME.1`. Each holds at most half of the bound; a full `NAME` becomes `NAME.1`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// A log that several write to, a chunk at a time.
#[derive(Clone)]
pub(crate) struct SharedLog(Arc<Mutex<BoundedLog>>);

impl SharedLog {
    pub(crate) fn new(log: BoundedLog) -> Self {
        Self(Arc::new(Mutex::new(log)))
    }

    /// See [`BoundedLog::append`].
    pub(crate) fn append(&self, bytes: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).append(bytes);
    }
}

/// The file with the older half of the log `path`.
pub(crate) fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

pub(crate) struct BoundedLog {
    path: PathBuf,
    half: u64,
    file: Option<File>,
    written: u64,
    lost: u64,
}

impl BoundedLog {
    /// An empty log; what a former run left under these names is removed.
    pub(crate) fn create(path: PathBuf, bound: u64) -> io::Result<Self> {
        vm_host::files::remove_if_there(&older(&path))?;
        vm_host::files::remove_if_there(&path)?;
        let mut log = Self { path, half: (bound / 2).max(1), file: None, written: 0, lost: 0 };
        log.open()?;
        Ok(log)
    }

    /// Adds bytes. What cannot be written is counted, and the gap is told in the log once writing works again.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        if self.lost > 0 {
            let notice = format!("\r\n[vmd: {} bytes were not logged]\r\n", self.lost);
            if self.write(notice.as_bytes()).is_err() {
                self.lost += bytes.len() as u64;
                return;
            }
            self.lost = 0;
        }
        if let Err(unwritten) = self.write(bytes) {
            self.lost += unwritten;
        }
    }

    /// Writes all or returns how much is left over.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), u64> {
        while !bytes.is_empty() {
            let left = bytes.len() as u64;
            if self.written >= self.half {
                self.rotate().map_err(|_| left)?;
            }
            let room = usize::try_from(self.half - self.written).unwrap_or(usize::MAX);
            let part = &bytes[..bytes.len().min(room)];
            match self.open().map_err(|_| left)?.write(part) {
                Ok(0) => return Err(left),
                Ok(n) => {
                    self.written += n as u64;
                    bytes = &bytes[n..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(left),
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        if let Err(error) = fs::rename(&self.path, older(&self.path))
            && error.kind() != io::ErrorKind::NotFound
        {
            // The bound matters more than the history.
            self.open()?.set_len(0)?;
            self.written = 0;
            return Ok(());
        }
        self.file = None;
        self.written = 0;
        self.open().map(|_| ())
    }

    fn open(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)?;
            self.written = file.metadata()?.len();
            self.file = Some(file);
        }
        self.file.as_mut().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(path: &Path) -> (u64, u64) {
        let size = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
        (size(path), size(&older(path)))
    }

    #[test]
    fn the_bound_holds_and_the_newest_bytes_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = BoundedLog::create(path.clone(), 1000).unwrap();
        let mut all = Vec::new();
        for n in 0..5000u32 {
            let line = format!("line {n}\n");
            log.append(line.as_bytes());
            all.extend_from_slice(line.as_bytes());
            let (new, old) = sizes(&path);
            assert!(new <= 500 && old <= 500, "{new} {old}");
        }
        let mut kept = fs::read(older(&path)).unwrap();
        kept.extend(fs::read(&path).unwrap());
        assert!(kept.len() >= 500);
        assert!(all.ends_with(&kept), "what is kept is not the newest part");
    }

    #[test]
    fn a_chunk_larger_than_the_bound_is_cut_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = BoundedLog::create(path.clone(), 100).unwrap();
        log.append(&[b'x'; 100_030]);
        assert_eq!(sizes(&path), (30, 50));
    }

    #[test]
    fn a_directory_that_is_gone_for_a_while_leaves_a_told_gap() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        fs::create_dir(&place).unwrap();
        let path = place.join("log");
        let mut log = BoundedLog::create(path.clone(), 200).unwrap();
        // The older file and half of the newer one, which stays open although it has no name any more.
        log.append(&[b'a'; 150]);
        fs::remove_dir_all(&place).unwrap();
        // 50 of these fill it up; the rest needs a new file, for which there is no place.
        log.append(&[b'b'; 60]);
        log.append(&[b'c'; 7]);
        fs::create_dir(&place).unwrap();
        log.append(b"again");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "\r\n[vmd: 17 bytes were not logged]\r\nagain");
    }

    #[test]
    fn a_full_disk_loses_bytes_but_not_the_log() {
        // The write end of /dev/full says ENOSPC to every write.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = BoundedLog::create(path.clone(), 1000).unwrap();
        log.append(b"before ");
        let good = log.file.replace(OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.append(&[b'x'; 300]);
        log.append(&[b'x'; 33]);
        log.file = good;
        log.append(b"after");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "before \r\n[vmd: 333 bytes were not logged]\r\nafter");
    }
}
