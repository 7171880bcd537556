//! What all importers have to see to before they bring anything.

use crate::{Error, Job, Result, Sandbox};

/// What is refused without [`Job::replace`].
fn occupied(destination: &str) -> Error {
    let message = format!("{destination} in the guest is not empty, and nobody knows what is in it");
    Error::new("workspace.destination-not-empty", message)
        .with_hint("name another place, or have all that is in it thrown away: --replace")
}

impl Job {
    /// Sees to it that there is nothing at the destination before something is brought. It need not be there at all:
    /// [`Sandbox::unpack`] makes it, for the user of the job.
    ///
    /// # Errors
    /// `workspace.destination-not-empty`, unless [`Job::replace`] says that what is there may be thrown away. The guest could not be
    /// looked at, or not be cleared.
    pub fn make_room(&self, sandbox: &Sandbox) -> Result {
        let destination = self.destination();
        if sandbox.is_empty(&destination)? {
            return Ok(());
        }
        if !self.replace() {
            return Err(occupied(&destination));
        }
        sandbox.clear(&destination)
    }

    /// The error for a strategy that this importer has not offered.
    #[must_use]
    pub fn unknown_strategy(&self) -> Error {
        let message = format!("there is no strategy {:?} here", self.strategy());
        Error::new("workspace.unknown-strategy", message).with_hint("see what there is: vm workspace plan")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_the_place_and_the_way_out() {
        let error = occupied("/work/site");
        assert!(
            error.message.starts_with("/work/site ") && error.hint.unwrap_or_default().contains("--replace")
        );
    }
}
