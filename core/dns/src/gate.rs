//! Bounds: how much may go on at once, in all and for one client, and how often strangers are told no.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// Lets at most so many in at once. It remembers only those who are in, so its memory is bounded too.
#[derive(Debug)]
pub(crate) struct Gate {
    total: usize,
    per_client: usize,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    total: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// Being inside; ends when dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    gate: Arc<Gate>,
    client: IpAddr,
}

impl Gate {
    pub(crate) fn new(total: usize, per_client: usize) -> Arc<Self> {
        Arc::new(Self { total, per_client, inside: Mutex::default() })
    }

    /// Lets a client in, or says that it is full. The host itself asks for all of its programs, often through one stub
    /// resolver, so only the total holds for loopback.
    pub(crate) fn enter(self: &Arc<Self>, client: IpAddr) -> Option<Entered> {
        let client = client.to_canonical();
        let mut inside = self.inside();
        if inside.total >= self.total {
            return None;
        }
        let own = inside.by_client.get(&client).copied().unwrap_or_default();
        if own >= self.per_client && !client.is_loopback() {
            return None;
        }
        inside.by_client.insert(client, own + 1);
        inside.total += 1;
        Some(Entered { gate: Arc::clone(self), client })
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut inside = self.gate.inside();
        inside.total -= 1;
        if let Some(own) = inside.by_client.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                inside.by_client.remove(&self.client);
            }
        }
    }
}

/// A bucket of tokens that fills up again with time; one for all strangers, since their addresses may be forged.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_second: f64,
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    pub(crate) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, state: Mutex::new((per_second, Instant::now())) }
    }

    /// Takes a token, if there is one.
    pub(crate) fn take(&self, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (tokens, since) = *state;
        let filled = (tokens + now.saturating_duration_since(since).as_secs_f64() * self.per_second)
            .min(self.per_second);
        let taken = filled >= 1.0;
        *state = (if taken { filled - 1.0 } else { filled }, now.max(since));
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_client_cannot_take_every_place_and_leaves_no_trace() {
        let gate = Gate::new(3, 2);
        let (a, b) = (IpAddr::from([10, 0, 0, 2]), IpAddr::from([10, 0, 0, 3]));
        let held = [gate.enter(a), gate.enter(a)];
        assert!(held.iter().all(Option::is_some));
        assert!(gate.enter(a).is_none());
        let other = gate.enter(b);
        assert!(other.is_some());
        assert!(gate.enter(IpAddr::from([127, 0, 0, 1])).is_none(), "the total holds for everybody");
        drop((held, other));
        assert!(gate.inside().by_client.is_empty());
        let host: Vec<_> = (0..3).map(|_| gate.enter(IpAddr::from([127, 0, 0, 1]))).collect();
        assert!(host.iter().all(Option::is_some));
    }

    #[test]
    fn a_full_gate_remembers_nobody_it_turned_away() {
        let gate = Gate::new(1, 0);
        assert!(gate.enter(IpAddr::from([10, 0, 0, 2])).is_none());
        assert_eq!(gate.inside().by_client.values().sum::<usize>(), 0);
        assert!(gate.inside().by_client.is_empty());
    }

    #[test]
    fn a_bucket_fills_with_time() {
        let bucket = Bucket::new(2);
        let now = Instant::now();
        assert_eq!([bucket.take(now), bucket.take(now), bucket.take(now)], [true, true, false]);
        let later = now + Duration::from_millis(600);
        assert_eq!([bucket.take(later), bucket.take(later)], [true, false]);
        assert!(!bucket.take(now), "time going backwards fills nothing");
    }
}
