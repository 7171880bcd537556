//! Putting a disk of differences together, and taking it apart.
//!
//! ```text
//!   nothing ──> origin ──> snapshot without a table ──> snapshot ──> with its node
//!      ▲          │               │                        │ ▲
//!      └──────────┴───── undo ────┴────────────────────────┘ └── suspended, while it grows
//! ```
//!
//! Whatever of this a daemon that was killed has left, [`Dm::apply`] completes, [`Dm::undo`] removes, and [`Dm::observe`] names.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{libc, sys::stat::SFlag};
use vm_types::Observed;

use super::{
    control::{Control, Info, Target},
    format::{self, CHUNK_BYTES, SECTOR, delta_bytes},
    loops, names,
    node::{self, Found},
};
use crate::{
    DiskError, Fill,
    cow::{Snapshot, check_size},
    host::{MARGIN_BYTES, check_space, failed},
};

/// `/dev/mapper/control` (MAPPER_CTRL_MINOR in linux/miscdevice.h). To open it loads the module.
const CONTROL: (u32, u32) = (10, 236);
/// How long a device may still be open: whoever looks at new devices, such as udev, lets go soon.
const BUSY: Duration = Duration::from_secs(3);
const BUSY_STEP: Duration = Duration::from_millis(20);

/// Device-mapper on this host.
#[derive(Debug, Clone)]
pub(crate) struct Dm {
    /// Where device nodes can be made, and used.
    nodes: PathBuf,
    /// One at a time looks for a base's loop and makes it.
    attaching: Arc<Mutex<()>>,
}

impl Dm {
    pub(crate) fn new(nodes: &Path) -> Self {
        Self { nodes: nodes.to_owned(), attaching: Arc::default() }
    }

    pub(crate) fn control(&self) -> io::Result<Control> {
        let device = node::open(&self.nodes, SFlag::S_IFCHR, libc::makedev(CONTROL.0, CONTROL.1), true)?;
        Control::new(device)
    }

