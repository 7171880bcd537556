//! Where something is, on the host or in a VM, and where it goes.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use jsonrpsee::core::client::Client;
use vm_api::{ErrorKind, Problem, rpc::VmClient};
use vm_guest::{Guest, GuestError};
use vm_types::guest::files::{Account, Found, SeenKind};

use super::last_name;
use crate::errors::CliError;

/// Until a guest has let us in; one that is emulated and busy takes seconds.
const LOGIN_DEADLINE: Duration = Duration::from_secs(60);
/// For the last words to a guest.
const CLOSE_DEADLINE: Duration = Duration::from_millis(500);

/// A place as it is named on the command line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Named {
    Host(PathBuf),
    Guest {
        vm: String,
        path: String,
    },
    /// Stdin or stdout.
    Stream,
}

impl Named {
    /// A colon behind a first name without a slash makes it a VM's.
    pub(super) fn parse(text: &OsStr) -> Result<Self, CliError> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':').filter(|at| !bytes[..*at].contains(&b'/'));
        let (vm, path) = match colon {
            Some(0) | None if bytes.is_empty() => {
                let hint = "name a file or directory".to_owned();
                return Err(CliError::Usage { message: "an empty path".to_owned(), hint });
            }
            Some(0) | None => return Ok(Self::Host(PathBuf::from(text))),
            Some(colon) => (&bytes[..colon], &bytes[colon + 1..]),
        };
        match (String::from_utf8(vm.to_vec()), String::from_utf8(path.to_vec())) {
            (Ok(vm), Ok(path)) => Ok(Self::Guest { vm, path }),
            _ => Err(CliError::Usage {
                message: format!("{} is not UTF-8", text.display()),
                hint: "copy the directory that it is in".to_owned(),
            }),
        }
    }
}

/// What has a path.
#[derive(Debug)]
pub(super) struct Spot {
    /// Absolute, without links on the way.
    pub(super) path: PathBuf,
    pub(super) kind: SeenKind,
    pub(super) mode: u32,
}

/// The host, or a guest that we are connected to.
pub(super) enum Side {
    Host,
    Guest(Box<InGuest>),
}

pub(super) struct InGuest {
    /// The VM's name.
    pub(super) vm: String,
    pub(super) guest: Guest,
    pub(super) account: Account,
}

impl InGuest {
    /// Of what the guest says.
    pub(super) fn failed(&self, source: GuestError) -> CliError {
        CliError::Guest { vm: self.vm.clone(), source: Box::new(source) }
    }
}

impl Side {
    /// The side of a place; stdin and stdout are on the host.
    pub(super) async fn of(named: &Named, client: &Client, user: &str) -> Result<Self, CliError> {
        let Named::Guest { vm, .. } = named else { return Ok(Self::Host) };
        let access = client.access(vm.clone()).await?;
        let vm = access.name.to_string();
        let entering = async {
            let guest = Guest::connect(&access.ssh_socket, &access.client_key, &access.host_key).await?;
            let account = guest.account(user).await?;
            Ok((guest, account))
        };
        match tokio::time::timeout(LOGIN_DEADLINE, entering).await {
            Ok(Ok((guest, account))) => Ok(Self::Guest(Box::new(InGuest { vm, guest, account }))),
            Ok(Err(source)) => Err(CliError::Guest { vm, source: Box::new(source) }),
            Err(_) => {
                let seconds = LOGIN_DEADLINE.as_secs();
                let problem = Problem::new(
                    ErrorKind::GuestUnresponsive,
                    format!("VM {vm} did not answer within {seconds} s"),
                );
                Err(problem.hint(format!("look at the guest's console: vm logs {vm}")).into())
            }
        }
    }

    pub(super) async fn close(self) {
        if let Self::Guest(side) = self {
            let _ = tokio::time::timeout(CLOSE_DEADLINE, side.guest.close()).await;
        }
    }

    /// A path as it is written on the command line.
    pub(super) fn text(&self, path: &Path) -> String {
        match self {
            Self::Host => path.display().to_string(),
            Self::Guest(side) => format!("{}:{}", side.vm, path.display()),
        }
    }

