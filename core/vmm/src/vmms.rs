//! The drivers of a daemon.

use std::sync::Arc;

use vm_types::vm::VmmKind;

use crate::{Vmm, VmmError};

/// The drivers there are, one of a kind, and which of them runs a VM that asks for none.
#[derive(Debug, Clone)]
pub struct Vmms {
    drivers: Vec<Arc<dyn Vmm>>,
    preferred: VmmKind,
}

impl Vmms {
    /// Several, of which the first is preferred.
    pub fn new(preferred: Arc<dyn Vmm>, others: impl IntoIterator<Item = Arc<dyn Vmm>>) -> Self {
        let kind = preferred.kind();
        Self { drivers: std::iter::once(preferred).chain(others).collect(), preferred: kind }
    }

    /// One alone.
    pub fn only(driver: impl Vmm + 'static) -> Self {
        Self::new(Arc::new(driver), [])
    }

    /// What runs a VM that asks for none.
    pub fn preferred(&self) -> VmmKind {
        self.preferred
    }

    /// The driver of a kind.
    ///
    /// # Errors
    /// [`VmmError::NoDriver`].
    pub fn get(&self, kind: VmmKind) -> Result<&dyn Vmm, VmmError> {
        let driver = self.drivers.iter().find(|driver| driver.kind() == kind);
        driver.map(|driver| &**driver).ok_or(VmmError::NoDriver { vmm: kind })
    }
}

#[cfg(all(test, feature = "fake"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{FakeDriver, FirecrackerDriver};

    #[test]
    fn a_driver_is_had_by_its_kind_and_the_first_is_preferred() {
        let fake: Arc<dyn Vmm> = Arc::new(FakeDriver::new("/none", []));
        let other: Arc<dyn Vmm> = Arc::new(FirecrackerDriver::new(Arc::new(vm_host::HostRunner), None));
        let vmms = Vmms::new(other, [fake]);
        assert_eq!(vmms.preferred(), VmmKind::Firecracker);
        assert_eq!(vmms.get(VmmKind::Fake).unwrap().kind(), VmmKind::Fake);
        let error = vmms.get(VmmKind::Qemu).unwrap_err();
        assert!(matches!(error, VmmError::NoDriver { vmm: VmmKind::Qemu }) && error.hint().is_some());
    }
}
