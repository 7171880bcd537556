//! Names of hosts, by the host's own resolver, with failures that can be told from others.

use std::{error::Error, io, iter};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// A host's name without an address.
#[derive(Debug, thiserror::Error)]
#[error("{host} has no address")]
struct Unresolved {
    host: String,
    source: io::Error,
}

/// Asks getaddrinfo(3).
#[derive(Debug)]
pub(super) struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            // The port is put in by whoever connects.
            let found = tokio::net::lookup_host((host.as_str(), 0)).await.map(Iterator::collect::<Vec<_>>);
            match found {
                Ok(found) => Ok(Box::new(found.into_iter()) as Addrs),
                Err(source) => Err(Box::new(Unresolved { host, source }) as Box<dyn Error + Send + Sync>),
            }
        })
    }
}

/// Whether this is what a request has failed for.
pub(super) fn failed(error: &(dyn Error + 'static)) -> bool {
    iter::successors(Some(error), |&error| error.source()).any(|error| error.is::<Unresolved>())
}
