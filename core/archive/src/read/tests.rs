//! Archives as tars of all times have written them, and damaged ones.

use super::*;

const FILE: EntryType = EntryType::Regular;

fn archive(members: &[(&[u8], &[u8], EntryType)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content, kind) in members {
        let records = [("SCHILY.xattr.user.x", &b"\n11 path=up\n"[..]), ("path", *name)];
        builder.append_pax_extensions(records).unwrap();
        let mut header = Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o100_755);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn records_are_as_long_as_they_say() {
    let long = b"n\n/\xff".repeat(60);
    let content = vec![7; 1025];
    let archive = archive(&[(&long, &content, FILE), (b"a\n12 b=c\n", b"", FILE), (b"x", b"y", FILE)]);
    let mut members = Members::new(archive.as_slice());
    let mut found = Vec::new();
    while let Some(member) = members.next_member().unwrap() {
        assert_eq!((member.kind, member.mode), (FILE, 0o755));
        // Content need not be read.
        if member.name == long {
            let mut read = Vec::new();
            members.read_to_end(&mut read).unwrap();
            assert_eq!(read, content);
        }
        found.push(member.name);
    }
    assert_eq!(found, [long, b"a\n12 b=c\n".to_vec(), b"x".to_vec()]);
}

#[test]
fn times_before_1970_as_gnu_tar_writes_them() {
    let mut header = Header::new_gnu();
    header.set_entry_type(FILE);
    header.set_size(0);
    header.set_mode(0o644);
    // `touch -d @-5 f; tar --format=gnu -c f`.
    let mut time = [0xff; 12];
    time[11] = 0xfb;
    header.as_gnu_mut().unwrap().mtime = time;
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, "f", &b""[..]).unwrap();
    let archive = builder.into_inner().unwrap();
    let member = Members::new(archive.as_slice()).next_member().unwrap().unwrap();
    assert_eq!(member.modified, TimeSpec::new(-5, 0));
}

#[test]
fn all_of_the_end_mark_is_read() {
    let whole = archive(&[(b"a", b"content", FILE)]);
    let mut source = whole.as_slice();
    let mut members = Members::new(&mut source);
    while members.next_member().unwrap().is_some() {}
    assert!(source.is_empty(), "{} bytes are left", source.len());
}

#[test]
fn damage_is_an_error_and_never_an_end() {
    let whole = archive(&[(b"a", b"content", FILE)]);
    let read = |archive: &[u8]| {
        let mut members = Members::new(archive);
        while members.next_member()?.is_some() {}
        io::Result::Ok(())
    };
    read(&whole).unwrap();
    // Up to the first block of the end mark.
    for length in 0..whole.len() - BLOCK as usize {
        assert!(read(&whole[..length]).is_err(), "cut off at {length}");
    }
    for at in [0, 100, 130, BLOCK as usize, 2 * BLOCK as usize + 20] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x15;
        assert!(read(&damaged).is_err(), "byte {at}");
    }
}

#[test]
fn times_have_their_nanoseconds() {
    for (text, seconds, nanos) in [
        ("12", 12, 0),
        ("12.5", 12, 500_000_000),
        ("12.000000005", 12, 5),
        ("12.0000000059", 12, 5),
        ("-0.5", -1, 500_000_000),
        ("-2.75", -3, 250_000_000),
        ("-3", -3, 0),
    ] {
        assert_eq!(time(text), Some(TimeSpec::new(seconds, nanos)), "{text}");
    }
    for text in ["", "x", "1.x", "--1", "1.-5", "99999999999999999999"] {
        assert_eq!(time(text), None, "{text}");
    }
}

/// Appends a member of V7's format with ustar's mark, after a change of its header; the sum is put right.
fn put(to: &mut Vec<u8>, kind: u8, name: &str, content: &[u8], change: impl Fn(&mut [u8; 512])) {
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[156] = kind;
    header.set_mode(0o644);
    header.set_uid(3);
    header.set_gid(4);
    header.set_mtime(5);
    header.set_size(content.len() as u64);
    change(header.as_mut_bytes());
    header.set_cksum();
    to.extend_from_slice(header.as_bytes());
    to.extend_from_slice(content);
    to.resize(to.len() + padding(content.len() as u64) as usize, 0);
}

fn as_is(_: &mut [u8; 512]) {}

/// Appends records for what follows (`x`, `X`) or for all (`g`).
fn put_records(to: &mut Vec<u8>, kind: u8, records: &[(&str, &str)]) {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|length| *length == rest + length.to_string().len()).unwrap();
        content.extend_from_slice(format!("{length} {key}={value}\n").as_bytes());
    }
    put(to, kind, "records", &content, as_is);
}

