//! Build files: a Dockerfile's text becomes instructions with the lines they begin at. Nothing is read or run here, and
//! variables stay as they are written: what they come to depends on the instructions before
//! (<https://docs.docker.com/reference/dockerfile/>).

use vm_oci::Platform;

use super::{
    documents::{self, Document},
    words::{self, split},
};

/// A build file that cannot be understood, or asks for what is not done here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct FileError {
    /// Where the instruction begins, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub message: String,
    /// What would do.
    pub hint: String,
}

/// A command as `RUN`, `CMD` and `ENTRYPOINT` have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// For the shell.
    Shell(String),
    /// Program and arguments.
    Exec(Vec<String>),
    /// A program's text, whose first line says what runs it. Of `RUN` only.
    Script(String),
}

/// Whence files are copied, where to, and whose they are then. The texts may have variables in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Copy {
    /// Another stage or image; the directory of the build if absent.
    pub(super) from: Option<String>,
    /// `USER[:GROUP]`; root if absent.
    pub(super) chown: Option<String>,
    /// Octal permission bits; the files' own if absent.
    pub(super) chmod: Option<String>,
    /// Patterns.
    pub(super) sources: Vec<String>,
    /// Files that are written here.
    pub(super) documents: Vec<Document>,
    /// A directory if it ends in a slash or there is more than one source.
    pub(super) to: String,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instruction {
    /// `FROM IMAGE [AS STAGE]`
    From { image: String, stage: Option<String> },
    /// `RUN`
    Run(Command),
    /// `COPY`, and `ADD` of local files
    Copy(Copy),
    /// `ENV`
    Env(Vec<(String, String)>),
    /// `WORKDIR`
    Workdir(String),
    /// `USER`
    User(String),
    /// `ENTRYPOINT`
    Entrypoint(Command),
    /// `CMD`
    Cmd(Command),
    /// `LABEL`
    Label(Vec<(String, String)>),
    /// `ARG NAME[=DEFAULT]`
    Arg(Vec<(String, Option<String>)>),
    /// `SHELL`
    Shell(Vec<String>),
    /// `EXPOSE`
    Expose(Vec<String>),
    /// `STOPSIGNAL`
    StopSignal(String),
    /// `VOLUME`
    Volume(Vec<String>),
    /// `MAINTAINER`
    Maintainer(String),
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// Where it begins, from 1.
    pub(super) line: usize,
    /// As it is written, on one line.
    pub(super) text: String,
    /// What it says.
    pub(super) instruction: Instruction,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// What continues lines and takes the meaning of characters away.
    pub(super) escape: char,
    /// In order; there is one `FROM` at least, and before it nothing but `ARG`.
    pub(super) steps: Vec<Step>,
}

/// Wrong in a way that a hint helps with.
struct Wrong {
    message: String,
    hint: String,
}

impl Wrong {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }

    fn at(self, line: usize) -> FileError {
        FileError { line, message: self.message, hint: self.hint }
    }
}

impl From<words::Problem> for Wrong {
    fn from(message: words::Problem) -> Self {
        Self::new(message, "quotes are \"…\" or '…'; a backslash takes a character's meaning away")
    }
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    /// What cannot be understood, by its line.
    pub(super) fn parse(text: &str) -> Result<Self, FileError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let escape = directives(text)?;
        let mut steps: Vec<Step> = Vec::new();
        for Joined { line, mut text, documents } in joined(text, escape)? {
            let instruction = instruction(&text, &documents, escape).map_err(|wrong| wrong.at(line))?;
            let begun = steps.iter().any(|step| matches!(step.instruction, Instruction::From { .. }));
            if !begun && !matches!(instruction, Instruction::From { .. } | Instruction::Arg(_)) {
                let hint = "only ARG may stand before it; `FROM scratch` begins with nothing";
                return Err(Wrong::new("the first instruction has to be FROM", hint).at(line));
            }
            if let Some(first) = documents.first().and_then(|document| document.raw.lines().next()) {
                text = format!("{text} ({}…)", first.trim());
            }
            steps.push(Step { line, text, instruction });
        }
        if !steps.iter().any(|step| matches!(step.instruction, Instruction::From { .. })) {
            let hint = "begin it with FROM and the image that it builds upon";
            return Err(Wrong::new("there is no FROM in the file", hint).at(text.lines().count().max(1)));
        }
        Ok(Self { escape, steps })
    }
}

