//! What goes into a guest of submodules, and of submodules in these.

use vm_workspace::Selection;

use crate::repo::{Repo, git_in};

/// A workspace with the submodule `sub`, and that with the submodule `inner`.
fn nested() -> Repo {
    let repo = Repo::git_repository();
    for name in ["inner", "middle"] {
        git_in(repo.home(), &["init", "-q", name]);
        std::fs::write(repo.home().join(name).join("kept"), "1").unwrap();
        git_in(&repo.home().join(name), &["add", "-A"]);
        git_in(&repo.home().join(name), &["commit", "-qm", "1"]);
    }
    git_in(&repo.home().join("middle"), &["submodule", "--quiet", "add", "../inner", "inner"]);
    git_in(&repo.home().join("middle"), &["commit", "-qm", "with a submodule"]);
    repo.write("kept", "1");
    repo.commit();
    repo.git(&["submodule", "--quiet", "add", "../middle", "sub"]);
    repo.git(&["submodule", "--quiet", "update", "--init", "--recursive"]);
    repo.commit();
    repo
}

#[test]
fn each_repository_ignores_what_its_own_lists_say() {
    let repo = nested();
    let places = [("", "top"), ("sub/", "sub"), ("sub/inner/", "inner")];
    for (place, name) in places {
        let top = repo.top().join(place);
        repo.write(format!("{place}.gitignore"), format!("*.{name}-list\n"));
        let list = git_in(&top, &["rev-parse", "--path-format=absolute", "--git-path", "info/exclude"]);
        std::fs::create_dir_all(std::path::Path::new(&list).parent().unwrap()).unwrap();
        std::fs::write(list, format!("*.{name}\n")).unwrap();
        for (_, kind) in places {
            repo.write(format!("{place}made.{kind}"), "1");
            repo.write(format!("{place}made.{kind}-list"), "1");
        }
    }
    let mut expected: Vec<String> = Vec::new();
    for (place, _) in places {
        let said = git_in(&repo.top().join(place), &["ls-files", "--others", "--exclude-standard", "made.*"]);
        expected.extend(said.lines().map(|name| format!("{place}{name}")));
    }
    expected.sort();
    assert_eq!(expected.len(), 12, "each ignores two of six: {expected:?}");
    let sent = repo.open().archive(Selection::All, std::io::sink()).unwrap();
    let names = sent.entries.into_keys().map(|path| String::from_utf8(path).unwrap());
    assert_eq!(names.filter(|path| path.contains("made.")).collect::<Vec<_>>(), expected);
}
