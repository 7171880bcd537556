//! The VM in which steps of a stage are done. It boots without the image's own init, so nothing changes in it but by the steps; its
//! owner is the daemon, so it goes with it.

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio_util::io::SyncIoBridge;
use vm_guest::{Command, Guest};
use vm_host::process;
use vm_locks::{Ctx, Unlocked};
use vm_oci::{Layer, LayerDraft, Lease};
use vm_shim::EndedProcesses;
use vm_types::{
    guest::{
        control::ENDED_NAMES,
        files::{PackOptions, Seen, SeenKind, UnpackOptions},
    },
    image::ImageRecord,
    vm::Owner,
};

use super::{
    context::{ContextError, Item},
    difference::Difference,
    ignore,
    stage::Runs,
};
use crate::{
    Engine, EngineError,
    images::commit::{PIPE, pour, told, whole_root},
    keys,
    ops::OpContext,
    vm::{
        cell::{Activity, Admitted, Cell},
        create::CreateRequest,
        start::Boot,
        state::Request,
    },
};

/// How much of a command's output an error tells, in bytes.
const TAIL: usize = 2048;

/// What a command has left running gets so long between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the agent may take to end all that.
const ENDED: Duration = Duration::from_secs(90);

/// A VM at work.
#[derive(Debug)]
pub(super) struct Workshop {
    cell: Arc<Cell>,
    guest: Guest,
    /// All files after the last step.
    seen: Vec<Seen>,
}

/// What the VM is to be.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Machine {
    pub(super) cpus: Option<u32>,
    pub(super) memory_mib: Option<u64>,
}

/// How a command that failed ended.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) how: String,
    /// The end of what it wrote.
    pub(super) output: String,
}

/// Where files are put in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Absolute.
    pub(super) directory: String,
    /// The name that a single file gets.
    pub(super) name: Option<String>,
}

/// What is copied from a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// Where it is, without links.
    pub(super) path: String,
    /// As it is called where it was found, which may be a link.
    pub(super) name: String,
    pub(super) is_directory: bool,
}

impl Workshop {
    /// Boots a VM of an image. What cannot be finished is undone.
    ///
    /// # Errors
    /// As of making and starting a VM.
    pub(super) async fn open(
        engine: &Engine,
        ctx: &mut Ctx<Unlocked>,
        image: &ImageRecord,
        machine: Machine,
        context: &OpContext,
    ) -> Result<Self, EngineError> {
        let owner = process::identify(std::process::id())
            .map(|process| Owner { process, boot_id: engine.inner.boot_id.clone() });
        let name = format!("build-{}", keys::random_hex(3)?);
        let request = CreateRequest {
            image: Some(image.digest.to_string()),
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            owner,
            ..CreateRequest::default()
        };
        let cell = Box::pin(engine.create_as(ctx, &name, request, context)).await?;
        let opened = async {
            let admitted = engine.reserve(ctx, &cell, Request::Start, Activity::Starting, context.id).await?;
            if let Admitted::Reserved(reserved) = admitted {
                Box::pin(engine.start_as(ctx, &reserved, Boot::Quiet, context)).await?;
            }
            context.cancellable(engine.guest_of(&cell)).await
        };
        match opened.await {
            Ok(guest) => Ok(Self { cell, guest, seen: Vec::new() }),
            Err(error) => {
                delete(engine, ctx, &cell, context).await;
                Err(error)
            }
        }
    }

    /// Deletes the VM.
    pub(super) async fn close(self, engine: &Engine, ctx: &mut Ctx<Unlocked>, context: &OpContext) {
        self.guest.close().await;
        delete(engine, ctx, &self.cell, context).await;
    }

    /// Remembers all files as they are now.
    ///
    /// # Errors
    /// The guest.
    pub(super) async fn look(&mut self) -> Result<(), EngineError> {
        self.seen = self.guest.survey("/").await?;
        Ok(())
    }

    /// All of the root filesystem as a layer, and what is not quite in it.
    ///
    /// # Errors
    /// The guest, or the store.
    pub(super) async fn whole(
        &self,
        engine: &Engine,
        lease: &Lease,
        context: &OpContext,
    ) -> Result<(Layer, Vec<String>), EngineError> {
        let mut layer = LayerDraft::begin(&engine.inner.content.store);
        let report = engine.pack_into(&self.guest, whole_root(), &mut layer, "", context).await?;
        Ok((layer.finish(lease).await?, told(&self.cell, report)))
    }