/// One instruction by itself, such as those that change a configuration.
pub(super) fn parse_one(text: &str) -> Result<Instruction, FileError> {
    instruction(text.trim(), &[], '\\').map_err(|wrong| wrong.at(1))
}

/// Comments at the very beginning that mean something.
fn directives(text: &str) -> Result<char, FileError> {
    let mut escape = '\\';
    for (number, line) in text.lines().enumerate() {
        let Some((name, value)) = line.trim().strip_prefix('#').and_then(|rest| rest.split_once('=')) else {
            break;
        };
        match (name.trim().to_ascii_lowercase().as_str(), value.trim()) {
            ("escape", "\\") => {}
            ("escape", "`") => escape = '`',
            ("escape", other) => {
                let hint = "it is a backslash or `";
                return Err(Wrong::new(format!("{other:?} cannot be the escape"), hint).at(number + 1));
            }
            // Which program is to read the file, and how strictly it is to be checked.
            ("syntax" | "check", _) => {}
            _ => break,
        }
    }
    Ok(escape)
}

/// An instruction on one line.
#[derive(Debug)]
struct Joined {
    /// The number of its first one.
    line: usize,
    text: String,
    documents: Vec<Document>,
}

/// Instructions with what belongs to them; comments and empty lines are left out.
fn joined(text: &str, escape: char) -> Result<Vec<Joined>, FileError> {
    let mut all = Vec::new();
    let mut begun: Option<(usize, String)> = None;
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let trimmed = line.trim_start();
        // Also between the lines of an instruction.
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let (first, mut whole) = begun.take().unwrap_or((number + 1, String::new()));
        let part = if whole.is_empty() { trimmed } else { line };
        let end = part.trim_end();
        match end.strip_suffix(escape) {
            Some(part) => {
                whole.push_str(part);
                begun = Some((first, whole));
            }
            None => {
                whole.push_str(end);
                all.push(with_documents(first, whole, &mut lines)?);
            }
        }
    }
    if let Some((first, whole)) = begun {
        all.push(with_documents(first, whole, &mut lines)?);
    }
    all.retain(|instruction| !instruction.text.trim().is_empty());
    Ok(all)
}

fn with_documents<'a>(
    line: usize,
    text: String,
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Result<Joined, FileError> {
    let word = text.split_whitespace().next().unwrap_or_default();
    let may = ["RUN", "COPY", "ADD"].iter().any(|name| name.eq_ignore_ascii_case(word));
    let mut documents = if may { documents::begun(&text) } else { Vec::new() };
    for document in &mut documents {
        if !document.read(lines) {
            let (word, name) = (&document.word, &document.name);
            let hint =
                "end it with a line that has nothing else; tabs may come before where it begins with <<-";
            return Err(Wrong::new(format!("{word} has no line {name} that ends it"), hint).at(line));
        }
    }
    Ok(Joined { line, text, documents })
}

