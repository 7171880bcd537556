//! What a call may use. wasmtime's own limits are per memory; these are for all that one call instantiates.

use std::time::Duration;

use wasmtime::ResourceLimiter;

use crate::{error::Excess, hook::Hook};

/// What one call may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Processor time.
    pub processor: Duration,
    /// Time in all, waiting for the host included, of hooks that only think.
    pub wall: Duration,
    /// The same of those that act in the guest or look at a repository: post-start, config-change, probe.
    pub wall_live: Duration,
    /// The same of an import, which sends a repository; a call can have another.
    pub wall_import: Duration,
    /// Memory in bytes, all memories together.
    pub memory: usize,
    /// Table elements, all tables together.
    pub table_elements: usize,
    /// Core instances, memories and tables, each.
    pub instances: usize,
    /// Handles open at the same time.
    pub handles: usize,
    /// Bytes handed to the host in one of its functions.
    pub transfer: usize,
    /// Planned effects.
    pub effects: usize,
    /// Bytes in planned effects.
    pub effect_bytes: usize,
    /// Bytes in any one name, path or value that is not content.
    pub text: usize,
    /// Findings in a report, and offers.
    pub findings: usize,
    /// Bytes in log messages; more is dropped.
    pub log_bytes: usize,
    /// Messages; more is dropped.
    pub log_messages: usize,
    /// Bytes handed to the component in one answer.
    pub read: usize,
    /// Keys in one scope of the state.
    pub state_keys: usize,
    /// Bytes in one scope of the state.
    pub state_bytes: usize,
    /// Failures in a row that disable a plugin.
    pub failures: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            processor: Duration::from_millis(250),
            wall: Duration::from_secs(2),
            wall_live: Duration::from_secs(120),
            wall_import: Duration::from_secs(3600),
            memory: 64 << 20,
            table_elements: 100_000,
            instances: 32,
            handles: 1024,
            transfer: 20 << 20,
            effects: 1000,
            effect_bytes: 32 << 20,
            text: 4096,
            findings: 200,
            log_bytes: 64 << 10,
            log_messages: 200,
            read: 4 << 20,
            state_keys: 1000,
            state_bytes: 4 << 20,
            failures: 5,
        }
    }
}

impl Limits {
    /// How long a call of this hook may take in all.
    pub fn wall_of(&self, hook: Hook) -> Duration {
        match hook {
            Hook::PostStart | Hook::ConfigChange | Hook::Probe => self.wall_live,
            Hook::Import => self.wall_import,
            Hook::Preflight
            | Hook::ContributeGuest
            | Hook::ContributeMachine
            | Hook::PrepareHost
            | Hook::Cleanup
            | Hook::Doctor
            | Hook::Zones
            | Hook::Resolve => self.wall,
        }
    }
}

/// Counts memory and tables of one store.
#[derive(Debug)]
pub(crate) struct Totals {
    memory: usize,
    table: usize,
    most_memory: usize,
    most_table: usize,
    most_instances: usize,
    /// The first thing refused: the component sees only that its allocation failed.
    pub(crate) refused: Option<Excess>,
}

impl Totals {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            memory: 0,
            table: 0,
            most_memory: limits.memory,
            most_table: limits.table_elements,
            most_instances: limits.instances,
            refused: None,
        }
    }
}

impl ResourceLimiter for Totals {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.memory.saturating_add(desired.saturating_sub(current));
        if total > self.most_memory {
            self.refused.get_or_insert(Excess::Memory(self.most_memory));
            return Ok(false);
        }
        self.memory = total;
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table.saturating_add(desired.saturating_sub(current));
        if total > self.most_table {
            self.refused.get_or_insert(Excess::Table(self.most_table));
            return Ok(false);
        }
        self.table = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.most_instances
    }

    fn tables(&self) -> usize {
        self.most_instances
    }

    fn memories(&self) -> usize {
        self.most_instances
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_memories_share_one_limit() {
        let mut totals = Totals::new(&Limits { memory: 100, table_elements: 10, ..Limits::default() });
        assert!(totals.memory_growing(0, 60, None).unwrap());
        assert!(
            !totals.memory_growing(0, 60, None).unwrap(),
            "a second memory of the same size does not fit"
        );
        assert!(totals.memory_growing(60, 100, None).unwrap(), "a refused one takes nothing");
        assert_eq!(totals.refused, Some(Excess::Memory(100)));
        assert!(totals.table_growing(0, 10, None).unwrap());
        assert!(!totals.table_growing(0, usize::MAX, None).unwrap());
    }
}
