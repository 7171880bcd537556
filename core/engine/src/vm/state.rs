//! What each request finds in each state: the one place that says so.

use vm_types::{VmName, vm::VmState};

use crate::EngineError;

/// What somebody wants of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Bring it up.
    Start,
    /// Shut it down.
    Stop,
    /// Stop it, if need be, and bring it up.
    Restart,
    /// End it at once.
    Kill,
    /// Halt its CPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Change its specification.
    Set,
    /// Delete it.
    Delete {
        /// Even if it is up or being worked on.
        force: bool,
    },
    /// Clean up after a VMM that has ended by itself.
    Ended,
}

/// What is to be done about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Proceed,
    /// It is so already.
    Already,
    /// Cancel the operation that has the VM, wait until it has unwound, and ask again.
    TakeOver,
    /// It cannot be done, however long one waits; `wanted` is a participle.
    Refuse,
    /// It cannot be done while another operation has the VM.
    Busy,
}

impl Request {
    /// As a participle: `it cannot be started`.
    fn wanted(self) -> &'static str {
        match self {
            Self::Start => "started",
            Self::Stop => "stopped",
            Self::Restart => "restarted",
            Self::Kill => "killed",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Set => "changed",
            Self::Delete { .. } => "deleted",
            Self::Ended => "cleaned up",
        }
    }

    /// What it finds. `changing` tells that an operation has the VM without its being on its way up or down.
    pub fn verdict(self, state: &VmState, changing: bool) -> Verdict {
        use Request as R;
        use Verdict as V;
        use VmState as S;
        match (state, self) {
            // Ending it beats whatever is being done to it, even its making.
            (
                S::Creating { .. } | S::Starting { .. } | S::Stopping { .. } | S::Deleting { .. },
                R::Kill | R::Delete { force: true },
            ) => V::TakeOver,
            // Whoever stops a VM that comes up wants it off; so does whoever asks twice.
            (S::Starting { .. }, R::Stop | R::Restart) => V::TakeOver,
            (
                S::Creating { .. } | S::Starting { .. } | S::Stopping { .. } | S::Deleting { .. },
                R::Start
                | R::Stop
                | R::Restart
                | R::Pause
                | R::Resume
                | R::Set
                | R::Delete { force: false }
                | R::Ended,
            ) => V::Busy,

            (S::Running { .. } | S::Paused { .. } | S::Stopped { .. } | S::Failed { .. }, _) if changing => {
                match self {
                    R::Kill | R::Delete { force: true } => V::TakeOver,
                    _ => V::Busy,
                }
            }

            // Half made or half deleted, and nobody works on it: all it is good for is being deleted.
            (S::Defined, R::Delete { .. } | R::Kill | R::Stop) => V::Proceed,
            (S::Defined, R::Start | R::Restart | R::Pause | R::Resume | R::Set | R::Ended) => V::Refuse,

            (S::Running { .. }, R::Start) => V::Refuse,
            (S::Running { .. }, R::Delete { force: false }) => V::Refuse,
            (
                S::Running { .. },
                // Pausing and resuming are asked of the VMM whatever we believe: somebody may have done either behind our back.
                R::Stop
                | R::Restart
                | R::Kill
                | R::Pause
                | R::Resume
                | R::Set
                | R::Delete { force: true }
                | R::Ended,
            ) => V::Proceed,

            (S::Paused { .. }, R::Start) => V::Refuse,
            (S::Paused { .. }, R::Delete { force: false }) => V::Refuse,
            (
                S::Paused { .. },
                R::Stop
                | R::Restart
                | R::Kill
                | R::Pause
                | R::Resume
                | R::Set
                | R::Delete { force: true }
                | R::Ended,
            ) => V::Proceed,

            (S::Stopped { .. }, R::Start | R::Restart | R::Set | R::Delete { .. }) => V::Proceed,
            // Leftovers that could not be undone, and a restart that is due, are looked after.
            (S::Stopped { .. } | S::Failed { .. }, R::Stop | R::Kill) => V::Proceed,
            (S::Stopped { .. } | S::Failed { .. }, R::Pause | R::Resume) => V::Refuse,
            (S::Stopped { .. } | S::Failed { .. }, R::Ended) => V::Already,

            (S::Failed { .. }, R::Start | R::Restart | R::Set | R::Delete { .. }) => V::Proceed,
        }
    }

    /// The error of [`Verdict::Refuse`].
    pub(crate) fn refused(self, name: &VmName, state: &VmState) -> EngineError {
        let state = match state {
            VmState::Defined => "half made or half deleted",
            other => other.word(),
        };
        EngineError::WrongState { name: name.clone(), state, wanted: self.wanted() }
    }
}

