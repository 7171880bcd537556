//! From an SSH request to an argument vector, an environment and a directory.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use vm_types::guest::{EXEC_ALONE_ENV, EXEC_ARGV_ENV, EXEC_CWD_ENV};

use super::{DEFAULT_PATH, users::User};

/// What the client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// The user's login shell.
    Shell,
    /// A command.
    Exec(Vec<u8>),
}

/// What is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    pub program: PathBuf,
    pub arg0: OsString,
    pub arguments: Vec<OsString>,
    pub environment: BTreeMap<String, String>,
    /// Where to; for an absent one the user's home, or `/` if that does not exist.
    pub directory: Option<PathBuf>,
    /// Its channel waits for nobody else that still writes.
    pub alone: bool,
}

/// Why a command is not run. Exit statuses are the shell's (POSIX, "Exit Status for Commands").
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{0}: command not found")]
    NotFound(String),
    #[error("{0}: permission denied")]
    NotExecutable(String),
    #[error("cannot run {0}: {1}")]
    Failed(String, String),
    #[error("the command is empty")]
    Empty,
    #[error("the command's quoting is not complete")]
    Quoting,
    #[error("directory {0}: {1}")]
    Directory(String, String),
    #[error("this image has no shell; name a program to run")]
    NoShell,
    #[error("no terminal: {0}")]
    NoTerminal(String),
}

impl Refusal {
    pub(crate) fn exit_status(&self) -> u32 {
        match self {
            Self::NotFound(_) | Self::NoShell => 127,
            Self::NotExecutable(_) | Self::Failed(..) | Self::Directory(..) => 126,
            Self::Empty | Self::Quoting => 2,
            Self::NoTerminal(_) => 255,
        }
    }

    /// From the error of starting `program`.
    pub(crate) fn of(program: &Path, error: &std::io::Error) -> Self {
        let name = program.display().to_string();
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound(name),
            std::io::ErrorKind::PermissionDenied => Self::NotExecutable(name),
            _ => Self::Failed(name, error.to_string()),
        }
    }
}

/// Environments in the order in which they override each other.
pub(crate) struct Environments<'a> {
    pub configured: &'a BTreeMap<String, String>,
    pub client: &'a BTreeMap<String, String>,
}

/// Decides what to run.
pub(crate) fn plan(
    user: &User,
    request: &Request,
    environments: &Environments<'_>,
) -> Result<Command, Refusal> {
    let client = environments.client;
    let given = |name| client.get(name).filter(|value| !value.is_empty());
    let shell = [user.shell.as_path(), Path::new("/bin/sh")].into_iter().find(|shell| is_executable(shell));
    let mut environment = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned())]);
    environment.extend(environments.configured.clone());
    environment.extend([
        ("HOME".to_owned(), user.home.display().to_string()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
        ("SHELL".to_owned(), shell.unwrap_or(&user.shell).display().to_string()),
    ]);
    environment.extend(client.clone());
    for own in [EXEC_ARGV_ENV, EXEC_CWD_ENV, EXEC_ALONE_ENV] {
        environment.remove(own);
    }
    let directory = match given(EXEC_CWD_ENV) {
        None => None,
        Some(path) => {
            let refuse = |why: &str| Refusal::Directory(path.clone(), why.to_owned());
            match fs::metadata(path) {
                Ok(meta) if meta.is_dir() => Some(PathBuf::from(path)),
                Ok(_) => return Err(refuse("not a directory")),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(refuse("no such directory in the VM"));
                }
                Err(error) => return Err(refuse(&error.to_string())),
            }
        }
    };
    let direct = given(EXEC_ARGV_ENV).is_some();
    let (program, arg0, arguments) = match (request, shell) {
        (Request::Shell, None) => return Err(Refusal::NoShell),
        (Request::Shell, Some(shell)) => {
            let mut arg0 = OsString::from("-");
            arg0.push(shell.file_name().unwrap_or(OsStr::new("sh")));
            (shell.to_owned(), arg0, Vec::new())
        }
        (Request::Exec(line), Some(shell)) if !direct => (
            shell.to_owned(),
            shell.as_os_str().to_owned(),
            vec!["-c".into(), OsStr::from_bytes(line).to_owned()],
        ),
        (Request::Exec(line), _) => {
            let words = shlex::bytes::split(line).ok_or(Refusal::Quoting)?;
            let mut words = words.into_iter().map(OsString::from_vec);
            let name = words.next().filter(|name| !name.is_empty()).ok_or(Refusal::Empty)?;
            let base = directory.as_deref().unwrap_or(&user.home);
            let path = environment.get("PATH").map_or(DEFAULT_PATH, String::as_str);
            (search(&name, path, base)?, name, words.collect())
        }
    };
    let alone = given(EXEC_ALONE_ENV).is_some();
    Ok(Command { program, arg0, arguments, environment, directory, alone })
}

