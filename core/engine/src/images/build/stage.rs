//! What a stage of a build has come to: its layers, and the configuration that instructions change without running anything.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use vm_oci::{History, ImageConfig, Layer, Platform};

use super::{
    file::{Command, FileError, Instruction, parse_one},
    words::{self, expand, expand_text, split},
};

/// What `RUN`, `CMD` and `ENTRYPOINT` without a list are given to, where there is no `SHELL`.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// Arguments that need no `ARG`, and that say nothing of what comes out.
const PROXIES: [&str; 5] = ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"];
/// What an image searches for programs where it says nothing else.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the text of a program is put to be run; in a directory that is none of an image's.
pub(super) const SCRIPT: (&str, &str) = ("/run/vm-build", "script");

/// One stage.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    /// What runs in it, and how it came to be.
    pub(super) config: ImageConfig,
    /// The lowest first.
    pub(super) layers: Vec<Layer>,
    /// When its last layer was made, RFC 3339.
    pub(super) made_at: Option<String>,
    /// Of `ARG`, as far as they have a value.
    arguments: BTreeMap<String, String>,
    shell: Vec<String>,
    /// `CMD` was said here, and not by the image that this one builds upon.
    own_cmd: bool,
    escape: char,
}

/// How a command is run in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Runs {
    /// Program and arguments.
    pub(super) argv: Vec<String>,
    /// All variables.
    pub(super) env: BTreeMap<String, String>,
    /// Where.
    pub(super) cwd: String,
    /// As whom.
    pub(super) user: String,
    /// What is to be at [`SCRIPT`] first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) script: Option<String>,
}

/// Values of arguments, from whoever asks for the build.
#[derive(Debug, Default)]
pub(super) struct Given {
    values: BTreeMap<String, String>,
    used: BTreeSet<String>,
}

impl Given {
    pub(super) fn new(values: BTreeMap<String, String>) -> Self {
        Self { values, used: BTreeSet::new() }
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let value = self.values.get(name).cloned();
        if value.is_some() {
            self.used.insert(name.to_owned());
        }
        value
    }

    /// Those that nothing asked for.
    pub(super) fn unused(&self) -> Vec<&str> {
        let names = self.values.keys().map(String::as_str);
        names.filter(|name| !self.used.contains(*name) && !is_proxy(name)).collect()
    }

    fn proxies(&self) -> impl Iterator<Item = (&String, &String)> {
        self.values.iter().filter(|(name, _)| is_proxy(name))
    }
}

fn is_proxy(name: &str) -> bool {
    PROXIES.contains(&name.to_ascii_lowercase().as_str())
}

/// Arguments that a build has by itself, as far as an `ARG` asks for them.
pub(super) fn automatic(name: &str) -> Option<String> {
    let Platform { os, architecture, variant } = Platform::host();
    match name.strip_prefix("TARGET").or_else(|| name.strip_prefix("BUILD"))? {
        "PLATFORM" => {
            Some([Some(os), Some(architecture), variant].into_iter().flatten().collect::<Vec<_>>().join("/"))
        }
        "OS" => Some(os),
        "ARCH" => Some(architecture),
        "VARIANT" => Some(variant.unwrap_or_default()),
        _ => None,
    }
}

/// Arguments from before the first `FROM`.
#[derive(Debug, Default)]
pub(super) struct Globals(BTreeMap<String, String>);

impl Globals {
    /// One more `ARG`.
    pub(super) fn declare(
        &mut self,
        arguments: &[(String, Option<String>)],
        given: &mut Given,
        escape: char,
    ) -> Result<(), words::Problem> {
        for (name, default) in arguments {
            let default = default.as_ref().map(|text| self.expand(text, escape)).transpose()?;
            if let Some(value) = given.take(name).or(default) {
                self.0.insert(name.clone(), value);
            }
        }
        Ok(())
    }

    /// A text with their values in it.
    pub(super) fn expand(&self, text: &str, escape: char) -> Result<String, words::Problem> {
        expand(text, escape, &|name| self.0.get(name).cloned().or_else(|| automatic(name)))
    }
}

impl Stage {
    /// One that begins with an image.
    pub(super) fn new(config: ImageConfig, layers: Vec<Layer>, escape: char) -> Self {
        Self {
            made_at: config.created.clone(),
            config,
            layers,
            arguments: BTreeMap::new(),
            shell: SHELL.map(str::to_owned).to_vec(),
            own_cmd: false,
            escape,
        }
    }

