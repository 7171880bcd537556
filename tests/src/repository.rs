//! Git repositories on the host, and copies of trees to compare with them.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

/// A working tree of the host's.
#[derive(Debug, Clone)]
pub struct Repository(pub PathBuf);

/// What a path is: permissions, and content or target, for comparing.
pub type Tree = BTreeMap<Vec<u8>, String>;

impl Repository {
    /// One with a history: `commits` commits on `main` of `files` files in all, then what repositories have that makes
    /// them hard to copy, in the history and beside it.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn with_history(path: PathBuf, commits: u32, files: u32) -> Self {
        fs::create_dir_all(&path).expect("a directory can be made");
        let repository = Self(path);
        repository.git(&["init", "-q", "-b", "main"]);
        let mut stream = Vec::new();
        let each = files / commits;
        for commit in 0..commits {
            let message = format!("change {commit}");
            let who = format!("A Person <person@example.org> {} +0000", 1_700_000_000 + commit);
            write!(
                stream,
                "commit refs/heads/main\nauthor {who}\ncommitter {who}\ndata {}\n{message}\n",
                message.len()
            )
            .expect("memory can be written to");
            for file in 0..each {
                let number = commit * each + file;
                let content = format!("file {number}\n").repeat(1 + number as usize % 40);
                let path = format!("src/part{:02}/module{:02}/file{number}.c", number % 50, number % 7);
                entry(&mut stream, "100644", path.as_bytes(), content.as_bytes());
            }
        }
        let odd: [(&str, &[u8], &[u8]); 9] = [
            ("100755", b"run.sh", b"#!/bin/sh\necho run\n"),
            ("100644", b"a name with  spaces", b"spaces\n"),
            ("100644", b"new\nline", b"newline\n"),
            ("100644", b"latin-\xe9", b"not UTF-8\n"),
            ("100644", b"-rf", b"dash\n"),
            ("100644", b"empty", b""),
            ("100644", b"binary", b"\x00\x01\xff\xfe\x00"),
            ("120000", b"link", b"run.sh"),
            ("120000", b"dangling", b"/nowhere/at all"),
        ];
        let who = "A Person <person@example.org> 1800000000 +0000";
        write!(stream, "commit refs/heads/main\ncommitter {who}\ndata 3\nodd\n")
            .expect("memory can be written to");
        for (mode, path, content) in odd {
            entry(&mut stream, mode, path, content);
        }
        entry(&mut stream, "100644", b".gitignore", b"/ignored/\n*.o\n");
        entry(&mut stream, "100644", b"to-be-deleted", b"1\n");
        entry(&mut stream, "100644", b"to-be-changed", b"1\n");
        repository.git_with(&["fast-import", "--quiet"], &stream);
        repository.git(&["reset", "-q", "--hard", "main"]);
        // What is not committed.
        fs::remove_file(repository.0.join("to-be-deleted")).expect("it is there");
        repository.write("to-be-changed", "changed, not committed\n");
        repository.write("untracked/new file", "untracked\n");
        repository.write("ignored/large", "ignored\n");
        repository
    }

    /// A copy of one.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn copy_of(from: &Path, to: PathBuf) -> Self {
        let copied = Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(&to).status();
        assert!(copied.expect("cp runs").success(), "{} cannot be copied", from.display());
        let repository = Self(to);
        // They are other files, which git would read each time that it is asked.
        repository.git(&["update-index", "-q", "--refresh"]);
        repository
    }

    /// Runs git in it; what it says, without the last line's end.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn git(&self, arguments: &[&str]) -> String {
        self.git_with(arguments, b"")
    }

    /// The same with a standard input.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn git_with(&self, arguments: &[&str], input: &[u8]) -> String {
        let mut command = Command::new("git");
        command.arg("-C").arg(&self.0).args([
            "-c",
            "user.name=A Person",
            "-c",
            "user.email=person@example.org",
        ]);
        command.args(["-c", "safe.directory=*", "-c", "core.fsmonitor=false"]).args(arguments);
        for (name, value) in
            [("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_SYSTEM", "/dev/null"), ("LC_ALL", "C")]
        {
            command.env(name, value);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("git is installed");
        let mut stdin = child.stdin.take().expect("it was asked for");
        // Nobody writes so much back that this could wait for ever.
        stdin.write_all(input).expect("git reads its input");
        drop(stdin);
        let output = child.wait_with_output().expect("git can be waited for");
        let said = String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned();
        assert!(
            output.status.success(),
            "git {arguments:?} in {}: {}{said}{}",
            self.0.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }

    /// Writes a file, with the directories above it.
    ///
    /// # Panics
    /// It cannot be written.
    #[track_caller]
    pub fn write(&self, path: &str, content: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a directory can be made");
        fs::write(path, content).expect("a file can be written");
    }

    /// A file's content.
    ///
    /// # Panics
    /// It cannot be read.
    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.0.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// What git says of it: commit, branch, and what is not committed.
    #[track_caller]
    pub fn state(&self) -> [String; 3] {
        [
            self.git(&["rev-parse", "HEAD"]),
            self.git(&["symbolic-ref", "-q", "HEAD"]),
            self.git(&["status", "--porcelain", "-z", "--untracked-files=all"]),
        ]
    }

    /// The tree that git would make of all that it does not ignore.
    #[track_caller]
    pub fn whole_tree(&self) -> String {
        let index = self.0.join(".git/index-of-test");
        let index = index.to_str().expect("the test's directory is UTF-8");
        // An index of its own: the repository's stays as it is.
        let script = format!(
            "export GIT_INDEX_FILE={index}; cp .git/index {index}; git -c safe.directory='*' add -A && \
             git -c safe.directory='*' write-tree; rm -f {index}"
        );
        let output =
            Command::new("sh").args(["-ec", &script]).current_dir(&self.0).output().expect("sh runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The files that git does not ignore, as they are.
    #[track_caller]
    pub fn files(&self) -> Tree {
        let output = Command::new("git")
            .arg("-C")
            .arg(&self.0)
            .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .output()
            .expect("git runs");
        let paths = output.stdout.split(|byte| *byte == 0).filter(|path| !path.is_empty());
        paths.filter_map(|path| Some((path.to_vec(), what(&self.0.join(OsStr::from_bytes(path)))?))).collect()
    }
}

/// All that is below a directory but `.git`.
///
/// # Panics
/// It cannot be read.
pub fn tree_of(directory: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).expect("a directory can be read").flatten() {
            let path = entry.path();
            if path.strip_prefix(directory) == Ok(Path::new(".git")) {
                continue;
            }
            match what(&path) {
                Some(what) => {
                    let relative = path.strip_prefix(directory).expect("it is below");
                    tree.insert(relative.as_os_str().as_bytes().to_vec(), what);
                }
                None => todo.push(path),
            }
        }
    }
    tree
}

/// A file or link in words; `None` of a directory, and of what is not there.
fn what(path: &Path) -> Option<String> {
    let about = fs::symlink_metadata(path).ok()?;
    if about.is_symlink() {
        return Some(format!("link to {:?}", fs::read_link(path).ok()?));
    }
    if about.is_dir() {
        return None;
    }
    let sum: String = Sha256::digest(fs::read(path).ok()?).iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{:o} {sum}", about.permissions().mode() & 0o777))
}

fn entry(stream: &mut Vec<u8>, mode: &str, path: &[u8], content: &[u8]) {
    let mut quoted = Vec::new();
    for byte in path {
        match byte {
            b'\n' => quoted.extend_from_slice(b"\\n"),
            b'"' | b'\\' => quoted.extend([b'\\', *byte]),
            byte => quoted.push(*byte),
        }
    }
    write!(stream, "M {mode} inline \"").expect("memory can be written to");
    stream.extend_from_slice(&quoted);
    write!(stream, "\"\ndata {}\n", content.len()).expect("memory can be written to");
    stream.extend_from_slice(content);
    stream.push(b'\n');
}
