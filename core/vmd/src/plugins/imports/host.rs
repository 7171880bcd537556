//! A workspace as an importer has it, and the record of what a guest was given of it.

use std::{
    io::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jsonrpsee::core::async_trait;
use vm_engine::ports::ImportSource;
use vm_plugin::{
    PluginError,
    ports::{Blob, Difference, RepoFacts, Repository},
};
use vm_types::{
    guest::files::{Seen, SeenKind},
    workspace::WorkspaceFacts,
};
use vm_workspace::{Baseline, EntryKind, History, Selection, Sent, Workspace, WorkspaceError};

use super::{
    super::sandbox::GuestFiles,
    blocking,
    difference::{self, Applied},
    made::Made,
    meter::Meter,
    of_workspace,
};

/// A workspace, and what becomes of it in a guest.
pub(super) struct Host {
    source: ImportSource,
    meter: Arc<Meter>,
    /// The guest and where the workspace shall be in it, once it is to be brought.
    place: Option<(Arc<dyn GuestFiles>, String)>,
    given: Arc<Mutex<Given>>,
}

/// What was unpacked at the destination.
#[derive(Default)]
pub(super) struct Given {
    sent: Sent,
    /// Whether all of the workspace was.
    whole: bool,
    history: Option<History>,
    /// What was known was brought up to date.
    applied: Option<Applied>,
}

impl Given {
    pub(super) fn applied(&mut self, applied: Applied) {
        self.applied = Some(applied);
    }
}

/// Whether a path is within a `.git`, or one.
fn is_of_git(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(|name| name == b".git")
}

/// Whoever panicked with it has failed the import.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    pub(super) fn new(source: ImportSource, meter: Arc<Meter>) -> Self {
        Self { source, meter, place: None, given: Arc::default() }
    }

    pub(super) fn with_guest(self, guest: Arc<dyn GuestFiles>, destination: &str) -> Self {
        Self { place: Some((guest, destination.to_owned())), ..self }
    }

    fn workspace(&self) -> &Arc<Workspace> {
        &self.source.workspace
    }

    fn facts(&self) -> &WorkspaceFacts {
        self.workspace().facts()
    }

    /// What was brought before, if that was all of this workspace.
    fn former(&self) -> Option<&Arc<Baseline>> {
        let former = self.source.former.as_ref()?;
        (former.whole && former.source == self.workspace().top()).then_some(former)
    }

    /// What the guest was given, `guest` being what it has now.
    pub(super) fn baseline(&self, importer: &str, mut guest: Vec<Seen>) -> Baseline {
        let given = std::mem::take(&mut *lock(&self.given));
        let workspace = self.workspace();
        match (given.applied, self.former()) {
            (Some(Applied { difference, mut sent, history }), Some(former)) => {
                sent.extend(given.sent);
                former.after(workspace, &difference, sent, given.history.or(history), guest)
            }
            _ => {
                // What came in other ways is the guest's own work. Directories come with what is in them.
                guest.retain(|seen| {
                    seen.kind == SeenKind::Directory
                        || given.sent.entries.contains_key(&seen.path)
                        || (given.history.is_some() && is_of_git(&seen.path))
                });
                let mut baseline = Baseline::new(workspace, importer, given.history, given.sent, guest);
                baseline.whole = given.whole;
                baseline
            }
        }
    }

    /// A blob that the workspace makes.
    fn made(
        &self,
        estimate: Option<u64>,
        make: impl Fn(&Workspace, &mut (dyn Write + Send)) -> Result<(), WorkspaceError> + Send + Sync + 'static,
    ) -> Made {
        let workspace = self.workspace().clone();
        Made::new(self.source.scratch.clone(), self.meter.clone(), estimate, move |to| {
            make(&workspace, to).map_err(|error| of_workspace(&error))
        })
    }

    /// A blob of which something is known once it was made, which counts when it was unpacked at the destination.
    fn counted<T: Clone + Send + 'static>(
        &self,
        estimate: Option<u64>,
        make: impl Fn(&Workspace, &mut (dyn Write + Send)) -> Result<T, WorkspaceError> + Send + Sync + 'static,
        count: impl Fn(&mut Given, T) + Send + Sync + 'static,
    ) -> Arc<dyn Blob> {
        let known: Arc<Mutex<Option<T>>> = Arc::default();
        let learned = known.clone();
        let made = self.made(estimate, move |workspace, to| {
            let outcome = make(workspace, to)?;
            *lock(&learned) = Some(outcome);
            Ok(())
        });
        let destination = self.place.as_ref().map(|(_, destination)| destination.clone());
        let given = self.given.clone();
        Arc::new(made.heard(move |directory| {
            let outcome = lock(&known).clone();
            if let Some(outcome) = outcome
                && destination.as_deref() == Some(directory)
            {
                count(&mut lock(&given), outcome);
            }
        }))
    }

    /// Bytes of the files that an archive with these prefixes has.
    fn bytes(&self, prefixes: &[Vec<u8>]) -> u64 {
        let chosen =
            |path: &[u8]| prefixes.is_empty() || prefixes.iter().any(|prefix| path.starts_with(prefix));
        self.workspace().files().iter().filter(|entry| chosen(&entry.path)).map(|entry| entry.size).sum()
    }
}