#[cfg(test)]
mod tests {
    use vm_types::{OperationId, vm::FailedAt};

    use super::*;

    const OPERATION: OperationId = OperationId(1);

    fn states() -> Vec<VmState> {
        vec![
            VmState::Defined,
            VmState::Creating { operation: OPERATION },
            VmState::Stopped { last_exit: None },
            VmState::Starting { operation: OPERATION },
            VmState::Running { pid: 1, since: 0 },
            VmState::Paused { pid: 1, since: 0 },
            VmState::Stopping { operation: OPERATION },
            VmState::Failed { at: FailedAt::Run, cause: String::new() },
            VmState::Deleting { operation: OPERATION },
        ]
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let requests = [
            ("start", Request::Start),
            ("stop", Request::Stop),
            ("restart", Request::Restart),
            ("kill", Request::Kill),
            ("pause", Request::Pause),
            ("resume", Request::Resume),
            ("set", Request::Set),
            ("delete", Request::Delete { force: false }),
            ("delete --force", Request::Delete { force: true }),
        ];
        let states = states();
        let words: Vec<_> = states.iter().map(VmState::word).collect();
        let mut table = format!("| request | {} |\n|{}\n", words.join(" | "), "---|".repeat(words.len() + 1));
        for (name, request) in requests {
            let cells: Vec<_> = states
                .iter()
                .map(|state| match request.verdict(state, false) {
                    Verdict::Proceed => "yes",
                    Verdict::Already => "nothing",
                    Verdict::TakeOver => "takes over",
                    Verdict::Refuse => "no",
                    Verdict::Busy => "busy",
                })
                .collect();
            table.push_str(&format!("| {name} | {} |\n", cells.join(" | ")));
        }
        let document = include_str!("../../../../docs/lifecycle.md");
        assert!(document.contains(&table), "docs/lifecycle.md should have this table:\n{table}");
    }

    #[test]
    fn every_state_can_be_killed_and_deleted() {
        for state in states() {
            for changing in [false, true] {
                for request in [Request::Kill, Request::Delete { force: true }] {
                    let verdict = request.verdict(&state, changing);
                    assert!(
                        matches!(verdict, Verdict::Proceed | Verdict::TakeOver),
                        "{request:?} of {state:?}: {verdict:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_failed_vm_can_be_started_stopped_and_deleted() {
        let failed = VmState::Failed { at: FailedAt::Stop, cause: String::new() };
        for request in [Request::Start, Request::Stop, Request::Restart, Request::Delete { force: false }] {
            assert_eq!(request.verdict(&failed, false), Verdict::Proceed, "{request:?}");
        }
    }

    #[test]
    fn what_is_up_is_not_deleted_by_accident() {
        for state in [VmState::Running { pid: 1, since: 0 }, VmState::Paused { pid: 1, since: 0 }] {
            assert_eq!(Request::Delete { force: false }.verdict(&state, false), Verdict::Refuse);
        }
    }

    #[test]
    fn a_refusal_names_vm_state_and_wish() {
        let running = VmState::Running { pid: 1, since: 0 };
        let error = Request::Start.refused(&"web".parse().unwrap(), &running);
        assert_eq!(error.to_string(), "VM web is running; it cannot be started");
        assert!(error.hint().is_some());
    }
}
