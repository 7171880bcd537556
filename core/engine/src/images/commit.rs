//! Images of VMs: the agent sends the root filesystem as a tar archive, which becomes the one layer of an image that is
//! otherwise what the VM's own was. A VM that is off is booted for it, without network and without the image's own init.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, DuplexStream};
use vm_guest::Guest;
use vm_locks::{Ctx, Unlocked};
use vm_oci::{History, ImageConfig, Layer, LayerDraft, Lease};
use vm_types::{
    OperationId,
    guest::files::{PackOptions, PackReport},
    image::ImageRecord,
    operation::OperationKind,
    vm::VmState,
};

use super::{build::stage::changed, oci::Arrived};
use crate::{
    Engine, EngineError,
    kernels::LABEL,
    ops::{Made, OpContext},
    vm::{cell::Cell, start::console},
};

/// What belongs to the run, where it is no mount of its own. The directories stay.
const OF_THE_RUN: [&str; 5] = ["/dev/", "/proc/", "/run/", "/sys/", "/tmp/"];
/// How long a guest may take until it lets us in. Whoever waits for it may hold locks.
const LOGIN_DEADLINE: Duration = Duration::from_secs(60);
/// Every ext4 filesystem has its own.
const OF_THE_DISK: &str = "/lost+found";
/// Bytes that are on their way between guest and layer.
pub(super) const PIPE: usize = 1 << 20;

/// What an image is to be made of.
#[derive(Debug, Clone)]
pub struct CommitRequest {
    /// Name or id.
    pub vm: String,
    /// The name that the image gets.
    pub reference: String,
    /// A remark for its history.
    pub message: Option<String>,
    /// Instructions of a build file that change its configuration, such as `ENV A=b`.
    pub changes: Vec<String>,
}

/// What the image is to be.
struct Plan {
    /// In full.
    name: String,
    message: Option<String>,
    changes: Vec<String>,
}

impl Engine {
    /// Makes an image of a VM's root filesystem in an operation of its own. One that runs runs on, so files that are written
    /// meanwhile are in it as they were at one time or another; one that is off is booted and shut down again.
    ///
    /// # Errors
    /// No such VM, one that is paused, or a name that does not fit.
    pub fn commit_image(&self, request: CommitRequest) -> Result<OperationId, EngineError> {
        let CommitRequest { vm, reference, message, changes } = request;
        let name = self.full_name(&reference)?;
        // Told at once, and not after the VM was read.
        changed(ImageConfig::default(), &changes)?;
        let cell = self.find(&vm)?;
        if let state @ VmState::Paused { .. } = cell.state() {
            let (name, state) = (cell.name().clone(), state.word());
            return Err(EngineError::WrongState { name, state, wanted: "committed" });
        }
        let engine = self.clone();
        let subject = format!("{} as {name}", cell.name());
        self.operations()
            .begin(OperationKind::ImageCommit, subject, move |context, mut ctx| async move {
                let plan = Plan { name, message, changes };
                Box::pin(engine.commit_now(&mut ctx, &cell, plan, &context)).await
            })
            .map(|operation| operation.id())
    }

    async fn commit_now(
        &self,
        ctx: &mut Ctx<Unlocked>,
        cell: &Arc<Cell>,
        plan: Plan,
        context: &OpContext,
    ) -> Result<Made, EngineError> {
        let Plan { name, message, changes } = plan;
        let prefix = format!("{}: ", cell.name());
        let lease = self.inner.content.store.lease();
        let pack = async || self.layer_of(cell, &lease, &prefix, context).await;
        let (layer, report) = if matches!(cell.state(), VmState::Running { .. }) {
            context.cancellable(pack()).await?
        } else {
            match Box::pin(self.visit(ctx, cell, pack(), context)).await? {
                Some(packed) => packed,
                // Somebody has just started it.
                None => context.cancellable(pack()).await?,
            }
        };
        let warnings = told(cell, report);
        let base = self.inner.store.images().by_digest(cell.record().spec.image.hex()).await?;
        let mut config = match &base {
            // Of what was not made of layers, the record has all that is known.
            Some(base) => self.blobs(base).map_or_else(|_| config_of(base), |pulled| pulled.config.clone()),
            None => ImageConfig::default(),
        };
        let label = config.labels.get(LABEL).cloned();
        config = changed(config, &changes)?;
        let mut kernel = base.and_then(|base| base.kernel);
        if config.labels.get(LABEL) != label.as_ref() {
            let labelled = Box::pin(self.labelled_kernel(ctx, &config.labels, context));
            kernel = context.cancellable(labelled).await?.or(kernel);
        }
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        // There is one layer for all of them.
        config.history.iter_mut().for_each(|step| step.empty_layer = true);
        config.history.push(History {
            created: Some(now.clone()),
            created_by: Some(format!("vm image commit {}", cell.name())),
            comment: message,
            empty_layer: false,
        });
        config.created = Some(now);
        let pulled = vm_oci::compose(&self.inner.content.store, lease, &config, &[layer]).await?;
        let source = format!("commit {}", cell.name());
        let arrived = Arrived { pulled, references: vec![name], source, kernel };
        let image = context.cancellable(self.admit(ctx, arrived, &prefix, context)).await?;
        Ok(Made { image, warnings })
    }

