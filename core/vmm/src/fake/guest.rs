//! The guest's side of the channel: the control service. SSH is refused by closing its streams.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::sleep_until,
};
use vm_channel::{ChannelStream, Service, serve_guest};
use vm_types::{
    guest::{
        config,
        control::{InitKind, Reply, Request, ShutdownKind},
    },
    shim::GuestEnd,
};

use super::{
    Boot, Crash, CrashAt, End,
    process::{World, drive_size},
};

/// Serves one host for as long as it is connected.
pub(super) async fn serve(mut carrier: UnixStream, world: Arc<World>) -> io::Result<()> {
    if world.behaviour.boot == Boot::Silent {
        // Bytes are taken, as QEMU takes them, and nobody answers.
        return tokio::io::copy(&mut carrier, &mut tokio::io::sink()).await.map(drop);
    }
    serve_guest(carrier, |service, stream| match service {
        Service::Control => drop(tokio::spawn(control(stream, world.clone()))),
        Service::Ssh => drop(stream),
    })
    .await
}

async fn control(stream: ChannelStream, world: Arc<World>) -> io::Result<()> {
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        world.running().await;
        let (reply, end) = match serde_json::from_str(&line) {
            Ok(request) => answer(request, &world).await,
            Err(error) => {
                (Reply::Error { code: "control.request".to_owned(), message: error.to_string() }, None)
            }
        };
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        write.write_all(&line).await?;
        write.flush().await?;
        if let Some(end) = end {
            // The reply has to be out of the process; the host shows that it has it by what it does next, at the
            // latest by doing nothing for this long.
            let _ = tokio::time::timeout(Duration::from_millis(50), lines.next_line()).await;
            world.end(end);
        }
    }
    Ok(())
}

/// The reply, and how the guest ends after it if it does.
async fn answer(request: Request, world: &Arc<World>) -> (Reply, Option<End>) {
    match request {
        Request::Hello => {
            let hello = Reply::Hello {
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                config_version: config::VERSION,
                kernel_release: "fake".to_owned(),
                init: InitKind::Agent,
            };
            (hello, None)
        }
        Request::WaitReady { phase } => match &world.behaviour.boot {
            Boot::ReadyAfter { millis } => {
                sleep_until(world.started + Duration::from_millis(*millis)).await;
                let end = match world.behaviour.crash {
                    Some(Crash { at: CrashAt::Ready, end }) => Some(end),
                    Some(Crash { at: CrashAt::AfterReady { millis }, end }) => {
                        world.end_later(Duration::from_millis(millis), end);
                        None
                    }
                    _ => None,
                };
                (Reply::Ready { phase, warnings: Vec::new() }, end)
            }
            Boot::Fails { code, message } => {
                (Reply::Error { code: code.clone(), message: message.clone() }, None)
            }
            Boot::NeverReady | Boot::Silent => std::future::pending().await,
        },
        Request::Apply { config } => {
            world.print(&format!("applied configuration of {}", config.hostname));
            (Reply::Applied { warnings: Vec::new() }, None)
        }
        // A reset ends the VMM too, as QEMU's -no-reboot does.
        Request::Shutdown { .. } if world.behaviour.ignore_shutdown => (Reply::ShuttingDown, None),
        Request::Shutdown { kind, .. } => {
            world.print("going down");
            let end = match kind {
                ShutdownKind::PowerOff => GuestEnd::PowerOff,
                ShutdownKind::Reboot => GuestEnd::Reboot,
            };
            (Reply::ShuttingDown, Some(End::Guest(end)))
        }
        Request::Sync => (Reply::Done, None),
        Request::GrowRoot { drive_bytes } => (grow_root(world, drive_bytes), None),
        // It has none.
        Request::EndProcesses { .. } => (Reply::ProcessesEnded { count: 0, names: Vec::new() }, None),
    }
}

/// The first drive is the root, and the fake's filesystem fills it.
fn grow_root(world: &World, drive_bytes: u64) -> Reply {
    let failed = |message| Reply::Error { code: "root.grow".to_owned(), message };
    let Some(drive) = world.drives.first() else { return failed("there is no drive".to_owned()) };
    match drive_size(&drive.path) {
        Ok(bytes) if bytes >= drive_bytes => Reply::Grown { bytes },
        Ok(bytes) => failed(format!("the drive has {bytes} bytes and not {drive_bytes}")),
        Err(error) => failed(error.to_string()),
    }
}