    /// [`Self::control`], or `None` where this kernel has no device-mapper at all.
    fn control_if_any(&self, disk: &Snapshot<'_>) -> Result<Option<Control>, DiskError> {
        match self.control() {
            Ok(control) => Ok(Some(control)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV | libc::ENOENT)) => {
                Ok(None)
            }
            Err(source) => Err(disk.failed("open the control device for", source)),
        }
    }

    /// Devices of this beginning, in the kernel's order.
    pub(crate) fn names(&self, prefix: &str) -> io::Result<Vec<String>> {
        let mut names = self.control()?.names()?;
        names.retain(|name| name.starts_with(prefix));
        Ok(names)
    }

    pub(crate) fn observe(&self, disk: &Snapshot<'_>) -> Result<Observed, DiskError> {
        let look = |source| failed("look at", disk.node, source);
        let node = node::look(disk.node).map_err(look)?;
        let Some(control) = self.control_if_any(disk)? else {
            return Ok(match node {
                Found::Nothing => Observed::Absent,
                _ => Observed::Foreign("its node is there without a device".to_owned()),
            });
        };
        let (top, origin) = (disk.info(&control, disk.name)?, disk.info(&control, &disk.origin())?);
        let half = match (&top, &origin, node) {
            (None, None, Found::Nothing) => return Ok(Observed::Absent),
            (None, None, Found::Node(_)) => "its node is there without a device",
            (.., Found::Foreign) => "what is in the place of its node is none",
            (None, ..) => "it is half made: only its origin is there",
            (_, None, _) => "its origin is gone",
            (Some(top), Some(origin), _) if top.suspended || origin.suspended => "it is held back",
            (Some(top), Some(origin), _) if !top.live || !origin.live => "it is half made: it has no table",
            (Some(top), Some(_), found) if found != Found::Node(top.dev) => "it has no node",
            (Some(_), Some(_), _) => {
                return Ok(match self.mismatch(&control, disk)? {
                    Some(what) => Observed::Foreign(what),
                    None => Observed::Present(vm_types::Handle::None),
                });
            }
        };
        Ok(Observed::Foreign(half.to_owned()))
    }

    /// Puts the disk together, or completes it. On failure nothing is left.
    pub(crate) fn apply(&self, disk: &Snapshot<'_>) -> Result<(), DiskError> {
        if node::look(disk.node).map_err(|source| failed("look at", disk.node, source))? == Found::Foreign {
            let what = "it is no block device".to_owned();
            return Err(DiskError::Foreign { path: disk.node.to_owned(), what });
        }
        let control = self.control().map_err(|source| disk.failed("open the control device for", source))?;
        let top = disk.info(&control, disk.name)?;
        if let Some(top) = top.filter(|top| top.live) {
            disk.info(&control, &disk.origin())?;
            if let Some(what) = self.mismatch(&control, disk)? {
                return Err(DiskError::Foreign { path: disk.mapper_path(), what });
            }
            self.let_go(&control, disk, &top)?;
            return disk.make_node(top.dev);
        }
        self.take_apart(&control, disk)?;
        let started = Instant::now();
        let made = self.make(&control, disk).and_then(|dev| disk.make_node(dev));
        match &made {
            Ok(()) => tracing::debug!(device = disk.name, took = ?started.elapsed(), "disk put together"),
            Err(_) => {
                if let Err(error) = self.take_apart(&control, disk) {
                    tracing::warn!(device = disk.name, %error, "half made, and left so");
                }
            }
        }
        made
    }

    /// Makes both devices; returns the number of the upper one.
    fn make(&self, control: &Control, disk: &Snapshot<'_>) -> Result<u64, DiskError> {
        let chunk_bytes = prepare_delta(disk, disk.size_bytes)?;
        let base_bytes = disk.base_bytes()?;
        let (base, delta) = {
            let _one = self.attaching.lock().unwrap_or_else(PoisonError::into_inner);
            let listed =
                loops::Listed::now().map_err(|source| disk.failed("list loop devices for", source))?;
            let attach = |path: &Path, read_only| {
                loops::attach(&self.nodes, &listed, path, read_only)
                    .map_err(|source| failed("attach", path, source))
            };
            (attach(disk.base, true)?, attach(disk.delta, false)?)
        };
        // A loop that is there may be older than what was added to its file.
        delta.refresh_size().map_err(|source| failed("take over the size of", disk.delta, source))?;

        let origin = disk.origin();
        let table = origin_table(&node::text(base.dev), base_bytes, disk.size_bytes);
        let below = activate(control, disk, &origin, true, &table)?;
        let table =
            snapshot_table(&node::text(below.dev), &node::text(delta.dev), chunk_bytes, disk.size_bytes);
        let top = activate(control, disk, disk.name, false, &table)?;
        match fill(control, disk)? {
            Fill { invalid: true, .. } => Err(DiskError::Invalid { path: disk.delta.to_owned() }),
            _ => Ok(top.dev),
        }
    }

    /// Makes a disk that is in use larger: the guest sees it when its VMM looks.
    pub(crate) fn grow(&self, disk: &Snapshot<'_>, size_bytes: u64) -> Result<(), DiskError> {
        let control = self.control().map_err(|source| disk.failed("open the control device for", source))?;
        let origin = disk.origin();
        let live = |info: Option<Info>| info.is_some_and(|info| info.live);
        if !live(disk.info(&control, disk.name)?) || !live(disk.info(&control, &origin)?) {
            return Err(disk.failed("grow", io::ErrorKind::NotFound.into()));
        }
        if let Some(what) = self.mismatch(&control, disk)? {
            return Err(DiskError::Foreign { path: disk.mapper_path(), what });
        }
        let table =
            |name: &str| control.table(name).map_err(|source| disk.failed("read the table of", source));
        let top = table(disk.name)?;
        if length(&top) * SECTOR >= size_bytes {
            return Ok(());
        }
        let parts = disk.parts(&top)?;
        let below = table(&origin)?;
        let base =
            below.first().and_then(|target| target.text.split(' ').next()).unwrap_or_default().to_owned();
        let chunk_bytes = prepare_delta(disk, size_bytes)?;
        loops::reopen(&self.nodes, parts.delta)
            .and_then(|delta| delta.refresh_size())
            .map_err(|source| failed("take over the size of", disk.delta, source))?;

        let below = origin_table(&base, disk.base_bytes()?, size_bytes);
        let top = snapshot_table(&parts.origin, &node::text(parts.delta), chunk_bytes, size_bytes);
        let grown = (|| {
            control.load(&origin, true, &below)?;
            control.load(disk.name, false, &top)?;
            // The upper one first: it writes what is under way, and nothing more comes down from it.
            control.suspend(disk.name)?;
            control.suspend(&origin)?;
            control.resume(&origin)?;
            control.resume(disk.name)
        })();
        grown.map_err(|source: io::Error| {
            for name in [&origin, disk.name] {
                let _ = control.clear(name);
                if let Err(error) = control.resume(name) {
                    tracing::error!(device = name, %error, "cannot be let go on");
                }
            }
            disk.failed("grow", source)
        })
    }

    /// Takes it apart; what is not there is no error.
    pub(crate) fn undo(&self, disk: &Snapshot<'_>) -> Result<(), DiskError> {
        match self.control_if_any(disk)? {
            Some(control) => self.take_apart(&control, disk),
            None => disk.remove_node(),
        }
    }

    fn take_apart(&self, control: &Control, disk: &Snapshot<'_>) -> Result<(), DiskError> {
        // Both are looked at before one is touched.
        disk.info(control, &disk.origin())?;
        if let Some(top) = disk.info(control, disk.name)?
            && top.live
        {
            // What is held back would keep whoever waits for it from closing the device.
            self.let_go(control, disk, &top)?;
        }
        remove(control, disk, disk.name)?;
        remove(control, disk, &disk.origin())?;
        disk.remove_node()
    }

    /// Ends what a daemon that was killed while the disk grew has begun.
    fn let_go(&self, control: &Control, disk: &Snapshot<'_>, top: &Info) -> Result<(), DiskError> {
        let origin = disk.origin();
        let below = disk.info(control, &origin)?;
        let resume = |name: &str| control.resume(name).map_err(|source| disk.failed("let go on", source));
        // Before the disk on it: neither may be larger than what it stands on.
        if below.is_some_and(|below| below.loaded || (below.suspended && below.live)) {
            resume(&origin)?;
        }
        if top.suspended {
            resume(disk.name)?;
        } else if top.loaded {
            control.clear(disk.name).map_err(|source| disk.failed("clear", source))?;
        }
        Ok(())
    }

    /// What is wrong with a disk that has a table.
    fn mismatch(&self, control: &Control, disk: &Snapshot<'_>) -> Result<Option<String>, DiskError> {
        let table = control.table(disk.name).map_err(|source| disk.failed("read the table of", source))?;
        let Ok(parts) = disk.parts(&table) else { return Ok(Some("it is no snapshot".to_owned())) };
        let behind = loops::file_behind(&self.nodes, parts.delta)
            .map_err(|source| disk.failed("look at the delta of", source))?;
        let delta = match std::fs::metadata(disk.delta) {
            Ok(about) => Some((about.dev(), about.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(failed("look at", disk.delta, source)),
        };
        if behind.is_none() || behind != delta {
            return Ok(Some(format!("its differences are not in {}", disk.delta.display())));
        }
        let bytes = length(&table) * SECTOR;
        Ok((bytes < disk.size_bytes).then(|| format!("it has {bytes} bytes instead of {}", disk.size_bytes)))
    }

    /// How full the delta is; `None` where the disk is not put together.
    pub(crate) fn fill(&self, disk: &Snapshot<'_>) -> Result<Option<Fill>, DiskError> {
        let Some(control) = self.control_if_any(disk)? else { return Ok(None) };
        match disk.info(&control, disk.name)? {
            Some(info) if info.live => fill(&control, disk).map(Some),
            _ => Ok(None),
        }
    }
}

/// What a snapshot's table names.
struct Parts {
    origin: String,
    delta: u64,
}

impl Snapshot<'_> {
    fn origin(&self) -> String {
        names::origin(self.name)
    }

    fn mapper_path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.name)
    }

    fn failed(&self, action: &'static str, source: io::Error) -> DiskError {
        DiskError::Device { action, name: self.name.to_owned(), source }
    }

    /// Of a device of ours; an error for one of the same name that is not.
    fn info(&self, control: &Control, name: &str) -> Result<Option<Info>, DiskError> {
        let info = control.info(name).map_err(|source| self.failed("look at", source))?;
        match info {
            Some(info) if info.uuid != names::uuid(name) => Err(DiskError::Foreign {
                path: Path::new("/dev/mapper").join(name),
                what: format!("a device with the UUID {:?}", info.uuid),
            }),
            info => Ok(info),
        }
    }

    fn parts(&self, table: &[Target]) -> Result<Parts, DiskError> {
        let parts = || {
            let [target] = table else { return None };
            let mut words = target.text.split(' ');
            let (origin, delta) = (words.next()?.to_owned(), words.next()?);
            let (major, minor) = delta.split_once(':')?;
            let delta = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
            (target.kind == "snapshot").then_some(Parts { origin, delta })
        };
        parts().ok_or_else(|| DiskError::Foreign {
            path: self.mapper_path(),
            what: "it is no snapshot".to_owned(),
        })
    }

    fn base_bytes(&self) -> Result<u64, DiskError> {
        let about = std::fs::metadata(self.base).map_err(|source| failed("look at", self.base, source))?;
        let bytes = about.len();
        check_size(self.size_bytes, bytes)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) || !self.size_bytes.is_multiple_of(SECTOR) {
            let what = format!("base and disk are whole sectors of {SECTOR} bytes, and it has {bytes} bytes");
            return Err(failed("use", self.base, io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(bytes)
    }

    fn make_node(&self, dev: u64) -> Result<(), DiskError> {
        node::make(self.node, dev).map_err(|source| failed("make the node", self.node, source))
    }

    fn remove_node(&self) -> Result<(), DiskError> {
        node::remove(self.node).map_err(|source| failed("remove the node", self.node, source))
    }
}

/// Sees that the delta is long enough and not marked as damaged; returns the size of its chunks.
fn prepare_delta(disk: &Snapshot<'_>, size_bytes: u64) -> Result<u64, DiskError> {
    let path = disk.delta;
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let delta: File = opened.map_err(|source| failed("open", path, source))?;
    let header = format::read(&delta).map_err(|source| failed("use", path, source))?;
    let chunk_bytes = header.map_or(CHUNK_BYTES, |header| header.chunk_bytes);
    if header.is_some_and(|header| !header.valid) {
        // It would only come to the same end.
        check_space(path, MARGIN_BYTES)?;
        tracing::warn!(delta = %path.display(), "its host had no room: it goes on from what was written by then");
        format::make_valid(&delta).map_err(|source| failed("write to", path, source))?;
    }
    let wanted = delta_bytes(size_bytes, chunk_bytes);
    let about = delta.metadata().map_err(|source| failed("look at", path, source))?;
    if about.len() < wanted {
        delta.set_len(wanted).map_err(|source| failed("grow", path, source))?;
    }
    Ok(chunk_bytes)
}

/// The base, and zeros to the disk's end.
fn origin_table(base: &str, base_bytes: u64, size_bytes: u64) -> Vec<Target> {
    let (base_sectors, sectors) = (base_bytes / SECTOR, size_bytes / SECTOR);
    let target = |start, sectors, kind: &str, text| Target { start, sectors, kind: kind.to_owned(), text };
    let mut table = vec![target(0, base_sectors, "linear", format!("{base} 0"))];
    if sectors > base_sectors {
        table.push(target(base_sectors, sectors - base_sectors, "zero", String::new()));
    }
    table
}

fn snapshot_table(origin: &str, delta: &str, chunk_bytes: u64, size_bytes: u64) -> Vec<Target> {
    // No feature for discards: they end here, and the base never sees one.
    let text = format!("{origin} {delta} P {}", chunk_bytes / SECTOR);
    vec![Target { start: 0, sectors: size_bytes / SECTOR, kind: "snapshot".to_owned(), text }]
}

fn length(table: &[Target]) -> u64 {
    table.iter().map(|target| target.sectors).sum()
}

/// Makes a device with a table.
fn activate(
    control: &Control,
    disk: &Snapshot<'_>,
    name: &str,
    read_only: bool,
    table: &[Target],
) -> Result<Info, DiskError> {
    control.create(name, &names::uuid(name)).map_err(|source| disk.failed("create", source))?;
    control.load(name, read_only, table).map_err(|source| disk.failed("load the table of", source))?;
    control.resume(name).map_err(|source| disk.failed("activate", source))?;
    disk.info(control, name)?.ok_or_else(|| disk.failed("activate", io::ErrorKind::NotFound.into()))
}

/// Removes a device, and waits a little for those who have it open.
fn remove(control: &Control, disk: &Snapshot<'_>, name: &str) -> Result<(), DiskError> {
    let deadline = Instant::now() + BUSY;
    loop {
        match control.remove(name) {
            Ok(_) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() >= deadline {
                    return Err(DiskError::Busy { name: name.to_owned(), node: disk.node.to_owned() });
                }
                std::thread::sleep(BUSY_STEP);
            }
            Err(source) => return Err(disk.failed("remove", source)),
        }
    }
}

fn fill(control: &Control, disk: &Snapshot<'_>) -> Result<Fill, DiskError> {
    let status = control.status(disk.name).map_err(|source| disk.failed("read the status of", source))?;
    let text = status.first().map(|target| target.text.trim()).unwrap_or_default();
    // `USED/TOTAL METADATA` in sectors, or a word.
    let numbers = || {
        let (used, rest) = text.split_once('/')?;
        let (total, _) = rest.split_once(' ')?;
        Some((used.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
    };
    Ok(match numbers() {
        Some((used, total)) => {
            Fill { used_bytes: used * SECTOR, total_bytes: total * SECTOR, invalid: false }
        }
        None => Fill { used_bytes: 0, total_bytes: 0, invalid: true },
    })
}
