//! Which paths of a guest may be paths of the host.
//!
//! Git keeps its own directory out of trees under every name that some filesystem takes for `.git`, as what is in it (hooks,
//! configuration) is run. What is written to a host's tree without git's help is held to the same rules here.

use vm_types::guest::files::is_within;

/// The longest component that Linux takes, in bytes.
const COMPONENT: usize = 255;
/// The longest path that is taken, in bytes.
const PATH: usize = 4095;

/// Whether a path can exist below a top at all.
pub(super) fn is_path(path: &[u8]) -> bool {
    is_within(path)
        && path.len() <= PATH
        && !path.contains(&0)
        && path.split(|byte| *byte == b'/').all(|part| part.len() <= COMPONENT)
}

/// The end of the first component that is git's own directory to somebody: whatever is there, and below, stays in the guest.
pub(super) fn git_directory(path: &[u8]) -> Option<usize> {
    let mut end = 0;
    for part in path.split(|byte| *byte == b'/') {
        end += part.len();
        if is_dot_git(part) {
            return Some(end);
        }
        end += 1;
    }
    None
}

/// Whether a filesystem somewhere takes a name for `.git`.
fn is_dot_git(name: &[u8]) -> bool {
    // All paths of a tree are looked at, many times, and nearly all of them need no copy.
    if name.is_ascii() { is_plain_dot_git(name) } else { is_plain_dot_git(&without_ignorable(name)) }
}

fn is_plain_dot_git(plain: &[u8]) -> bool {
    // NTFS knows short names and streams, and drops dots and spaces at the end.
    let stem = plain.split(|byte| matches!(byte, b':' | b'\\')).next().unwrap_or_default();
    let length = stem.iter().rposition(|byte| !matches!(byte, b'.' | b' ')).map_or(0, |last| last + 1);
    let stem = stem.get(..length).unwrap_or_default();
    // A backslash separates there.
    let behind = plain.iter().position(|byte| *byte == b'\\').and_then(|at| plain.get(at + 1..));
    [&b".git"[..], b"git~1"].iter().any(|own| stem.eq_ignore_ascii_case(own))
        || behind.is_some_and(is_plain_dot_git)
}

/// A name as HFS+ compares it: it does not see these code points.
fn without_ignorable(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        let seen = chunk.valid().chars().filter(|point| {
            !matches!(point, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}')
        });
        for point in seen {
            plain.extend_from_slice(point.encode_utf8(&mut [0; 4]).as_bytes());
        }
        plain.extend_from_slice(chunk.invalid());
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::shown;

    #[test]
    fn names_that_some_filesystem_takes_for_git() {
        for path in [
            &b".git"[..],
            b".git/config",
            b"a/.GIT/hooks/post-checkout",
            b"a/b/.Git",
            b"git~1",
            b"a/GIT~1/x",
            b".git. . ",
            b".git::$INDEX_ALLOCATION/x",
            b".git\\hooks",
            b"a\\.git\\hooks",
            b".g\xe2\x80\x8cit/x",
            b"\xef\xbb\xbf.git",
        ] {
            assert!(git_directory(path).is_some(), "{}", shown(path));
        }
        for path in [
            &b".gitignore"[..],
            b".gitmodules",
            b"git",
            b"a/.github/x",
            b"git~2",
            b"x.git",
            b"a.git/b",
            b".gi\xfft",
            b"..git",
        ] {
            assert_eq!(git_directory(path), None, "{}", shown(path));
        }
        assert_eq!(git_directory(b"vendor/.git/config"), Some(11));
    }

    #[test]
    fn paths_that_lead_nowhere_else() {
        let long = [b'a'; 256];
        for path in [&b""[..], b"/a", b"a/", b"a//b", b"a/../b", b".", b"./a", b"..", b"a\0b", &long] {
            assert!(!is_path(path), "{}", shown(path));
        }
        for path in [&b"a"[..], b"-a", b"a b/\n", b"...", b"\xff/\xfe"] {
            assert!(is_path(path), "{}", shown(path));
        }
    }
}
