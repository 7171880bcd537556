//! Files of the image that carry the VM's identity, and configured ones. All are replaced as directory entries, see
//! [`Draft`].

use std::{
    fmt::Write as _,
    fs,
    io::{self, ErrorKind, Write as _},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use vm_types::guest::config::{GuestConfig, GuestFile};

use vm_archive::{Draft, Replaced};

const BEGIN: &str = "# vmd: begin (kept by the VM's agent)";
const END: &str = "# vmd: end";
/// Begins a `/etc/resolv.conf` of ours.
const RESOLV_MARK: &str = "# Written by the VM's agent.\n";

/// Replaces `path` unless it is a regular file with just this content.
pub(super) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
        && fs::read(path).is_ok_and(|old| old == content)
    {
        return Ok(());
    }
    put(path, content, mode, None)
}

fn put(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut draft = Draft::begin(path)?;
    draft.write_all(content)?;
    draft.commit(mode, owner)
}

/// `/etc/hostname`, from which an image's init sets the name again.
pub(super) fn hostname(root: &Path, config: &GuestConfig) -> io::Result<()> {
    replace(&root.join("etc/hostname"), format!("{}\n", config.hostname).as_bytes(), 0o644)
}

/// `/etc/hosts`: the image's own lines stay.
pub(super) fn hosts(root: &Path, config: &GuestConfig) -> io::Result<()> {
    let path = root.join("etc/hosts");
    let old = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    replace(&path, hosts_text(&old, config).as_bytes(), 0o644)
}