    /// What has changed since the last look as a layer, if anything has, and what is not quite in it.
    ///
    /// # Errors
    /// The guest, or the store.
    pub(super) async fn layer(
        &mut self,
        engine: &Engine,
        lease: &Lease,
        context: &OpContext,
    ) -> Result<(Option<Layer>, Vec<String>), EngineError> {
        context.progress("looking for changes", 0, None);
        let now = self.guest.survey("/").await?;
        let difference = Difference::of(&self.seen, &now);
        self.seen = now;
        if difference.is_empty() {
            return Ok((None, Vec::new()));
        }
        let whiteouts =
            difference.whiteouts().map_err(|error| EngineError::Panicked { detail: error.to_string() })?;
        let mut layer = LayerDraft::begin(&engine.inner.content.store);
        layer.write(Bytes::from(whiteouts)).await?;
        let options = PackOptions { sparse: true, generalize: true, links: true, ..PackOptions::default() };
        let (to, from) = tokio::io::duplex(PIPE);
        let packing = async {
            let packed = self.guest.pack_selected_as("/", &difference.changed, options, to).await;
            packed.map_err(EngineError::from)
        };
        let keeping = pour(from, &mut layer, "keeping changes", context);
        let (packed, ()) = tokio::try_join!(packing, keeping)?;
        Ok((Some(layer.finish(lease).await?), told(&self.cell, packed.report)))
    }

    /// Runs a command, and says what it writes. What a command has left running is ended, and said to be: it is over with its
    /// step, and its files do not change while they are looked at.
    ///
    /// # Errors
    /// The guest, or what cannot be ended.
    pub(super) async fn run(
        &self,
        runs: &Runs,
        more_env: BTreeMap<String, String>,
        context: &OpContext,
    ) -> Result<Result<(), Failed>, EngineError> {
        let mut command = Command::new(runs.argv.clone());
        command.env = more_env;
        command.env.extend(runs.env.clone());
        command.cwd = Some(runs.cwd.clone());
        command.user = Some(runs.user.clone());
        command.alone = true;
        let mut tail = Vec::new();
        let each = |bytes: &[u8]| {
            context.say(bytes);
            tail.extend_from_slice(bytes);
            if tail.len() > 2 * TAIL {
                tail.drain(..tail.len() - TAIL);
            }
        };
        let ended = self.guest.stream(command, each).await?;
        let how = match (ended.code, ended.signal) {
            (Some(0), _) => return self.end_left(context).await.map(Ok),
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        };
        let output = String::from_utf8_lossy(&tail[tail.len().saturating_sub(TAIL)..]).into_owned();
        Ok(Err(Failed { how, output }))
    }

    /// Ends all processes but the agent's.
    async fn end_left(&self, context: &OpContext) -> Result<(), EngineError> {
        let ended = async {
            let (mut control, _) = vm_shim::connect_control(&self.cell.paths(), ENDED).await?;
            control.end_processes(GRACE, ENDED).await
        };
        let what = "end what the command has left running";
        let ended = ended.await.map_err(|source| EngineError::Guest { what, source })?;
        if ended.count > 0 {
            context.say(left(&ended).as_bytes());
        }
        Ok(())
    }

    /// Makes a directory, if it is not there.
    ///
    /// # Errors
    /// The guest.
    pub(super) async fn directory(&self, path: &str) -> Result<(), EngineError> {
        Ok(self.guest.unpack(&[0; 1024][..], path, 0, 0).await?)
    }

    /// Where what is copied to a path goes: into a directory that is there, or that a slash says is meant, or that several files
    /// need; else to a file of that name.
    ///
    /// # Errors
    /// The guest.
    pub(super) async fn target(
        &self,
        path: &str,
        slash: bool,
        one_file: bool,
    ) -> Result<Target, EngineError> {
        let found = self.guest.find(path, true).await?;
        let is_directory = found.as_ref().is_some_and(|found| found.kind == SeenKind::Directory);
        let into = |directory: &str| Target { directory: directory.to_owned(), name: None };
        if slash || !one_file || is_directory {
            return Ok(into(path));
        }
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directory = if directory.is_empty() { "/" } else { directory };
        Ok(Target { directory: directory.to_owned(), name: Some(name.to_owned()) })
    }

