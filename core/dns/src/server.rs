//! The server: listeners that come and go, and what may be changed while it runs.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use futures::future::join_all;
use tokio::sync::Mutex;
use tracing::info;

use crate::{
    Config, DnsError, Networks, Resolver, Stats, Upstreams,
    handler::Handler,
    listen::{Doors, Listener},
};

/// A DNS server, running. Dropping it stops it without waiting; [`Server::stop`] waits.
pub struct Server {
    doors: Arc<Doors>,
    listeners: Mutex<HashMap<SocketAddr, Listener>>,
}

impl Server {
    /// Starts on these addresses, UDP and TCP each; none is fine, they may come later.
    ///
    /// # Errors
    /// One of them cannot be used; then none is.
    pub async fn start(
        config: Config,
        resolver: Arc<dyn Resolver>,
        addresses: &[SocketAddr],
    ) -> Result<Self, DnsError> {
        let limits = config.limits.clone();
        let handler = Arc::new(Handler::new(config, resolver));
        let server = Self { doors: Doors::new(handler, &limits), listeners: Mutex::default() };
        for address in addresses {
            if let Err(error) = server.listen(*address).await {
                server.stop().await;
                return Err(error);
            }
        }
        Ok(server)
    }

    /// Listens on one more address, e.g. the bridge's when it is up, and says which it is (for port 0).
    ///
    /// # Errors
    /// It means every interface, is listened on already, or cannot be bound.
    pub async fn listen(&self, address: SocketAddr) -> Result<SocketAddr, DnsError> {
        if address.ip().is_unspecified() {
            return Err(DnsError::Wildcard { address });
        }
        let mut listeners = self.listeners.lock().await;
        if listeners.contains_key(&address) {
            return Err(DnsError::Already { address });
        }
        let (address, listener) = Listener::start(address, Arc::clone(&self.doors)).await?;
        listeners.insert(address, listener);
        self.tell_own(&listeners);
        info!(%address, "answering DNS");
        Ok(address)
    }

    /// Stops listening on an address, e.g. before the bridge goes; questions that came by it are dropped. When it
    /// returns the address is free. Whether it was listened on.
    pub async fn unlisten(&self, address: SocketAddr) -> bool {
        let mut listeners = self.listeners.lock().await;
        let Some(listener) = listeners.remove(&address) else { return false };
        listener.stop().await;
        self.tell_own(&listeners);
        info!(%address, "no longer answering DNS");
        true
    }

    /// The addresses that are listened on.
    pub async fn listening(&self) -> Vec<SocketAddr> {
        self.listeners.lock().await.keys().copied().collect()
    }

    /// Puts another resolver in place, e.g. when the active component changes, and asks it for its zones. Questions that
    /// are being answered stay with the one before.
    pub fn set_resolver(&self, resolver: Arc<dyn Resolver>) {
        self.doors.handler.set_resolver(resolver);
    }

    /// Changes who may ask, e.g. when the bridge gets another subnet.
    pub fn set_networks(&self, networks: Networks) {
        self.doors.handler.set_networks(networks);
    }

    /// Changes who is asked about other names, and forgets what those before said.
    pub fn set_upstreams(&self, upstreams: Upstreams) {
        self.doors.handler.forwarder.set_upstreams(upstreams);
    }

    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        self.doors.handler.counters.read()
    }

    /// Stops listening everywhere. When it returns all addresses are free; [`Server::listen`] starts again.
    pub async fn stop(&self) {
        let mut listeners = self.listeners.lock().await;
        join_all(listeners.drain().map(|(_, listener)| listener.stop())).await;
        self.tell_own(&listeners);
    }

    fn tell_own(&self, listeners: &HashMap<SocketAddr, Listener>) {
        self.doors.handler.forwarder.set_own(listeners.keys().copied().collect::<HashSet<_>>());
    }
}
