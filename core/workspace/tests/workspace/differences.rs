//! What a second prepare would do.

use std::{fs, os::unix::fs::symlink, path::Path};

use vm_workspace::{Baseline, Difference, WorkspaceError};

use crate::{
    guest::Guest,
    repo::{Repo, things, things_of},
};

fn texts(paths: &[Vec<u8>]) -> Vec<String> {
    paths.iter().map(|path| String::from_utf8_lossy(path).into_owned()).collect()
}

/// Writes a new file in the place of one, so that nobody depends on the clock's grain.
fn replace(file: &Path, content: &str) {
    let new = file.with_file_name(".new");
    fs::write(&new, content).unwrap();
    fs::rename(new, file).unwrap();
}

fn prepared() -> (Repo, Guest, Baseline) {
    let repo = Repo::plain();
    for name in ["a", "b", "d/c", "d/e", "gone/x"] {
        repo.write(name, name);
    }
    let guest = Guest::new();
    let baseline = guest.prepare(&repo.open(), None);
    (repo, guest, baseline)
}

#[test]
fn nothing_is_sent_where_nothing_changed() {
    let (repo, guest, baseline) = prepared();
    assert!(guest.difference(&repo.open(), &baseline).is_empty());
    // Other times are no change.
    replace(&repo.top().join("a"), "a");
    let (difference, after) = guest.catch_up(&repo.open(), &baseline);
    assert!(difference.is_empty());
    assert_eq!(after.sent.entries[&b"a"[..]].sha256, baseline.sent.entries[&b"a"[..]].sha256);
}

#[test]
fn what_the_host_changed_is_sent_and_the_guests_own_stays() {
    let (repo, guest, baseline) = prepared();
    repo.write("a", "changed");
    repo.write("new/deep", "12");
    repo.mode("b", 0o755);
    fs::remove_dir_all(repo.top().join("gone")).unwrap();
    replace(&guest.top().join("d/c"), "the guest's");
    fs::write(guest.top().join("built"), "1").unwrap();
    let (difference, after) = guest.catch_up(&repo.open(), &baseline);
    assert_eq!(texts(&difference.send), ["a", "b", "new", "new/deep"]);
    assert_eq!(texts(&difference.remove), ["gone/x", "gone"]);
    assert_eq!((difference.bytes, difference.guest_changed.as_slice()), (7 + 1 + 2, &[][..]));
    let mut expected = things_of(&repo.open());
    let now = things(&guest.top());
    for own in [&b"built"[..], b"d/c"] {
        expected.insert(own.to_vec(), now[own].clone());
    }
    assert_eq!(now, expected);
    // The guest's change is still one, and would be lost if the host changed the file, too.
    repo.write("d/c", "the host's");
    assert_eq!(texts(&guest.difference(&repo.open(), &after).guest_changed), ["d/c"]);
}

#[test]
fn what_the_guest_would_lose_is_named() {
    let (repo, guest, baseline) = prepared();
    let (host, top) = (repo.top(), guest.top());
    repo.write("a", "host");
    replace(&top.join("a"), "guest");
    repo.write("b", "same");
    replace(&top.join("b"), "same");
    repo.write("d/c", "host");
    fs::remove_file(top.join("d/c")).unwrap();
    fs::remove_file(host.join("d/e")).unwrap();
    replace(&top.join("d/e"), "guest");
    fs::remove_dir_all(host.join("gone")).unwrap();
    fs::remove_dir_all(top.join("gone")).unwrap();
    repo.write("both", "host");
    fs::write(top.join("both"), "guest").unwrap();
    let difference = guest.difference(&repo.open(), &baseline);
    assert_eq!(texts(&difference.guest_changed), ["a", "both", "d/c", "d/e"]);
}

