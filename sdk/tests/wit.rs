//! The package carries its own copy of the interface, for whoever builds from the registry.

use std::{collections::BTreeMap, fs, path::Path};

fn files(dir: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let text = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        (name, fs::read_to_string(entry.path()).expect("a readable file"))
    };
    entries.map(|entry| text(entry.expect("a readable directory"))).collect()
}

#[test]
fn the_copy_of_the_interface_is_the_interface() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (copy, original) = (files(&here.join("wit")), files(&here.join("../wit")));
    assert_eq!(copy.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
    for (name, text) in &original {
        assert!(copy[name] == *text, "sdk/wit/{name} differs from wit/{name}: cp wit/*.wit sdk/wit/");
    }
}