    /// Numbers of user and group, if somebody is named.
    ///
    /// # Errors
    /// No such user, or the guest.
    pub(super) async fn owner(&self, chown: Option<&str>) -> Result<Option<(u32, u32)>, EngineError> {
        let Some(text) = chown.filter(|text| !text.is_empty()) else { return Ok(None) };
        let (user, group) = text.split_once(':').unwrap_or((text, text));
        if let (Ok(uid), Ok(gid)) = (user.parse(), group.parse()) {
            return Ok(Some((uid, gid)));
        }
        let account = self.guest.account(text).await?;
        Ok(Some((account.uid, account.gid)))
    }

    /// Puts files of the host into a directory, with these permission bits if there are some. `archive` writes them as a tar
    /// archive, on a thread of its own.
    ///
    /// # Errors
    /// Reading them, or the guest.
    pub(super) async fn put(
        &self,
        directory: &str,
        owner: (u32, u32),
        mode: Option<u32>,
        archive: impl FnOnce(SyncIoBridge<tokio::io::DuplexStream>) -> Result<(), ContextError> + Send + 'static,
    ) -> Result<(), EngineError> {
        let (to, from) = tokio::io::duplex(PIPE);
        let archiving = tokio::task::spawn_blocking(move || archive(SyncIoBridge::new(to)));
        let options = UnpackOptions { overlay: true, mode, ..UnpackOptions::default() };
        let unpacked = self.guest.unpack_tar_as(from, directory, owner, options).await;
        let archived =
            archiving.await.map_err(|error| EngineError::Panicked { detail: error.to_string() })?;
        match (archived, unpacked) {
            // The guest takes no more: it says why.
            (Err(ContextError::Read { source, .. }), Err(error))
                if source.kind() == io::ErrorKind::BrokenPipe =>
            {
                Err(error.into())
            }
            (Err(error), _) => Err(error.into()),
            (Ok(()), unpacked) => Ok(unpacked?),
        }
    }

    /// Files that a pattern fits, or the one that a path leads to. Links are followed.
    ///
    /// # Errors
    /// There is none, a link that leads nowhere, or the guest.
    pub(super) async fn matching(&self, source: &str) -> Result<Vec<Source>, EngineError> {
        let missing = |name: &str| ContextError::Missing { name: name.to_owned(), ignored: false };
        let clean =
            ignore::cleaned(source).ok_or_else(|| ContextError::Outside { name: source.to_owned() })?;
        if !ignore::is_pattern(&clean) {
            let path = format!("/{clean}");
            let found = self.guest.find(&path, true).await?.ok_or_else(|| missing(source))?;
            return Ok(vec![Source {
                is_directory: found.kind == SeenKind::Directory,
                path: found.path,
                name: last(&clean).to_owned(),
            }]);
        }
        let (above, pattern) = ignore::split(&clean);
        let pattern = ignore::pattern(pattern)
            .map_err(|problem| ContextError::Pattern { name: source.to_owned(), problem })?;
        // `/lib` may be a link to `/usr/lib`, below which its files are seen.
        let above = self.guest.find(&format!("/{above}"), true).await?.ok_or_else(|| missing(source))?;
        let mut found = Vec::new();
        for (path, kind) in fitting(&self.seen, above.path.trim_matches('/'), &pattern) {
            let name = last(path).to_owned();
            let path = format!("/{path}");
            let (path, kind) = match kind {
                SeenKind::Symlink => {
                    let led = self.guest.find(&path, true).await?.ok_or_else(|| missing(&path))?;
                    (led.path, led.kind)
                }
                kind => (path, kind),
            };
            found.push(Source { path, name, is_directory: kind == SeenKind::Directory });
        }
        if found.is_empty() { Err(missing(source).into()) } else { Ok(found) }
    }

