//! Where a guest's HEAD points, read from the files of its `.git` as plain data: no name in them becomes a path.

/// How many symbolic references may follow one another, as git has it.
const DEPTH: usize = 5;

/// A guest's HEAD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Head {
    /// There is none, or it is nothing that this code knows.
    None,
    /// A branch without a commit.
    Unborn,
    /// A commit, by its name in lower-case hexadecimal digits.
    At(String),
}

/// Reads HEAD. `file` gives the content of a file by its path within `.git`; names of objects have `digits` digits.
pub(super) fn head(file: impl Fn(&[u8]) -> Option<Vec<u8>>, digits: usize) -> Head {
    let mut name = b"HEAD".to_vec();
    for _ in 0..=DEPTH {
        let Some(content) = file(&name) else {
            // HEAD itself has to be a file of its own.
            return match file(b"packed-refs").and_then(|refs| packed(&refs, &name, digits)) {
                Some(object) if name != b"HEAD" => Head::At(object),
                _ if name != b"HEAD" => Head::Unborn,
                _ => Head::None,
            };
        };
        let content = content.trim_ascii_end();
        if let Some(object) = object(content, digits) {
            return Head::At(object);
        }
        let Some(next) = content.strip_prefix(b"ref:").map(<[u8]>::trim_ascii_start) else {
            return Head::None;
        };
        if !next.starts_with(b"refs/") {
            return Head::None;
        }
        name = next.to_vec();
    }
    Head::None
}

fn object(text: &[u8], digits: usize) -> Option<String> {
    let named = text.len() == digits && text.iter().all(u8::is_ascii_hexdigit);
    // A name of nothing but zeros means no object.
    (named && text.iter().any(|digit| *digit != b'0'))
        .then(|| String::from_utf8_lossy(text).to_ascii_lowercase())
}

fn packed(refs: &[u8], name: &[u8], digits: usize) -> Option<String> {
    let lines = refs.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#"));
    lines.filter_map(|line| line.split_at_checked(digits)).find_map(|(named, rest)| {
        let found = rest.strip_prefix(b" ")?.trim_ascii_end() == name;
        found.then(|| object(named, digits)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn read(files: &[(&str, &str)]) -> Head {
        let files: HashMap<_, _> = files.iter().copied().collect();
        let file = |name: &[u8]| {
            let text = *files.get(std::str::from_utf8(name).ok()?)?;
            Some(text.as_bytes().to_vec())
        };
        head(file, 40)
    }

    #[test]
    fn branches_loose_and_packed_and_detached() {
        let packed = format!("# pack-refs with: peeled\n{B} refs/heads/a\n{A} refs/heads/b\n^{B}\n");
        let at_a = Head::At(A.to_owned());
        assert_eq!(read(&[("HEAD", &format!("{}\n", A.to_uppercase()))]), at_a);
        assert_eq!(read(&[("HEAD", "ref: refs/heads/a\n"), ("refs/heads/a", A)]), at_a);
        assert_eq!(read(&[("HEAD", "ref: refs/heads/b\n"), ("packed-refs", &packed)]), at_a);
        assert_eq!(
            read(&[("HEAD", "ref: refs/heads/a\n"), ("refs/heads/a", A), ("packed-refs", &packed)]),
            at_a,
            "a file is newer than packed-refs"
        );
        assert_eq!(read(&[("HEAD", "ref: refs/heads/new\n"), ("packed-refs", &packed)]), Head::Unborn);
    }

    #[test]
    fn what_is_no_head_is_none() {
        let zeros = "0".repeat(40);
        for content in ["", "ref: ../../etc/passwd", "ref: HEAD", "aaaa", &A[1..], &format!("{A}a"), &zeros] {
            assert_eq!(read(&[("HEAD", content)]), Head::None, "{content:?}");
        }
        assert_eq!(read(&[]), Head::None);
        let round = [("HEAD", "ref: refs/heads/a"), ("refs/heads/a", "ref: refs/heads/a")];
        assert_eq!(read(&round), Head::None, "a circle ends");
    }
}