fn instruction(text: &str, documents: &[Document], escape: char) -> Result<Instruction, Wrong> {
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (name, rest) = (word.to_ascii_uppercase(), rest.trim());
    let known = "FROM, RUN, COPY, ADD, ENV, WORKDIR, USER, ENTRYPOINT, CMD, LABEL, ARG, SHELL, EXPOSE, STOPSIGNAL and VOLUME are";
    match name.as_str() {
        "HEALTHCHECK" | "ONBUILD" => {
            let hint = "leave it out: nothing here acts on it";
            return Err(Wrong::new(format!("{name} is not supported"), hint));
        }
        "FROM" | "RUN" | "COPY" | "ADD" | "ENV" | "WORKDIR" | "USER" | "ENTRYPOINT" | "CMD" | "LABEL"
        | "ARG" | "SHELL" | "EXPOSE" | "STOPSIGNAL" | "VOLUME" | "MAINTAINER" => {}
        _ => return Err(Wrong::new(format!("there is no instruction {word}"), known)),
    }
    if rest.is_empty() && !matches!(name.as_str(), "CMD" | "ENTRYPOINT") {
        return Err(Wrong::new(format!("{name} has no argument"), "say what it is about, on the same line"));
    }
    Ok(match name.as_str() {
        "FROM" => from(rest, escape)?,
        "RUN" => {
            let (flags, rest) = flags(rest);
            if let Some((flag, _)) = flags.first() {
                let hint = "copy what it needs with COPY; the network is that of any VM";
                return Err(Wrong::new(format!("RUN --{flag} is not supported"), hint));
            }
            let command = run(rest, documents);
            if matches!(&command, Command::Exec(words) if words.is_empty()) {
                return Err(Wrong::new("RUN has no command", "name a program: [\"/bin/true\"]"));
            }
            Instruction::Run(command)
        }
        "COPY" | "ADD" => Instruction::Copy(copy(&name, rest, documents, escape)?),
        "ENV" => Instruction::Env(pairs(&name, rest, escape)?),
        "LABEL" => Instruction::Label(pairs(&name, rest, escape)?),
        "ARG" => Instruction::Arg(arguments(rest, escape)?),
        "WORKDIR" => Instruction::Workdir(rest.to_owned()),
        "USER" => Instruction::User(rest.to_owned()),
        "ENTRYPOINT" => Instruction::Entrypoint(command(rest)),
        "CMD" => Instruction::Cmd(command(rest)),
        "SHELL" => match json(rest) {
            Some(words) if !words.is_empty() => Instruction::Shell(words),
            _ => return Err(Wrong::new("SHELL is no list", "write it like [\"/bin/bash\", \"-c\"]")),
        },
        "EXPOSE" => Instruction::Expose(split(rest, escape)?),
        "STOPSIGNAL" => Instruction::StopSignal(rest.to_owned()),
        "VOLUME" => Instruction::Volume(json(rest).map_or_else(|| split(rest, escape), Ok)?),
        _ => Instruction::Maintainer(rest.to_owned()),
    })
}

/// `--NAME[=VALUE]` at the beginning, and what is behind.
fn flags(mut rest: &str) -> (Vec<(&str, &str)>, &str) {
    let mut flags = Vec::new();
    while let Some(flag) = rest.strip_prefix("--") {
        let (flag, behind) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        if flag.is_empty() {
            break;
        }
        flags.push(flag.split_once('=').unwrap_or((flag, "")));
        rest = behind.trim_start();
    }
    (flags, rest)
}

fn from(rest: &str, escape: char) -> Result<Instruction, Wrong> {
    let (flags, rest) = flags(rest);
    let own = Platform::host();
    let own = format!("{}/{}", own.os, own.architecture);
    let is_own = |value: &str| {
        let variable = value.trim_start_matches(['$', '{']).trim_end_matches('}');
        let named = value.starts_with('$') && matches!(variable, "BUILDPLATFORM" | "TARGETPLATFORM");
        named || value == own || value.starts_with(&format!("{own}/"))
    };
    if let Some((flag, value)) = flags.iter().find(|(flag, value)| *flag != "platform" || !is_own(value)) {
        let hint = format!("images are built for the host's own platform, {own}");
        return Err(Wrong::new(format!("FROM --{flag}={value} is not supported"), hint));
    }
    let words = split(rest, escape)?;
    let hint = "write FROM IMAGE, or FROM IMAGE AS NAME";
    match words.as_slice() {
        [image] => Ok(Instruction::From { image: image.clone(), stage: None }),
        [image, word, name] if word.eq_ignore_ascii_case("as") => {
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(fits) {
                let hint = "a stage's name begins with a letter and has letters, digits, -, _ and . in it";
                return Err(Wrong::new(format!("{name} is no name of a stage"), hint));
            }
            Ok(Instruction::From { image: image.clone(), stage: Some(name.to_ascii_lowercase()) })
        }
        _ => Err(Wrong::new("FROM has arguments that it does not take", hint)),
    }
}

/// A list of texts as JSON has it.
fn json(text: &str) -> Option<Vec<String>> {
    if text.starts_with('[') { serde_json::from_str(text).ok() } else { None }
}

/// What looks like a list and is none is for the shell, as `[ -f x ]` is.
fn command(rest: &str) -> Command {
    match json(rest) {
        Some(words) => Command::Exec(words),
        None if rest.is_empty() => Command::Exec(Vec::new()),
        None => Command::Shell(rest.to_owned()),
    }
}

