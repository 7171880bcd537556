//! What the host needs of whoever embeds it: state, the running guest, a repository, bytes.

use std::{collections::BTreeMap, net::IpAddr, pin::Pin, sync::Arc};

use async_trait::async_trait;
use tokio::io::AsyncRead;
use vm_types::VmId;

use crate::error::PluginError;

/// Whose value in the state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StateScope {
    /// The plugin's.
    Plugin,
    /// The plugin's for one VM.
    Vm(VmId),
}

/// One change of a plugin's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    /// Whose.
    pub scope: StateScope,
    /// The key.
    pub key: String,
    /// The new value; none removes it.
    pub value: Option<Vec<u8>>,
}

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// Where plugins' state is kept.
#[async_trait]
pub trait StateStore: Send + Sync {
    /// A value.
    async fn get(&self, plugin: &str, scope: &StateScope, key: &str) -> Result<Option<Vec<u8>>, StateError>;
    /// The keys of a scope with the sizes of their values, sorted.
    async fn sizes(&self, plugin: &str, scope: &StateScope) -> Result<BTreeMap<String, usize>, StateError>;
    /// All of these changes or none.
    async fn commit(&self, plugin: &str, changes: &[StateChange]) -> Result<(), StateError>;
}

/// State in memory, for tests and for authors.
#[derive(Debug, Default)]
pub struct MemoryState(std::sync::Mutex<BTreeMap<(String, StateScope, String), Vec<u8>>>);

impl MemoryState {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, StateScope, String), Vec<u8>>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[async_trait]
impl StateStore for MemoryState {
    async fn get(&self, plugin: &str, scope: &StateScope, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.lock().get(&(plugin.to_owned(), scope.clone(), key.to_owned())).cloned())
    }

    async fn sizes(&self, plugin: &str, scope: &StateScope) -> Result<BTreeMap<String, usize>, StateError> {
        let all = self.lock();
        let mine = all.iter().filter(|((owner, whose, _), _)| owner == plugin && whose == scope);
        Ok(mine.map(|((_, _, key), value)| (key.clone(), value.len())).collect())
    }

    async fn commit(&self, plugin: &str, changes: &[StateChange]) -> Result<(), StateError> {
        let mut all = self.lock();
        for change in changes {
            let key = (plugin.to_owned(), change.scope.clone(), change.key.clone());
            match &change.value {
                Some(value) => all.insert(key, value.clone()),
                None => all.remove(&key),
            };
        }
        Ok(())
    }
}

/// A stream of bytes. One that ends without an error has ended whole.
pub type Stream = Pin<Box<dyn AsyncRead + Send>>;

/// Bytes in the host that do not change.
#[async_trait]
pub trait Blob: Send + Sync {
    /// How many.
    async fn size(&self) -> Result<u64, PluginError>;
    /// `sha256:` and 64 digits.
    async fn digest(&self) -> Result<String, PluginError>;
    /// At most `length` of them from `offset` on.
    async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError>;

    /// All of them, where they are made while they are read and are nowhere before; `None` where [`Blob::read`] is as good. An error
    /// of the stream has a [`PluginError`] in it.
    fn stream(&self) -> Option<Stream> {
        None
    }

    /// They are an archive, and all of it was unpacked below this directory of the guest.
    fn unpacked(&self, directory: &str) {
        let _ = directory;
    }
}

/// Bytes in memory.
#[derive(Debug, Clone)]
pub struct MemoryBlob(pub Arc<[u8]>);

#[async_trait]
impl Blob for MemoryBlob {
    async fn size(&self) -> Result<u64, PluginError> {
        Ok(self.0.len() as u64)
    }

    async fn digest(&self) -> Result<String, PluginError> {
        Ok(format!("sha256:{}", crate::digest::hex(&self.0)))
    }

    async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
        Ok(rest[..rest.len().min(length)].to_vec())
    }
}

/// Who a file in the guest belongs to, and who may do what with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMode {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A command for the guest.
#[derive(Clone, Default)]
pub struct GuestCommand {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the environment.
    pub environment: BTreeMap<String, String>,
    /// Working directory.
    pub directory: Option<String>,
    /// The guest's user.
    pub user: Option<String>,
    /// Standard input.
    pub input: Option<Arc<dyn Blob>>,
    /// In milliseconds.
    pub time_limit: Option<u64>,
}

/// How a command in the guest ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestOutput {
    /// Exit code.
    pub code: Option<i32>,
    /// Signal.
    pub signal: Option<u32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Whether one of them was cut.
    pub truncated: bool,
}

