//! Compiled components on disk.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use vm_host::HostRunner;
use vm_plugin::{Compiler, Granted, Hook, LoadError, Plugin, Runtime};

use crate::common::{component, input, limits, manifest, state};

async fn load(dir: &Path, compiler: Compiler, wasm: &[u8]) -> Result<Plugin, LoadError> {
    let runtime = Arc::new(Runtime::new(dir, compiler, limits()).unwrap());
    Plugin::new(&runtime, manifest("cached", "capability"), wasm, Granted::All, json!({})).await
}

fn process() -> Compiler {
    Compiler::Process {
        runner: Arc::new(HostRunner),
        program: env!("CARGO_BIN_EXE_vm-plugin-compile").into(),
        args: Vec::new(),
        timeout: Duration::from_secs(120),
    }
}

fn only_file(dir: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

async fn works(plugin: &Plugin) {
    assert_eq!(plugin.call(Hook::Preflight, input(), &state()).await.unwrap().findings.len(), 1);
}

#[tokio::test]
async fn another_process_compiles_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("aot");
    let wasm = component("only-preflight");
    let nobody = load(&cache, Compiler::Nobody, &wasm).await.unwrap_err();
    assert!(matches!(nobody, LoadError::Compile { .. }), "{nobody}");

    works(&load(&cache, process(), &wasm).await.unwrap()).await;
    let file = only_file(&cache);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&cache).unwrap().permissions().mode() & 0o777, 0o700);
    let plugin = load(&cache, Compiler::Nobody, &wasm).await.unwrap();
    works(&plugin).await;
    plugin.forget().unwrap();
    assert!(load(&cache, Compiler::Nobody, &wasm).await.is_err());
}

#[tokio::test]
async fn a_damaged_file_is_never_run_and_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("aot");
    let wasm = component("only-preflight");
    load(&cache, Compiler::InProcess, &wasm).await.unwrap();
    let file = only_file(&cache);
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [&whole[..whole.len() / 2], &whole[..20], b"", &flipped, b"something else altogether"] {
        fs::write(&file, damaged).unwrap();
        assert!(load(&cache, Compiler::Nobody, &wasm).await.is_err(), "{} bytes", damaged.len());
        works(&load(&cache, Compiler::InProcess, &wasm).await.unwrap()).await;
        assert_eq!(fs::read(&file).unwrap().len(), whole.len());
    }
}

#[tokio::test]
async fn a_compiler_that_fails_says_why_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("aot");
    let error = load(&cache, process(), b"no component").await.unwrap_err();
    assert!(error.to_string().contains("plugin cached"), "{error}");
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
    // One that hangs is killed.
    let hangs = Compiler::Process {
        runner: Arc::new(HostRunner),
        program: "sleep".into(),
        args: vec!["1000".to_owned()],
        timeout: Duration::from_millis(100),
    };
    let error = load(&cache, hangs, &component("only-preflight")).await.unwrap_err();
    assert!(error.to_string().contains("did not end"), "{error}");
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
}
