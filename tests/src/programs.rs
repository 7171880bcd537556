//! The programs under test, and the harness's own helper.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Where `vm`, `vmd`, `vm-agent` and `vm-fake-vmm` are: `VM_TEST_BIN`, which the Makefile sets.
///
/// # Panics
/// It is not set or something is missing there.
pub fn directory() -> PathBuf {
    let Some(dir) = env::var_os("VM_TEST_BIN").map(PathBuf::from) else {
        panic!("VM_TEST_BIN is not set: run the end-to-end tests by `make test` or `make e2e`");
    };
    for name in ["vm", "vmd", "vm-agent"] {
        assert!(dir.join(name).is_file(), "{} has no {name}: run `make test` or `make e2e`", dir.display());
    }
    dir
}

/// The static program of a test image: `VM_TEST_PROG`, which the Makefile sets.
///
/// # Panics
/// It is not set.
pub fn test_program() -> PathBuf {
    let path = env::var_os("VM_TEST_PROG").map(PathBuf::from).filter(|path| path.is_file());
    path.unwrap_or_else(|| {
        panic!("VM_TEST_PROG names no file: run the end-to-end tests by `make test` or `make e2e`")
    })
}

/// A plugin that comes with the programs under test, as `vm plugin install` takes it.
///
/// # Panics
/// It is not there.
pub fn bundled_plugin(name: &str) -> String {
    plugin_in(directory().join("plugins"), name)
}

/// A plugin that is for tests: in `VM_TEST_PLUGINS`, which the Makefile sets.
///
/// # Panics
/// It is not there.
pub fn test_plugin(name: &str) -> String {
    plugin_in(test_plugins(), name)
}

/// Where plugins that are for tests are: `VM_TEST_PLUGINS`, which the Makefile sets.
///
/// # Panics
/// It is not set.
pub fn test_plugins() -> PathBuf {
    let Some(dir) = env::var_os("VM_TEST_PLUGINS") else {
        panic!("VM_TEST_PLUGINS is not set: run the tests with a daemon by `make test` or `make e2e`");
    };
    dir.into()
}

fn plugin_in(directory: PathBuf, name: &str) -> String {
    let plugin = directory.join(name);
    assert!(plugin.join("plugin.toml").is_file(), "{} is no plugin: run `make test`", plugin.display());
    plugin.display().to_string()
}

/// The program that holds a world's namespaces; cargo builds it beside the tests.
///
/// # Panics
/// It is not there.
pub fn world_holder() -> PathBuf {
    let own = env::current_exe().unwrap_or_default();
    let found = own.ancestors().map(|dir| dir.join("vm-test-world")).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("vm-test-world is not near {}", own.display()))
}

/// The source tree.
pub fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}
