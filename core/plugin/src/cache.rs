//! Compiled components. Compiling takes long and runs a large program over bytes of unknown origin, so another process does it, which
//! can be killed; its result is kept by the content of what it was made from.
//!
//! Loading compiled code means running it: the directory is this user's alone, and a file is used only if its content is what
//! was written. A file that is not, or that another version wrote, is made anew.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use vm_host::{HostCommand, RunError, Runner, files};
use wasmtime::{Engine, component::Component};

use crate::error::{LoadError, chain};

/// The engine that files are for. It checks its own version, settings and the processor's features once more on loading.
const ENGINE: &str = "wasmtime-48.0.8";

/// Counts changes of [`crate::runtime::config`].
pub(crate) const REVISION: u32 = 1;

const MAGIC: &[u8; 16] = b"vm-plugin aot 1\n";

/// The largest component, in bytes. Languages with a runtime of their own bring some 20 MiB.
pub const MAX_COMPONENT: u64 = 64 << 20;

/// The largest compiled component, in bytes.
const MAX_COMPILED: u64 = 1 << 30;

/// Who compiles.
#[derive(Debug, Clone)]
pub enum Compiler {
    /// This command: it gets a component on its stdin and writes the compiled one to its stdout, as [`compile_main`] does.
    Process {
        /// Runs it.
        runner: Arc<dyn Runner>,
        /// The program.
        program: PathBuf,
        /// Its arguments.
        args: Vec<String>,
        /// It is killed after this long.
        timeout: Duration,
    },
    /// This process. For tools that run as their user and compile that user's own component.
    #[cfg(feature = "compiler")]
    InProcess,
    /// Nobody: what is not in the cache cannot be loaded.
    Nobody,
}

/// The directory of compiled components.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    compiler: Compiler,
}

fn unusable(path: &Path, reason: impl ToString) -> LoadError {
    LoadError::Cache { path: path.to_owned(), reason: reason.to_string() }
}

impl Cache {
    pub(crate) fn open(dir: &Path, compiler: Compiler) -> Result<Self, LoadError> {
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        make.map_err(|error| unusable(dir, error))?;
        let found = fs::symlink_metadata(dir).map_err(|error| unusable(dir, error))?;
        if !found.is_dir() {
            return Err(unusable(dir, "it is no directory"));
        }
        if found.uid() != nix::unistd::geteuid().as_raw() {
            return Err(unusable(dir, format!("it belongs to user {}", found.uid())));
        }
        if found.permissions().mode() & 0o077 != 0 {
            return Err(unusable(dir, format!("its mode is {:o}", found.permissions().mode() & 0o7777)));
        }
        Ok(Self { dir: dir.to_owned(), compiler })
    }

    fn file(&self, digest: &str) -> PathBuf {
        self.dir.join(format!("{digest}-{ENGINE}-{REVISION}-{}.aot", std::env::consts::ARCH))
    }

    /// The component of these bytes, whose SHA-256 is `digest`: from the cache, or compiled.
    pub(crate) async fn load(
        &self,
        engine: &Engine,
        plugin: &str,
        wasm: &[u8],
        digest: &str,
    ) -> Result<Component, LoadError> {
        let path = self.file(digest);
        match read(&path) {
            Ok(Some(code)) => match component(engine, &code) {
                Ok(component) => return Ok(component),
                Err(error) => {
                    tracing::info!(plugin, "compiled for another engine, compiling again: {error:#}")
                }
            },
            Ok(None) => {}
            Err(error) => tracing::warn!(plugin, path = %path.display(), "damaged, compiling again: {error}"),
        }
        let code = self.compile(engine, plugin, wasm, &path).await?;
        let component = component(engine, &code).map_err(|error| LoadError::Compile {
            plugin: plugin.to_owned(),
            reason: format!("what was compiled cannot be loaded: {error:#}"),
        })?;
        let mut content = Vec::with_capacity(code.len() + 48);
        content.extend_from_slice(MAGIC);
        content.extend_from_slice(&Sha256::digest(&code));
        content.extend_from_slice(&code);
        files::write_atomic(&path, 0o600, &content).map_err(|error| unusable(&path, error))?;
        Ok(component)
    }

