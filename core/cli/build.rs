//! Puts the SDK's sources into the program, for `vm plugin new`: whoever has only `vm` can write plugins.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// What of the SDK a plugin needs to be built.
const PARTS: [&str; 6] = ["Cargo.toml", "Cargo.lock", "README.md", "src", "wit", "worlds"];

fn main() -> io::Result<()> {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk").canonicalize()?;
    let mut files = Vec::new();
    for part in PARTS {
        let path = sdk.join(part);
        println!("cargo::rerun-if-changed={}", path.display());
        collect(&path, &mut files)?;
    }
    files.sort();
    let mut list = String::from("&[\n");
    for file in &files {
        let name = file.strip_prefix(&sdk).map_err(io::Error::other)?;
        list.push_str(&format!("    ({name:?}, include_str!({file:?})),\n"));
    }
    list.push_str("]\n");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    fs::write(out.join("sdk.rs"), list)
}

/// The file, or all files below the directory.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
