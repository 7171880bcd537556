//! A repository as people have them: a Debian source package of thousands of files with a history. The guest has git and is asked
//! itself what it got, and what it made of it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    process::{Command, Stdio},
};

use serde_json::json;
use vm_tests::{
    World,
    debian::{WITH_GIT, seed_with_git, source_package},
    repository::Repository,
    world::BOOT,
};

use crate::workspaces::text;

/// What git and the kernel say of a working tree, in the same words on both sides: commit, its tree, branch, changes, what is staged,
/// the tree of all that is there; kind, permissions, size and target of each file. The index stays as it is.
const DESCRIBE: &str = r#"
export LC_ALL=C QUOTING_STYLE=escape GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
cd "$1"
index=$(mktemp)
cp -p "${GIT_DIR:-.git}/index" "$index"
export GIT_INDEX_FILE=$index
git rev-parse HEAD 'HEAD^{tree}'
git symbolic-ref HEAD
echo "-- status"; git status --porcelain --untracked-files=all
echo "-- staged"; git write-tree
echo "-- files"
git ls-files -z --cached --others --exclude-standard | sort -zu |
    xargs -0 stat --printf '%n|%f|%s|%N\n' 2>/dev/null || :
echo "-- all"; git add -A; git write-tree
rm "$index"
"#;

/// The tree of all that is in a description.
fn whole_tree(description: &str) -> &str {
    description.lines().last().unwrap()
}