    /// One that begins with this one as it is now.
    pub(super) fn child(&self) -> Self {
        Self { own_cmd: false, made_at: self.config.created.clone(), ..self.clone() }
    }

    fn value(&self, name: &str) -> Option<String> {
        variable(&self.config.env, name).or_else(|| self.arguments.get(name).cloned())
    }

    /// What a text with variables comes to now.
    pub(super) fn expand(&self, text: &str) -> Result<String, words::Problem> {
        expand(text, self.escape, &|name| self.value(name))
    }

    /// Several of them.
    pub(super) fn expand_all(&self, texts: &[String]) -> Result<Vec<String>, words::Problem> {
        texts.iter().map(|text| self.expand(text)).collect()
    }

    /// What the text of a file comes to now.
    pub(super) fn expand_text(&self, text: &str) -> Result<String, words::Problem> {
        expand_text(text, &|name| self.value(name))
    }

    /// A path as the working directory has it.
    pub(super) fn path(&self, text: &str) -> String {
        join(&self.config.working_dir, text)
    }

    /// How a command is run.
    pub(super) fn runs(&self, command: &Command) -> Runs {
        let mut env: BTreeMap<String, String> = self.arguments.clone();
        env.insert("PATH".to_owned(), PATH.to_owned());
        env.extend(self.config.env.iter().filter_map(|pair| {
            pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
        }));
        let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
        Runs {
            argv: self.argv(command),
            env,
            cwd: or(&self.config.working_dir, "/"),
            user: or(&self.config.user, "root"),
            script: match command {
                Command::Script(text) => Some(text.clone()),
                _ => None,
            },
        }
    }

    fn argv(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(words) => words.clone(),
            Command::Script(_) => vec![format!("{}/{}", SCRIPT.0, SCRIPT.1)],
            Command::Shell(text) => self.shell.iter().cloned().chain([text.clone()]).collect(),
        }
    }

    /// Variables that a command gets beside its own, and that no layer depends on.
    pub(super) fn proxies(&self, given: &Given) -> BTreeMap<String, String> {
        given.proxies().map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// Does what an instruction says that runs and copies nothing; whether it was one. It becomes a step of the history.
    ///
    /// # Errors
    /// A text that cannot be understood.
    pub(super) fn configure(
        &mut self,
        instruction: &Instruction,
        text: &str,
        given: &mut Given,
        globals: &Globals,
    ) -> Result<bool, words::Problem> {
        match instruction {
            Instruction::From { .. } | Instruction::Run(_) | Instruction::Copy(_) => return Ok(false),
            Instruction::Arg(arguments) => {
                for (name, default) in arguments {
                    let default = default.as_ref().map(|text| self.expand(text)).transpose()?;
                    let value = given.take(name).or(default).or_else(|| globals.0.get(name).cloned());
                    if let Some(value) = value.or_else(|| automatic(name)) {
                        self.arguments.insert(name.clone(), value);
                    }
                }
            }
            Instruction::Env(pairs) => {
                // All of one instruction see what was before it.
                let expand = |(name, value): &(String, String)| Ok((self.expand(name)?, self.expand(value)?));
                let pairs: Vec<_> = pairs.iter().map(expand).collect::<Result<_, words::Problem>>()?;
                for (name, value) in pairs {
                    let pair = format!("{name}={value}");
                    let known = format!("{name}=");
                    match self.config.env.iter_mut().find(|other| other.starts_with(&known)) {
                        Some(other) => *other = pair,
                        None => self.config.env.push(pair),
                    }
                }
            }
            Instruction::Label(pairs) => {
                for (name, value) in pairs {
                    let (name, value) = (self.expand(name)?, self.expand(value)?);
                    self.config.labels.insert(name, value);
                }
            }
            Instruction::Workdir(path) => self.config.working_dir = self.path(&self.expand(path)?),
            Instruction::User(user) => self.config.user = self.expand(user)?,
            Instruction::Entrypoint(command) => {
                self.config.entrypoint = self.argv(command);
                // That of the image below was for its own entry point.
                if !self.own_cmd {
                    self.config.cmd.clear();
                }
            }
            Instruction::Cmd(command) => {
                self.config.cmd = self.argv(command);
                self.own_cmd = true;
            }
            Instruction::Shell(words) => self.shell.clone_from(words),
            Instruction::Expose(ports) => {
                for port in ports {
                    // One variable may have several.
                    for port in split(&self.expand(port)?, self.escape)? {
                        let port = if port.contains('/') { port } else { format!("{port}/tcp") };
                        if !is_port(&port) {
                            return Err(format!("{port} is no port"));
                        }
                        insert_sorted(&mut self.config.exposed_ports, port);
                    }
                }
            }
            Instruction::StopSignal(signal) => self.config.stop_signal = Some(self.expand(signal)?),
            Instruction::Volume(paths) => {
                for path in self.expand_all(paths)? {
                    insert_sorted(&mut self.config.volumes, path);
                }
            }
            Instruction::Maintainer(author) => self.config.author = Some(author.clone()),
        }
        self.note(text, None, true);
        Ok(true)
    }

    /// One more step of the history. One that made no layer is as old as the last that did, so that the same file makes the same
    /// image.
    pub(super) fn note(&mut self, text: &str, made_at: Option<String>, empty_layer: bool) {
        if made_at.is_some() {
            self.made_at = made_at;
        }
        self.config.history.push(History {
            created: self.made_at.clone(),
            created_by: Some(text.to_owned()),
            comment: None,
            empty_layer,
        });
        self.config.created.clone_from(&self.made_at);
    }
}

