//! A tree by the relative paths of its entries: what is in it, what files contain, removing.
//!
//! No symbolic link is followed below the top, and nothing is opened for more than to be asked about it before it is known to be
//! a file or a directory.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    vec,
};

use bytes::Bytes;
use ring::digest::{Context, SHA256};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxTimestamp, openat, readlinkat, unlinkat},
    io::Errno,
};
use vm_types::guest::files::{PATH_LIMIT, Seen, SeenKind, code, is_within};

use vm_archive::{
    CHUNK, Failure, Output, is_draft,
    look::{Mount, about, about_name, below, by_descriptor, kind_of, mount_of},
};

use super::{Input, operations::absolute};

/// Directories within each other. Each is open while what is in it is listed.
const DEPTH: usize = 512;
/// How much of a file is read at once, in bytes.
const READ: usize = 128 << 10;

/// The paths that follow a request.
pub(super) struct Paths<'a> {
    input: &'a mut Input,
    path: Vec<u8>,
}

impl<'a> Paths<'a> {
    pub(super) fn new(input: &'a mut Input) -> Self {
        Self { input, path: Vec::new() }
    }

    /// The next one; `None` behind the last.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, Failure> {
        self.path.clear();
        while self.input.advance().map_err(|_| Failure::Gone)? {
            let end = self.input.current.iter().position(|byte| *byte == 0);
            let length = end.unwrap_or(self.input.current.len());
            if self.path.len() + length > PATH_LIMIT {
                return Err(Failure::new(code::REQUEST, "a path is longer than any may be"));
            }
            self.path.extend_from_slice(&self.input.current.split_to(length));
            if end.is_some() {
                drop(self.input.current.split_to(1));
                return if is_within(&self.path) {
                    Ok(Some(&self.path))
                } else {
                    let path = self.path.escape_ascii();
                    Err(Failure::new(code::REQUEST, format!("\"{path}\" is no path below a directory")))
                };
            }
        }
        if self.path.is_empty() {
            Ok(None)
        } else {
            Err(Failure::new(code::REQUEST, "the last path has no NUL behind it"))
        }
    }
}

/// Opens a tree's top, the way to which may have links.
fn top(path: &str) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, absolute(path)?, flags, Mode::empty()).map_err(|errno| Failure::of(path, &errno.into()))
}

/// Of an entry of `top`.
fn failed(top: &str, path: &[u8], error: &io::Error) -> Failure {
    let path = OsStr::from_bytes(path).to_string_lossy();
    Failure::of(&format!("{}/{path}", top.trim_end_matches('/')), error)
}

/// Gathers small pieces of what is sent.
struct Gathered<'a> {
    output: &'a Output,
    bytes: Vec<u8>,
}

impl<'a> Gathered<'a> {
    fn new(output: &'a Output) -> Self {
        Self { output, bytes: Vec::with_capacity(2 * CHUNK) }
    }

    /// Sends what is enough for a packet.
    fn flow(&mut self) -> Result<(), Failure> {
        if self.bytes.len() < CHUNK { Ok(()) } else { self.send() }
    }

    fn send(&mut self) -> Result<(), Failure> {
        // Pieces are packets, or two.
        let bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(2 * CHUNK));
        if bytes.is_empty() { Ok(()) } else { self.output.send(Bytes::from(bytes)) }
    }
}

/// A directory whose entries are being told.
struct Level {
    directory: OwnedFd,
    /// Sorted names. A directory's comes twice, once with a slash behind it, where what is in it has its place.
    names: vec::IntoIter<Vec<u8>>,
    /// Bytes of its own path, the slash included.
    path: usize,
}

/// Sends what is below a directory.
pub(super) fn survey(path: &str, output: &Output) -> Result<(), Failure> {
    let directory = match openat(
        CWD,
        absolute(path)?,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(Failure::of(path, &errno.into())),
    };
    let home = about(&directory).map(|about| mount_of(&about));
    let mut survey = Survey {
        top: path,
        home: home.map_err(|errno| Failure::of(path, &errno.into()))?,
        path: Vec::new(),
        levels: Vec::new(),
        output: Gathered::new(output),
    };
    survey.enter(directory)?;
    while let Some(level) = survey.levels.last_mut() {
        survey.path.truncate(level.path);
        match level.names.next() {
            Some(name) => survey.tell(&name)?,
            None => drop(survey.levels.pop()),
        }
    }
    survey.output.send()
}

struct Survey<'a> {
    top: &'a str,
    /// The mount that is not left.
    home: Mount,
    /// The current entry's.
    path: Vec<u8>,
    levels: Vec<Level>,
    output: Gathered<'a>,
}

