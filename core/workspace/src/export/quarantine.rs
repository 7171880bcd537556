//! A repository in scratch where a guest's objects are looked at before the host's repository meets them.
//!
//! It has the host's objects as alternates and nobody's configuration: neither the person's, nor the repository's, nor
//! the guest's. So there is no filter, hook or other program that git could run for it.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use crate::{
    Git, GitCommand, GitError, Workspace, WorkspaceError,
    export::ExportError,
    files::read_small,
    text::{path, shown},
};

use super::{
    fetch::{Content, Fetched},
    names::is_path,
};

/// What holds in it. What is missing here has git's own default.
const SETTINGS: [&str; 7] = [
    "core.bare=false",
    "core.ignoreCase=false",
    "core.protectHFS=true",
    "core.protectNTFS=true",
    "core.safecrlf=false",
    // What is made here is read once.
    "core.compression=1",
    "pack.threads=1",
];

/// What decides how git compares and converts files. The guest has these as the host has them.
const CONVERTING: [&str; 4] = ["core.fileMode", "core.symlinks", "core.autocrlf", "core.eol"];

/// What it needs to know of the host's repository.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// The working tree.
    pub(super) top: PathBuf,
    /// `sha1` or `sha256`.
    pub(super) format: String,
    /// The directory of its objects.
    objects: PathBuf,
    /// Commits whose parents it does not have.
    shallow: Option<Vec<u8>>,
    /// Some settings, as git takes them.
    settings: Vec<String>,
}

impl Host {
    /// That of a workspace; none where there is no git.
    pub(super) fn of(workspace: &Workspace) -> Result<Option<Self>, WorkspaceError> {
        let (Some(common), Some(format)) = (workspace.git_common_directory(), workspace.object_format())
        else {
            return Ok(None);
        };
        let mut settings = Vec::new();
        for key in CONVERTING {
            let value = workspace.git().at(workspace.top()).args(["config", "--get", key]).find();
            let value = value.map_err(WorkspaceError::git("reading the repository's configuration"))?;
            settings.extend(value.map(|value| format!("{key}={}", String::from_utf8_lossy(&value))));
        }
        Ok(Some(Self { settings, ..Self::plain(workspace.top().to_owned(), format, common) }))
    }

    /// A repository of which only the objects count.
    pub(super) fn plain(top: PathBuf, format: &str, common: &Path) -> Self {
        let shallow = read_small(&common.join("shallow"), true).ok().filter(|list| is_list(list));
        let objects = common.join("objects");
        Self { top, format: format.to_owned(), objects, shallow, settings: Vec::new() }
    }

    /// How many digits the name of an object has.
    pub(super) fn digits(&self) -> usize {
        digits(&self.format)
    }
}

fn digits(format: &str) -> usize {
    if format == "sha256" { 64 } else { 40 }
}

/// Whether it is nothing but names of objects.
fn is_list(content: &[u8]) -> bool {
    content.iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'\n' | b'\r'))
}

/// The repository.
#[derive(Debug)]
pub(super) struct Quarantine {
    git: Git,
    /// It and all else that is made here.
    scratch: PathBuf,
    repository: PathBuf,
    digits: usize,
    settings: Vec<String>,
}

impl Quarantine {
    /// Makes it in `scratch`, which is the identity's own.
    pub(super) fn make(git: &Git, scratch: &Path, host: Option<&Host>) -> Result<Self, ExportError> {
        let repository = scratch.join("quarantine.git");
        let format = host.map_or("sha1", |host| host.format.as_str());
        let digits = digits(format);
        let settings = host.map(|host| host.settings.clone()).unwrap_or_default();
        let made = Self { git: git.clone(), scratch: scratch.to_owned(), repository, digits, settings };
        made.neutral(git.at(scratch))
            .args(["init", "--quiet", "--bare", "--template=", "--initial-branch=export"])
            .arg(format!("--object-format={format}"))
            .arg(&made.repository)
            .output()
            .map_err(WorkspaceError::git("making a repository in the scratch directory"))?;
        if let Some(host) = host {
            made.write("objects/info/alternates", &quoted(host.objects.as_os_str().as_bytes()))?;
            if let Some(shallow) = &host.shallow {
                made.write("shallow", shallow)?;
            }
        }
        Ok(made)
    }