#[test]
fn other_kinds_of_things_make_way() {
    let (repo, guest, baseline) = prepared();
    let (host, top) = (repo.top(), guest.top());
    // A directory becomes a file, a file a directory, a file a link; the guest has put something into the first.
    fs::remove_dir_all(host.join("d")).unwrap();
    repo.write("d", "file now");
    fs::remove_file(host.join("a")).unwrap();
    repo.write("a/below", "1");
    fs::remove_file(host.join("b")).unwrap();
    symlink("a", host.join("b")).unwrap();
    fs::write(top.join("d/own"), "guest").unwrap();
    // The guest has a link where the host puts a new directory, and a directory where it puts a new file.
    symlink("/nowhere", top.join("link")).unwrap();
    repo.write("link/file", "1");
    fs::create_dir(top.join("dir")).unwrap();
    fs::write(top.join("dir/own"), "guest").unwrap();
    repo.write("dir", "file");
    let (difference, _) = guest.catch_up(&repo.open(), &baseline);
    assert_eq!(texts(&difference.guest_changed), ["d/own", "dir", "dir/own", "link"]);
    assert_eq!(things(&top), things_of(&repo.open()));
}

#[test]
fn a_commit_in_the_guest_is_its_own_work() {
    let repo = Repo::git_repository();
    repo.write("a", "1");
    repo.commit();
    let guest = Guest::new();
    let baseline = guest.prepare(&repo.open(), Some(1));
    guest.git(&["status"]);
    repo.write("b", "1");
    repo.commit();
    let looked = guest.difference(&repo.open(), &baseline);
    assert!(looked.history && looked.guest_changed.is_empty(), "{:?}", texts(&looked.guest_changed));
    guest.git(&["commit", "-q", "--allow-empty", "-m", "guest"]);
    assert_eq!(texts(&guest.difference(&repo.open(), &baseline).guest_changed), [".git/refs/heads/main"]);
    guest.git(&["checkout", "-q", "-b", "own"]);
    let changed = guest.difference(&repo.open(), &baseline).guest_changed;
    assert_eq!(texts(&changed), [".git/HEAD", ".git/refs/heads/main"]);
}

#[test]
fn a_record_comes_back_and_a_later_form_is_refused() {
    let repo = Repo::git_repository();
    repo.write(b"\xff\n%", "1");
    symlink("x", repo.top().join("link")).unwrap();
    repo.commit();
    fs::File::open(repo.top().join("link").parent().unwrap()).unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH - std::time::Duration::from_millis(1500);
    fs::File::options()
        .write(true)
        .open(repo.top().join(crate::repo::path(b"\xff\n%")))
        .unwrap()
        .set_modified(old)
        .unwrap();
    let guest = Guest::new();
    let baseline = guest.prepare(&repo.open(), Some(1));
    let file = repo.home().join("record");
    assert!(Baseline::load(&file).unwrap().is_none());
    baseline.save(&file).unwrap();
    assert_eq!(Baseline::load(&file).unwrap().unwrap(), baseline);
    let text = fs::read_to_string(&file).unwrap();
    let later =
        text.replacen("\"version\":1", "\"version\":99", 1).replacen("\"version\": 1", "\"version\": 99", 1);
    fs::write(&file, later).unwrap();
    assert!(matches!(Baseline::load(&file), Err(WorkspaceError::BaselineVersion { version: 99, .. })));
    fs::write(&file, "{\"version\":1").unwrap();
    assert!(matches!(Baseline::load(&file), Err(WorkspaceError::Baseline { .. })));
}

#[test]
fn a_guest_that_does_not_answer_is_told() {
    let (repo, guest, baseline) = prepared();
    repo.write("a", "host");
    replace(&guest.top().join("a"), "x");
    let survey = guest.survey();
    let workspace = repo.open();
    let ask = |difference: Result<Difference, WorkspaceError>| difference.unwrap_err();
    let error = ask(baseline.difference(&workspace, &survey, &mut |_| Err("gone".into())));
    assert!(matches!(error, WorkspaceError::Ask { .. }) && error.hint().is_some());
    let error = ask(baseline.difference(&workspace, &survey, &mut |_| Ok(Vec::new())));
    assert!(matches!(error, WorkspaceError::Ask { .. }));
}