/// All members to the end mark, which is put behind them.
fn members(archive: &[u8]) -> io::Result<Vec<Member>> {
    let whole = [archive, &[0; 2 * BLOCK as usize]].concat();
    let mut members = Members::new(whole.as_slice());
    let mut all = Vec::new();
    while let Some(member) = members.next_member()? {
        all.push(member);
    }
    Ok(all)
}

fn names(archive: &[u8]) -> Vec<String> {
    let members = members(archive).unwrap();
    members.into_iter().map(|member| String::from_utf8(member.name).unwrap()).collect()
}

#[test]
fn blank_numbers_are_zero() {
    // Mode, owner, group, size, time.
    for blank in [0, b' '] {
        let mut archive = Vec::new();
        put(&mut archive, b'0', "blank", b"", |header| header[100..148].fill(blank));
        put(&mut archive, b'0', "next", b"", as_is);
        let found = members(&archive).unwrap();
        let [member, next] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((member.mode, member.owner, member.size), (0, Some((0, 0)), 0));
        assert_eq!(member.modified, TimeSpec::new(0, 0));
        assert_eq!((next.mode, next.owner), (0o644, Some((3, 4))));
    }
    let mut archive = Vec::new();
    put(&mut archive, b'0', "none", b"", |header| header[124] = b'x');
    members(&archive).unwrap_err();
}

#[test]
fn sums_may_be_of_signed_bytes() {
    let mut archive = Vec::new();
    put(&mut archive, b'0', "\u{e4}\u{f6}", b"", as_is);
    let sum: i64 =
        archive[..148].iter().chain(&archive[156..]).map(|byte| i64::from(byte.cast_signed())).sum();
    let sum = sum + 8 * i64::from(b' ');
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(names(&archive), ["\u{e4}\u{f6}"]);
    archive[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 1).as_bytes());
    members(&archive).unwrap_err();
}

#[test]
fn forms_of_other_tars_are_known() {
    let mut archive = Vec::new();
    put(&mut archive, b'V', "label", b"", |header| header[124..136].fill(0));
    put(&mut archive, b'V', "label", b"of some size", as_is);
    // Solaris.
    put_records(&mut archive, b'X', &[("path", "solaris")]);
    put(&mut archive, b'0', "short", b"", as_is);
    // star: the prefix may fill its field, behind which two times are.
    put(&mut archive, b'0', "star", b"", |header| {
        header[345..476].fill(b'p');
        header[476..500].copy_from_slice(b"00000000001 00000000002 ");
        header[508..].copy_from_slice(b"tar\0");
    });
    // GNU tar: a directory with the names in it.
    put(&mut archive, b'D', "incremental/", &b"Yname\0".repeat(100), as_is);
    put(&mut archive, b'0', "last", b"", as_is);
    let star = format!("{}/star", "p".repeat(131));
    assert_eq!(names(&archive), ["solaris", &star, "incremental/", "last"]);
    assert_eq!(members(&archive).unwrap()[2].kind, EntryType::Directory);
}

#[test]
fn what_is_said_of_all_holds_until_something_else_is() {
    let mut archive = Vec::new();
    put_records(&mut archive, b'g', &[("uid", "70000"), ("mtime", "77.5"), ("SCHILY.xattr.user.a", "all")]);
    put(&mut archive, b'0', "all", b"", as_is);
    put_records(&mut archive, b'x', &[("uid", "8"), ("SCHILY.xattr.user.a", "own")]);
    put(&mut archive, b'0', "own", b"", as_is);
    // An empty value takes back, here of one member, then of all.
    put_records(&mut archive, b'x', &[("uid", "")]);
    put(&mut archive, b'0', "taken", b"", as_is);
    put(&mut archive, b'0', "again", b"", as_is);
    put_records(&mut archive, b'g', &[("mtime", "")]);
    put(&mut archive, b'0', "last", b"", as_is);
    let found: Vec<_> = members(&archive)
        .unwrap()
        .into_iter()
        .map(|member| {
            let xattrs: Vec<_> =
                member.xattrs.iter().map(|(_, value)| value.escape_ascii().to_string()).collect();
            let name = String::from_utf8(member.name).unwrap();
            (name, member.owner.unwrap(), member.modified.tv_sec(), xattrs.concat())
        })
        .collect();
    let wanted = [
        ("all", (70_000, 4), 77, "all"),
        ("own", (8, 4), 77, "own"),
        ("taken", (3, 4), 77, "all"),
        ("again", (70_000, 4), 77, "all"),
        ("last", (70_000, 4), 5, "all"),
    ];
    assert_eq!(
        found,
        wanted.map(|(name, owner, time, xattrs)| (name.to_owned(), owner, time, xattrs.to_owned()))
    );
}

