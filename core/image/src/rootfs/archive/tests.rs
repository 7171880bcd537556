//! What headers say, and take back.

use tar::{EntryType, Header as Written};

use super::*;

type Records<'a> = &'a [(&'a str, &'a str)];

/// Appends an entry of user 3, group 4 and time 5.
fn put(to: &mut Vec<u8>, kind: u8, name: &str, content: &[u8]) {
    let mut header = Written::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(EntryType::new(kind));
    header.set_mode(0o4755);
    header.set_uid(3);
    header.set_gid(4);
    header.set_mtime(5);
    header.set_size(content.len() as u64);
    header.set_cksum();
    to.extend_from_slice(header.as_bytes());
    to.extend_from_slice(content);
    to.resize(to.len().next_multiple_of(BLOCK), 0);
}

/// Appends records for what follows (`x`) or for all (`g`).
fn put_records(to: &mut Vec<u8>, kind: u8, records: Records<'_>) {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|length| *length == rest + length.to_string().len()).unwrap();
        content.extend_from_slice(format!("{length} {key}={value}\n").as_bytes());
    }
    put(to, kind, "records", &content);
}

/// All entries up to the end.
fn entries(archive: &[u8]) -> Result<Vec<Entry>, ImageError> {
    let mut archive = Archive::new(archive, true);
    let mut all = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        all.push(entry);
    }
    Ok(all)
}

/// The one of a file `file` that such records stand before.
fn file_of(records: Records<'_>, content: &[u8]) -> Result<Entry, ImageError> {
    let mut archive = Vec::new();
    put_records(&mut archive, b'x', records);
    put(&mut archive, b'0', "file", content);
    entries(&archive).map(|mut entries| entries.pop().unwrap())
}

#[test]
fn empty_values_take_back_what_was_said_before() {
    let said = [
        ("path", "said"),
        ("linkpath", "said"),
        ("uid", "8"),
        ("gid", "9"),
        ("mtime", "7"),
        ("size", "600"),
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "1"),
        ("GNU.sparse.name", "sparse"),
        ("GNU.sparse.realsize", "700"),
    ];
    let taken = said.map(|(key, _)| (key, ""));
    let file = file_of(&[said, taken].concat(), b"content").unwrap();
    assert_eq!((file.path.as_slice(), file.uid, file.gid, file.mtime), (&b"file"[..], 3, 4, (5, 0)));
    assert_eq!((file.size, file.segments), (7, vec![(0, 7)]));
    // A link's target is its header's.
    let mut archive = Vec::new();
    put_records(&mut archive, b'x', &[("linkpath", "said"), ("linkpath", "")]);
    put(&mut archive, b'2', "link", b"");
    assert_eq!(entries(&archive).unwrap()[0].kind, Kind::Symlink(Vec::new()));
    // An empty attribute is one.
    let file = file_of(&[("SCHILY.xattr.user.empty", "")], b"").unwrap();
    assert_eq!(file.xattrs, [(b"user.empty".to_vec(), Vec::new())]);
}

#[test]
fn empty_values_take_back_what_was_said_of_all() {
    let mut archive = Vec::new();
    put_records(&mut archive, b'g', &[("uid", "70000"), ("mtime", "77.5")]);
    put(&mut archive, b'0', "all", b"");
    put_records(&mut archive, b'x', &[("uid", "")]);
    put(&mut archive, b'0', "taken", b"");
    put(&mut archive, b'0', "again", b"");
    put_records(&mut archive, b'g', &[("mtime", "")]);
    put(&mut archive, b'0', "last", b"");
    let found: Vec<_> = entries(&archive).unwrap().iter().map(|entry| (entry.uid, entry.mtime)).collect();
    let all = (77, 500_000_000);
    assert_eq!(found, [(70_000, all), (3, all), (70_000, all), (70_000, (5, 0))]);
}

#[test]
fn sparse_files_have_a_size_and_a_version_that_is_known() {
    let map = [b"0\n".to_vec(), vec![0; 510]].concat();
    let cases: [(Records<'_>, &str); 6] = [
        (&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")], "no size"),
        (&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "5"), ("GNU.sparse.realsize", "")], "no size"),
        (&[("GNU.sparse.map", "0,512")], "no size"),
        (&[("GNU.sparse.offset", "0"), ("GNU.sparse.numbytes", "512")], "no size"),
        (&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "1"), ("GNU.sparse.realsize", "5")], "version"),
        (&[("GNU.sparse.major", "2"), ("GNU.sparse.realsize", "512")], "version"),
    ];
    for (records, says) in cases {
        let error = file_of(records, &map).unwrap_err();
        assert!(matches!(error, ImageError::CorruptArchive { .. }), "{records:?}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(says) && text.contains("file"), "{records:?}: {text}");
    }
    let known: [(Records<'_>, &[u8]); 2] = [
        (&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")], &map),
        // All hole.
        (&[("GNU.sparse.size", "9"), ("GNU.sparse.map", "")], b""),
    ];
    for (records, content) in known {
        let file = file_of(records, content).unwrap();
        assert_eq!((file.size, file.segments), (9, Vec::new()), "{records:?}");
    }
}

/// The kernel has no such owner: nobody could write the file.
#[test]
fn owners_that_there_cannot_be_are_refused_by_name() {
    for (key, at, what) in [("uid", 108, "an owner"), ("gid", 116, "a group")] {
        let told = file_of(&[(key, "4294967295")], b"");
        let mut archive = Vec::new();
        put(&mut archive, b'0', "file", b"");
        // Base-256, as GNU tar has what is too large for octal digits.
        archive[at..at + 8].copy_from_slice(&(u64::from(u32::MAX) | 1 << 63).to_be_bytes());
        let block: &mut [u8; BLOCK] = archive.as_mut_slice().try_into().unwrap();
        let mut header = Written::from_byte_slice(block).clone();
        header.set_cksum();
        let in_header = entries(header.as_bytes()).map(|mut entries| entries.pop().unwrap());
        for refused in [told, in_header] {
            let error = refused.unwrap_err();
            assert!(matches!(&error, ImageError::RefusedEntry { path, .. } if path == "file"), "{error:?}");
            assert!(error.to_string().contains(what), "{error}");
        }
        let file = file_of(&[(key, "4294967294")], b"").unwrap();
        assert_eq!(file.uid.max(file.gid), u32::MAX - 1);
    }
}
