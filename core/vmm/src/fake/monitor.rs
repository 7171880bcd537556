//! The VMM's control socket: as much of QMP's server side as the drivers use.

use std::{io, sync::Arc};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::{End, process::World};

#[derive(Deserialize)]
struct Command {
    execute: String,
    #[serde(default)]
    id: Value,
}

/// Serves one client for as long as it is connected.
pub(super) async fn serve(stream: UnixStream, world: Arc<World>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let greeting = json!({"QMP": {"version": {"package": "fake"}, "capabilities": []}});
    write.write_all(format!("{greeting}\r\n").as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let Ok(Command { execute, id }) = serde_json::from_str(&line) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let (reply, end) = match execute.as_str() {
            "qmp_capabilities" => (json!({"return": {}, "id": id}), None),
            "quit" => (json!({"return": {}, "id": id}), Some(End::Code(0))),
            "system_powerdown" => {
                let obeys = !world.behaviour.ignore_power_button;
                world.print("power button pressed");
                (json!({"return": {}, "id": id}), obeys.then_some(End::Code(0)))
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
