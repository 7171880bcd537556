//! What a build's directory keeps to itself: `.dockerignore`, and patterns in general
//! (<https://docs.docker.com/build/concepts/context/#dockerignore-files>).

use std::path::Path;

use glob::{MatchOptions, Pattern};

/// As a shell has it: a star ends at a slash.
const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Patterns in their order; the last one that fits decides.
#[derive(Debug, Default)]
pub(super) struct Ignore {
    /// Whether it takes back, and what it is about.
    rules: Vec<(bool, Pattern)>,
}

/// A pattern for paths that are relative to the directory. Two stars stand for any number of directories.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn pattern(text: &str) -> Result<Pattern, String> {
    let mut glob = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            // Two stars stand for directories also where a name goes on behind them: `**.pyc` is `**/*.pyc`. The crate wants them
            // to be alone.
            '*' if chars.as_str().starts_with('*') && (glob.is_empty() || glob.ends_with('/')) => {
                let rest = chars.as_str().trim_start_matches('*');
                chars = rest.chars();
                glob.push_str(if rest.is_empty() || rest.starts_with('/') { "**" } else { "**/*" });
            }
            // The crate takes away a character's meaning by brackets, not by a backslash.
            '\\' => match chars.next() {
                Some(next @ ('*' | '?' | '[' | ']')) => glob.extend(['[', next, ']']),
                Some(next) => glob.push(next),
                None => return Err("it ends in a backslash".into()),
            },
            '[' if chars.as_str().starts_with('^') => {
                chars.next();
                glob.push_str("[!");
            }
            c => glob.push(c),
        }
    }
    Pattern::new(&glob).map_err(|error| error.msg.to_owned())
}

/// Whether a path fits.
pub(super) fn fits(pattern: &Pattern, path: &Path) -> bool {
    pattern.matches_path_with(path, OPTIONS)
}

/// Whether a text is a pattern for more than one name.
pub(super) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '[', '\\'])
}

/// A cleaned pattern as the directory that it is certainly in, and what is a pattern.
pub(super) fn split(text: &str) -> (&str, &str) {
    let wild = text.find(['*', '?', '[', '\\']).unwrap_or(text.len());
    text[..wild].rfind('/').map_or(("", text), |slash| (&text[..slash], &text[slash + 1..]))
}

/// A path or pattern without what adds nothing to it; `None` where it climbs out by `..`.
pub(super) fn cleaned(text: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

impl Ignore {
    /// Reads a file of patterns.
    ///
    /// # Errors
    /// A line and what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut rules = Vec::new();
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (back, line) = line.strip_prefix('!').map_or((false, line), |rest| (true, rest.trim()));
            // Nothing is outside of the directory.
            let Some(clean) = cleaned(line).filter(|clean| !clean.is_empty()) else { continue };
            rules.push((back, pattern(&clean).map_err(|problem| (number + 1, problem))?));
        }
        Ok(Self { rules })
    }

    /// Whether a path is left out: it or a directory above it is named, and not taken back.
    pub(super) fn leaves_out(&self, path: &Path) -> bool {
        let named = |pattern: &Pattern| {
            path.ancestors().any(|above| !above.as_os_str().is_empty() && fits(pattern, above))
        };
        self.rules.iter().rev().find(|(_, pattern)| named(pattern)).is_some_and(|(back, _)| !back)
    }

    /// Whether something below a directory that is left out may have been taken back.
    pub(super) fn takes_back(&self) -> bool {
        self.rules.iter().any(|(back, _)| *back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        let text = "# notes\n*.log\n!keep.log\n/target/\n**/node_modules\ndocs/*\n!docs/README.md\nsrc/[^a]*.rs\na\\*b\n";
        let ignore = Ignore::parse(text).unwrap();
        for out in [
            "a.log",
            "target",
            "target/debug/x",
            "node_modules",
            "web/js/node_modules/a/b",
            "docs/a",
            "docs/sub/a",
            "src/b.rs",
            "a*b",
        ] {
            assert!(ignore.leaves_out(Path::new(out)), "{out}");
        }
        for stays in
            ["keep.log", "sub/a.log", "mytarget", "sub/target", "docs", "docs/README.md", "src/a.rs", "axb"]
        {
            assert!(!ignore.leaves_out(Path::new(stays)), "{stays}");
        }
        assert!(ignore.takes_back());
        assert_eq!(Ignore::parse("a\n[").unwrap_err().0, 2);
        assert!(!Ignore::parse("\n# nothing\n.\n../x\n").unwrap().leaves_out(Path::new("x")));
    }

    #[test]
    fn two_stars_before_a_name_are_any_directories() {
        let ignore = Ignore::parse("**.pyc\nsrc/**_test\n").unwrap();
        for out in ["a.pyc", "x/y/a.pyc", ".pyc", "src/a_test", "src/x/a_test"] {
            assert!(ignore.leaves_out(Path::new(out)), "{out}");
        }
        for stays in ["a.py", "a_test", "src/test"] {
            assert!(!ignore.leaves_out(Path::new(stays)), "{stays}");
        }
    }

    #[test]
    fn paths_are_cleaned_and_never_climb() {
        assert_eq!(cleaned("/a/./b//c/"), Some("a/b/c".into()));
        assert_eq!(cleaned("a/../b"), Some("b".into()));
        assert_eq!(cleaned("./"), Some(String::new()));
        assert_eq!(cleaned("a/../../b"), None);
    }
}