    /// The absolute path of a place. It may have dots and slashes at its end that mean something.
    fn absolute(&self, named: &Named) -> PathBuf {
        match (self, named) {
            (Self::Guest(side), Named::Guest { path, .. }) => {
                let home = Path::new(&side.account.home);
                match path.as_str() {
                    "" | "~" => home.to_owned(),
                    path => match path.strip_prefix("~/") {
                        Some(below) => home.join(below),
                        None => home.join(path),
                    },
                }
            }
            (_, Named::Host(path)) => path.clone(),
            _ => PathBuf::new(),
        }
    }

    /// What a path leads to.
    pub(super) async fn find(&self, path: &Path, follow: bool) -> Result<Option<Spot>, CliError> {
        match self {
            Self::Host => match on_host(path, follow) {
                Ok(spot) => Ok(Some(spot)),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    Ok(None)
                }
                Err(source) => Err(CliError::File { path: path.to_owned(), source }),
            },
            Self::Guest(side) => {
                let Some(path) = path.to_str() else { return Ok(None) };
                let found = side.guest.find(path, follow).await.map_err(|error| side.failed(error))?;
                let spot = |Found { path, kind, mode, .. }| Spot { path: path.into(), kind, mode };
                Ok(found.map(spot))
            }
        }
    }

    fn problem(&self, kind: ErrorKind, path: &Path, what: &str, hint: &str) -> CliError {
        Problem::new(kind, format!("{}: {what}", self.text(path))).hint(hint).into()
    }

    fn nothing(&self, path: &Path, what: &str) -> CliError {
        let hint = match self {
            Self::Host => "check the path".to_owned(),
            Self::Guest(side) => format!("see what is there: vm ssh {} -- ls -la DIRECTORY", side.vm),
        };
        self.problem(ErrorKind::NotFound, path, what, &hint)
    }
}

fn on_host(path: &Path, follow: bool) -> io::Result<Spot> {
    let path = match path.file_name() {
        Some(name) if !follow => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            fs::canonicalize(parent.unwrap_or(Path::new(".")))?.join(name)
        }
        _ => fs::canonicalize(path)?,
    };
    let meta = fs::symlink_metadata(&path)?;
    let kind = match meta.file_type() {
        kind if kind.is_file() => SeenKind::File,
        kind if kind.is_dir() => SeenKind::Directory,
        kind if kind.is_symlink() => SeenKind::Symlink,
        _ => SeenKind::Other,
    };
    Ok(Spot { path, kind, mode: meta.permissions().mode() & 0o7777 })
}

/// What is copied.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) path: PathBuf,
    pub(super) kind: SeenKind,
    /// What it is called where it arrives in a directory; nothing for what is in a directory.
    pub(super) name: Option<OsString>,
}

impl Item {
    /// What is copied of a side.
    pub(super) async fn find(side: &Side, named: &Named, follow: bool) -> Result<Self, CliError> {
        let path = side.absolute(named);
        let bytes = path.as_os_str().as_bytes();
        let name = last_name(bytes).map(OsStr::to_owned);
        let directory = bytes.ends_with(b"/") || name.is_none();
        let found = side.find(&path, follow || directory).await?;
        let Spot { path: real, kind, .. } = found.ok_or_else(|| side.nothing(&path, "there is nothing"))?;
        match kind {
            SeenKind::Other => Err(side.problem(
                ErrorKind::InvalidArgument,
                &path,
                "is a device, pipe or socket",
                "copy files, directories and links",
            )),
            SeenKind::File if directory => Err(side.problem(
                ErrorKind::InvalidArgument,
                &path,
                "is no directory",
                "leave the slash at its end out",
            )),
            kind => Ok(Self { path: real, kind, name }),
        }
    }

    /// An archive, which is put into a directory.
    pub(super) fn nameless() -> Self {
        Self { path: PathBuf::new(), kind: SeenKind::Directory, name: None }
    }

    /// A file without a name.
    pub(super) fn content() -> Self {
        Self { path: PathBuf::new(), kind: SeenKind::File, name: None }
    }
}

/// Where an item goes.
#[derive(Debug)]
pub(super) struct Target {
    /// A directory that is there.
    pub(super) directory: PathBuf,
    /// What the item is called in it; nothing where what is in the item goes there.
    pub(super) name: Option<OsString>,
    /// That of the file that is replaced.
    pub(super) mode: Option<u32>,
}

