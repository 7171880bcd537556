//! What has changed on the host since a workspace was brought to a guest, and bringing that.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    io::Write,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use jsonrpsee::core::async_trait;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use vm_plugin::{
    PluginError,
    ports::{self, DifferenceSummary},
};
use vm_workspace::{Baseline, Difference, GitError, History, Selection, Sent, Workspace, WorkspaceError};

use super::{
    super::sandbox::GuestFiles,
    blocking,
    host::{Given, lock},
    made::Made,
    meter::Meter,
    of_workspace,
};

/// Where a workspace is, and where it was brought.
pub(super) struct Place {
    pub(super) workspace: Arc<Workspace>,
    pub(super) guest: Arc<dyn GuestFiles>,
    pub(super) destination: String,
    pub(super) scratch: PathBuf,
    pub(super) meter: Arc<Meter>,
    pub(super) given: Arc<Mutex<Given>>,
}

/// What was brought of a difference.
pub(super) struct Applied {
    pub(super) difference: Arc<Difference>,
    pub(super) sent: Sent,
    pub(super) history: Option<History>,
}

/// What is not known.
struct Unknown;

#[async_trait]
impl ports::Difference for Unknown {
    fn summary(&self) -> DifferenceSummary {
        DifferenceSummary::default()
    }

    async fn apply(&self, _: u32, _: u32) -> Result<(), PluginError> {
        Err(PluginError::new("workspace.not-prepared", "what the guest has is not known")
            .hint("for the author: ask whether the difference is known before applying it"))
    }
}

/// What is known.
struct Known {
    place: Place,
    former: Arc<Baseline>,
    difference: Arc<Difference>,
}

/// Compares a workspace with what was brought to its place before.
pub(super) async fn compare(
    place: Place,
    former: Option<Arc<Baseline>>,
) -> Result<Arc<dyn ports::Difference>, PluginError> {
    let Some(former) = former else { return Ok(Arc::new(Unknown)) };
    let survey = place.guest.survey(&place.destination).await?;
    // Somebody threw it away, or it was on a disk that is gone.
    if survey.is_empty() && !former.guest.is_empty() {
        return Ok(Arc::new(Unknown));
    }
    // The guest is not asked any more when nobody waits for the answer.
    let given_up = CancellationToken::new();
    let _guard = given_up.clone().drop_guard();
    let (runtime, guest, destination) = (Handle::current(), place.guest.clone(), place.destination.clone());
    let (workspace, known) = (place.workspace.clone(), former.clone());
    let difference = blocking(move || {
        let mut ask = |paths: &[Vec<u8>]| {
            let answer = given_up.run_until_cancelled(guest.digests(&destination, paths));
            let answer = runtime.block_on(answer).ok_or("nobody waits for it any more")?;
            answer.map_err(Into::into)
        };
        let difference = known.difference(&workspace, &survey, &mut ask)?;
        // Found out now, not when half of it is done.
        let base_is_gone = difference.history && base_is_gone(&workspace, &known)?;
        Ok((!base_is_gone).then_some(difference))
    });
    Ok(match difference.await? {
        Some(difference) => Arc::new(Known { place, former, difference: Arc::new(difference) }),
        None => Arc::new(Unknown),
    })
}

/// Whether the host does not have a commit any more that the guest was given, as after a rebase that git has cleaned up after.
/// What is new since then cannot be told.
fn base_is_gone(workspace: &Workspace, known: &Baseline) -> Result<bool, WorkspaceError> {
    for line in known.history.iter().flat_map(|history| &history.repositories) {
        let Some(head) = &line.head else { continue };
        // A submodule that is not checked out any more is in nobody's way.
        if !line.path.is_empty() && !workspace.submodules().any(|path| path == line.path) {
            continue;
        }
        let directory = workspace.top().join(OsStr::from_bytes(&line.path));
        let ask = ["rev-parse", "--verify", "--quiet", "--end-of-options"];
        let found = workspace.git().at(&directory).args(ask).arg(format!("{head}^{{commit}}")).find();
        let found = found.map_err(|source| match source {
            GitError::Cancelled => WorkspaceError::Cancelled,
            source => WorkspaceError::Git { doing: "looking for what the guest has", source },
        });
        if found?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Paths as people are told them. All that is git's own is one thing to them.
fn shown(paths: &[Vec<u8>]) -> Vec<String> {
    let shown = |path: &Vec<u8>| {
        let text = String::from_utf8_lossy(path);
        let names: Vec<_> = text.split('/').collect();
        match names.iter().position(|name| *name == ".git") {
            Some(at) => names[..=at].join("/"),
            None => text.into_owned(),
        }
    };
    paths.iter().map(shown).collect::<BTreeSet<_>>().into_iter().collect()
}

impl Known {
    /// Streams an archive of the workspace into the guest, and returns what is known of it.
    async fn send<T: Send + 'static>(
        &self,
        estimate: Option<u64>,
        (uid, gid): (u32, u32),
        make: impl Fn(&Workspace, &mut (dyn Write + Send)) -> Result<T, WorkspaceError> + Send + Sync + 'static,
    ) -> Result<T, PluginError> {
        let place = &self.place;
        let known: Arc<Mutex<Option<T>>> = Arc::default();
        let (learned, workspace) = (known.clone(), place.workspace.clone());
        let made = Made::new(place.scratch.clone(), place.meter.clone(), estimate, move |to| {
            let outcome = make(&workspace, to).map_err(|error| of_workspace(&error))?;
            *lock(&learned) = Some(outcome);
            Ok(())
        });
        place.guest.unpack(Arc::new(made), &place.destination, uid, gid).await?;
        let outcome = lock(&known).take();
        outcome.ok_or_else(|| {
            PluginError::new("guest.protocol", "the guest said that it was done before it was")
        })
    }
}

#[async_trait]
impl ports::Difference for Known {
    fn summary(&self) -> DifferenceSummary {
        let difference = &self.difference;
        DifferenceSummary {
            known: true,
            changed: difference.send.len() as u64 + u64::from(difference.history),
            removed: difference.remove.len() as u64,
            bytes: difference.bytes,
            overwritten: shown(&difference.guest_changed),
        }
    }

    async fn apply(&self, uid: u32, gid: u32) -> Result<(), PluginError> {
        let (place, difference) = (&self.place, &self.difference);
        let mut applied = Applied { difference: difference.clone(), sent: Sent::default(), history: None };
        if !difference.remove.is_empty() {
            place.guest.remove_below(&place.destination, &difference.remove).await?;
        }
        if !difference.send.is_empty() {
            let difference = difference.clone();
            applied.sent = self
                .send(Some(difference.bytes), (uid, gid), move |workspace, to| {
                    workspace.archive(Selection::Paths(&difference.send), to)
                })
                .await?;
        }
        if difference.history && self.former.history.is_some() {
            let former = self.former.clone();
            let history = self.send(None, (uid, gid), move |workspace, to| match &former.history {
                Some(history) => workspace.git_update(history, to).map(Some),
                None => Ok(None),
            });
            applied.history = history.await?;
        }
        lock(&place.given).applied(applied);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gits_own_is_named_once() {
        let paths = [".git/HEAD", ".git/refs/heads/main", "a/.git/HEAD", "a/.gitignore", "b"];
        let paths: Vec<_> = paths.iter().map(|path| path.as_bytes().to_vec()).collect();
        assert_eq!(shown(&paths), [".git", "a/.git", "a/.gitignore", "b"]);
        assert_eq!(shown(&[b"\xff/x".to_vec()]), ["\u{fffd}/x"]);
    }
}