    /// Copies a file, or what is in a directory, to another guest; with owners, modes and attributes that it has here, where
    /// nobody says others.
    ///
    /// # Errors
    /// One of the guests.
    pub(super) async fn give(
        &self,
        path: &str,
        name: Option<String>,
        to: &Self,
        directory: &str,
        owner: Option<(u32, u32)>,
        mode: Option<u32>,
    ) -> Result<(), EngineError> {
        let (writer, reader) = tokio::io::duplex(PIPE);
        let options = PackOptions { one_filesystem: true, sparse: true, name, ..PackOptions::default() };
        let packing = async { self.guest.pack(path, options, writer).await.map_err(EngineError::from) };
        let options = UnpackOptions { owners: owner.is_none(), xattrs: true, overlay: true, mode };
        let unpacking = to.guest.unpack_tar_as(reader, directory, owner.unwrap_or_default(), options);
        let unpacking = async { unpacking.await.map_err(EngineError::from) };
        tokio::try_join!(packing, unpacking).map(drop)
    }
}

/// What is below a directory, by its path without links, and fits a pattern that is relative to it.
fn fitting<'a>(
    seen: &'a [Seen],
    above: &'a str,
    pattern: &'a glob::Pattern,
) -> impl Iterator<Item = (&'a str, SeenKind)> {
    seen.iter().filter_map(move |seen| {
        let path = std::str::from_utf8(&seen.path).ok()?;
        let below = if above.is_empty() { path } else { path.strip_prefix(above)?.strip_prefix('/')? };
        ignore::fits(pattern, Path::new(below)).then_some((path, seen.kind))
    })
}

/// What there is to say of what was ended.
fn left(ended: &EndedProcesses) -> String {
    let more = if ended.names.len() == ENDED_NAMES { ", …" } else { "" };
    let processes = if ended.count == 1 { "1 process" } else { &format!("{} processes", ended.count) };
    format!("      note: ended {processes} that it left running: {}{more}\n", ended.names.join(", "))
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Items as they are called in a target.
pub(super) fn named(mut items: Vec<Item>, target: &Target) -> Vec<Item> {
    if let (Some(name), [item]) = (&target.name, items.as_mut_slice()) {
        item.name = name.into();
    }
    items
}

async fn delete(engine: &Engine, ctx: &mut Ctx<Unlocked>, cell: &Arc<Cell>, context: &OpContext) {
    if let Err(error) = engine.delete_now(ctx, cell, true, context.id).await {
        tracing::warn!(vm = %cell.name(), error = %error.chain(), "a VM of a build could not be deleted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_ended_is_named() {
        let ended = |count, names: &[&str]| {
            left(&EndedProcesses { count, names: names.iter().map(|name| (*name).to_owned()).collect() })
        };
        assert_eq!(ended(1, &["sleep"]), "      note: ended 1 process that it left running: sleep\n");
        let all = ended(40, &["a"; ENDED_NAMES]);
        assert!(all.contains("40 processes") && all.ends_with("a, a, …\n"), "{all}");
    }

    #[test]
    fn a_pattern_is_asked_of_what_is_below_its_directory_as_that_is_really_called() {
        let seen =
            ["usr", "usr/lib", "usr/lib/libz.so", "usr/lib/libz.so.1", "usr/lib/x/libz.so", "usr/libz.so"];
        let seen = seen.map(|path| Seen {
            path: path.into(),
            kind: if path.ends_with(".1") { SeenKind::File } else { SeenKind::Symlink },
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            ctime: 0,
            inode: 1,
            target: None,
        });
        let found = |above: &str, text: &str| {
            let (_, pattern) = ignore::split(text);
            let pattern = ignore::pattern(pattern).unwrap();
            fitting(&seen, above, &pattern).map(|(path, _)| path.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ignore::split("lib/x/libz*"), ("lib/x", "libz*"));
        assert_eq!(ignore::split("*/a/b"), ("", "*/a/b"));
        assert_eq!(found("usr/lib", "lib/libz*"), ["usr/lib/libz.so", "usr/lib/libz.so.1"]);
        assert_eq!(found("", "u*"), ["usr"]);
        assert_eq!(found("us", "us/*"), Vec::<String>::new());
        assert_eq!(last("a/b"), "b");
    }
}
