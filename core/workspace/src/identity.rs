//! Who acts on the host.
//!
//! A daemon that is root takes its caller's rights before it touches a path of the caller's. Programs get them whole
//! (user, group, other groups). Threads get the filesystem's side only (setfsuid(2)): a thread whose user id is the caller's
//! could be sent signals by the caller, and one that is killed takes the process with it.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
};

use nix::unistd::{self, Gid, Uid, User};
use rustix::thread as own;

use crate::WorkspaceError;

/// Whose rights are used for a workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Other groups.
    pub groups: Vec<u32>,
}

impl Identity {
    /// This process as it is.
    pub fn own() -> Self {
        let groups = unistd::getgroups().unwrap_or_default().into_iter().map(Gid::as_raw).collect();
        Self { uid: unistd::geteuid().as_raw(), gid: unistd::getegid().as_raw(), groups }
    }

    /// Who acts for a caller on `path`. A caller who is root acts as the owner of the working tree that has the path, or of the
    /// path itself: as root, git would refuse the tree, or run as root what its owner has configured. Everyone else acts as
    /// themselves. A daemon that is not root is itself whoever asks.
    ///
    /// # Errors
    /// The path cannot be looked at.
    pub fn for_caller(uid: u32, gid: u32, path: &Path) -> Result<Self, WorkspaceError> {
        if !unistd::geteuid().is_root() {
            return Ok(Self::own());
        }
        if uid != 0 {
            return Ok(Self::of_user(uid, gid));
        }
        let failed = |source| WorkspaceError::Open { path: path.to_owned(), source };
        let whole = fs::canonicalize(path).map_err(failed)?;
        let top = whole.ancestors().find(|above| fs::symlink_metadata(above.join(".git")).is_ok());
        let owner = fs::metadata(top.unwrap_or(&whole)).map_err(failed)?;
        Ok(Self::of_user(owner.uid(), owner.gid()))
    }

    /// A user with the groups that the host's user database gives them; with no other group than `gid` if it does not know
    /// them.
    fn of_user(uid: u32, gid: u32) -> Self {
        let known = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let groups = known.and_then(|user| {
            let name = std::ffi::CString::new(user.name).ok()?;
            Some((user.gid, unistd::getgrouplist(&name, user.gid).ok()?))
        });
        match groups {
            // What the caller's process has for its group is theirs to choose among the groups they have.
            Some((own, groups)) => {
                let groups: Vec<u32> = groups.into_iter().map(Gid::as_raw).collect();
                Self { uid, gid: if groups.contains(&gid) { gid } else { own.as_raw() }, groups }
            }
            None => Self { uid, gid, groups: vec![gid] },
        }
    }

    /// Whether this process has these rights already.
    pub fn is_own(&self) -> bool {
        self.uid == unistd::geteuid().as_raw()
    }

    /// The user's home, where the host's user database knows it.
    pub fn home(&self) -> Option<PathBuf> {
        User::from_uid(Uid::from_raw(self.uid)).ok().flatten().map(|user| user.dir)
    }

    /// The user's name, or number.
    pub fn name(&self) -> String {
        let known = User::from_uid(Uid::from_raw(self.uid)).ok().flatten();
        known.map_or_else(|| self.uid.to_string(), |user| user.name)
    }

    /// Does something with files as this user, on a thread for that; on this one if the process has these rights already.
    ///
    /// # Errors
    /// The kernel does not let this process act as somebody else; and those of the work.
    pub fn act<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, WorkspaceError> + Send,
    ) -> Result<T, WorkspaceError> {
        if self.is_own() {
            return work();
        }
        let outcome = thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.take_for_files()
                        .map_err(|source| WorkspaceError::Identity { uid: self.uid, source })?;
                    work()
                })
                .join()
        });
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Gives this thread, for the rest of its life, the rights of the user where files are concerned.
    fn take_for_files(&self) -> io::Result<()> {
        own::set_thread_groups(&self.rustix_groups())?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // The calls tell of no failure; asked again they say what has become of them. The group comes first: changing it
        // needs what changing the user gives up.
        unistd::setfsgid(gid);
        let group = unistd::setfsgid(gid);
        unistd::setfsuid(uid);
        let user = unistd::setfsuid(uid);
        if (group, user) == (gid, uid) {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::PermissionDenied))
        }
    }

    pub(crate) fn rustix_groups(&self) -> Vec<rustix::process::Gid> {
        self.groups.iter().map(|gid| rustix::process::Gid::from_raw(*gid)).collect()
    }
}
