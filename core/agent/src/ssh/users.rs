//! Users of the image, read from its files at each request: a static binary has no NSS.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A user who can be logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// The user's own group first.
    pub groups: Vec<u32>,
    pub home: PathBuf,
    pub shell: PathBuf,
}

/// One line of passwd(5).
#[derive(Debug, Clone)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
    shell: PathBuf,
}

/// Looks a user up in the image at `root`, who is named as an image's configuration names one: `USER`, `UID`, `USER:GROUP`,
/// `UID:GID` (<https://github.com/opencontainers/image-spec/blob/v1.1.0/config.md>). A number need not be anybody's. With a group
/// the user has that one alone. An image without passwd(5) has only root and numbers.
pub(crate) fn find(root: &Path, name: &str) -> Option<User> {
    let read =
        |file: &str| String::from_utf8_lossy(&fs::read(root.join(file)).unwrap_or_default()).into_owned();
    parse(&read("etc/passwd"), &read("etc/group"), name)
}

fn parse(passwd: &str, group: &str, name: &str) -> Option<User> {
    let (name, wanted_group) = match name.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (name, None),
    };
    let account = account(passwd, name)?;
    let Account { name, uid, gid, home, shell } = account;
    let (gid, groups) = match wanted_group {
        Some(wanted) => {
            let gid = group_id(group, wanted)?;
            (gid, vec![gid])
        }
        None => (gid, groups_of(group, &name, gid)),
    };
    Some(User { name, uid, gid, groups, home, shell })
}

fn account(passwd: &str, name: &str) -> Option<Account> {
    let or = |field: &str, default: &str| PathBuf::from(if field.is_empty() { default } else { field });
    let accounts: Vec<Account> = passwd
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [login, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
            Some(Account {
                name: (*login).to_owned(),
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
                home: or(home, "/"),
                shell: or(shell.trim_end(), "/bin/sh"),
            })
        })
        .collect();
    let nobodys =
        |uid| Account { name: name.to_owned(), uid, gid: 0, home: "/".into(), shell: "/bin/sh".into() };
    let number = name.parse::<u32>().ok();
    let named = accounts.iter().find(|account| account.name == name);
    let numbered = || accounts.iter().find(|account| Some(account.uid) == number);
    match named.or_else(numbered) {
        Some(account) => Some(account.clone()),
        None if name == "root" && passwd.is_empty() => Some(nobodys(0)),
        None => number.map(nobodys),
    }
}

/// Name, number and members of each group(5).
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, id, members] = fields.as_slice() else { return None };
        Some((*name, id.parse().ok()?, members.trim_end()))
    })
}

fn group_id(group: &str, wanted: &str) -> Option<u32> {
    let named = groups(group).find(|(name, _, _)| *name == wanted).map(|(_, id, _)| id);
    named.or_else(|| wanted.parse().ok())
}

fn groups_of(group: &str, user: &str, own: u32) -> Vec<u32> {
    let mut found = vec![own];
    for (_, id, members) in groups(group) {
        if members.split(',').any(|member| member == user) && !found.contains(&id) {
            found.push(id);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_their_groups_and_defaults() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\n# junk\ndev:x:1000:1000:A, b:/home/dev:\nbad:x:no:1::/:/bin/sh\n";
        let group = "root:x:0:\nsudo:x:27:other,dev\ndev:x:1000:dev\ndocker:x:999:dev\nde:x:5:devs\n";
        let dev = parse(passwd, group, "dev").unwrap();
        assert_eq!((dev.uid, dev.gid, dev.groups), (1000, 1000, vec![1000, 27, 999]));
        assert_eq!((dev.home, dev.shell), ("/home/dev".into(), "/bin/sh".into()));
        assert_eq!(parse(passwd, group, "root").unwrap().shell, Path::new("/bin/bash"));
        assert_eq!(parse(passwd, group, "bad"), None);
        assert_eq!(parse(passwd, group, "#"), None);
    }

    #[test]
    fn an_image_without_passwd_has_root_only() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(find(root.path(), "root").unwrap().home, Path::new("/"));
        assert_eq!(find(root.path(), "dev"), None);
        let somebody = find(root.path(), "1000").unwrap();
        assert_eq!((somebody.uid, somebody.groups, somebody.home), (1000, vec![0], "/".into()));
    }

    #[test]
    fn users_are_named_as_images_name_them() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\ndev:x:1000:1001::/home/dev:/bin/sh\n7:x:8:8::/seven:/bin/sh\n";
        let group = "dev:x:1001:\ndocker:x:999:dev\n";
        let ids = |name| parse(passwd, group, name).map(|user| (user.uid, user.groups, user.home));
        assert_eq!(ids("1000"), Some((1000, vec![1001, 999], "/home/dev".into())));
        assert_eq!(ids("dev:docker"), Some((1000, vec![999], "/home/dev".into())));
        assert_eq!(ids("1000:12"), Some((1000, vec![12], "/home/dev".into())));
        assert_eq!(ids("4242:4243"), Some((4242, vec![4243], "/".into())));
        assert_eq!(ids("4242"), Some((4242, vec![0], "/".into())));
        assert_eq!(ids("7"), Some((8, vec![8], "/seven".into())));
        assert_eq!(ids("nobody:0"), None);
        assert_eq!(ids("dev:nobody"), None);
    }
}
