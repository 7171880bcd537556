//! What the worker does for a request.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use vm_types::guest::files::{Account, FileRequest, Found, SeenKind, code, is_within};

use vm_archive::{CHUNK, Draft, Failure, Output, Unpacking, copy, pack, pack_selected, unpack};

use super::{
    Input,
    tree::{self, Paths},
};
use crate::ssh::users;

/// Reads the request and does what it asks for; the result is what is to be told of a success, as JSON.
pub(super) fn serve(mut input: Input, output: &Output) -> Result<Option<Vec<u8>>, Failure> {
    match input.request()? {
        FileRequest::Write { path, mode, uid, gid } => write(&path, mode, (uid, gid), &mut input)?,
        FileRequest::Read { path, limit } => read(&path, limit.unwrap_or(u64::MAX), output)?,
        FileRequest::Unpack { directory, uid, gid, options } => {
            let how =
                Unpacking { owner: Some((uid, gid)), modes: 0o7777, only: None, careful: false, options };
            unpack(absolute(&directory)?, how, input)?;
        }
        FileRequest::Pack { path, options } => {
            if let Some(name) = &options.name
                && (!is_within(name.as_bytes()) || name.contains('/'))
            {
                return Err(Failure::new(code::REQUEST, format!("{name:?} is no name")));
            }
            let path = absolute(&path)?;
            for excluded in &options.exclude {
                absolute(excluded)?;
            }
            let replaced = match options.generalize {
                true => crate::apply::generalized(Path::new("/")),
                false => HashMap::new(),
            };
            if options.selected {
                let mut paths = Paths::new(&mut input);
                let next = || Ok(paths.next()?.map(<[u8]>::to_vec));
                return told(&pack_selected(path, &options, replaced, next, output)?);
            }
            let name = options.name.as_deref().map(OsStr::new);
            return told(&pack(path, name, &options, replaced, output)?);
        }
        FileRequest::Survey { path } => tree::survey(&path, output)?,
        FileRequest::Digests { directory } => tree::digests(&directory, &mut input, output)?,
        FileRequest::Remove { directory } => tree::remove(&directory, &mut input)?,
        FileRequest::Find { path, follow } => return told(&find(&path, follow)?),
        FileRequest::Account { user } => return told(&account(&user)?),
    }
    Ok(None)
}

fn told(answer: &impl Serialize) -> Result<Option<Vec<u8>>, Failure> {
    let answer = serde_json::to_vec(answer);
    answer.map(Some).map_err(|error| Failure::new(code::FAILED, format!("the answer: {error}")))
}

/// What a path leads to.
fn find(name: &str, follow: bool) -> Result<Option<Found>, Failure> {
    let path = absolute(name)?;
    let place = match path.file_name() {
        Some(last) if !follow => {
            path.parent().map_or_else(|| Ok("/".into()), fs::canonicalize).map(|parent| parent.join(last))
        }
        _ => fs::canonicalize(path),
    };
    let found = match place.and_then(|place| fs::symlink_metadata(&place).map(|meta| (place, meta))) {
        Ok(found) => found,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(None),
        Err(error) => return Err(Failure::of(name, &error)),
    };
    let (place, meta) = found;
    let path = place.into_os_string().into_string().map_err(|place| {
        Failure::new(code::FAILED, format!("{name}: leads to {}, which is not UTF-8", place.display()))
    })?;
    let kind = match meta.file_type() {
        kind if kind.is_file() => SeenKind::File,
        kind if kind.is_dir() => SeenKind::Directory,
        kind if kind.is_symlink() => SeenKind::Symlink,
        _ => SeenKind::Other,
    };
    let size = if kind == SeenKind::File { meta.len() } else { 0 };
    Ok(Some(Found { path, kind, mode: meta.mode() & 0o7777, size }))
}

fn account(name: &str) -> Result<Account, Failure> {
    let user = users::find(Path::new("/"), name)
        .ok_or_else(|| Failure::new(code::NO_USER, format!("there is no user {name}")))?;
    let home = user.home.to_string_lossy().into_owned();
    Ok(Account { uid: user.uid, gid: user.gid, home })
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