fn on_host(host: &Repository) -> String {
    let mut command = Command::new("sh");
    command.args(["-es", text(&host.0)]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(DESCRIBE.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// `git` names the repository that is asked, where the directory has none.
fn in_guest(world: &World, directory: &str, git: Option<&str>) -> String {
    let of = git.map(|git| format!("GIT_DIR={git}/.git GIT_WORK_TREE={directory} ")).unwrap_or_default();
    let shell = format!("{of}sh -es {directory}");
    world.vm(&["ssh", "a", &shell]).stdin(DESCRIBE).within(BOOT).run().exits(0).text()
}

/// Line by line, for thousands of them are no message.
#[track_caller]
fn assert_same(guest: &str, host: &str, what: &str) {
    let differing = guest.lines().zip(host.lines()).find(|(guest, host)| guest != host);
    assert_eq!(differing, None, "{what}: guest, host");
    assert_eq!(guest.lines().count(), host.lines().count(), "{what}");
}

/// What people have not committed yet.
fn leave_work(host: &Repository) {
    let at = |name: &str| host.0.join(name);
    host.write("git.c", "changed\n");
    host.write("builtin/add.c", "staged\n");
    host.git(&["add", "builtin/add.c"]);
    host.write("builtin/add.c", "staged, and then changed\n");
    host.git(&["mv", "builtin/am.c", "builtin/renamed.c"]);
    fs::remove_file(at("builtin/branch.c")).unwrap();
    host.git(&["rm", "-q", "builtin/blame.c"]);
    fs::set_permissions(at("git-bisect.sh"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(at("README.md"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(at("RelNotes")).unwrap();
    symlink("Documentation/RelNotes", at("RelNotes")).unwrap();
    host.write("new/a name\nof two lines", "untracked\n");
    fs::write(at("new/binary"), b"\x00\xff\n\x00").unwrap();
    host.write("new/empty", "");
    host.write("git.o", "ignored\n");
}

#[test]
fn a_source_package_is_the_hosts_by_each_importer_and_the_guests_work_comes_back() {
    let (seed, source) = (seed_with_git(), source_package());
    let world = World::with_seed(&seed, "");
    let host = Repository::copy_of(&source, world.directory().join("package"));
    let path = text(&host.0);
    let count = |list: &str| list.lines().count();
    let tracked = host.git(&["ls-files", "--stage"]);
    assert!(count(&tracked) >= 3000, "{} files", count(&tracked));
    let has = |mode: &str| tracked.lines().filter(|line| line.starts_with(mode)).count();
    assert!(has("100755") > 1000 && has("120000") > 0);
    assert!(count(&host.git(&["rev-list", "HEAD"])) > 5);

    world.vm(&["create", "--name", "a", "--image", WITH_GIT, "--memory", "512M", "--start"]).run().exits(0);
    let prepare = |to: &str, arguments: &[&str]| {
        let all = [&["workspace", "prepare", "a", path, "--to", to], arguments].concat();
        world.ask(&all)["workspace"].clone()
    };

    let full = prepare("/srv/git", &["--importer", "git/full"]);
    assert_eq!(full["base"], json!(host.git(&["rev-parse", "HEAD"])));
    let described = on_host(&host);
    assert!(described.contains("-- status\n-- staged\n"), "nothing is changed yet");
    assert_same(&in_guest(&world, "/srv/git", None), &described, "git/full");

    // Another commit of the host's, and work that is none yet.
    host.git(&["rm", "-q", "-r", "contrib/buildsystems"]);
    host.git(&["mv", "contrib/completion", "contrib/completions"]);
    host.git(&["commit", "-q", "-m", "Another place"]);
    leave_work(&host);
    let described = on_host(&host);
    let again = prepare("/srv/git", &["--importer", "incremental"]);
    assert_eq!(again["strategy"], "changes");
    assert_same(&in_guest(&world, "/srv/git", None), &described, "incremental/changes");
    let commits = world.vm(&["ssh", "a", "git -C /srv/git rev-list HEAD"]).run().exits(0).text();
    assert_eq!(commits.trim_end(), host.git(&["rev-list", "HEAD"]));

    // One without a repository of its own: what git says of its files is asked of the other's.
    prepare("/srv/copy", &["--importer", "copy"]);
    assert_same(&in_guest(&world, "/srv/copy", Some("/srv/git")), &described, "copy/files");
    world
        .vm(&["ssh", "a", "test ! -e /srv/copy/.git && git -C /srv/git fsck --connectivity-only"])
        .run()
        .exits(0);

    // Work in the guest, with its own git.
    let work = r#"
        export GIT_AUTHOR_NAME=Guest GIT_AUTHOR_EMAIL=guest@example.org
        export GIT_COMMITTER_NAME=Guest GIT_COMMITTER_EMAIL=guest@example.org
        cd /srv/git
        git commit -q -m "What was staged on the host"
        git checkout -q -b deeper
        git mv t/perf t/slow; git rm -q t/README; chmod +x Makefile
        printf 'a\000b\377' >t/binary; git add t/binary Makefile
        git commit -q -m "Made in the guest"
        echo changed >>cache.h; printf '\000\001' >t/binary; rm config.c; chmod -x git-submodule.sh
        echo staged >staged.c; git add staged.c; echo more >>staged.c
        mkdir made; echo made >'made/in the guest'; ln -s ../cache.h made/link; echo no >made/ignored.o
    "#;
    world.vm(&["ssh", "a", "sh -es"]).stdin(work).run().exits(0);
    let made = in_guest(&world, "/srv/git", None);
    let head = made.lines().next().unwrap();
    let exported = world.ask(&[
        "workspace",
        "export",
        "a",
        "--at",
        "/srv/git",
        "--branch",
        "from-guest",
        "-m",
        "Not committed",
    ]);
    assert_eq!(exported["how"], "branch");
    assert_eq!(host.git(&["rev-parse", "from-guest^{tree}"]), whole_tree(&made));
    assert_eq!(host.git(&["rev-parse", "from-guest~1"]), head);
    let subjects = host.git(&["log", "--format=%s", "main..from-guest"]);
    assert_eq!(subjects, "Not committed\nMade in the guest\nWhat was staged on the host");
    host.git(&["fsck", "--connectivity-only"]);
    assert_same(&on_host(&host), &described, "the host's own working tree");
    world.leaves_nothing();
}