    #[cfg_attr(
        not(feature = "compiler"),
        expect(unused_variables, reason = "there is nothing to compile with")
    )]
    async fn compile(
        &self,
        engine: &Engine,
        plugin: &str,
        wasm: &[u8],
        path: &Path,
    ) -> Result<Vec<u8>, LoadError> {
        let failed = |reason: String| LoadError::Compile { plugin: plugin.to_owned(), reason };
        let (runner, program, args, timeout) = match &self.compiler {
            Compiler::Process { runner, program, args, timeout } => (runner, program, args, timeout),
            #[cfg(feature = "compiler")]
            Compiler::InProcess => {
                return engine.precompile_component(wasm).map_err(|error| failed(format!("{error:#}")));
            }
            Compiler::Nobody => return Err(failed("it was not compiled when it was installed".to_owned())),
        };
        // Names of our own making; one that is left over after a crash is written over by the next.
        let output = path.with_extension(format!("new{}", std::process::id()));
        let mut command = HostCommand::new(program).args(args).stdin(wasm).timeout(*timeout);
        command.stdout_file = Some(output.clone());
        let done = runner.run(command).await;
        let code = done.map_err(|error| match &error {
            RunError::Failed { stderr_tail, .. } if !stderr_tail.trim().is_empty() => {
                failed(crate::error::tame(stderr_tail.trim(), 2000))
            }
            _ => failed(chain(&error)),
        });
        let code =
            code.and_then(|_| limited(&output, MAX_COMPILED).map_err(|error| unusable(&output, error)));
        files::remove_if_there(&output).map_err(|error| unusable(&output, error))?;
        code
    }

    /// Whether a component is there, whole.
    pub(crate) fn check(&self, digest: &str) -> io::Result<bool> {
        Ok(read(&self.file(digest))?.is_some())
    }

    /// Forgets a component.
    pub(crate) fn forget(&self, digest: &str) -> Result<(), LoadError> {
        let path = self.file(digest);
        files::remove_if_there(&path).map_err(|error| unusable(&path, error))
    }
}

/// A whole file, if it is not too large.
pub(crate) fn limited(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {} MiB", most >> 20)));
    }
    Ok(bytes)
}

/// The code in a file of the cache, none where there is no file.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut content = match limited(path, MAX_COMPILED) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        content => content?,
    };
    let damaged = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let rest = content.strip_prefix(MAGIC).ok_or_else(|| damaged("it begins like nothing of ours"))?;
    let (digest, code) = rest.split_at_checked(32).ok_or_else(|| damaged("it is cut short"))?;
    if Sha256::digest(code).as_slice() != digest {
        return Err(damaged("its content is not what was written"));
    }
    Ok(Some(content.split_off(MAGIC.len() + 32)))
}

#[expect(unsafe_code, reason = "compiled code can only be loaded by trusting it")]
fn component(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the bytes are what our own compiler wrote: they come from it just now, or from a file whose digest was checked,
    // in a directory that only this user can write to. They were read into memory of this process, so they cannot change.
    unsafe { Component::deserialize(engine, code) }
}

/// The compiling process: reads a component from stdin, writes compiled code to stdout. Takes at most 4 GiB of memory and
/// two minutes of processor time from the system.
#[cfg(feature = "compiler")]
pub fn compile_main() -> std::process::ExitCode {
    use std::io::Write as _;

    use nix::sys::resource::{Resource, setrlimit};

    let work = || -> Result<(), String> {
        for (resource, most) in
            [(Resource::RLIMIT_AS, 4 << 30), (Resource::RLIMIT_CPU, 120), (Resource::RLIMIT_CORE, 0)]
        {
            setrlimit(resource, most, most).map_err(|error| format!("could not limit itself: {error}"))?;
        }
        let mut wasm = Vec::new();
        let read = io::stdin().lock().take(MAX_COMPONENT + 1).read_to_end(&mut wasm);
        read.map_err(|error| format!("could not read the component: {error}"))?;
        if wasm.len() as u64 > MAX_COMPONENT {
            return Err(format!("the component is larger than {} MiB", MAX_COMPONENT >> 20));
        }
        let engine = Engine::new(&crate::runtime::config()).map_err(|error| format!("{error:#}"))?;
        let code = engine.precompile_component(&wasm).map_err(|error| format!("{error:#}"))?;
        let mut out = io::stdout().lock();
        out.write_all(&code).and_then(|()| out.flush()).map_err(|error| format!("could not write: {error}"))
    };
    match work() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_engine_is_that_of_the_dependency() {
        let root = include_str!("../../../Cargo.toml");
        assert!(root.contains(&format!("wasmtime = {{ version = \"={}\"", &ENGINE["wasmtime-".len()..])));
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o770)).unwrap();
        let error = Cache::open(&open, Compiler::Nobody).unwrap_err();
        assert!(error.to_string().contains("770") && error.hint().contains("0700"), "{error}");
        let link = dir.path().join("link");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&open, &link).unwrap();
        assert!(Cache::open(&link, Compiler::Nobody).is_err(), "a link can be pointed elsewhere");
        Cache::open(&open, Compiler::Nobody).unwrap();
    }
}