/// Finds a program as execvp(3) does, from `base`.
fn search(name: &OsStr, path: &str, base: &Path) -> Result<PathBuf, Refusal> {
    let text = || name.to_string_lossy().into_owned();
    if name.as_bytes().contains(&b'/') {
        // The kernel says itself what is wrong with it.
        return Ok(base.join(name));
    }
    let mut refusal = Refusal::NotFound(text());
    for directory in path.split(':') {
        let candidate = base.join(directory).join(name);
        if is_executable(&candidate) {
            return Ok(candidate);
        }
        if candidate.is_file() {
            refusal = Refusal::NotExecutable(text());
        }
    }
    Err(refusal)
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(shell: &str) -> User {
        User {
            name: "dev".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/dev".into(),
            shell: shell.into(),
        }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn planned(shell: &str, request: &Request, client: &[(&str, &str)]) -> Result<Command, Refusal> {
        let configured = map(&[("LANG", "C.UTF-8"), ("HOME", "/nowhere")]);
        plan(&user(shell), request, &Environments { configured: &configured, client: &map(client) })
    }

    #[test]
    fn a_command_goes_to_the_shell_as_it_is() {
        let command =
            planned("/bin/sh", &Request::Exec(b"echo $HOME | cat".to_vec()), &[("A", "b")]).unwrap();
        assert_eq!(command.arguments, ["-c", "echo $HOME | cat"]);
        assert_eq!(command.environment["HOME"], "/home/dev");
        assert_eq!(command.environment["A"], "b");
        assert_eq!(command.environment["LANG"], "C.UTF-8");
        assert_eq!(planned("/bin/sh", &Request::Shell, &[]).unwrap().arg0, "-sh");
    }

    #[test]
    fn an_argument_vector_goes_to_no_shell() {
        let request = Request::Exec(b"printf '%s %s' 'a b' \\$HOME".to_vec());
        let command = planned("/bin/sh", &request, &[(EXEC_ARGV_ENV, "1"), (EXEC_CWD_ENV, "/usr")]).unwrap();
        assert_eq!(command.program.file_name().unwrap(), "printf");
        assert_eq!(command.arguments, ["%s %s", "a b", "$HOME"]);
        assert_eq!(command.directory.as_deref(), Some(Path::new("/usr")));
        assert!(!command.environment.contains_key(EXEC_ARGV_ENV));
        assert!(!command.environment.contains_key(EXEC_CWD_ENV));
        let again = planned(
            "/bin/sh",
            &Request::Exec(b"./x".to_vec()),
            &[(EXEC_ARGV_ENV, "1"), (EXEC_CWD_ENV, "/usr")],
        );
        assert_eq!(again.unwrap().program, Path::new("/usr/./x"));
    }

    #[test]
    fn refusals_have_the_shells_statuses() {
        let direct = [(EXEC_ARGV_ENV, "1")];
        let status = |line: &str, env: &[_]| {
            planned("/bin/sh", &Request::Exec(line.into()), env).unwrap_err().exit_status()
        };
        assert_eq!(status("no-such-program-here", &direct), 127);
        assert_eq!(status("'open", &direct), 2);
        assert_eq!(status("true", &[(EXEC_CWD_ENV, "/no/such")]), 126);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("plain"), "").unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(status("plain", &[(EXEC_ARGV_ENV, "1"), ("PATH", path)]), 126);
    }
}
