//! Interfaces `directory` and `resolver`: the name service's view.

use wasmtime::component::Resource;

use super::{Call, QueryHandle, Vms};
use crate::bindings::vm::plugin::directory;

/// One question to a component of world `dns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Lower case, without the last dot.
    pub name: String,
    /// The type's number.
    pub query_type: u16,
    /// The class's number.
    pub query_class: u16,
    /// The VM that asks; none for the host.
    pub asker: Option<String>,
}

impl Call {
    fn query(&self) -> wasmtime::Result<&Query> {
        self.query.as_ref().ok_or_else(|| wasmtime::Error::msg("nobody asks"))
    }
}

impl directory::Host for Call {}

impl directory::HostVms for Call {
    fn names(&mut self, _: Resource<Vms>) -> wasmtime::Result<Vec<String>> {
        Ok(self.directory.as_ref().map(|directory| directory.names()).unwrap_or_default())
    }

    fn addresses(&mut self, _: Resource<Vms>, name: String) -> wasmtime::Result<Vec<String>> {
        let addresses =
            self.directory.as_ref().map(|directory| directory.addresses(&name)).unwrap_or_default();
        Ok(addresses.iter().map(ToString::to_string).collect())
    }

    fn name_of(&mut self, _: Resource<Vms>, address: String) -> wasmtime::Result<Option<String>> {
        let address = address.parse().ok();
        Ok(self.directory.as_ref().zip(address).and_then(|(directory, address)| directory.name_of(address)))
    }

    fn drop(&mut self, _: Resource<Vms>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl directory::HostQuery for Call {
    fn name(&mut self, _: Resource<QueryHandle>) -> wasmtime::Result<String> {
        Ok(self.query()?.name.clone())
    }

    fn query_type(&mut self, _: Resource<QueryHandle>) -> wasmtime::Result<u16> {
        Ok(self.query()?.query_type)
    }

    fn query_class(&mut self, _: Resource<QueryHandle>) -> wasmtime::Result<u16> {
        Ok(self.query()?.query_class)
    }

    fn asker(&mut self, _: Resource<QueryHandle>) -> wasmtime::Result<Option<String>> {
        Ok(self.query()?.asker.clone())
    }

    fn drop(&mut self, _: Resource<QueryHandle>) -> wasmtime::Result<()> {
        Ok(())
    }
}
