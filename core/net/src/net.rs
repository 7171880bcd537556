//! The trait through which the engine changes the host's network.

use std::fmt;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use vm_types::{Effect, Handle, InstanceId, Observed};

use crate::{Blocker, HostRoute, NetError, subnet};

/// Applies [`Effect::Bridge`], [`Effect::Tap`], [`Effect::Firewall`], [`Effect::Rules`], [`Effect::Port`], [`Effect::LinkDns`] and
/// [`Effect::Sysctl`]. `apply` brings what is ours into
/// the wanted shape from whatever shape it is in; `undo` of what is gone is success.
#[async_trait]
pub trait Net: Send + Sync + fmt::Debug {
    /// Compares the host with an effect. `Foreign` is both what is not ours and what is ours in
    /// another shape; `apply` mends the second and refuses the first.
    ///
    /// # Errors
    /// [`NetError::NotMine`], or the host cannot be asked.
    async fn observe(&self, effect: &Effect) -> Result<Observed, NetError>;

    /// What [`Self::undo`] will need and only the host before the change can tell: the value that a kernel setting has now.
    /// To be asked, and written down, before [`Self::apply`].
    ///
    /// # Errors
    /// [`NetError::NotMine`], or the host cannot be asked.
    async fn former(&self, effect: &Effect) -> Result<Handle, NetError>;

    /// Makes it so, and says what exists only since then: [`Handle::Value`] for a port, [`Handle::None`] for all others.
    ///
    /// # Errors
    /// [`NetError::NotMine`], [`NetError::Foreign`], or the kernel or nft refusing; a device that was new is removed again.
    async fn apply(&self, effect: &Effect) -> Result<Handle, NetError>;

    /// Takes it back. A kernel setting gets its former value only if it still has ours.
    ///
    /// # Errors
    /// [`NetError::NotMine`], [`NetError::Foreign`], or the kernel or nft refusing.
    async fn undo(&self, effect: &Effect, handle: &Handle) -> Result<(), NetError>;

    /// Devices and tables on the host that carry the names of this instance and are of the kind we make; taps last. Sizes and
    /// addresses in the effects are those of the host, or none.
    ///
    /// # Errors
    /// The host cannot be asked.
    async fn found(&self, instance: &InstanceId) -> Result<Vec<Effect>, NetError>;

    /// The host's IPv4 routes and addresses, without default routes.
    ///
    /// # Errors
    /// The host cannot be asked.
    async fn routes(&self) -> Result<Vec<HostRoute>, NetError>;

    /// The MTU guests should use: that of the device of the default route where it is below 1500
    /// (tunnels, clouds), else `None`. Bridge and taps keep the kernel's 1500; TCP is clamped by our table anyhow.
    ///
    /// # Errors
    /// The host cannot be asked.
    async fn guest_mtu(&self) -> Result<Option<u32>, NetError>;

    /// Firewalls of others that drop what our bridge forwards, or what VMs ask the host. An `accept` of ours cannot overrule
    /// a `drop` in another table, so these are for people to mend.
    ///
    /// # Errors
    /// nft failing.
    async fn forwarding_blocked(&self, own_bridge: &str) -> Result<Vec<Blocker>, NetError>;

    /// Refuses a subnet that overlaps with a route or an address of the host, other than those of our own bridge.
    ///
    /// # Errors
    /// [`NetError::SubnetClash`], or the host cannot be asked.
    async fn check_subnet(&self, subnet: Ipv4Net, own_bridge: &str) -> Result<(), NetError> {
        match subnet::clash(subnet, &self.routes().await?, own_bridge) {
            Some(route) => Err(NetError::SubnetClash {
                subnet,
                route: route.destination,
                device: route.device.clone().unwrap_or_else(|| "no device".to_owned()),
            }),
            None => Ok(()),
        }
    }
}
