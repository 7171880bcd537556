//! Listing VMs at the cost of copying text: a VM's JSON is kept with the VM until something about it changes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use vm_api::{RenderedVm, VmInfo};
use vm_engine::{Engine, vm::cell::Cell};

use super::vm::{disk_used, shown};

/// How old a disk's usage may be while something may write to the disk.
const FRESH: Duration = Duration::from_secs(1);

/// A VM as it was listed last.
struct Listed {
    vm: Arc<RenderedVm>,
    /// [`Cell::changes`] of what it was made of.
    changes: u64,
    /// When it was made.
    since: Instant,
    at_rest: bool,
    /// When the disk's usage is to be looked at again.
    look_again: Instant,
}

/// A VM as a listing shows it.
pub(super) fn listed(engine: &Engine, cell: &Cell, now: Instant) -> serde_json::Result<Arc<RenderedVm>> {
    let kept = cell.kept::<Listed>().filter(|kept| kept.changes == cell.changes());
    let next = match kept {
        Some(kept) if now < kept.look_again => return Ok(kept.vm.clone()),
        Some(kept) => {
            let disk_used_bytes = disk_used(cell);
            let vm = if disk_used_bytes == kept.vm.vm().disk_used_bytes {
                kept.vm.clone()
            } else {
                Arc::new(RenderedVm::new(VmInfo { disk_used_bytes, ..kept.vm.vm().clone() })?)
            };
            let look_again = now + pause(kept.at_rest, now.saturating_duration_since(kept.since));
            Listed { vm, look_again, ..*kept }
        }
        None => {
            let view = cell.view();
            let (changes, at_rest) = (view.changes, view.at_rest);
            let vm = Arc::new(RenderedVm::new(shown(engine, view, disk_used(cell)))?);
            Listed { vm, changes, since: now, at_rest, look_again: now + FRESH }
        }
    };
    // Two listings at a time may put each other's away; both are right, and the next one checks anew.
    let vm = next.vm.clone();
    cell.keep(Arc::new(next));
    Ok(vm)
}

/// How long a disk's usage holds. Nobody writes to one at rest, but filesystems that allocate late say so late, and an
/// administrator may have punched holes: it is looked at when it has rested for 1, 2, 4, 8, … seconds.
fn pause(at_rest: bool, unchanged: Duration) -> Duration {
    if at_rest { unchanged.max(FRESH) } else { FRESH }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_at_rest_is_looked_at_ever_more_rarely_and_another_each_second() {
        let looks = |at_rest| {
            let mut at = FRESH;
            let mut looks = 1;
            while at < Duration::from_secs(24 * 3600) {
                at += pause(at_rest, at);
                looks += 1;
            }
            looks
        };
        assert_eq!(looks(true), 18);
        assert_eq!(looks(false), 24 * 3600);
    }
}