/// A guest that runs and answers. Dropping a future of these ends what it does.
#[async_trait]
pub trait Sandbox: Send + Sync {
    /// Runs a command to its end; collects at most `output_limit` bytes of each stream.
    async fn run(&self, command: GuestCommand, output_limit: usize) -> Result<GuestOutput, PluginError>;
    /// Writes a file, whole or not at all.
    async fn write_file(&self, path: &str, content: Arc<dyn Blob>, mode: FileMode)
    -> Result<(), PluginError>;
    /// At most `limit` bytes of a file.
    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError>;
    /// A file's content, kept in the host.
    async fn fetch_file(&self, path: &str) -> Result<Arc<dyn Blob>, PluginError>;
    /// Unpacks a tar archive below a directory.
    async fn unpack(
        &self,
        archive: Arc<dyn Blob>,
        directory: &str,
        uid: u32,
        gid: u32,
    ) -> Result<(), PluginError>;
    /// Whether a directory has nothing in it, or is not there.
    async fn is_empty(&self, directory: &str) -> Result<bool, PluginError>;
    /// Removes all that is in a directory, which stays; its absence is success.
    async fn clear(&self, directory: &str) -> Result<(), PluginError>;
    /// Removes a file, or a directory with all that is in it; its absence is success.
    async fn remove(&self, path: &str) -> Result<(), PluginError>;
}

/// What a repository is, known when the call begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepoFacts {
    /// Its directory's name.
    pub name: String,
    /// Whether git knows it.
    pub is_git: bool,
    /// Commit checked out.
    pub head: Option<String>,
    /// Branch checked out.
    pub branch: Option<String>,
    /// Whether files differ from it.
    pub dirty: bool,
    /// How many files an archive of all has.
    pub files: u64,
    /// How many bytes are in them.
    pub bytes: u64,
    /// Files that git knows and that have changed.
    pub modified: u64,
    /// Files that git knows and that are gone.
    pub deleted: u64,
    /// Files that git neither knows nor ignores.
    pub untracked: u64,
    /// What is special about it, sorted: `detached`, `lfs`, `shallow`, …
    pub traits: Vec<String>,
    /// All of it was brought to where it is wanted before.
    pub prepared: bool,
}

/// A repository on the host, to look at. Whoever implements it sees to it that no path leads out of it.
#[async_trait]
pub trait Repository: Send + Sync {
    /// What it is.
    fn facts(&self) -> RepoFacts;
    /// Paths with a prefix.
    async fn paths(&self, prefix: &str) -> Result<Vec<String>, PluginError>;
    /// Paths of submodules.
    async fn submodules(&self) -> Result<Vec<String>, PluginError>;
    /// At most `limit` bytes of a file.
    async fn read_file(&self, path: &str, limit: usize) -> Result<Vec<u8>, PluginError>;
    /// A tar archive of the files with these prefixes; of all where there is none.
    async fn archive(&self, prefixes: &[String]) -> Result<Arc<dyn Blob>, PluginError>;
    /// A git bundle.
    async fn bundle(&self, depth: Option<u32>) -> Result<Arc<dyn Blob>, PluginError>;
    /// What differs from the commit.
    async fn patch(&self) -> Result<Arc<dyn Blob>, PluginError>;
    /// A tar archive of `.git` for a guest.
    async fn history(&self, depth: Option<u32>) -> Result<Arc<dyn Blob>, PluginError>;
    /// Compares it with what was brought to a directory of the call's guest before.
    async fn compare(&self, directory: &str) -> Result<Arc<dyn Difference>, PluginError>;
}

/// What has changed since a repository was brought to a guest.
#[async_trait]
pub trait Difference: Send + Sync {
    /// What it comes to.
    fn summary(&self) -> DifferenceSummary;
    /// Brings the guest up to date.
    async fn apply(&self, uid: u32, gid: u32) -> Result<(), PluginError>;
}

/// What a [`Difference`] comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DifferenceSummary {
    /// What is in the guest came from this repository, and what was sent is known. If not, all else is empty.
    pub known: bool,
    /// Paths to be sent; a new history counts as one.
    pub changed: u64,
    /// Paths to be removed.
    pub removed: u64,
    /// Bytes in the files to be sent.
    pub bytes: u64,
    /// Of the paths to be sent or removed, those that the guest has changed, sorted. `.git` stands for commits and branches.
    pub overwritten: Vec<String>,
}

/// Told what an import is doing. Called often, so it must be quick.
pub trait Progress: Send + Sync {
    /// A few words of the component, fit for a terminal.
    fn says(&self, message: &str);
}

/// The VMs as the name service knows them. Read for each question, so it must be quick.
pub trait Directory: Send + Sync {
    /// Names, sorted.
    fn names(&self) -> Vec<String>;
    /// A VM's addresses.
    fn addresses(&self, name: &str) -> Vec<IpAddr>;
    /// The VM with an address.
    fn name_of(&self, address: IpAddr) -> Option<String>;
}