#[test]
fn what_is_said_of_all_is_not_kept_beyond_a_bound() {
    let large = "x".repeat(40 << 10);
    // The same one again and again is one, a comment is none.
    let mut archive = Vec::new();
    for _ in 0..4 {
        put_records(&mut archive, b'g', &[("SCHILY.xattr.user.a", &large), ("comment", &large)]);
        put(&mut archive, b'0', "file", b"", as_is);
    }
    assert_eq!(members(&archive).unwrap().len(), 4);
    for key in ["SCHILY.xattr.user.b", "linkpath"] {
        let mut more = archive.clone();
        put_records(&mut more, b'g', &[(key, &large)]);
        put(&mut more, b'0', "file", b"", as_is);
        assert!(members(&more).unwrap_err().to_string().contains("64 KiB"), "{key}");
    }
    // Nor are many small ones.
    let keys: Vec<_> = (0..2000).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
    let records: Vec<_> = keys.iter().map(|key| (key.as_str(), "")).collect();
    let mut archive = Vec::new();
    put_records(&mut archive, b'g', &records);
    put(&mut archive, b'0', "file", b"", as_is);
    assert!(members(&archive).unwrap_err().to_string().contains("64 KiB"));
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
        ("GNU.sparse.name", "sparse"),
        ("GNU.sparse.realsize", "700"),
    ];
    let taken = said.map(|(key, _)| (key, ""));
    let mut archive = Vec::new();
    put_records(&mut archive, b'x', &[said, taken].concat());
    put(&mut archive, b'0', "file", b"content", as_is);
    put(&mut archive, b'0', "next", b"", as_is);
    let found = members(&archive).unwrap();
    assert_eq!(names(&archive), ["file", "next"]);
    let file = &found[0];
    assert_eq!((file.owner, file.size, file.modified), (Some((3, 4)), 7, TimeSpec::new(5, 0)));
    assert!(file.parts.is_none() && file.link.is_empty(), "{file:?}");
    // An empty attribute is one.
    let mut archive = Vec::new();
    put_records(&mut archive, b'x', &[("SCHILY.xattr.user.empty", "")]);
    put(&mut archive, b'0', "file", b"", as_is);
    assert_eq!(members(&archive).unwrap()[0].xattrs, [(b"user.empty".to_vec(), Vec::new())]);
}

#[test]
fn sparse_files_have_a_size_and_a_version_that_is_known() {
    for records in [
        &[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")][..],
        &[("GNU.sparse.map", "0,0")],
        &[("GNU.sparse.major", "2"), ("GNU.sparse.realsize", "0")],
        &[("GNU.sparse.realsize", "5"), ("GNU.sparse.major", "1"), ("GNU.sparse.size", "")],
    ] {
        let mut archive = Vec::new();
        put_records(&mut archive, b'x', records);
        put(&mut archive, b'0', "file", b"0\n", as_is);
        assert!(members(&archive).unwrap_err().to_string().contains("sparse file"), "{records:?}");
    }
    // All hole.
    let mut archive = Vec::new();
    put_records(&mut archive, b'x', &[("GNU.sparse.size", "9"), ("GNU.sparse.map", "")]);
    put(&mut archive, b'0', "hole", b"", as_is);
    let found = members(&archive).unwrap();
    assert_eq!((found[0].size, found[0].parts.as_deref()), (9, Some(&[][..])));
}

#[test]
fn owners_are_such_as_there_can_be() {
    for (id, owner) in
        [(u64::from(u32::MAX) - 1, Some(u32::MAX - 1)), (u64::from(u32::MAX), None), (1 << 32, None)]
    {
        for key in ["uid", "gid"] {
            let mut told = Vec::new();
            put_records(&mut told, b'x', &[(key, &id.to_string())]);
            put(&mut told, b'0', "file", b"", as_is);
            // Base-256.
            let mut header = Vec::new();
            put(&mut header, b'0', "file", b"", |block| {
                let at = if key == "uid" { 108 } else { 116 };
                block[at..at + 8].copy_from_slice(&(id | 1 << 63).to_be_bytes());
            });
            let wanted = owner.map(|owner| if key == "uid" { (owner, 4) } else { (3, owner) });
            for archive in [told, header] {
                assert_eq!(members(&archive).unwrap()[0].owner, wanted, "{key} {id}");
            }
        }
    }
}
