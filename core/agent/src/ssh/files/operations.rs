//! What the worker does for a request.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use bytes::{Bytes, BytesMut};
use vm_types::guest::files::{FileRequest, PackReport, code};

use super::{Failure, Input, Output, pack::pack, unpack::unpack};
use crate::draft::Draft;

/// Bytes read or sent at once: an SSH packet.
pub(super) const CHUNK: usize = 32 << 10;

/// Reads the request and does what it asks for; the result is what is to be told of a success.
pub(super) fn serve(mut input: Input, output: &Output) -> Result<Option<PackReport>, Failure> {
    match input.request()? {
        FileRequest::Write { path, mode, uid, gid } => write(&path, mode, (uid, gid), &mut input)?,
        FileRequest::Read { path, limit } => read(&path, limit.unwrap_or(u64::MAX), output)?,
        FileRequest::Unpack { directory, uid, gid } => {
            absolute(&directory)?;
            unpack(Path::new(&directory), (uid, gid), input)?;
        }
        FileRequest::Pack { path, options } => {
            let replaced = match options.generalize {
                true => crate::apply::generalized(Path::new("/")),
                false => HashMap::new(),
            };
            return pack(absolute(&path)?, &options, replaced, output).map(Some);
        }
    }
    Ok(None)
}

pub(super) fn absolute(path: &str) -> Result<&Path, Failure> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(Path::new(path))
    } else {
        Err(Failure::new(code::REQUEST, format!("{path:?} is no absolute path")))
    }
}

fn write(name: &str, mode: u32, owner: (u32, u32), content: &mut Input) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::of(name, &error);
    let path = absolute(name)?;
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => return Err(is_directory(name)),
        Ok(meta) if !meta.is_file() && !meta.is_symlink() => return Err(not_regular(name)),
        _ => {}
    }
    let parent = path.parent().ok_or_else(|| is_directory(name))?;
    if path.file_name().is_none() || name.ends_with('/') {
        return Err(is_directory(name));
    }
    fs::create_dir_all(parent).map_err(failed)?;
    let mut draft = Draft::begin(path).map_err(failed)?;
    copy(content, &mut draft).map_err(failed)?;
    draft.commit(mode & 0o7777, Some(owner)).map_err(failed)
}

/// Copies in pieces that are larger than `io::copy`'s on the stack.
pub(super) fn copy(from: &mut impl Read, to: &mut impl io::Write) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut all = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(all),
            Ok(length) => {
                to.write_all(&buffer[..length])?;
                all += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read(name: &str, limit: u64, output: &Output) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::of(name, &error);
    let path = absolute(name)?;
    // One that is no regular file must not be waited for.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => not_regular(name),
        _ => failed(error),
    })?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_dir() {
        return Err(is_directory(name));
    }
    if !meta.is_file() {
        return Err(not_regular(name));
    }
    let mut left = file.take(limit);
    loop {
        let mut buffer = BytesMut::zeroed(CHUNK);
        match left.read(&mut buffer).map_err(failed)? {
            0 => return Ok(()),
            length => {
                buffer.truncate(length);
                output.send(Bytes::from(buffer))?;
            }
        }
    }
}

fn is_directory(name: &str) -> Failure {
    Failure::new(code::IS_DIRECTORY, format!("{name}: Is a directory"))
}

fn not_regular(name: &str) -> Failure {
    Failure::new(code::NOT_REGULAR, format!("{name}: Not a regular file"))
}