/// What is special about a workspace, in the words of `vm:plugin`.
fn traits(facts: &WorkspaceFacts) -> Vec<String> {
    let all = [
        (facts.detached, "detached"),
        (facts.lfs, "lfs"),
        (facts.shallow, "shallow"),
        (facts.sparse, "sparse"),
        (!facts.submodules.is_empty(), "submodules"),
        (facts.worktree, "worktree"),
    ];
    all.into_iter().filter(|(is, _)| *is).map(|(_, name)| name.to_owned()).collect()
}

#[async_trait]
impl Repository for Host {
    fn facts(&self) -> RepoFacts {
        let facts = self.facts();
        RepoFacts {
            name: facts.name.clone(),
            is_git: facts.is_git,
            head: facts.head.clone(),
            branch: facts.branch.clone(),
            dirty: facts.dirty(),
            files: facts.files,
            bytes: facts.bytes,
            modified: facts.modified,
            deleted: facts.deleted,
            untracked: facts.untracked,
            traits: traits(facts),
            prepared: self.former().is_some(),
        }
    }

    async fn paths(&self, prefix: &str) -> Result<Vec<String>, PluginError> {
        let entries = self.workspace().files().iter().filter(|entry| entry.kind != EntryKind::Directory);
        let paths = entries.filter(|entry| entry.path.starts_with(prefix.as_bytes()));
        Ok(paths.map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect())
    }

    async fn submodules(&self) -> Result<Vec<String>, PluginError> {
        Ok(self.facts().submodules.clone())
    }

    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError> {
        let (workspace, path) = (self.workspace().clone(), path.as_bytes().to_vec());
        blocking(move || workspace.read_file(&path, limit as u64)).await
    }

    async fn archive(&self, prefixes: &[String]) -> Result<Arc<dyn Blob>, PluginError> {
        let prefixes: Vec<Vec<u8>> = prefixes.iter().map(|prefix| prefix.as_bytes().to_vec()).collect();
        let (whole, estimate) = (prefixes.is_empty(), self.bytes(&prefixes));
        let make = move |workspace: &Workspace, to: &mut (dyn Write + Send)| {
            workspace.archive(if whole { Selection::All } else { Selection::Prefixes(&prefixes) }, to)
        };
        let count = move |given: &mut Given, sent| {
            given.sent.extend(sent);
            given.whole |= whole;
        };
        Ok(self.counted(Some(estimate), make, count))
    }

    async fn bundle(&self, depth: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(self.made(None, move |workspace, to| workspace.bundle(depth, to))))
    }

    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError> {
        Ok(Arc::new(self.made(None, |workspace, to| workspace.patch(to))))
    }

    async fn history(&self, depth: Option<u32>) -> Result<Arc<dyn Blob>, PluginError> {
        let make =
            move |workspace: &Workspace, to: &mut (dyn Write + Send)| workspace.git_directory(depth, to);
        Ok(self.counted(None, make, |given, history| given.history = Some(history)))
    }

    async fn compare(&self, directory: &str) -> Result<Arc<dyn Difference>, PluginError> {
        let Some((guest, destination)) = &self.place else {
            return Err(PluginError::new("guest.absent", "there is no guest to compare with"));
        };
        let former = self.former().filter(|_| directory == destination);
        let place = difference::Place {
            workspace: self.workspace().clone(),
            guest: guest.clone(),
            destination: destination.clone(),
            scratch: self.source.scratch.clone(),
            meter: self.meter.clone(),
            given: self.given.clone(),
        };
        difference::compare(place, former.cloned()).await
    }
}
