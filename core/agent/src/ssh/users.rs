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

/// Looks `name` up in the image at `root`. An image without passwd(5) has only root.
pub(crate) fn find(root: &Path, name: &str) -> Option<User> {
    let groups = fs::read(root.join("etc/group")).unwrap_or_default();
    match fs::read(root.join("etc/passwd")) {
        Ok(passwd) => parse(&String::from_utf8_lossy(&passwd), &String::from_utf8_lossy(&groups), name),
        Err(_) if name == "root" => Some(User {
            name: name.into(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: "/".into(),
            shell: "/bin/sh".into(),
        }),
        Err(_) => None,
    }
}

/// passwd(5) and group(5).
fn parse(passwd: &str, group: &str, name: &str) -> Option<User> {
    let or = |field: &str, default: &str| PathBuf::from(if field.is_empty() { default } else { field });
    let (uid, gid, home, shell) = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [login, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
        (*login == name).then_some(())?;
        Some((uid.parse().ok()?, gid.parse().ok()?, or(home, "/"), or(shell.trim_end(), "/bin/sh")))
    })?;
    let mut groups = vec![gid];
    for line in group.lines() {
        let fields: Vec<_> = line.split(':').collect();
        if let [_, _, id, members] = fields.as_slice()
            && members.trim_end().split(',').any(|member| member == name)
            && let Ok(id) = id.parse()
            && !groups.contains(&id)
        {
            groups.push(id);
        }
    }
    Some(User { name: name.into(), uid, gid, groups, home, shell })
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
    }
}
