use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn context(files: &[(&str, &str)]) -> (tempfile::TempDir, Context) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join("in").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let context = open(&dir);
    (dir, context)
}

fn open(dir: &tempfile::TempDir) -> Context {
    Context::open(&dir.path().join("in"), &dir.path().join("in/Dockerfile")).unwrap()
}

fn sources(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn names(items: &[Item]) -> Vec<&str> {
    items.iter().map(|item| item.name.to_str().unwrap()).collect()
}

#[test]
fn files_keep_their_names_and_directories_give_what_is_in_them() {
    let (_dir, context) =
        context(&[("a.txt", "1"), ("b.txt", "2"), ("d/x", "3"), ("d/e/y", "4"), ("dd", "")]);
    let select = |names: &[&str]| context.select(&sources(names), None).unwrap();
    assert_eq!(names(&select(&["a.txt", "d/x"])), ["a.txt", "x"]);
    assert_eq!(names(&select(&["d"])), ["", "e", "e/y", "x"]);
    assert_eq!(names(&select(&["/d/e/../e/"])), ["", "y"]);
    assert_eq!(names(&select(&["*.txt"])), ["a.txt", "b.txt"]);
    assert_eq!(names(&select(&["d/*"])), ["", "x", "y"], "what is in d/e, and d/x");
    assert_eq!(names(&select(&["."])), ["", "a.txt", "b.txt", "d", "d/e", "d/e/y", "d/x", "dd"]);
    let renamed = context.select(&sources(&["a.txt"]), Some(OsStr::new("new"))).unwrap();
    assert_eq!(names(&renamed), ["new"]);
    let digest = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b";
    assert_eq!(renamed[0].content, Content::File { digest: digest.into(), size: 1 });
    for (given, one) in [
        (&["a.txt"][..], true),
        (&["a*"], true),
        (&["d"], false),
        (&["*.txt"], false),
        (&["a.txt", "dd"], false),
    ] {
        assert_eq!(context.is_one_file(&sources(given)).unwrap(), one, "{given:?}");
    }
}

#[test]
fn nothing_comes_from_outside() {
    let (dir, context) = context(&[("a", ""), ("real/x", "inside")]);
    fs::write(dir.path().join("secret"), "secret").unwrap();
    let inside = dir.path().join("in");
    symlink("../secret", inside.join("out")).unwrap();
    symlink("/etc", inside.join("etc")).unwrap();
    symlink("real", inside.join("near")).unwrap();
    let select = |name: &str| context.select(&sources(&[name]), None);
    for name in ["../secret", "a/../../secret", "out", "etc/passwd", "etc"] {
        let error = select(name).unwrap_err();
        assert!(matches!(error, ContextError::Outside { .. }), "{name}: {error}");
    }
    // A link that stays inside is followed where it is named, and is itself where it is only met.
    assert_eq!(names(&select("near").unwrap()), ["", "x"]);
    assert_eq!(names(&select("near/x").unwrap()), ["x"]);
    let all = select(".").unwrap();
    let link = all.iter().find(|item| item.name == Path::new("out")).unwrap();
    assert_eq!(link.content, Content::Link(b"../secret".to_vec()));
    assert!(matches!(select("none").unwrap_err(), ContextError::Missing { ignored: false, .. }));
    assert!(matches!(select("*.none").unwrap_err(), ContextError::Missing { .. }));
    assert!(matches!(select("[").unwrap_err(), ContextError::Pattern { .. }));
}

#[test]
fn what_is_to_be_left_out_is_no_source() {
    let (dir, _) =
        context(&[(".dockerignore", "target\n*.log\n!keep.log\ndocs\n!docs/one\n"), ("target/x", "")]);
    for name in ["a.log", "keep.log", "docs/one", "docs/two", "src"] {
        let path = dir.path().join("in").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let context = open(&dir);
    assert_eq!(
        names(&context.select(&sources(&["."]), None).unwrap()),
        ["", ".dockerignore", "docs/one", "keep.log", "src"]
    );
    assert_eq!(names(&context.select(&sources(&["*.log"]), None).unwrap()), ["keep.log"]);
    let error = context.select(&sources(&["a.log"]), None).unwrap_err();
    assert!(matches!(error, ContextError::Missing { ignored: true, .. }), "{error}");
    // Nor under another name.
    symlink("a.log", dir.path().join("in/alias")).unwrap();
    let error = open(&dir).select(&sources(&["alias"]), None).unwrap_err();
    assert!(matches!(error, ContextError::Missing { ignored: true, .. }), "{error}");
    // A build file's own comes first.
    fs::write(dir.path().join("in/Dockerfile.dockerignore"), "src\n").unwrap();
    assert!(open(&dir).select(&sources(&["a.log"]), None).is_ok());
    fs::write(dir.path().join("in/Dockerfile.dockerignore"), "\n[\n").unwrap();
    let error = Context::open(&dir.path().join("in"), &dir.path().join("in/Dockerfile")).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn names_need_not_be_text() {
    let (dir, _) = context(&[("d/x", "")]);
    let file = |byte: u8| dir.path().join("in/d").join(OsStr::from_bytes(&[b'a', byte]));
    fs::write(file(0xff), "").unwrap();
    let first = open(&dir).select(&sources(&["d"]), None).unwrap();
    assert!(first.iter().any(|item| item.name.as_os_str().as_bytes() == b"a\xff"));
    fs::rename(file(0xff), file(0xfe)).unwrap();
    let second = open(&dir).select(&sources(&["d"]), None).unwrap();
    let [first, second] = [first, second].map(|items| serde_json::to_value(items).unwrap());
    assert_ne!(first, second, "another name is another copy");
}

#[test]
fn an_archive_is_what_was_selected_or_fails() {
    let (dir, context) = context(&[("d/x", "text"), ("d/run", "")]);
    let inside = dir.path().join("in/d");
    fs::set_permissions(inside.join("run"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("x", inside.join("link")).unwrap();
    let items = context.select(&sources(&["d"]), None).unwrap();
    let mut bytes = Vec::new();
    context.archive(&items, &mut bytes).unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut seen = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        let target = entry.link_name().unwrap().map(|target| target.display().to_string());
        seen.push((
            entry.path().unwrap().display().to_string(),
            entry.header().mode().unwrap(),
            target.unwrap_or(text),
        ));
    }
    let about = |name: &str| seen.iter().find(|(other, ..)| other == name).cloned().unwrap_or_default();
    assert_eq!(about("run").1, 0o4755);
    assert_eq!((about("x").2.as_str(), about("link").2.as_str()), ("text", "x"));
    fs::write(inside.join("x"), "next").unwrap();
    let error = context.archive(&items, &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ContextError::Changed { .. }), "{error}");
    let again = context.select(&sources(&["d"]), None).unwrap();
    assert_ne!(again, items, "other content is another copy");
}