    /// Its directory.
    pub(super) fn directory(&self) -> &Path {
        &self.repository
    }

    /// A command in it.
    pub(super) fn command(&self) -> GitCommand<'_> {
        let mut command = self.neutral(self.git.at(&self.scratch)).env("GIT_DIR", &self.repository);
        for setting in SETTINGS.into_iter().chain(self.settings.iter().map(String::as_str)) {
            command = command.args(["-c", setting]);
        }
        command
    }

    /// Whether a commit can be read.
    pub(super) fn has_commit(&self, commit: &str) -> Result<bool, ExportError> {
        match self.command().args(["cat-file", "-e"]).arg(format!("{commit}^{{commit}}")).output() {
            Ok(_) => Ok(true),
            Err(GitError::Failed { .. }) => Ok(false),
            Err(error) => Err(WorkspaceError::git("looking for a commit")(error).into()),
        }
    }

    /// Those of the objects that are files' contents and can be read.
    pub(super) fn contents<'a>(
        &self,
        objects: impl IntoIterator<Item = &'a str>,
    ) -> Result<HashSet<String>, ExportError> {
        let asked = objects.into_iter().flat_map(|object| [object, "\n"]).collect::<String>();
        if asked.is_empty() {
            return Ok(HashSet::new());
        }
        let args = ["cat-file", "--batch-check=%(objecttype) %(objectname)"];
        let said = self.command().args(args).input(asked.into_bytes()).output();
        let said = said.map_err(WorkspaceError::git("looking for the objects in the guest's index"))?;
        let said = String::from_utf8_lossy(&said);
        Ok(said.lines().filter_map(|line| line.strip_prefix("blob ")).map(str::to_owned).collect())
    }

    fn neutral<'a>(&self, command: GitCommand<'a>) -> GitCommand<'a> {
        command
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_ATTR_NOSYSTEM", "1")
            .env("HOME", "/nonexistent")
            .env("XDG_CONFIG_HOME", "/nonexistent")
    }

    /// Puts a file of its own in place.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> Result<(), ExportError> {
        let file = self.repository.join(name);
        let write = || {
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&file, content)
        };
        write().map_err(|source| ExportError::Scratch { action: "write", path: file.clone(), source })
    }

    /// Takes the guest's objects: `loose` by their path in `objects/`, and packs, of which git makes the indexes anew. Nothing
    /// here is believed: what git reads of it, it checks when it goes to the host.
    pub(super) fn take_objects<'a>(
        &self,
        objects: impl IntoIterator<Item = (&'a [u8], &'a Content)>,
    ) -> Result<(), ExportError> {
        for (name, content) in objects {
            let place = self.repository.join("objects").join(path(name));
            let scratch = |source| ExportError::Scratch { action: "link", path: place.clone(), source };
            if name.starts_with(b"pack/") {
                let pack = self.scratch.join(format!("{}.pack", content.file.display()));
                fs::hard_link(&content.file, &pack).map_err(scratch)?;
                let indexed = self.command().arg("index-pack").arg(&pack).output();
                indexed.map_err(unusable)?;
                let target =
                    self.repository.join("objects/pack").join(format!("pack-{}", number(&content.file)));
                for extension in ["pack", "idx"] {
                    let to = target.with_extension(extension);
                    if let Some(parent) = to.parent() {
                        fs::create_dir_all(parent).map_err(scratch)?;
                    }
                    fs::rename(pack.with_extension(extension), to).map_err(scratch)?;
                }
            } else {
                if let Some(parent) = place.parent() {
                    fs::create_dir_all(parent).map_err(scratch)?;
                }
                match fs::hard_link(&content.file, &place) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    result => result.map_err(scratch)?,
                }
            }
        }
        Ok(())
    }

    /// A new index in it, with the entries of a tree or none, in a directory of that name and some letters.
    pub(super) fn index(&self, name: &str, tree: Option<&str>) -> Result<Index<'_>, ExportError> {
        let own =
            tempfile::Builder::new().prefix(name).tempdir_in(&self.scratch).map(tempfile::TempDir::keep);
        let own = own.map_err(|source| ExportError::Scratch {
            action: "make a directory in",
            path: self.scratch.clone(),
            source,
        })?;
        let work = own.join("work");
        super::fetch::directory(&work)?;
        let index = Index { quarantine: self, file: own.join("index"), work };
        let read = index.command().arg("read-tree");
        let read = match tree {
            Some(tree) => read.arg(tree),
            None => read.arg("--empty"),
        };
        read.output().map_err(WorkspaceError::git("reading the commit that the guest started from"))?;
        Ok(index)
    }
}

