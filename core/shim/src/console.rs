//! The serial console: drained always, logged within a bound, shown live to whoever is there.
//!
//! A guest that writes to its console must never wait for a reader of ours. So the VMM's stdout is read
//! whatever happens to the log and to clients; a client that is too slow misses a part and is told so.

use std::sync::Arc;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::ChildStdin,
    sync::{broadcast, mpsc},
};

use crate::{log::SharedLog, sockets::wait_hang_up, words::Listener};

/// Bytes read at once.
const CHUNK: usize = 8 * 1024;
/// Chunks that a slow client may be behind.
const BACKLOG: usize = 64;

type Chunk = Arc<[u8]>;

/// Both directions of the console, for clients.
#[derive(Clone)]
pub(crate) struct Console {
    output: broadcast::Sender<Chunk>,
    input: mpsc::Sender<Vec<u8>>,
}

impl Console {
    /// A console whose input goes to `stdin`. Needs a runtime.
    pub(crate) fn new(stdin: Option<ChildStdin>) -> Self {
        let (input, typed) = mpsc::channel(16);
        if let Some(stdin) = stdin {
            tokio::spawn(type_in(stdin, typed));
        }
        Self { output: broadcast::Sender::new(BACKLOG), input }
    }

    /// Where the VMM's output is shown.
    pub(crate) fn output(&self) -> broadcast::Sender<Chunk> {
        self.output.clone()
    }

    /// Serves one client until it hangs up or the console ends.
    pub(crate) fn serve(&self, mut stream: UnixStream) -> impl Future<Output = ()> + Send + use<> {
        // Subscribed before the task first runs, and holding no sender: the end of output ends the client too.
        let (mut output, input) = (self.output.subscribe(), self.input.clone());
        async move {
            let (mut read, mut write) = stream.split();
            let typing = async {
                let mut buffer = [0; 512];
                while let Ok(n @ 1..) = read.read(&mut buffer).await {
                    // A VMM that reads no more is no reason to stop its output. One that reads nothing now keeps the
                    // client waiting, but not after it has hung up.
                    tokio::select! {
                        _ = input.send(buffer[..n].to_vec()) => {}
                        () = wait_hang_up(read.as_ref()) => return,
                    }
                }
                // No more input is not the end: `nc -U … </dev/null` wants to watch.
                wait_hang_up(read.as_ref()).await;
            };
            let showing = async {
                loop {
                    let shown = match output.recv().await {
                        Ok(chunk) => write.write_all(&chunk).await,
                        Err(broadcast::error::RecvError::Lagged(_)) => {
                            write
                                .write_all(b"\r\n[vmd: console output skipped, the reader is too slow]\r\n")
                                .await
                        }
                        Err(broadcast::error::RecvError::Closed) => return,
                    };
                    if shown.is_err() {
                        return;
                    }
                }
            };
            // Either end ends the client; what the other had under way is of no use then.
            tokio::select! {
                () = typing => {}
                () = showing => {}
            }
        }
    }
}

async fn type_in(mut stdin: ChildStdin, mut typed: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = typed.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Reads `source` to its end into `log` and, for a console, to its clients and whoever listens for its guest's last words.
pub(crate) async fn drain<R: AsyncRead + Unpin>(
    mut source: R,
    log: SharedLog,
    clients: Option<broadcast::Sender<Chunk>>,
    mut listener: Option<Listener>,
) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(n @ 1..) = source.read(&mut buffer).await {
        log.append(&buffer[..n]);
        if let Some(listener) = &mut listener {
            listener.hear(&buffer[..n]);
        }
        if let Some(clients) = &clients
            && clients.receiver_count() > 0
        {
            let _ = clients.send(Chunk::from(&buffer[..n]));
        }
    }
}
