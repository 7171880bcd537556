//! A resolver that answers from a table in memory: what tests use in place of a component.

use std::{
    collections::HashMap,
    error::Error,
    net::IpAddr,
    sync::{PoisonError, RwLock},
};

use async_trait::async_trait;

use crate::{Answer, Name, Question, Record, RecordData, Resolver};

/// Names and their records, changeable at any time.
#[derive(Debug, Default)]
pub struct Table {
    zones: Vec<Name>,
    names: RwLock<HashMap<Name, Vec<Record>>>,
}

impl Table {
    /// An empty table for these zones.
    pub fn new(zones: impl IntoIterator<Item = Name>) -> Self {
        Self { zones: zones.into_iter().collect(), names: RwLock::default() }
    }

    /// Adds a record.
    pub fn add(&self, record: Record) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.entry(record.name.clone()).or_default().push(record);
    }

    /// Adds an address and the way back from it.
    pub fn add_host(&self, name: &Name, address: IpAddr, ttl: u32) {
        let data = match address {
            IpAddr::V4(address) => RecordData::A(address),
            IpAddr::V6(address) => RecordData::Aaaa(address),
        };
        self.add(Record { name: name.clone(), ttl, data });
        self.add(Record { name: Name::from(address), ttl, data: RecordData::Ptr(name.clone()) });
    }

    /// Forgets all records of a name.
    pub fn remove(&self, name: &Name) {
        self.names.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

#[async_trait]
impl Resolver for Table {
    fn zones(&self) -> Vec<Name> {
        self.zones.clone()
    }

    async fn resolve(&self, question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(records) = names.get(&question.name) {
            return Ok(Answer::Records(records.clone()));
        }
        // A name below which there are names exists (RFC 4592, section 2.2.2).
        let exists = names.keys().any(|name| question.name.zone_of(name));
        Ok(if exists { Answer::NoData } else { Answer::NxDomain })
    }
}