    /// The guest's root filesystem as a layer.
    async fn layer_of(
        &self,
        cell: &Cell,
        lease: &Lease,
        prefix: &str,
        context: &OpContext,
    ) -> Result<(Layer, PackReport), EngineError> {
        let guest = self.guest_of(cell).await?;
        let mut layer = LayerDraft::begin(&self.inner.content.store);
        let report = self.pack_into(&guest, whole_root(), &mut layer, prefix, context).await?;
        guest.close().await;
        Ok((layer.finish(lease).await?, report))
    }

    /// The way into a running guest.
    pub(crate) async fn guest_of(&self, cell: &Cell) -> Result<Guest, EngineError> {
        let public = self.host_public_key(cell)?;
        let (socket, key) = (cell.paths().ssh_sock(), self.inner.layout.client_key());
        match tokio::time::timeout(LOGIN_DEADLINE, Guest::connect(&socket, &key, &public)).await {
            Ok(guest) => Ok(guest?),
            Err(_) => Err(EngineError::GuestUnresponsive {
                seconds: LOGIN_DEADLINE.as_secs(),
                console: console(&cell.paths()),
            }),
        }
    }

    /// Has the guest's files come into a layer.
    pub(super) async fn pack_into(
        &self,
        guest: &Guest,
        options: PackOptions,
        layer: &mut LayerDraft,
        prefix: &str,
        context: &OpContext,
    ) -> Result<PackReport, EngineError> {
        let (to, from) = tokio::io::duplex(PIPE);
        let packing = async { guest.pack("/", options, to).await.map_err(EngineError::from) };
        let what = format!("{prefix}reading files");
        let (packed, ()) = tokio::try_join!(packing, pour(from, layer, &what, context))?;
        Ok(packed.report)
    }
}

/// Has all that comes go into a layer.
pub(super) async fn pour(
    mut from: DuplexStream,
    layer: &mut LayerDraft,
    what: &str,
    context: &OpContext,
) -> Result<(), EngineError> {
    let (mut piece, mut done) = (BytesMut::new(), 0);
    loop {
        piece.reserve(PIPE / 4);
        let read = from.read_buf(&mut piece).await;
        let read = read.map_err(|error| EngineError::Panicked { detail: error.to_string() })?;
        if read == 0 {
            return Ok(());
        }
        layer.write(piece.split().freeze()).await?;
        done += read as u64;
        context.progress(format!("{what}, {} MiB", done >> 20), done, None);
    }
}

/// All of the root filesystem that is not of this run.
pub(super) fn whole_root() -> PackOptions {
    PackOptions {
        one_filesystem: true,
        exclude: OF_THE_RUN.into_iter().chain([OF_THE_DISK]).map(str::to_owned).collect(),
        sparse: true,
        generalize: true,
        ..PackOptions::default()
    }
}

/// What was not quite packed, for people.
pub(super) fn told(cell: &Cell, report: PackReport) -> Vec<String> {
    let mut warnings: Vec<_> = report.warnings.into_iter().map(|warning| warning.message).collect();
    if report.more > 0 {
        warnings.push(format!("and {} more files that are not quite in the image", report.more));
    }
    for warning in &warnings {
        tracing::warn!(vm = %cell.name(), "not quite in the image: {warning}");
    }
    warnings
}

pub(super) fn config_of(image: &ImageRecord) -> ImageConfig {
    let config = image.config.clone();
    ImageConfig {
        env: config.env,
        working_dir: config.working_dir.unwrap_or_default(),
        user: config.user.unwrap_or_default(),
        entrypoint: config.entrypoint,
        cmd: config.cmd,
        labels: config.labels,
        exposed_ports: config.exposed_ports,
        ..ImageConfig::default()
    }
}
