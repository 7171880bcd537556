//! What a returning daemon has found and done, for people.

/// What was done to bring host and records together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// When, seconds since the Unix epoch.
    pub at: u64,
    /// VMs that are up and were taken over.
    pub adopted: usize,
    /// VMs of which something half done was undone.
    pub undone: usize,
    /// VMs that were removed, being half made or half deleted.
    pub removed: usize,
    /// Things on the host that nobody's journal had and that were reclaimed.
    pub reclaimed: usize,
    /// VMs, and things, that could not be recovered.
    pub failed: usize,
    /// VMs that are started again, with the reason.
    pub to_restart: Vec<(String, String)>,
    /// One for each of them.
    pub lines: Vec<String>,
}

impl Recovery {
    pub(super) fn new() -> Self {
        Self { at: vm_host::clock::unix_seconds(), ..Self::default() }
    }

    /// Whether all was as it should be.
    pub fn nothing_to_do(&self) -> bool {
        self.lines.is_empty()
    }

    /// In one line.
    pub fn summary(&self) -> String {
        let counts = [
            (self.adopted, "adopted"),
            (self.undone, "half done and undone"),
            (self.removed, "removed"),
            (self.reclaimed, "leftovers reclaimed"),
            (self.failed, "failed"),
            (self.to_restart.len(), "to be started again"),
        ];
        let told: Vec<_> = counts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if told.is_empty() { "nothing was left to do".to_owned() } else { told.join(", ") }
    }
}
