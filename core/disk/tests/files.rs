//! Directories and files come, go, and never reach outside their roots.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use vm_disk::{DiskError, Files};
use vm_types::{Effect, Handle, Observed};

fn directory(path: impl AsRef<Path>) -> Effect {
    Effect::Directory { path: path.as_ref().to_owned(), mode: 0o750 }
}

fn file(path: impl AsRef<Path>, content: &str) -> Effect {
    Effect::File { path: path.as_ref().to_owned(), mode: 0o600, content: content.into() }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

async fn roundtrip(files: &Files, effect: &Effect) {
    assert_eq!(files.observe(effect).await.unwrap(), Observed::Absent);
    for _ in 0..2 {
        assert_eq!(files.apply(effect).await.unwrap(), Handle::None);
        assert_eq!(files.observe(effect).await.unwrap(), Observed::Present(Handle::None));
    }
    for _ in 0..2 {
        files.undo(effect, &Handle::None).await.unwrap();
        assert_eq!(files.observe(effect).await.unwrap(), Observed::Absent);
    }
}

#[tokio::test]
async fn each_kind_comes_and_goes_any_number_of_times() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new([root.path().to_owned()]);
    let base = root.path().join("base");
    fs::write(&base, "shared").unwrap();
    roundtrip(&files, &directory(root.path().join("vms/one"))).await;
    roundtrip(&files, &file(root.path().join("vms/key"), "secret")).await;
    let path = root.path().join("vms/initramfs");
    roundtrip(&files, &Effect::AppendedFile { path, mode: 0o640, base, tail: b"own".to_vec() }).await;
}

#[tokio::test]
async fn contents_and_modes_are_what_was_asked() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new([root.path().to_owned()]);
    let at = |name: &str| root.path().join(name);
    files.apply(&file(at("f"), "one")).await.unwrap();
    files.apply(&file(at("f"), "two")).await.unwrap();
    assert_eq!((fs::read_to_string(at("f")).unwrap().as_str(), mode(&at("f"))), ("two", 0o600));

    fs::create_dir(at("d")).unwrap();
    files.apply(&directory(at("d"))).await.unwrap();
    assert_eq!(mode(&at("d")), 0o750);

    fs::write(at("base"), vec![7; 3_000_001]).unwrap();
    let appended =
        Effect::AppendedFile { path: at("a"), mode: 0o640, base: at("base"), tail: b"tail".to_vec() };
    files.apply(&appended).await.unwrap();
    let bytes = fs::read(at("a")).unwrap();
    assert!(bytes.len() == 3_000_005 && bytes.ends_with(b"\x07tail") && mode(&at("a")) == 0o640);

    let lost = Effect::AppendedFile { path: at("b"), mode: 0o640, base: at("none"), tail: Vec::new() };
    assert!(files.apply(&lost).await.unwrap_err().to_string().contains("none"));
    let mut names: Vec<_> = fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "base", "d", "f"]);
}

#[tokio::test]
async fn nothing_outside_the_roots_is_touched() {
    let outer = tempfile::tempdir().unwrap();
    let (root, other) = (outer.path().join("root"), outer.path().join("other"));
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::create_dir_all(other.join("precious")).unwrap();
    symlink(&other, root.join("link")).unwrap();
    symlink("../../other", root.join("sub/link")).unwrap();
    let files = Files::new([root.clone()]);
    for path in [
        other.join("precious"),
        root.clone(),
        root.join("../other/precious"),
        root.join("link/precious"),
        root.join("sub/link/precious"),
        outer.path().join("root-not"),
        "relative".into(),
    ] {
        for effect in [directory(&path), file(&path, "x")] {
            for result in [
                files.observe(&effect).await.map(|_| ()),
                files.apply(&effect).await.map(|_| ()),
                files.undo(&effect, &Handle::None).await,
            ] {
                assert!(matches!(result, Err(DiskError::OutsideRoots { .. })), "{path:?}: {result:?}");
            }
        }
    }
    assert!(other.join("precious").is_dir() && !outer.path().join("root-not").exists());
}

#[tokio::test]
async fn removing_a_directory_does_not_follow_links_in_it() {
    let outer = tempfile::tempdir().unwrap();
    let (root, other) = (outer.path().join("root"), outer.path().join("other"));
    fs::create_dir_all(root.join("vm/deep/er")).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious"), "data").unwrap();
    symlink(&other, root.join("vm/deep/link")).unwrap();
    fs::write(root.join("vm/deep/er/file"), "x").unwrap();
    let files = Files::new([root.clone()]);
    files.undo(&directory(root.join("vm")), &Handle::None).await.unwrap();
    assert!(!root.join("vm").exists() && other.join("precious").exists());
}

#[tokio::test]
async fn what_is_of_another_kind_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new([root.path().to_owned()]);
    let at = |name: &str| root.path().join(name);
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("file"), "x").unwrap();
    symlink("file", at("link")).unwrap();
    for effect in [file(at("dir"), "y"), directory(at("file")), file(at("link"), "y"), directory(at("link"))]
    {
        assert!(matches!(files.observe(&effect).await.unwrap(), Observed::Foreign(_)));
        for result in [files.apply(&effect).await.map(|_| ()), files.undo(&effect, &Handle::None).await] {
            let error = result.unwrap_err();
            assert!(matches!(error, DiskError::Foreign { .. }) && error.hint().is_some(), "{error:?}");
        }
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"x");
}

#[tokio::test]
async fn other_effects_are_refused() {
    let files = Files::new(["/nowhere".into()]);
    let effect = Effect::Tap { name: "vt0".into(), bridge: "br0".into() };
    assert!(matches!(files.apply(&effect).await, Err(DiskError::NotMine { .. })));
}
