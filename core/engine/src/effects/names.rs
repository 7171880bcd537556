//! Records of the name service that plugins planned: in memory, for they are void without the daemon. Journals have them, and a
//! daemon that takes a VM over puts them back.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vm_types::{Effect, EffectId, Handle, Observed};

/// A record as it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameRecord {
    /// Lower case, without the last dot.
    pub name: String,
    /// The type's number (RFC 1035).
    pub record_type: u16,
    /// How long it may be remembered.
    pub ttl_seconds: u32,
    /// In text form (RFC 1035).
    pub data: String,
}

/// All records. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct NameTable(Arc<Mutex<BTreeMap<EffectId, NameRecord>>>);

impl NameTable {
    /// The records of a name, of all types.
    pub fn of(&self, name: &str) -> Vec<NameRecord> {
        self.lock().values().filter(|record| record.name == name).cloned().collect()
    }

    pub(crate) fn add(&self, effect: &Effect) {
        if let Effect::NameRecord { name, record_type, ttl_seconds, data, .. } = effect {
            let record = NameRecord {
                name: name.clone(),
                record_type: *record_type,
                ttl_seconds: *ttl_seconds,
                data: data.clone(),
            };
            self.lock().insert(effect.id(), record);
        }
    }

    pub(super) fn observe(&self, effect: &Effect) -> Observed {
        match self.lock().contains_key(&effect.id()) {
            true => Observed::Present(Handle::None),
            false => Observed::Absent,
        }
    }

    pub(super) fn remove(&self, effect: &Effect) {
        self.lock().remove(&effect.id());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<EffectId, NameRecord>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