impl Target {
    /// As cp(1) finds it.
    pub(super) async fn find(
        side: &Side,
        named: &Named,
        item: &Item,
        several: bool,
    ) -> Result<Self, CliError> {
        let path = side.absolute(named);
        let bytes = path.as_os_str().as_bytes();
        let found = side.find(&path, true).await?;
        let no_directory = |what: &str| {
            side.problem(
                ErrorKind::InvalidArgument,
                &path,
                what,
                "name a directory, or one that is to be made",
            )
        };
        match found {
            Some(Spot { path: directory, kind: SeenKind::Directory, .. }) => {
                let Some(name) = &item.name else {
                    return match item.kind {
                        SeenKind::Directory => Ok(Self { directory, name: None, mode: None }),
                        _ => Err(side.problem(
                            ErrorKind::InvalidArgument,
                            &path,
                            "is a directory",
                            "name a file in it",
                        )),
                    };
                };
                let place = directory.join(name);
                let mode = match side.find(&place, false).await? {
                    Some(spot) => fits(side, item, &spot)?,
                    None => None,
                };
                Ok(Self { directory, name: Some(name.clone()), mode })
            }
            Some(_) if several || bytes.ends_with(b"/") => Err(no_directory("is no directory")),
            Some(spot) => {
                let mode = fits(side, item, &spot)?;
                let directory = spot.path.parent().unwrap_or(Path::new("/")).to_owned();
                Ok(Self { directory, name: spot.path.file_name().map(OsStr::to_owned), mode })
            }
            None => {
                let missing = |path: &Path| side.nothing(path, "there is no such directory");
                let name = last_name(bytes);
                let Some(name) =
                    name.filter(|_| !several && (item.kind == SeenKind::Directory || !bytes.ends_with(b"/")))
                else {
                    return Err(missing(&path));
                };
                let parent = parent_of(bytes);
                match side.find(&parent, true).await? {
                    Some(Spot { path: directory, kind: SeenKind::Directory, .. }) => {
                        Ok(Self { directory, name: Some(name.to_owned()), mode: None })
                    }
                    Some(_) => Err(side.problem(
                        ErrorKind::InvalidArgument,
                        &parent,
                        "is no directory",
                        "name a directory, or one that is to be made",
                    )),
                    None => Err(missing(&parent)),
                }
            }
        }
    }

    /// Where the item will be.
    pub(super) fn whole(&self) -> PathBuf {
        match &self.name {
            Some(name) => self.directory.join(name),
            None => self.directory.clone(),
        }
    }

    /// A directory copied into itself would have no end.
    pub(super) fn must_not_be_within(&self, from: &Side, to: &Side, item: &Item) -> Result<(), CliError> {
        match (from, to) {
            (Side::Guest(from), Side::Guest(to)) if from.vm == to.vm => {}
            _ => return Ok(()),
        }
        if self.whole().starts_with(&item.path) {
            return Err(to.problem(
                ErrorKind::InvalidArgument,
                &self.whole(),
                "is, or is within, what is to be copied",
                "name a place outside of it",
            ));
        }
        Ok(())
    }
}

/// The directory that a path with a last name is in.
fn parent_of(path: &[u8]) -> PathBuf {
    let trimmed = |path: &[u8]| path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let path = &path[..trimmed(path)];
    let above = &path[..path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1)];
    match (trimmed(above), above) {
        (0, []) => PathBuf::from("."),
        (0, _) => PathBuf::from("/"),
        (end, above) => PathBuf::from(OsStr::from_bytes(&above[..end])),
    }
}

