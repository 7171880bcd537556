//! Copying a file's data and none of its holes.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
};

use nix::{
    errno::Errno,
    fcntl::copy_file_range,
    unistd::{Whence, lseek64},
};

/// Copied between two looks at `give_up`; half a second on a slow disk.
const STEP: u64 = 32 << 20;
/// Buffer of the way round by user space.
const BUFFER: usize = 1 << 20;

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// All of it; so many bytes of data.
    Whole(u64),
    /// `give_up` said so.
    GivenUp,
}

/// Copies the first `length` bytes of `from` to the same places in `to`, which is empty or sparse there. Holes stay holes where
/// `from`'s filesystem tells them (lseek(2), SEEK_DATA); the data goes by copy_file_range(2), in the kernel.
/// Does not set `to`'s length beyond the last data.
///
/// # Errors
/// Reading or writing.
pub fn copy_data(from: &File, to: &File, length: u64, give_up: &dyn Fn() -> bool) -> io::Result<Copied> {
    let mut in_kernel = true;
    let (mut at, mut copied) = (0, 0);
    while let Some((start, end)) = next_data(from, at, length)? {
        let mut place = start;
        while place < end {
            if give_up() {
                return Ok(Copied::GivenUp);
            }
            let step = (end - place).min(STEP);
            let done = if in_kernel {
                match range(from, to, place, step) {
                    // Another filesystem, or one that cannot (see the errors of copy_file_range(2)).
                    Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EPERM) => {
                        in_kernel = false;
                        continue;
                    }
                    other => other? as u64,
                }
            } else {
                through_memory(from, to, place, step)?
            };
            if done == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the source became shorter"));
            }
            place += done;
            copied += done;
        }
        at = end;
    }
    Ok(Copied::Whole(copied))
}

/// The next stretch of data in `at..length`.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |from: u64, whence| lseek64(file.as_fd(), from as i64, whence).map(|found| found as u64);
    if at >= length {
        return Ok(None);
    }
    let start = match seek(at, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        // A filesystem that knows no holes: all is data.
        Err(Errno::EINVAL) => return Ok(Some((at, length))),
        Err(error) => return Err(error.into()),
    };
    let end = seek(start, Whence::SeekHole)?.min(length);
    Ok((start < end).then_some((start, end)))
}

fn range(from: &File, to: &File, place: u64, length: u64) -> nix::Result<usize> {
    let (mut source, mut target) = (place as i64, place as i64);
    copy_file_range(from, Some(&mut source), to, Some(&mut target), length as usize)
}

/// Leaves out blocks of zeros: the source may have them where the other way would have seen holes.
fn through_memory(from: &File, to: &File, place: u64, length: u64) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER.min(length as usize)];
    let mut done = 0;
    while done < length {
        let want = buffer.len().min((length - done) as usize);
        let got = from.read_at(&mut buffer[..want], place + done)?;
        if got == 0 {
            break;
        }
        if buffer[..got].iter().any(|&byte| byte != 0) {
            to.write_all_at(&buffer[..got], place + done)?;
        }
        done += got as u64;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.write_all_at(b"middle", 20 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        file
    }

    fn same(a: &File, b: &File) {
        for place in [0, 4096, 20 << 20, 40 << 20, (64 << 20) - 4096] {
            let (mut left, mut right) = ([0; 4096], [0; 4096]);
            a.read_exact_at(&mut left, place).unwrap();
            b.read_exact_at(&mut right, place).unwrap();
            assert!(left == right, "differs near {place}");
        }
    }

    #[test]
    fn holes_stay_holes() {
        let (from, to) = (sparse(), tempfile::tempfile().unwrap());
        let copied = copy_data(&from, &to, 64 << 20, &|| false).unwrap();
        assert!(matches!(copied, Copied::Whole(bytes) if bytes < 1 << 20), "{copied:?}");
        same(&from, &to);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn another_filesystem_works_too() {
        let Ok(to) = tempfile::tempfile_in("/dev/shm") else { return };
        let from = sparse();
        copy_data(&from, &to, 64 << 20, &|| false).unwrap();
        same(&from, &to);
        assert!(to.metadata().unwrap().blocks() * 512 < 4 << 20);
    }

    #[test]
    fn the_way_through_memory_is_exact() {
        let (from, to) = (sparse(), tempfile::tempfile().unwrap());
        assert_eq!(through_memory(&from, &to, 0, 64 << 20).unwrap(), 64 << 20);
        to.set_len(64 << 20).unwrap();
        same(&from, &to);
    }

    #[test]
    fn it_can_be_given_up() {
        let (from, to) = (sparse(), tempfile::tempfile().unwrap());
        assert_eq!(copy_data(&from, &to, 64 << 20, &|| true).unwrap(), Copied::GivenUp);
    }
}
