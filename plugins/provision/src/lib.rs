//! Files, environment and first commands for each VM, by configuration.

use std::collections::BTreeMap;

use serde::Deserialize;
use vm_plugin_sdk::{
    ConfigChange, Context, ContributeGuest, Error, Facts, GuestConfig, OrRefuse, Outcome, PostStart, Result,
    Sandbox, Vm, capability, info,
    state::{self, Scope},
};

/// Set in a VM's state when its first commands have run.
const DONE: &str = "first-boot";
/// How much of a failed command's output is told, in bytes.
const TOLD: usize = 1000;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
struct Provision {
    files: Vec<File>,
    environment: BTreeMap<String, String>,
    first_boot: Vec<FirstBoot>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    path: String,
    content: Option<String>,
    blob: Option<String>,
    mode: Option<String>,
    uid: u32,
    gid: u32,
}

/// A line for `/bin/sh`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FirstBoot {
    run: String,
    user: Option<String>,
    directory: Option<String>,
}

/// What a file is made of.
#[derive(Debug, PartialEq, Eq)]
enum Source<'a> {
    Text(&'a str),
    Blob(&'a str),
}

impl File {
    fn source(&self) -> Result<Source<'_>> {
        match (&self.content, &self.blob) {
            (Some(text), None) => Ok(Source::Text(text)),
            (None, Some(blob)) => Ok(Source::Blob(blob)),
            (Some(_), Some(_)) => {
                Err(Error::new("file.two-sources", format!("{} has two contents", self.path))
                    .with_hint("leave out `content` or `blob`"))
            }
            (None, None) => Err(Error::new("file.no-source", format!("{} has no content", self.path))
                .with_hint(
                    "give it `content`, or `blob` with the name of a file that comes with the plugin",
                )),
        }
    }

    fn mode(&self) -> Result<u32> {
        let text = self.mode.as_deref().unwrap_or("644");
        let mode = u32::from_str_radix(text, 8);
        mode.or_refuse("file.mode", format_args!("{}: {text:?} is no mode in octal", self.path))
            .map_err(|error| error.with_hint("modes are written like 0644 or 755"))
    }
}

impl Provision {
    /// All that can be wrong with the configuration beyond what its schema says.
    fn check(&self) -> Result {
        self.files.iter().try_for_each(|file| file.source().and(file.mode()).map(drop))
    }
}

/// The end of an output, where commands say what went wrong.
fn end(stderr: &[u8], stdout: &[u8]) -> String {
    let said = if stderr.trim_ascii().is_empty() { stdout } else { stderr };
    let said = said.trim_ascii();
    String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD)..]).into_owned()
}

impl ContributeGuest for Provision {
    fn run(&self, context: &Context, _: &Vm, _: &Facts, guest: &GuestConfig) -> Result {
        for file in &self.files {
            let mode = file.mode()?;
            match file.source()? {
                Source::Text(text) => guest.file(&file.path, text.as_bytes(), mode, file.uid, file.gid)?,
                Source::Blob(name) => {
                    guest.file_from_blob(&file.path, &context.blob(name)?, mode, file.uid, file.gid)?;
                }
            }
        }
        for (name, value) in &self.environment {
            guest.environment(name, value)?;
        }
        Ok(())
    }
}

impl PostStart for Provision {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, sandbox: &Sandbox) -> Result {
        if self.first_boot.is_empty() || state::get(Scope::Vm, DONE)?.is_some() {
            return Ok(());
        }
        for (number, first) in self.first_boot.iter().enumerate() {
            let command = sandbox.command("/bin/sh")?;
            command.argument("-c");
            command.argument(&first.run);
            if let Some(user) = &first.user {
                command.user(user);
            }
            if let Some(directory) = &first.directory {
                command.directory(directory);
            }
            let output = command.run()?;
            if output.code() != Some(0) {
                let how = match (output.code(), output.signal()) {
                    (Some(code), _) => format!("ended with code {code}"),
                    (None, Some(signal)) => format!("was ended by signal {signal}"),
                    (None, None) => "did not end".to_owned(),
                };
                let said = end(&output.stderr(), &output.stdout());
                let message = format!("first-boot command {} {how}: {}: {said}", number + 1, first.run);
                return Err(Error::new("first-boot.failed", message)
                    .with_hint("all first-boot commands run again at the next start of this VM"));
            }
        }
        info!("{}: {} first-boot commands ran", vm.name(), self.first_boot.len());
        state::set(Scope::Vm, DONE, b"done")
    }
}

impl ConfigChange for Provision {
    /// Files and environment come by planning anew; first commands are for VMs that have not had theirs.
    fn run(&self, _: &Context, _: &Vm, _: &Facts, _: &Self, _: Option<&Sandbox>) -> Result<Outcome> {
        Ok(self.check().map_or_else(Outcome::Refused, |()| Outcome::Applied))
    }
}

capability!(Provision: ContributeGuest, PostStart, ConfigChange);

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        File { path: "/etc/motd".to_owned(), content: Some("hello".to_owned()), ..File::default() }
    }

    #[test]
    fn modes_are_octal_as_everybody_writes_them() {
        assert_eq!(file().mode().unwrap(), 0o644);
        for (text, mode) in [("0755", 0o755), ("600", 0o600), ("4755", 0o4755)] {
            assert_eq!(File { mode: Some(text.to_owned()), ..file() }.mode().unwrap(), mode);
        }
        for bad in ["", "u+x", "888", "-1"] {
            let error = File { mode: Some(bad.to_owned()), ..file() }.mode().unwrap_err();
            assert!(error.message.contains("/etc/motd") && error.hint.is_some(), "{bad:?}");
        }
    }

    #[test]
    fn a_file_has_exactly_one_content() {
        assert_eq!(file().source().unwrap(), Source::Text("hello"));
        let blob = File { content: None, blob: Some("key.pem".to_owned()), ..file() };
        assert_eq!(blob.source().unwrap(), Source::Blob("key.pem"));
        assert_eq!(File { content: None, ..file() }.source().unwrap_err().code, "file.no-source");
        let both = File { blob: Some("key.pem".to_owned()), ..file() };
        assert_eq!(both.source().unwrap_err().code, "file.two-sources");
        assert!(Provision { files: vec![file(), both], ..Provision::default() }.check().is_err());
    }

    #[test]
    fn the_end_of_the_output_is_told() {
        assert_eq!(end(b"no such package\n", b"reading lists\n"), "no such package");
        assert_eq!(end(b"\n", b"FAILED\n"), "FAILED");
        let long = [vec![b'x'; 5000], b"the cause".to_vec()].concat();
        assert!(end(&long, b"").len() == TOLD && end(&long, b"").ends_with("the cause"));
    }
}
