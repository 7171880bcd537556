//! systemd units of the configuration.
//!
//! A unit's file lies in `/etc/systemd/system`; what makes systemd start it, the link in a target's `.wants` directory, lies
//! in `/run/systemd/system` and so is made anew at each boot. Files of ours are listed in [`LIST`], so that those which a
//! configuration has no more go, and those of the image stay.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use vm_types::guest::config::Unit;

use vm_archive::Replaced;

use super::etc;

/// Where units are.
const UNITS: &str = "etc/systemd/system";
/// Where they are for this boot only.
const RUN: &str = "run/systemd/system";
/// Names of our units, one a line. systemd takes no notice of it.
const LIST: &str = "etc/systemd/system/.vmd-units";
/// What wants a unit that does not say.
const DEFAULT: &str = "multi-user.target";
/// systemd.unit(5), without those that only the kernel's state makes.
const KINDS: [&str; 6] = ["service", "socket", "timer", "mount", "path", "target"];

/// What the guest's init is, as far as units are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Systemd {
    /// Another one.
    None,
    /// Not running yet; it will read what is there then.
    Coming,
    /// Running.
    Running,
}

/// What has changed, by name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// New ones.
    added: Vec<String>,
    /// Those with another content.
    changed: Vec<String>,
    /// Those that are no longer there.
    removed: Vec<String>,
}

/// Writes units, removes those that were ours and are not wanted any more, and tells a systemd that runs; the result says
/// what did not work.
pub(super) fn apply(root: &Path, units: &[Unit], systemd: Systemd) -> Vec<String> {
    let mut warnings = Vec::new();
    if systemd == Systemd::None && !units.is_empty() {
        let names: Vec<_> = units.iter().map(|unit| unit.name.as_str()).collect();
        warnings.push(format!("units {}: not started, the image's init is not systemd", names.join(", ")));
    }
    let wanted: &[Unit] = if systemd == Systemd::None { &[] } else { units };
    let changes = write(root, wanted, &mut warnings);
    if systemd == Systemd::Running {
        warnings.extend(tell(&changes).err());
    }
    warnings
}

/// Our units do not belong in an image.
pub(super) fn generalized(root: &Path, files: &mut Replaced) {
    let list = root.join(LIST);
    let Ok(text) = fs::read_to_string(&list) else { return };
    for name in text.lines().filter(|name| is_unit(name)) {
        files.insert(root.join(UNITS).join(name), None);
    }
    files.insert(list, None);
}

fn write(root: &Path, units: &[Unit], warnings: &mut Vec<String>) -> Changes {
    let mut changes = Changes::default();
    let list = root.join(LIST);
    let former: BTreeSet<String> = match fs::read_to_string(&list) {
        Ok(text) => text.lines().map(str::to_owned).filter(|name| is_unit(name)).collect(),
        Err(_) if units.is_empty() => return changes,
        Err(_) => BTreeSet::new(),
    };
    let directory = root.join(UNITS);
    let mut usable = Vec::new();
    for unit in units {
        let path = directory.join(&unit.name);
        if !is_unit(&unit.name) {
            warnings.push(format!(
                "unit {:?}: that is no unit's name; one ends in .service, for example",
                unit.name
            ));
        } else if !former.contains(&unit.name) && path.symlink_metadata().is_ok() {
            warnings.push(format!("unit {}: the image has one of this name, which stays", unit.name));
        } else {
            usable.push(unit);
        }
    }
    // Before the files: one that is not listed would be taken for the image's.
    let wanted: BTreeSet<String> = usable.iter().map(|unit| unit.name.clone()).collect();
    let write_list = |names: &BTreeSet<String>| {
        let text: String = names.iter().flat_map(|name| [name.as_str(), "\n"]).collect();
        etc::replace(&list, text.as_bytes(), 0o644)
    };
    let all = former.union(&wanted).cloned().collect();
    if let Err(error) = fs::create_dir_all(&directory).and_then(|()| write_list(&all)) {
        warnings.push(format!("units: /{UNITS}: {error}"));
        return changes;
    }
    for name in former.difference(&wanted) {
        disable(root, name);
        match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warnings.push(format!("unit {name}: {error}"));
            }
            _ => changes.removed.push(name.clone()),
        }
    }
    for unit in usable {
        let path = directory.join(&unit.name);
        let before = fs::read(&path).ok();
        let enabled = etc::replace(&path, unit.content.as_bytes(), 0o644).and_then(|()| {
            disable(root, &unit.name);
            enable(root, unit)
        });
        match (enabled, before) {
            (Err(error), _) => warnings.push(format!("unit {}: {error}", unit.name)),
            (Ok(()), None) => changes.added.push(unit.name.clone()),
            (Ok(()), Some(before)) if before != unit.content.as_bytes() => {
                changes.changed.push(unit.name.clone())
            }
            (Ok(()), Some(_)) => {}
        }
    }
    let result = if wanted.is_empty() { fs::remove_file(&list) } else { write_list(&wanted) };
    warnings.extend(result.err().map(|error| format!("units: /{LIST}: {error}")));
    changes
}

