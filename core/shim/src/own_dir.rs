//! A directory that the VMM makes its sockets in, and the pipes in it through which it tells what it does.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{sys::stat::Mode, unistd};
use serde_json::{Map, Value};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{OpenOptions, Receiver},
};
use tokio_util::sync::CancellationToken;
use vm_types::shim::{OwnDir, Told};

use crate::error::StartError;

/// Bytes read at once.
const CHUNK: usize = 8 * 1024;
/// What is read of a pipe at most when its VMM has ended: as much as fits into one (pipe(7), `pipe-max-size`).
const REST: usize = 1 << 20;
/// The longest object of metrics in bytes. Firecracker's have some 10 KiB, and 1 KiB for each device.
const METRICS_LIMIT: usize = 64 * 1024;

/// Pipes that are read.
pub(crate) type Pipes = Vec<(Told, Receiver)>;

/// Makes it, in the place of a former run's, and opens its pipes: from then on they have a reader whatever becomes of their names.
/// Given to `user`, if any.
pub(crate) fn make(own: &OwnDir, user: Option<u32>) -> Result<Pipes, StartError> {
    let give = |path: &Path| user.map_or(Ok(()), |user| chown(path, Some(user), Some(user)));
    let make = || {
        remove(own)?;
        fs::DirBuilder::new().mode(0o700).create(&own.path)?;
        let mut pipes = Pipes::new();
        for pipe in &own.pipes {
            unistd::mkfifo(&pipe.path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            // For writing, too: there is no end to it as long as nobody has it open.
            pipes.push((pipe.what, OpenOptions::new().read_write(true).open_receiver(&pipe.path)?));
            give(&pipe.path)?;
        }
        // Last, for nobody is to meddle with it before.
        give(&own.path)?;
        io::Result::Ok(pipes)
    };
    make().map_err(|source| StartError::OwnDir { path: own.path.clone(), source })
}

/// Takes it back from the VMM, which has made all that it makes in it: no guest that takes the VMM over is to fill this filesystem,
/// or to put something else in a socket's place.
pub(crate) fn close(own: &OwnDir) -> Result<(), StartError> {
    let (user, group) = (unistd::geteuid().as_raw(), unistd::getegid().as_raw());
    chown(&own.path, Some(user), Some(group))
        .map_err(|source| StartError::OwnDir { path: own.path.clone(), source })
}

/// Removes it with all that is in it.
pub(crate) fn remove(own: &OwnDir) -> io::Result<()> {
    match fs::remove_dir_all(&own.path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Has `take` take what comes, until the VMM is `over` and all that was in the pipe is taken.
pub(crate) async fn read(mut pipe: Receiver, over: CancellationToken, mut take: impl FnMut(&[u8])) {
    let mut buffer = vec![0; CHUNK];
    loop {
        // Cancel-safe: a read that is not done has taken nothing.
        let read = tokio::select! {
            read = pipe.read(&mut buffer) => read,
            () = over.cancelled() => break,
        };
        match read {
            Ok(n @ 1..) => take(&buffer[..n]),
            _ => return,
        }
    }
    let mut left = REST;
    while let Ok(n @ 1..) = pipe.try_read(&mut buffer) {
        take(&buffer[..n]);
        left = left.saturating_sub(n);
        if left == 0 {
            return;
        }
    }
}

/// The last object of metrics that came whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics(Arc<Mutex<Option<Box<[u8]>>>>);

impl Metrics {
    /// What it is; none where what came is no object.
    pub(crate) fn last(&self) -> Option<Value> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::from_slice::<Map<_, _>>(last.as_deref()?).ok().map(Value::Object)
    }

    /// What takes the bytes of a pipe.
    pub(crate) fn taker(&self) -> impl FnMut(&[u8]) + Send + use<> {
        let (last, mut line, mut too_long) = (self.0.clone(), Vec::new(), false);
        move |bytes| {
            for part in bytes.split_inclusive(|&byte| byte == b'\n') {
                too_long |= line.len() + part.len() > METRICS_LIMIT;
                if !too_long {
                    line.extend_from_slice(part);
                }
                if !part.ends_with(b"\n") {
                    continue;
                }
                if !too_long {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.as_slice().into());
                }
                // Its room is given back: metrics are rare.
                (line, too_long) = (Vec::new(), false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_object_that_is_whole_and_not_too_long_is_kept() {
        let metrics = Metrics::default();
        let mut take = metrics.taker();
        assert_eq!(metrics.last(), None);
        take(b"{\"a\": 1}\n{\"a\"");
        assert_eq!(metrics.last(), Some(serde_json::json!({"a": 1})));
        take(b": 2}");
        assert_eq!(metrics.last(), Some(serde_json::json!({"a": 1})));
        take(b"\n");
        assert_eq!(metrics.last(), Some(serde_json::json!({"a": 2})));
        for _ in 0..100 {
            take(&[b'x'; METRICS_LIMIT / 10]);
        }
        take(b"}\n");
        assert_eq!(metrics.last(), Some(serde_json::json!({"a": 2})));
        take(b"{\"a\": 3}\n");
        assert_eq!(metrics.last(), Some(serde_json::json!({"a": 3})));
        take(b"[1]\n");
        assert_eq!(metrics.last(), None);
    }
}