/// What `RUN` runs: the lines of a document that stands alone, else a line for the shell with the documents behind it.
fn run(rest: &str, documents: &[Document]) -> Command {
    match documents {
        [] => command(rest),
        [document] if document.word == rest => match document.text() {
            script if script.starts_with("#!") => Command::Script(script),
            lines => Command::Shell(lines),
        },
        documents => {
            let lines = |Document { raw, name, .. }: &Document| format!("{raw}{name}\n");
            Command::Shell(format!("{rest}\n{}", documents.iter().map(lines).collect::<String>()))
        }
    }
}

fn copy(name: &str, rest: &str, documents: &[Document], escape: char) -> Result<Copy, Wrong> {
    let (flags, rest) = flags(rest);
    let mut copy = Copy::default();
    for (flag, value) in flags {
        let value = Some(value.to_owned());
        match flag {
            "chown" => copy.chown = value,
            "chmod" => copy.chmod = value,
            "from" if name == "COPY" => copy.from = value,
            // How layers are stored elsewhere.
            "link" => {}
            _ => {
                let hint = "--from, --chown and --chmod are; .dockerignore leaves files out";
                return Err(Wrong::new(format!("{name} --{flag} is not supported"), hint));
            }
        }
    }
    let mut words = json(rest).map_or_else(|| split(rest, escape), Ok)?;
    let hint = format!("write {name} SOURCE… TARGET");
    let to = words.pop().ok_or_else(|| Wrong::new(format!("{name} has no argument"), hint.clone()))?;
    if words.is_empty() {
        return Err(Wrong::new(format!("{name} has a source and no target"), hint));
    }
    words.retain(|word| documents.iter().all(|document| document.word != *word));
    if let Some(document) =
        documents.iter().find(|document| document.name.contains('/') || document.name == "..")
    {
        let hint = "name it as the file is to be called, and say the directory as the target";
        return Err(Wrong::new(format!("{} is no name of a file", document.name), hint));
    }
    if copy.from.is_some() && !documents.is_empty() {
        let hint = "copy what is written here by an instruction of its own";
        return Err(Wrong::new("a here-document is not --from anywhere", hint));
    }
    if name == "ADD"
        && let Some(other) = words.iter().find(|word| word.contains("://") || word.starts_with("git@"))
    {
        let hint = "fetch it with RUN, or beforehand; ADD takes files of the build's directory";
        return Err(Wrong::new(format!("{other} is no local file"), hint));
    }
    if name == "ADD"
        && let Some(archive) = words.iter().find(|word| is_archive(word))
    {
        let hint = "unpack it with RUN; COPY takes it as it is";
        return Err(Wrong::new(format!("ADD does not unpack {archive} here"), hint));
    }
    Ok(Copy { sources: words, documents: documents.to_vec(), to, ..copy })
}

/// What another builder would unpack.
fn is_archive(name: &str) -> bool {
    let name = name.trim_matches(['"', '\'']).to_ascii_lowercase();
    [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// `NAME=VALUE …`, or the old `NAME VALUE` with a value up to the line's end.
fn pairs(name: &str, rest: &str, escape: char) -> Result<Vec<(String, String)>, Wrong> {
    let hint = format!("write {name} NAME=VALUE, with quotes around a value that has blanks");
    let first = rest.split(char::is_whitespace).next().unwrap_or_default();
    if !first.contains('=') {
        let (key, value) = rest
            .split_once(char::is_whitespace)
            .ok_or_else(|| Wrong::new(format!("{name} {rest} has no value"), hint))?;
        return Ok(vec![(key.to_owned(), value.trim().to_owned())]);
    }
    split(rest, escape)?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(Wrong::new(format!("{word} is no NAME=VALUE"), hint.clone())),
        })
        .collect()
}

fn arguments(rest: &str, escape: char) -> Result<Vec<(String, Option<String>)>, Wrong> {
    split(rest, escape)?
        .into_iter()
        .map(|word| {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, None),
            };
            let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || !name.chars().all(fits) {
                let hint = "write ARG NAME or ARG NAME=DEFAULT";
                return Err(Wrong::new(format!("{name:?} is no name of an argument"), hint));
            }
            Ok((name, value))
        })
        .collect()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
