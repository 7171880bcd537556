//! Copies as a build makes them: of an archive also owners and attributes count, and what it says of directories.

use std::{
    fs::{self, Permissions},
    io::Cursor,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
    path::Path,
};

use rustix::fs::{XattrFlags, lgetxattr, lsetxattr};
use vm_guest::Guest;
use vm_types::guest::files::{PackOptions, UnpackOptions};

use crate::ssh::guest_tests::guest;

/// `CAP_DAC_READ_SEARCH`, permitted and effective: `struct vfs_cap_data` of revision 2.
const READS_ALL: [u8; 20] = [1, 0, 0, 2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A value that only its length tells the end of.
const LINES: &[u8] = b"a\n9 path=b\n\0";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Mode, owner and group; of a link its own.
fn about(path: &Path) -> (u32, u32, u32) {
    let about = fs::symlink_metadata(path).unwrap();
    (about.mode() & 0o7777, about.uid(), about.gid())
}

fn make(path: &Path, mode: u32, owner: (u32, u32)) {
    fs::create_dir_all(path).unwrap();
    chown(path, Some(owner.0), Some(owner.1)).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = [0; 100];
    lgetxattr(path, name, value.as_mut_slice()).ok().map(|length| value[..length].to_vec())
}

async fn packed(guest: &Guest, path: &Path) -> Vec<u8> {
    let mut archive = Cursor::new(Vec::new());
    guest.pack(text(path), PackOptions::default(), &mut archive).await.unwrap();
    archive.into_inner()
}

#[tokio::test]
async fn a_copy_has_owners_and_attributes_of_the_archives_or_those_that_are_given() {
    let (guest, served) = guest().await;
    let from = served.path("from");
    make(&from.join("dir"), 0o2750, (3, 4));
    let file = from.join("dir/file");
    fs::write(&file, "content").unwrap();
    fs::hard_link(&file, from.join("dir/same")).unwrap();
    symlink("dir/file", from.join("link")).unwrap();
    lchown(from.join("link"), Some(5), Some(6)).unwrap();
    // A number of more digits than a header has room for.
    chown(&file, Some(3_000_000), Some(34)).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o4751)).unwrap();
    for (path, name, value) in [
        (&file, "trusted.lines", LINES),
        (&file, "security.capability", &READS_ALL),
        (&from.join("dir"), "trusted.empty", b""),
        (&from.join("link"), "trusted.link", b"x"),
    ] {
        lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
    }
    let archive = packed(&guest, &from).await;

    let exact = UnpackOptions { owners: true, xattrs: true, ..UnpackOptions::default() };
    let to = served.path("to");
    guest.unpack_tar_as(archive.as_slice(), text(&to), (7, 8), exact).await.unwrap();
    assert_eq!(about(&to), (0o755, 7, 8), "it is not in the archive");
    assert_eq!(about(&to.join("dir")), (0o2750, 3, 4));
    assert_eq!(about(&to.join("dir/file")), (0o4751, 3_000_000, 34));
    assert_eq!(about(&to.join("link")), (0o777, 5, 6));
    let inode = |name: &str| fs::metadata(to.join(name)).unwrap().ino();
    assert_eq!(inode("dir/file"), inode("dir/same"));
    assert_eq!(attribute(&to.join("dir/file"), "trusted.lines").as_deref(), Some(LINES));
    assert_eq!(attribute(&to.join("dir/same"), "security.capability").as_deref(), Some(&READS_ALL[..]));
    assert_eq!(attribute(&to.join("dir"), "trusted.empty").as_deref(), Some(&b""[..]));
    assert_eq!(attribute(&to.join("link"), "trusted.link").as_deref(), Some(&b"x"[..]));

    let given = UnpackOptions { mode: Some(0o640), ..UnpackOptions::default() };
    let to = served.path("given");
    guest.unpack_tar_as(archive.as_slice(), text(&to), (7, 8), given).await.unwrap();
    assert_eq!(about(&to), (0o755, 7, 8));
    assert_eq!(about(&to.join("dir")), (0o640, 7, 8));
    assert_eq!(about(&to.join("dir/same")), (0o640, 7, 8));
    assert_eq!(about(&to.join("link")), (0o777, 7, 8));
    assert_eq!(attribute(&to.join("dir/file"), "trusted.lines"), None);
}

#[tokio::test]
async fn directories_that_are_there_change_only_where_that_is_asked_for() {
    let (guest, served) = guest().await;
    let from = served.path("from");
    make(&from, 0o700, (1, 1));
    make(&from.join("old/new"), 0o711, (1, 1));
    make(&from.join("old"), 0o2750, (1, 1));
    make(&from.join("linked"), 0o755, (1, 1));
    for name in ["old/file", "linked/file"] {
        fs::write(from.join(name), name).unwrap();
    }
    let archive = packed(&guest, &from).await;
    for overlay in [false, true] {
        let to = served.path(if overlay { "over" } else { "beside" });
        make(&to, 0o1777, (5, 6));
        make(&to.join("old/kept"), 0o700, (5, 6));
        make(&to.join("old"), 0o700, (5, 6));
        make(&to.join("real"), 0o711, (5, 6));
        symlink("real", to.join("linked")).unwrap();
        let options = UnpackOptions { overlay, ..UnpackOptions::default() };
        guest.unpack_tar_as(archive.as_slice(), text(&to), (3, 4), options).await.unwrap();
        assert_eq!(about(&to), (0o1777, 5, 6), "the target itself");
        let old = if overlay { (0o2750, 3, 4) } else { (0o700, 5, 6) };
        assert_eq!(about(&to.join("old")), old, "{overlay}");
        assert_eq!(about(&to.join("old/kept")), (0o700, 5, 6), "not in the archive");
        assert_eq!(about(&to.join("old/new")), (0o711, 3, 4));
        assert_eq!(fs::read_to_string(to.join("old/file")).unwrap(), "old/file");
        assert_eq!(about(&to.join("real")), (0o711, 5, 6), "behind a link");
        assert_eq!(fs::read_to_string(to.join("real/file")).unwrap(), "linked/file");
    }
}

#[tokio::test]
async fn directories_on_the_way_belong_to_whom_they_are_made_for() {
    let (guest, served) = guest().await;
    make(&served.path("there"), 0o750, (5, 6));
    let to = served.path("there/a/b/c");
    guest.unpack_tar(&[0; 1024][..], text(&to), 7, 8).await.unwrap();
    for made in ["there/a", "there/a/b", "there/a/b/c"] {
        assert_eq!(about(&served.path(made)), (0o755, 7, 8), "{made}");
    }
    assert_eq!(about(&served.path("there")), (0o750, 5, 6));
}
