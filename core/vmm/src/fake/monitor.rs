//! The VMM's control socket: as much of QMP's server side as the drivers use.

use std::{fs::File, io, sync::Arc};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use vm_types::{machine::Drive, shim::GuestEnd};

use super::{
    End,
    process::{World, drive_size},
};
use crate::control::drive_id;

#[derive(Deserialize)]
struct Command {
    execute: String,
    #[serde(default)]
    arguments: Value,
    #[serde(default)]
    id: Value,
}

const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"package\": \"fake\"}, \"capabilities\": []}}\r\n";

/// Serves one client of the event socket, to whom the guest's end is told if it has said that it listens.
pub(super) async fn serve_events(stream: UnixStream, world: Arc<World>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(GREETING).await?;
    let mut lines = BufReader::with_capacity(512, read).lines();
    let mut write = Some(write);
    while let Some(line) = lines.next_line().await? {
        let Ok(Command { execute, id, .. }) = serde_json::from_str(&line) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        if execute == "qmp_capabilities"
            && let Some(mut write) = write.take()
        {
            write.write_all(format!("{}\r\n", json!({"return": {}, "id": id})).as_bytes()).await?;
            world.listener.send_replace(Some(write));
        }
    }
    world.listener.send_replace(None);
    Ok(())
}

/// Serves one client for as long as it is connected.
pub(super) async fn serve(stream: UnixStream, world: Arc<World>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(GREETING).await?;
    let mut lines = BufReader::with_capacity(512, read).lines();
    while let Some(line) = lines.next_line().await? {
        let Ok(Command { execute, arguments, id }) = serde_json::from_str(&line) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let (reply, end) = match execute.as_str() {
            "qmp_capabilities" => (json!({"return": {}, "id": id}), None),
            "quit" => (json!({"return": {}, "id": id}), Some(End::Code(0))),
            "system_powerdown" => {
                let obeys = !world.behaviour.ignore_power_button;
                world.print("power button pressed");
                (json!({"return": {}, "id": id}), obeys.then_some(End::Guest(GuestEnd::PowerOff)))
            }
            "stop" | "cont" => {
                world.paused.send_replace(execute == "stop");
                (json!({"return": {}, "id": id}), None)
            }
            "query-status" => {
                let running = !*world.paused.borrow();
                let status = if running { "running" } else { "paused" };
                (json!({"return": {"running": running, "status": status}, "id": id}), None)
            }
            "query-block" => (answer(query_block(&world), id), None),
            "block_resize" => (answer(block_resize(&world, arguments), id), None),
            "x-end" => match serde_json::from_value::<Ending>(arguments) {
                Ok(Ending { end }) => (json!({"return": {}, "id": id}), Some(end)),
                Err(error) => (answer(Err(io::Error::other(error)), id), None),
            },
            other => {
                let error = json!({"class": "CommandNotFound", "desc": format!("no command {other}")});
                (json!({"error": error, "id": id}), None)
            }
        };
        write.write_all(format!("{reply}\r\n").as_bytes()).await?;
        if let Some(end) = end {
            world.end(end);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Ending {
    end: End,
}

fn answer(result: io::Result<Value>, id: Value) -> Value {
    match result {
        Ok(value) => json!({"return": value, "id": id}),
        Err(error) => json!({"error": {"class": "GenericError", "desc": error.to_string()}, "id": id}),
    }
}

fn query_block(world: &World) -> io::Result<Value> {
    let describe = |drive: &Drive| {
        let image = json!({"virtual-size": drive_size(&drive.path)?});
        Ok(json!({"device": drive_id(&drive.serial), "inserted": {"image": image}}))
    };
    world.drives.iter().map(describe).collect()
}

/// As QEMU does it: a file gets the size, a block device has to have it.
fn block_resize(world: &World, arguments: Value) -> io::Result<Value> {
    #[derive(Deserialize)]
    struct Arguments {
        device: String,
        size: u64,
    }
    let Arguments { device, size } = serde_json::from_value(arguments)?;
    let drive = world.drives.iter().find(|drive| drive_id(&drive.serial) == device);
    let drive = drive.ok_or_else(|| io::Error::other(format!("no device {device}")))?;
    let image = File::options().write(true).open(&drive.path)?;
    if image.metadata()?.is_file() {
        image.set_len(size)?;
    } else if drive_size(&drive.path)? < size {
        return Err(io::Error::other("cannot grow device files"));
    }
    world.print(&format!("drive {} has {size} bytes", drive.serial));
    Ok(json!({}))
}
