//! Ends a VMM whose guest has switched itself off and which does not notice.
//!
//! Such a guest has halted its processors. That its kernel said so on the console proves little, since anything can be written there.
//! It is dead when, besides, its kernel neither takes nor refuses a connection, which every living one does at once or, being busy,
//! uses the processor instead. One that is paused lives.

use std::{
    io,
    time::{Duration, Instant},
};

use nix::{sys::time::TimeValLike, unistd::Pid};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use vm_host::HttpClient;
use vm_types::{
    guest::DEAD_VSOCK_PORT,
    shim::{ChannelEndpoint, GuestEnd, Paused},
};

/// How long a guest is given to show that it lives.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a VMM may take to say whether its guest is paused.
const ANSWER: Duration = Duration::from_secs(10);
/// The part of a processor that a VMM may use whose guest does nothing: one of this many.
const IDLE: u32 = 20;

/// Waits until the guest has powered off and has `kill` end the VMM then. Returns when the VMM has been told, or the console has
/// ended.
pub(crate) async fn watch(
    endpoint: ChannelEndpoint,
    paused: Option<Paused>,
    vmm: u32,
    mut said: watch::Receiver<Option<GuestEnd>>,
    kill: mpsc::Sender<oneshot::Sender<()>>,
) {
    while said.wait_for(|said| *said == Some(GuestEnd::PowerOff)).await.is_ok() {
        match is_dead(&endpoint, vmm, PATIENCE).await {
            // Asked behind it: a guest that is let go on afterwards shows that it lives.
            Ok(true) if may_run(paused.as_ref()).await => {
                let (answer, killed) = oneshot::channel();
                let _ = kill.send(answer).await;
                let _ = killed.await;
                return;
            }
            // One that answers at once is not asked all the time.
            Ok(_) => tokio::time::sleep(PATIENCE).await,
            // The VMM is ending by itself.
            Err(_) if processor_time(vmm).is_err() => return,
            // It is too busy to be asked, or is not there to be asked any more.
            Err(_) => tokio::time::sleep(PATIENCE).await,
        }
    }
}

/// Whether the VMM says that its processors are not halted by us. One that says nothing is left alone.
async fn may_run(paused: Option<&Paused>) -> bool {
    let Some(Paused { socket, path, pointer, value }) = paused else { return true };
    let asked = async { HttpClient::connect(socket, ANSWER).await?.request("GET", path, None).await };
    asked.await.is_ok_and(|state| state.pointer(pointer).is_some_and(|state| state != value.as_str()))
}

async fn is_dead(endpoint: &ChannelEndpoint, vmm: u32, patience: Duration) -> io::Result<bool> {
    let (since, before) = (Instant::now(), processor_time(vmm)?);
    match endpoint {
        ChannelEndpoint::Vsock { socket, .. } => {
            let mut stream = vm_host::socket::connect(socket).await?;
            stream.write_all(format!("CONNECT {DEAD_VSOCK_PORT}\n").as_bytes()).await?;
            if timeout(patience, stream.read_u8()).await.is_ok() {
                return Ok(false);
            }
        }
        // No kernel answers there, only an agent.
        ChannelEndpoint::VirtioSerial { .. } => tokio::time::sleep(patience).await,
    }
    let used = processor_time(vmm)?.saturating_sub(before);
    Ok(used < since.elapsed() / IDLE)
}

/// What all threads of a process have used so far.
fn processor_time(pid: u32) -> io::Result<Duration> {
    let pid = Pid::from_raw(pid.cast_signed());
    let time = nix::time::clock_gettime(nix::time::clock_getcpuclockid(pid)?)?;
    Ok(Duration::from_nanos(u64::try_from(time.num_nanoseconds()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn endpoint(&self) -> ChannelEndpoint {
            ChannelEndpoint::Vsock { socket: self.0.path().join("s"), port: 1 }
        }
    }

    /// A VMM's vsock socket whose guest does `answer` when it is connected to.
    fn guest<F: Future<Output = ()> + Send>(answer: impl Fn(UnixStream) -> F + Send + 'static) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let listener = UnixListener::bind(place.endpoint().socket()).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                answer(stream).await;
            }
        });
        place
    }

    fn process(program: &str, args: &[&str]) -> tokio::process::Child {
        tokio::process::Command::new(program).args(args).kill_on_drop(true).spawn().unwrap()
    }

    async fn judged(place: &Place, vmm: &tokio::process::Child, patience: Duration) -> bool {
        is_dead(&place.endpoint(), vmm.id().unwrap(), patience).await.unwrap()
    }

    #[tokio::test]
    async fn only_a_guest_that_neither_answers_nor_works_is_dead() {
        let silent = guest(|stream| async move {
            std::mem::forget(stream);
        });
        let refusing = guest(|stream| async move { drop(stream) });
        let taking = guest(|mut stream| async move { drop(stream.write_all(b"OK 1\n").await) });
        let idle = process("sleep", &["1000"]);
        // For what shows after less.
        let long = Duration::from_secs(60);
        assert!(judged(&silent, &idle, PATIENCE).await);
        assert!(!judged(&refusing, &idle, long).await);
        assert!(!judged(&taking, &idle, long).await);
        let busy = process("sh", &["-c", "while :; do :; done"]);
        // It may not get its share at once on a host that is busy itself.
        let works = async { while judged(&silent, &busy, PATIENCE).await {} };
        timeout(long, works).await.expect("one that works is not dead");
        let nowhere = Place(tempfile::tempdir().unwrap());
        assert!(is_dead(&nowhere.endpoint(), idle.id().unwrap(), long).await.is_err());
    }

    #[tokio::test]
    async fn its_vmm_is_ended_when_it_has_said_so() {
        let silent = guest(|stream| async move {
            std::mem::forget(stream);
        });
        let idle = process("sleep", &["1000"]);
        let (say, said) = watch::channel(None);
        let (kill, mut kills) = mpsc::channel(1);
        let watching = tokio::spawn(watch(silent.endpoint(), None, idle.id().unwrap(), said, kill));
        say.send_replace(Some(GuestEnd::PowerOff));
        kills.recv().await.expect("it is to be killed").send(()).unwrap();
        watching.await.unwrap();
    }

    /// A VMM's own socket that says this of its guest's state.
    fn api(state: &'static str) -> (tempfile::TempDir, Paused) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut asked = Vec::new();
                while !asked.ends_with(b"\r\n\r\n") {
                    asked.push(stream.read_u8().await.unwrap());
                }
                let body = format!("{{\"state\": \"{state}\"}}");
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let paused = Paused { socket, path: "/".into(), pointer: "/state".into(), value: "Paused".into() };
        (dir, paused)
    }

    #[tokio::test]
    async fn a_guest_that_is_paused_or_whose_vmm_says_nothing_is_left_alone() {
        let (_running, running) = api("Running");
        let (_halted, halted) = api("Paused");
        assert!(may_run(None).await);
        assert!(may_run(Some(&running)).await);
        assert!(!may_run(Some(&halted)).await);
        let gone = Paused { socket: "/nonexistent".into(), ..running };
        assert!(!may_run(Some(&gone)).await);
    }
}