/// Git cannot make use of what the guest has.
pub(super) fn unusable(error: GitError) -> ExportError {
    match error {
        GitError::Failed { stderr, .. } => ExportError::History { reason: shown(stderr.as_bytes()) },
        error => WorkspaceError::git("reading the guest's commits")(error).into(),
    }
}

fn number(file: &Path) -> String {
    file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A path as `objects/info/alternates` has it.
fn quoted(path: &[u8]) -> Vec<u8> {
    let mut line = vec![b'"'];
    for &byte in path {
        match byte {
            b'"' | b'\\' => line.extend([b'\\', byte]),
            0..0x20 | 0x7f => line.extend(format!("\\{byte:03o}").bytes()),
            _ => line.push(byte),
        }
    }
    line.extend(b"\"\n");
    line
}

/// An index and a working tree that has as much as is needed.
#[derive(Debug)]
pub(super) struct Index<'a> {
    quarantine: &'a Quarantine,
    file: PathBuf,
    work: PathBuf,
}

impl Index<'_> {
    fn command(&self) -> GitCommand<'_> {
        self.quarantine.command().env("GIT_INDEX_FILE", &self.file).env("GIT_WORK_TREE", &self.work)
    }

    /// Puts a file that was fetched into the working tree.
    pub(super) fn file(&self, name: &[u8], content: &Content, executable: bool) -> Result<(), ExportError> {
        self.place(name, |place| {
            fs::set_permissions(
                &content.file,
                fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }),
            )?;
            match fs::hard_link(&content.file, place) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(place)?;
                    fs::hard_link(&content.file, place)
                }
                result => result,
            }
        })
    }

    /// Puts a link into the working tree.
    pub(super) fn link(&self, name: &[u8], target: &[u8]) -> Result<(), ExportError> {
        self.place(name, |place| std::os::unix::fs::symlink(path(target), place))
    }

    fn place(&self, name: &[u8], put: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), ExportError> {
        debug_assert!(is_path(name), "checked where the guest was looked at");
        let place = self.work.join(path(name));
        let make = || {
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            put(&place)
        };
        make().map_err(|source| ExportError::Scratch { action: "write", path: place.clone(), source })
    }

    /// Writes files of the index into the working tree.
    pub(super) fn check_out(&self, names: &[&[u8]]) -> Result<(), ExportError> {
        if names.is_empty() {
            return Ok(());
        }
        let command = self.command().args(["checkout-index", "--quiet", "--force", "-z", "--stdin"]);
        command.input(list(names)).output().map_err(WorkspaceError::git("reading what the guest ignores"))?;
        Ok(())
    }

    /// Those of the names that the `.gitignore`s of the working tree in a directory and the repository's own list name. The
    /// names are relative to that directory, which is the working tree's own where it has no name.
    pub(super) fn ignored(&self, below: &[u8], names: &[&[u8]]) -> Result<Vec<Vec<u8>>, ExportError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let top = self.work.join(path(below));
        fs::create_dir_all(&top).map_err(|source| ExportError::Scratch {
            action: "make",
            path: top.clone(),
            source,
        })?;
        // A name may begin as a pathspec with magic does.
        let names: Vec<Vec<u8>> = names.iter().map(|name| [b"./", *name].concat()).collect();
        let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
        let command =
            self.command().args(["check-ignore", "--no-index", "-z", "--stdin"]).input(list(&names));
        let command = command.env("GIT_WORK_TREE", &top);
        let found = command.find().map_err(WorkspaceError::git("asking what the guest ignores"))?;
        let found = found.unwrap_or_default();
        Ok(found
            .split(|byte| *byte == 0)
            .filter_map(|name| name.strip_prefix(b"./"))
            .map(<[u8]>::to_vec)
            .collect())
    }

    /// Takes names out of the index.
    pub(super) fn remove(&self, names: &[&[u8]]) -> Result<(), ExportError> {
        let null = "0".repeat(self.quarantine.digits);
        self.set(
            names
                .iter()
                .map(|name| [b"0 ", null.as_bytes(), b"\t", *name, b"\0"].concat())
                .collect::<Vec<_>>()
                .concat(),
        )
    }

    /// Has a commit of a submodule at each of the names.
    pub(super) fn link_commits<'a>(
        &self,
        commits: impl IntoIterator<Item = (&'a [u8], &'a str)>,
    ) -> Result<(), ExportError> {
        let lines = commits
            .into_iter()
            .map(|(name, commit)| [b"160000 ", commit.as_bytes(), b"\t", name, b"\0"].concat());
        self.set(lines.collect::<Vec<_>>().concat())
    }

    /// Has these modes and objects at the names.
    pub(super) fn put<'a>(
        &self,
        entries: impl IntoIterator<Item = (&'a [u8], u32, &'a str)>,
    ) -> Result<(), ExportError> {
        let lines = entries
            .into_iter()
            .map(|(name, mode, object)| [format!("{mode:o} {object}\t").as_bytes(), name, b"\0"].concat());
        self.set(lines.collect::<Vec<_>>().concat())
    }

    fn set(&self, lines: Vec<u8>) -> Result<(), ExportError> {
        if lines.is_empty() {
            return Ok(());
        }
        let command = self.command().args(["update-index", "-z", "--index-info"]).input(lines);
        command.output().map_err(WorkspaceError::git("putting the guest's files together"))?;
        Ok(())
    }

    /// Brings files and links of the working tree into the index, and takes out what has to make room for them.
    pub(super) fn add(&self, names: &[&[u8]]) -> Result<(), ExportError> {
        if names.is_empty() {
            return Ok(());
        }
        let command =
            self.command().args(["update-index", "-z", "--add", "--replace", "--stdin"]).input(list(names));
        command.output().map_err(WorkspaceError::git("putting the guest's files together"))?;
        Ok(())
    }

    /// Those of the names that `.gitattributes` give a filter to, and which. None is run here.
    pub(super) fn filtered(&self, names: &[&[u8]]) -> Result<Vec<(Vec<u8>, String)>, ExportError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let command = self.command().args(["check-attr", "-z", "--stdin", "filter"]).input(list(names));
        let said = command.output().map_err(WorkspaceError::git("reading the guest's attributes"))?;
        let fields: Vec<&[u8]> = said.split(|byte| *byte == 0).collect();
        let found = fields
            .as_chunks::<3>()
            .0
            .iter()
            .filter(|[_, _, filter]| !matches!(*filter, b"unspecified" | b"unset" | b"set"));
        Ok(found.map(|[name, _, filter]| (name.to_vec(), shown(filter))).collect())
    }

    /// The tree of the index.
    pub(super) fn tree(&self) -> Result<String, ExportError> {
        let tree = self.command().arg("write-tree").line();
        let tree = tree.map_err(WorkspaceError::git("putting the guest's files together"))?;
        Ok(String::from_utf8_lossy(&tree).into_owned())
    }
}

fn list(names: &[&[u8]]) -> Vec<u8> {
    names.iter().flat_map(|name| name.iter().copied().chain([0])).collect()
}

/// Where to keep what is fetched.
pub(super) fn fetched(scratch: &Path) -> Result<Fetched, ExportError> {
    let directory = scratch.join("content");
    super::fetch::directory(&directory)?;
    Ok(Fetched::new(directory))
}