impl Survey<'_> {
    fn failed(&self, errno: Errno) -> Failure {
        failed(self.top, &self.path, &errno.into())
    }

    /// Goes into a directory, that of the current path.
    fn enter(&mut self, directory: OwnedFd) -> Result<(), Failure> {
        if self.levels.len() == DEPTH {
            let path = String::from_utf8_lossy(&self.path);
            return Err(Failure::new(code::FAILED, format!("{}/{path}: is too deep", self.top)));
        }
        let names = match names_in(&directory) {
            Ok(names) => names,
            // It was removed since it was opened.
            Err(Errno::NOENT) => Vec::new(),
            Err(errno) => return Err(self.failed(errno)),
        };
        self.levels.push(Level { directory, names: names.into_iter(), path: self.path.len() });
        Ok(())
    }

    /// Tells of one entry of the last directory, or goes into it.
    fn tell(&mut self, name: &[u8]) -> Result<(), Failure> {
        self.path.extend_from_slice(name);
        let Some(Level { directory, .. }) = self.levels.last() else { return Ok(()) };
        if let Some(name) = name.strip_suffix(b"/") {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let entered = match openat(directory, name, flags, Mode::empty()) {
                Ok(directory) => directory,
                // It has become something else.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => return Ok(()),
                Err(errno) => return Err(self.failed(errno)),
            };
            let mount = about(&entered).map(|about| mount_of(&about)).map_err(|errno| self.failed(errno))?;
            return if mount == self.home { self.enter(entered) } else { Ok(()) };
        }
        if self.path.len() > PATH_LIMIT {
            return Err(self.failed(Errno::NAMETOOLONG));
        }
        let about = match about_name(directory, name) {
            Ok(about) => about,
            Err(Errno::NOENT | Errno::STALE) => return Ok(()),
            Err(errno) => return Err(self.failed(errno)),
        };
        let target = match kind_of(&about) {
            FileType::Symlink => match readlinkat(directory, name, Vec::new()) {
                Ok(target) => Some(target.into_bytes()),
                Err(Errno::NOENT | Errno::INVAL | Errno::STALE) => return Ok(()),
                Err(errno) => return Err(self.failed(errno)),
            },
            _ => None,
        };
        let kind = match kind_of(&about) {
            FileType::Directory => SeenKind::Directory,
            // What is mounted there is not of the tree, and what is below cannot be seen.
            _ if mount_of(&about) != self.home => SeenKind::Other,
            FileType::RegularFile => SeenKind::File,
            FileType::Symlink => SeenKind::Symlink,
            _ => SeenKind::Other,
        };
        let seen = Seen {
            path: std::mem::take(&mut self.path),
            kind,
            mode: u32::from(about.stx_mode) & 0o7777,
            uid: about.stx_uid,
            gid: about.stx_gid,
            size: if matches!(kind, SeenKind::File | SeenKind::Symlink) { about.stx_size } else { 0 },
            mtime: nanoseconds(&about.stx_mtime),
            ctime: nanoseconds(&about.stx_ctime),
            inode: about.stx_ino,
            target,
        };
        seen.encode(&mut self.output.bytes);
        self.path = seen.path;
        self.output.flow()
    }
}

fn nanoseconds(time: &StatxTimestamp) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// Sorted, as [`Level::names`].
fn names_in(directory: &OwnedFd) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        // What is being made is not there yet.
        if matches!(name.to_bytes(), b"." | b"..") || is_draft(name.to_bytes()) {
            continue;
        }
        let kind = match entry.file_type() {
            // Some filesystems do not say.
            FileType::Unknown => match about_name(directory, name) {
                Ok(about) => kind_of(&about),
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno),
            },
            kind => kind,
        };
        if kind == FileType::Directory {
            names.push([name.to_bytes(), b"/"].concat());
        }
        names.push(name.to_bytes().to_vec());
    }
    names.sort_unstable();
    Ok(names)
}

/// Sends the digests of the files whose paths follow.
pub(super) fn digests(directory: &str, input: &mut Input, output: &Output) -> Result<(), Failure> {
    let top = top(directory)?;
    let mut buffer = vec![0; READ];
    let mut answers = Gathered::new(output);
    let mut paths = Paths::new(input);
    while let Some(path) = paths.next()? {
        match digest(&top, path, &mut buffer).map_err(|error| failed(directory, path, &error))? {
            Some(digest) => digest.as_ref().iter().for_each(|byte| {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                answers.bytes.extend([byte >> 4, byte & 15].map(|digit| DIGITS[usize::from(digit)]));
            }),
            None => answers.bytes.push(b'-'),
        }
        answers.bytes.push(0);
        answers.flow()?;
    }
    answers.send()
}

fn digest(top: &OwnedFd, path: &[u8], buffer: &mut [u8]) -> io::Result<Option<ring::digest::Digest>> {
    let Some(file) = below(top, path, OFlags::PATH)? else { return Ok(None) };
    if kind_of(&about(&file)?) != FileType::RegularFile {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut file = File::from(openat(CWD, by_descriptor(&file), flags, Mode::empty())?);
    let mut digest = Context::new(&SHA256);
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(Some(digest.finish())),
            Ok(length) => digest.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes what the paths that follow name.
pub(super) fn remove(directory: &str, input: &mut Input) -> Result<(), Failure> {
    let top = top(directory)?;
    // That of the last entry, as many are in one.
    let mut parent: Option<(Vec<u8>, OwnedFd)> = None;
    let mut paths = Paths::new(input);
    while let Some(path) = paths.next()? {
        let of = |errno: Errno| failed(directory, path, &errno.into());
        let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b"."[..], path),
        };
        if parent.as_ref().is_none_or(|(path, _)| path != above) {
            parent = below(&top, above, OFlags::PATH | OFlags::DIRECTORY)
                .map_err(of)?
                .map(|directory| (above.to_vec(), directory));
        }
        let Some((_, directory)) = &parent else { continue };
        let removed = match unlinkat(directory, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => unlinkat(directory, name, AtFlags::REMOVEDIR),
            result => result,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(errno) => return Err(of(errno)),
        }
    }
    Ok(())
}
