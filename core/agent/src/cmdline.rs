//! What the VMM's driver says on the kernel's command line.

use std::fs;

/// The value of `NAME=VALUE`, the last one if there are several.
pub(crate) fn value(name: &str) -> Option<String> {
    find(&fs::read_to_string("/proc/cmdline").unwrap_or_default(), name).map(ToOwned::to_owned)
}

fn find<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(name)?.strip_prefix('=')).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_name_counts() {
        let line = "console=ttyS0 vmd.drives=a,b vmd.drives.more=x quiet\n";
        assert_eq!(find(line, "vmd.drives"), Some("a,b"));
        assert_eq!(find(line, "drives"), None);
        assert_eq!(find(line, "quiet"), None);
    }
}