/// Whether a name is one of a unit that a configuration may have.
fn is_unit(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    let known = name.rsplit_once('.').is_some_and(|(stem, kind)| !stem.is_empty() && KINDS.contains(&kind));
    known && name.len() <= 255 && !name.starts_with('.') && name.bytes().all(plain)
}

/// Makes systemd start the unit in this boot. A template has no instance that could be started.
fn enable(root: &Path, unit: &Unit) -> io::Result<()> {
    if unit.name.contains("@.") {
        return Ok(());
    }
    for (target, relation) in wanted_by(&unit.content) {
        let directory = root.join(RUN).join(format!("{target}.{relation}"));
        fs::create_dir_all(&directory)?;
        match symlink(Path::new("/").join(UNITS).join(&unit.name), directory.join(&unit.name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Removes whatever [`enable`] has made.
fn disable(root: &Path, name: &str) {
    for entry in fs::read_dir(root.join(RUN)).into_iter().flatten().flatten() {
        if matches!(entry.path().extension().and_then(|kind| kind.to_str()), Some("wants" | "requires")) {
            let _ = fs::remove_file(entry.path().join(name));
        }
    }
}

/// Who pulls a unit in, and how, by its `[Install]` section (systemd.unit(5)).
fn wanted_by(content: &str) -> BTreeSet<(String, &'static str)> {
    let mut found = BTreeSet::new();
    let mut install = false;
    for line in content.lines().map(str::trim) {
        if line.starts_with('[') {
            install = line == "[Install]";
        } else if install && let Some((key, value)) = line.split_once('=') {
            let relation = match key.trim_end() {
                "WantedBy" => "wants",
                "RequiredBy" => "requires",
                _ => continue,
            };
            let names = value.split_ascii_whitespace().filter(|name| is_unit(name));
            found.extend(names.map(|name| (name.to_owned(), relation)));
        }
    }
    if found.is_empty() {
        found.insert((DEFAULT.to_owned(), "wants"));
    }
    found
}

/// Has a systemd that runs take notice.
fn tell(changes: &Changes) -> Result<(), String> {
    if *changes == Changes::default() {
        return Ok(());
    }
    let plain = |names: &[String]| -> Vec<String> {
        names.iter().filter(|name| !name.contains("@.")).cloned().collect()
    };
    // Before systemd forgets how to.
    let stopped = systemctl("stop", &plain(&changes.removed));
    systemctl("daemon-reload", &[])?;
    stopped?;
    systemctl("start", &plain(&changes.added))?;
    systemctl("restart", &plain(&changes.changed))
}

fn systemctl(verb: &str, names: &[String]) -> Result<(), String> {
    if names.is_empty() && verb != "daemon-reload" {
        return Ok(());
    }
    let output = Command::new("systemctl")
        // What becomes of the jobs is systemd's to tell.
        .args(["--no-block", verb, "--"])
        .args(names)
        .env_clear()
        .env("PATH", crate::ssh::DEFAULT_PATH)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("units: systemctl {verb}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("units: systemctl {verb}: {}", String::from_utf8_lossy(&output.stderr).trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn unit(name: &str, content: &str) -> Unit {
        Unit { name: name.into(), content: content.into() }
    }

    /// What systemd would find, as paths below the root.
    fn links(root: &Path) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for directory in fs::read_dir(root.join(RUN)).into_iter().flatten().flatten() {
            for link in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                let target = fs::read_link(link.path()).unwrap();
                assert_eq!(target, Path::new("/etc/systemd/system").join(link.file_name()));
                let place = link.path();
                found.insert(place.strip_prefix(root.join(RUN)).unwrap().to_str().unwrap().to_owned());
            }
        }
        found
    }

    #[test]
    fn units_are_written_enabled_and_go_with_the_configuration() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let units = [
            unit("web.service", "[Service]\nExecStart=/bin/true\n"),
            unit(
                "tick.timer",
                "[Timer]\nWantedBy=no.target\n[Install]\nWantedBy=timers.target  basic.target\nRequiredBy=a.service\n",
            ),
            unit("many@.service", "[Service]\n"),
        ];
        for _ in 0..2 {
            assert_eq!(apply(root.path(), &units, Systemd::Coming), Vec::<String>::new());
            let wanted = [
                "multi-user.target.wants/web.service",
                "timers.target.wants/tick.timer",
                "basic.target.wants/tick.timer",
                "a.service.requires/tick.timer",
            ];
            assert_eq!(links(root.path()), wanted.map(str::to_owned).into());
        }
        let meta = fs::metadata(at("etc/systemd/system/web.service")).unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o644);
        assert!(at("etc/systemd/system/many@.service").exists());

        let mut files = Replaced::new();
        generalized(root.path(), &mut files);
        let names = ["web.service", "tick.timer", "many@.service", ".vmd-units"];
        let wanted = names.map(|name| (at("etc/systemd/system").join(name), None));
        assert_eq!(files, Replaced::from(wanted));

        // The next boot: what was in /run is gone.
        fs::remove_dir_all(at("run")).unwrap();
        assert_eq!(apply(root.path(), &units[..1], Systemd::Coming), Vec::<String>::new());
        assert_eq!(links(root.path()), ["multi-user.target.wants/web.service".to_owned()].into());
        assert!(!at("etc/systemd/system/tick.timer").exists());
        assert_eq!(apply(root.path(), &[], Systemd::Coming), Vec::<String>::new());
        assert_eq!(fs::read_dir(at("etc/systemd/system")).unwrap().count(), 0, "nothing of ours is left");
        assert!(links(root.path()).is_empty());
    }

    #[test]
    fn changes_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let mut warnings = Vec::new();
        let mut write = |units: &[Unit]| write(root.path(), units, &mut warnings);
        let (a, b) = (unit("a.service", "1"), unit("b.service", "1"));
        assert_eq!(write(&[a.clone(), b.clone()]).added, ["a.service", "b.service"]);
        assert_eq!(write(&[a.clone(), b]), Changes::default());
        let changes = write(&[unit("a.service", "2")]);
        assert_eq!(
            changes,
            Changes { added: vec![], changed: vec!["a.service".into()], removed: vec!["b.service".into()] }
        );
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn the_images_units_and_masks_stay() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join(UNITS);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("theirs.service"), "theirs").unwrap();
        symlink("/dev/null", directory.join("masked.service")).unwrap();
        let units =
            [unit("theirs.service", "ours"), unit("masked.service", "ours"), unit("ours.service", "ours")];
        let warnings = apply(root.path(), &units, Systemd::Coming);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings.iter().all(|warning| warning.contains("which stays")));
        apply(root.path(), &[], Systemd::Coming);
        assert_eq!(fs::read_to_string(directory.join("theirs.service")).unwrap(), "theirs");
        assert!(directory.join("masked.service").is_symlink() && !directory.join("ours.service").exists());
    }

    #[test]
    fn names_lead_nowhere_else_and_without_systemd_nothing_is_written() {
        let root = tempfile::tempdir().unwrap();
        for bad in
            ["", ".service", "a/b.service", "../a.service", "a.conf", "a b.service", "a\n.service", "x"]
        {
            assert!(!is_unit(bad), "{bad}");
            let warnings = apply(root.path(), &[unit(bad, "")], Systemd::Coming);
            assert_eq!(warnings.len(), 1, "{warnings:?}");
        }
        assert!(is_unit("a@b:c\\x2d.service") && is_unit("home-dev.mount"));
        let warnings = apply(root.path(), &[unit("a.service", "")], Systemd::None);
        assert_eq!(warnings, ["units a.service: not started, the image's init is not systemd"]);
        assert!(!root.path().join("etc/systemd/system/a.service").exists());
    }
}