/// The lines that are not ours.
fn without_block(old: &str) -> String {
    let mut text = String::new();
    let mut ours = false;
    for line in old.lines() {
        match line {
            BEGIN => ours = true,
            END => ours = false,
            _ if ours => {}
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

fn hosts_text(old: &str, config: &GuestConfig) -> String {
    let mut text = without_block(old);
    let names_in = |name: &str| {
        text.lines().any(|line| {
            let line = line.split('#').next().unwrap_or_default();
            line.split_ascii_whitespace().skip(1).any(|word| word == name)
        })
    };
    let mut block = String::new();
    if !names_in("localhost") {
        block.push_str("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    }
    for entry in &config.hosts {
        let _ = writeln!(block, "{} {}", entry.address, entry.names.join(" "));
    }
    let own = config.hosts.iter().any(|entry| entry.names.contains(&config.hostname));
    if !own && !names_in(&config.hostname) {
        let _ = writeln!(block, "127.0.1.1 {}", config.hostname);
    }
    if !block.is_empty() {
        let _ = write!(text, "{BEGIN}\n{block}{END}\n");
    }
    text
}

/// `/etc/resolv.conf`. systemd-resolved takes its servers from a regular file there (resolv.conf mode "foreign").
pub(super) fn resolv_conf(root: &Path, config: &GuestConfig) -> io::Result<()> {
    if config.resolvers.is_empty() {
        return Ok(());
    }
    let mut text = String::from(RESOLV_MARK);
    for server in &config.resolvers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !config.search.is_empty() {
        let _ = writeln!(text, "search {}", config.search.join(" "));
    }
    replace(&root.join("etc/resolv.conf"), text.as_bytes(), 0o644)
}

/// `/etc/machine-id`, where the image has none (machine-id(5): empty or "uninitialized" is none).
pub(super) fn machine_id(root: &Path, config: &GuestConfig) -> io::Result<()> {
    let path = root.join("etc/machine-id");
    if let Ok(old) = fs::read_to_string(&path)
        && !matches!(old.trim(), "" | "uninitialized")
    {
        return Ok(());
    }
    replace(&path, format!("{}\n", config.machine_id).as_bytes(), 0o444)
}

/// What of the above an image must not have: contents instead of the files' own, nothing for those that do not belong in it.
pub(super) fn generalized(root: &Path, hostname: &str, files: &mut Replaced) {
    let text = |path: &Path| {
        fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?;
        fs::read_to_string(path).ok()
    };
    // machine-id(5): each first boot makes its own of an empty one.
    files.insert(root.join("etc/machine-id"), Some(Vec::new()));
    let path = root.join("etc/hostname");
    if text(&path).is_some_and(|text| text.trim_end() == hostname) {
        files.insert(path, None);
    }
    let path = root.join("etc/hosts");
    if let Some(hosts) = text(&path).filter(|text| text.lines().any(|line| line == BEGIN)) {
        let rest = without_block(&hosts);
        files.insert(path, Some(rest.into_bytes()).filter(|rest| !rest.is_empty()));
    }
    let path = root.join("etc/resolv.conf");
    if text(&path).is_some_and(|text| text.starts_with(RESOLV_MARK)) {
        files.insert(path, None);
    }
}

/// One configured file, directories above it included.
pub(super) fn file(root: &Path, file: &GuestFile) -> io::Result<()> {
    let path = root.join(file.path.trim_start_matches('/'));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let content = if file.base64 {
        &STANDARD.decode(&file.content).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?
    } else {
        file.content.as_bytes()
    };
    put(&path, content, file.mode & 0o7777, Some((file.uid, file.gid)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn config() -> GuestConfig {
        serde_json::from_value(serde_json::json!({
            "version": 1, "hostname": "box", "machine_id": "0123456789abcdef0123456789abcdef",
            "clock_unix_nanos": null, "resolvers": ["10.0.0.1", "fd00::1"], "search": ["vm"],
            "hosts": [{"address": "10.0.0.2", "names": ["peer.vm", "peer"]}],
            "ssh": {"host_key": "", "authorized_keys": []},
            "root": {"serial": "root", "fstype": "ext4", "grow": false},
        }))
        .unwrap()
    }

    #[test]
    fn the_images_hosts_stay_and_ours_are_replaced() {
        let mut config = config();
        let image = "127.0.0.1\tlocalhost # here\n10.9.9.9 theirs\n";
        let once = hosts_text(image, &config);
        assert!(once.starts_with(image));
        assert!(once.contains("10.0.0.2 peer.vm peer\n") && once.contains("127.0.1.1 box\n"));
        assert_eq!(hosts_text(&once, &config), once, "twice is once");
        config.hosts.clear();
        config.hostname = "theirs".into();
        assert_eq!(hosts_text(&once, &config), image, "nothing of ours is left");
        assert!(hosts_text("", &config).contains("127.0.0.1 localhost\n"));
    }

    #[test]
    fn links_are_replaced_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        let outside = root.path().join("outside");
        fs::write(&outside, "precious").unwrap();
        symlink(&outside, etc.join("resolv.conf")).unwrap();
        symlink("../run/systemd/resolve/stub-resolv.conf", etc.join("hosts")).unwrap();
        resolv_conf(root.path(), &config()).unwrap();
        hosts(root.path(), &config()).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
        let text = fs::read_to_string(etc.join("resolv.conf")).unwrap();
        assert!(text.ends_with("nameserver 10.0.0.1\nnameserver fd00::1\nsearch vm\n"), "{text}");
        assert!(fs::read_to_string(etc.join("hosts")).unwrap().contains("peer.vm"));
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 2, "no drafts are left");
    }

    #[test]
    fn a_machine_id_is_given_only_where_there_is_none() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let path = root.path().join("etc/machine-id");
        for none in [None, Some(""), Some("uninitialized\n")] {
            let _ = fs::remove_file(&path);
            if let Some(text) = none {
                fs::write(&path, text).unwrap();
            }
            machine_id(root.path(), &config()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap().trim(), config().machine_id);
        }
        let _ = fs::remove_file(&path);
        fs::write(&path, "feedfeedfeedfeedfeedfeedfeedfeed\n").unwrap();
        machine_id(root.path(), &config()).unwrap();
        assert!(fs::read_to_string(&path).unwrap().starts_with("feed"));
    }

    #[test]
    fn an_image_has_nothing_of_one_vm() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join("etc").join(name);
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(at("hosts"), "10.0.0.1 mine\n").unwrap();
        let config = config();
        hostname(root.path(), &config).unwrap();
        hosts(root.path(), &config).unwrap();
        resolv_conf(root.path(), &config).unwrap();
        machine_id(root.path(), &config).unwrap();
        let mut files = Replaced::new();
        generalized(root.path(), &config.hostname, &mut files);
        assert!(!config.resolvers.is_empty());
        let wanted = [
            (at("hosts"), Some(b"10.0.0.1 mine\n".to_vec())),
            (at("machine-id"), Some(Vec::new())),
            (at("hostname"), None),
            (at("resolv.conf"), None),
        ];
        assert_eq!(files, Replaced::from(wanted));

        // What the user has made of them stays.
        for name in ["hostname", "resolv.conf", "hosts"] {
            fs::write(at(name), "theirs\n").unwrap();
        }
        let mut files = Replaced::new();
        generalized(root.path(), &config.hostname, &mut files);
        assert_eq!(files, Replaced::from([(at("machine-id"), Some(Vec::new()))]));
    }

    #[test]
    fn files_get_owner_and_mode() {
        let root = tempfile::tempdir().unwrap();
        let mut wanted = GuestFile {
            path: "/a/b/c".into(),
            mode: 0o4750,
            uid: 12,
            gid: 34,
            content: "x".into(),
            base64: false,
        };
        file(root.path(), &wanted).unwrap();
        file(root.path(), &wanted).unwrap();
        let path = root.path().join("a/b/c");
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o4750, 12, 34));
        assert_eq!(fs::read(&path).unwrap(), b"x");
        (wanted.base64, wanted.content) = (true, "AP+AwyhA/w==".into());
        file(root.path(), &wanted).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"\x00\xff\x80\xc3\x28\x40\xff");
        wanted.content = "not Base64".into();
        assert!(file(root.path(), &wanted).is_err());
        assert_eq!(fs::read(&path).unwrap().len(), 7, "the former content stays");
        assert_eq!(fs::read_dir(root.path().join("a/b")).unwrap().count(), 1, "no drafts are left");
    }
}
