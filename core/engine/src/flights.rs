//! Work that several callers may want done at once and that is done once: acquiring an image, say. It may take minutes, so it is
//! no lock of the order: whoever boards a flight holds no lock, and whoever waits for one can be cancelled.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;
use vm_locks::{Ctx, Unlocked};

/// What is under way, by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flights(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    under_way: Mutex<HashSet<String>>,
    landed: Notify,
}

/// The right to do what has this name, until it is dropped.
#[derive(Debug)]
pub(crate) struct Flight {
    flights: Flights,
    name: String,
}

impl Flights {
    /// Waits until nobody else does what has this name; afterwards it may well be done. Cancel-safe.
    pub(crate) async fn board(&self, _: &mut Ctx<Unlocked>, name: impl Into<String>) -> Flight {
        let name = name.into();
        loop {
            let landed = self.0.landed.notified();
            if self.under_way().insert(name.clone()) {
                return Flight { flights: self.clone(), name };
            }
            landed.await;
        }
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.under_way().remove(&self.name);
        self.flights.0.landed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vm_locks::LockTable;

    use super::*;

    #[tokio::test]
    async fn one_at_a_time_of_a_name_and_none_is_forgotten() {
        let (table, flights) = (LockTable::default(), Flights::default());
        let aboard = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let (flights, aboard) = (flights.clone(), aboard.clone());
                tokio::spawn(table.root("test", async move |mut ctx| {
                    let _flight = flights.board(&mut ctx, "image a").await;
                    assert_eq!(aboard.fetch_add(1, Ordering::SeqCst), 0);
                    tokio::task::yield_now().await;
                    aboard.fetch_sub(1, Ordering::SeqCst);
                }))
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(flights.under_way().is_empty());
    }
}