/// Changes a configuration by instructions such as `ENV A=b`, one a text.
///
/// # Errors
/// A text that is none, or one of an instruction that runs or copies something.
pub(crate) fn changed(config: ImageConfig, changes: &[String]) -> Result<ImageConfig, FileError> {
    let wrong = |message: String| FileError {
        line: 1,
        message,
        hint: "changes are such as 'ENV A=b', 'CMD [\"/run\"]' and 'USER me'".into(),
    };
    let history = config.history.clone();
    let mut stage = Stage::new(config, Vec::new(), '\\');
    for text in changes {
        let instruction = parse_one(text).map_err(|error| FileError { line: 1, ..error })?;
        let done = stage.configure(&instruction, text, &mut Given::default(), &Globals::default());
        if !done.map_err(wrong)? || matches!(instruction, Instruction::Arg(_)) {
            return Err(wrong(format!("{text:?} changes no configuration")));
        }
    }
    Ok(ImageConfig { history, ..stage.config })
}

fn variable(env: &[String], name: &str) -> Option<String> {
    env.iter().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
}

/// An absolute path without dots.
fn join(base: &str, path: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{base}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn is_port(text: &str) -> bool {
    let Some((ports, protocol)) = text.split_once('/') else { return false };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    matches!(protocol, "tcp" | "udp" | "sctp")
        && number(first).zip(number(last)).is_some_and(|(first, last)| first <= last)
}

fn insert_sorted(list: &mut Vec<String>, text: String) {
    if let Err(at) = list.binary_search(&text) {
        list.insert(at, text);
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::File;
    use super::*;

    /// Does a whole file, as far as nothing is run.
    fn done(
        text: &str,
        base: ImageConfig,
        given: &[(&str, &str)],
    ) -> Result<(Stage, Vec<Runs>), words::Problem> {
        let file = File::parse(text).unwrap();
        let given = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let (mut given, mut globals) = (Given::new(given.collect()), Globals::default());
        let mut stage = Stage::new(base, Vec::new(), file.escape);
        let (mut begun, mut runs) = (false, Vec::new());
        for step in &file.steps {
            match &step.instruction {
                Instruction::Arg(arguments) if !begun => {
                    globals.declare(arguments, &mut given, file.escape)?
                }
                Instruction::From { .. } => begun = true,
                Instruction::Run(command) => runs.push(stage.runs(command)),
                other => assert!(stage.configure(other, &step.text, &mut given, &globals)?),
            }
        }
        Ok((stage, runs))
    }

    fn base() -> ImageConfig {
        ImageConfig {
            env: vec!["PATH=/bin".into(), "A=base".into()],
            entrypoint: vec!["/old".into()],
            cmd: vec!["-x".into()],
            created: Some("2026-01-01T00:00:00Z".into()),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn instructions_change_what_comes_after_them() {
        let text = "FROM a\nENV A=b B=$A C=\"${A:-x} y\"\nENV A=$B$C\nWORKDIR /srv\nWORKDIR app/../$B\nUSER me\nRUN x\n\
                    SHELL [\"/bin/bash\", \"-ec\"]\nRUN y\nEXPOSE 80 53/udp\nLABEL a=\"$B\"\nCMD z $A\n";
        let (stage, runs) = done(text, base(), &[]).unwrap();
        // Within one instruction, as it was before it.
        assert_eq!(stage.config.env, ["PATH=/bin", "A=basebase y", "B=base", "C=base y"]);
        assert_eq!(stage.config.working_dir, "/srv/base");
        assert_eq!(runs[0].argv, ["/bin/sh", "-c", "x"]);
        assert_eq!((runs[0].cwd.as_str(), runs[0].user.as_str()), ("/srv/base", "me"));
        assert_eq!(runs[0].env["PATH"], "/bin");
        assert_eq!(runs[1].argv, ["/bin/bash", "-ec", "y"]);
        assert_eq!(stage.config.cmd, ["/bin/bash", "-ec", "z $A"]);
        assert_eq!(stage.config.entrypoint, ["/old"]);
        assert_eq!(stage.config.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(stage.config.labels["a"], "base");
        assert!(stage.config.history.iter().all(|step| step.empty_layer));
        assert_eq!(stage.config.created, base().created, "no layer was made");
        assert!(done("FROM a\nEXPOSE x\n", base(), &[]).is_err());
    }

    #[test]
    fn an_entry_point_of_ones_own_takes_no_arguments_of_anothers() {
        let (stage, _) = done("FROM a\nENTRYPOINT [\"/new\"]\n", base(), &[]).unwrap();
        assert_eq!((stage.config.entrypoint, stage.config.cmd), (vec!["/new".to_owned()], Vec::new()));
        let (stage, _) = done("FROM a\nCMD [\"y\"]\nENTRYPOINT [\"/new\"]\n", base(), &[]).unwrap();
        assert_eq!(stage.config.cmd, ["y"]);
    }

    #[test]
    fn a_stage_upon_another_has_its_arguments_and_shell_but_not_its_word_on_cmd() {
        let text = "FROM a\nARG V=1\nSHELL [\"/bin/bash\", \"-c\"]\nCMD [\"x\"]\n";
        let (stage, _) = done(text, base(), &[]).unwrap();
        let mut child = stage.child();
        let runs = child.runs(&Command::Shell("z".into()));
        assert_eq!((runs.env["V"].as_str(), runs.argv[0].as_str()), ("1", "/bin/bash"));
        let entry = Instruction::Entrypoint(Command::Exec(vec!["/new".into()]));
        child.configure(&entry, "ENTRYPOINT", &mut Given::default(), &Globals::default()).unwrap();
        assert!(child.config.cmd.is_empty());
    }

    #[test]
    fn arguments_are_seen_where_they_are_asked_for() {
        let text = "ARG V=1\nARG W=w$V\nFROM a\nRUN x\nARG V\nARG X=${V}x\nARG A=arg\nARG NONE\nARG TARGETOS\nRUN y\n";
        let (stage, runs) = done(text, base(), &[]).unwrap();
        assert_eq!(runs[0].env.get("V"), None);
        assert_eq!((runs[1].env["V"].as_str(), runs[1].env["X"].as_str()), ("1", "1x"));
        assert_eq!(runs[1].env["A"], "base", "a variable wins");
        assert_eq!((runs[1].env.get("NONE"), runs[1].env["TARGETOS"].as_str()), (None, "linux"));
        assert!(stage.config.env.iter().all(|pair| !pair.starts_with("V=")), "they are not the image's");
        let (_, runs) = done(text, base(), &[("V", "2"), ("NONE", "3")]).unwrap();
        assert_eq!((runs[1].env["X"].as_str(), runs[1].env["NONE"].as_str()), ("2x", "3"));

        let mut given =
            Given::new([("a".to_owned(), String::new()), ("HTTP_PROXY".to_owned(), "p".to_owned())].into());
        assert_eq!(given.unused(), ["a"]);
        given.take("a");
        assert!(given.unused().is_empty());
    }

    #[test]
    fn a_configuration_is_changed_by_instructions() {
        let changes = ["ENV A=new", "CMD [\"/run\", \"-v\"]", "WORKDIR /x", "label b=c"].map(str::to_owned);
        let config = changed(base(), &changes).unwrap();
        assert_eq!(config.env, ["PATH=/bin", "A=new"]);
        assert_eq!(
            (config.cmd.as_slice(), config.working_dir.as_str()),
            (&["/run".to_owned(), "-v".to_owned()][..], "/x")
        );
        assert!(config.history.is_empty());
        for bad in ["RUN x", "FROM a", "ARG x", "nonsense", "ENV A", "COPY a b"] {
            let error = changed(base(), &[bad.to_owned()]).unwrap_err();
            assert!(!error.hint.is_empty(), "{bad}");
        }
    }
}