/// Whether an item can take the place of what is there; the mode of a file that it replaces.
fn fits(side: &Side, item: &Item, there: &Spot) -> Result<Option<u32>, CliError> {
    let refused = |what: &str, hint: &str| side.problem(ErrorKind::InvalidArgument, &there.path, what, hint);
    match (item.kind, there.kind) {
        (SeenKind::Directory, SeenKind::Directory) => Ok(None),
        (_, SeenKind::Directory) => Err(refused("is a directory", "name another place, or remove it first")),
        (_, SeenKind::Other) => {
            Err(refused("is a device, pipe or socket", "name a file; to write to a device run a command"))
        }
        (SeenKind::Directory, _) => Err(refused("is no directory", "name another place, or remove it first")),
        (_, _) => Ok(Some(there.mode)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_vm_where_no_slash_is_before_it() {
        let guest = |vm: &str, path: &str| Named::Guest { vm: vm.to_owned(), path: path.to_owned() };
        for (text, named) in [
            ("web:/etc", guest("web", "/etc")),
            ("web:", guest("web", "")),
            ("web:a:b", guest("web", "a:b")),
            ("./a:b", Named::Host("./a:b".into())),
            ("/a:b", Named::Host("/a:b".into())),
            (":a", Named::Host(":a".into())),
            ("a", Named::Host("a".into())),
            ("-", Named::Stream),
        ] {
            assert_eq!(Named::parse(OsStr::new(text)).unwrap(), named, "{text}");
        }
        for text in [&b"web:\xff"[..], b""] {
            let refused = Named::parse(OsStr::from_bytes(text)).unwrap_err();
            assert!(matches!(refused, CliError::Usage { .. }), "{refused:?}");
        }
        assert_eq!(
            Named::parse(OsStr::from_bytes(b"\xff")).unwrap(),
            Named::Host(OsStr::from_bytes(b"\xff").into())
        );
    }

    #[test]
    fn directories_above_are_found_behind_any_slashes() {
        for (path, parent) in [
            ("a", "."),
            ("a/", "."),
            ("/a", "/"),
            ("//a//", "/"),
            ("a/b", "a"),
            ("/a//b/", "/a"),
            ("./a", "."),
        ] {
            assert_eq!(parent_of(path.as_bytes()), PathBuf::from(parent), "{path}");
        }
    }

    /// The target for a file, a directory, or what is in one.
    fn target(
        destination: &Path,
        kind: SeenKind,
        name: Option<&str>,
        several: bool,
    ) -> Result<Target, CliError> {
        let item = Item { path: "/src/x".into(), kind, name: name.map(OsString::from) };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Target::find(&Side::Host, &Named::Host(destination.to_owned()), &item, several))
    }

    #[test]
    fn things_go_where_cp_would_put_them() {
        let directory = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(directory.path()).unwrap();
        let at = |name: &str| top.join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::create_dir(at("dir/sub")).unwrap();
        fs::write(at("file"), "").unwrap();
        fs::write(at("dir/taken"), "").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::os::unix::fs::symlink("dir", at("to-dir")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
        let whole = |result: Result<Target, CliError>| {
            result.map(|target| target.whole()).map_err(|error| error.message())
        };
        let (file, dir) = (SeenKind::File, SeenKind::Directory);
        for (destination, kind, name, several, wanted) in [
            ("new", file, Some("x"), false, "new"),
            ("new", dir, Some("x"), false, "new"),
            ("new/", dir, Some("x"), false, "new"),
            ("new", dir, None, false, "new"),
            ("dir", file, Some("x"), false, "dir/x"),
            ("dir/", dir, Some("x"), true, "dir/x"),
            ("dir/.", file, Some("x"), false, "dir/x"),
            ("dir", dir, None, false, "dir"),
            ("dir", dir, Some("sub"), false, "dir/sub"),
            ("dir", file, Some("taken"), false, "dir/taken"),
            ("to-dir", file, Some("x"), false, "dir/x"),
            ("file", file, Some("x"), false, "file"),
            ("link", file, Some("x"), false, "file"),
            ("link", SeenKind::Symlink, Some("x"), false, "file"),
        ] {
            let got = whole(target(&at(destination), kind, name, several));
            assert_eq!(got, Ok(at(wanted)), "{destination}");
        }
        for (destination, kind, name, several, what) in [
            ("new/", file, Some("x"), false, "no such directory"),
            ("new", file, Some("x"), true, "no such directory"),
            ("no/new", file, Some("x"), false, "no such directory"),
            ("file/x", file, Some("x"), false, "is no directory"),
            ("file", file, Some("x"), true, "is no directory"),
            ("file", dir, Some("x"), false, "is no directory"),
            ("file", dir, None, false, "is no directory"),
            ("dir", file, Some("sub"), false, "is a directory"),
            ("dir", dir, Some("taken"), false, "is no directory"),
            ("dir", file, None, false, "is a directory"),
            ("socket", file, Some("x"), false, "is a device"),
        ] {
            let got = whole(target(&at(destination), kind, name, several));
            assert!(got.as_ref().is_err_and(|message| message.contains(what)), "{destination}: {got:?}");
        }
    }
}
