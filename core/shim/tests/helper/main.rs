//! Plays every process around the shim: the shim itself, its VMM with a guest, and a daemon that starts one.
//!
//! ```text
//!   shim-test-helper shim --spec FILE --run-dir DIR
//!   shim-test-helper jail --spec FILE
//!   shim-test-helper daemon SPEC DIR         starts a shim, prints its ShimStarted, waits to be killed
//!   shim-test-helper vmm STEP...             see `vmm`
//! ```

#![expect(clippy::unwrap_used, reason = "a test's part fails by panicking")]

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener as StdListener,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
};
use vm_channel::{ChannelStream, Service};
use vm_types::guest::control::{InitKind, Reply, Request};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["shim", "--spec", spec, "--run-dir", _] => vm_shim::main(Path::new(spec)),
        ["jail", "--spec", spec] => vm_shim::jail::main(Path::new(spec)),
        ["daemon", spec, run_dir] => daemon(spec, run_dir),
        ["vmm", steps @ ..] => vmm(steps),
        other => panic!("no such part: {other:?}"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn daemon(spec: &str, run_dir: &str) -> ExitCode {
    runtime().block_on(async {
        let me = std::env::current_exe().unwrap();
        let limit = Duration::from_secs(30);
        let started = vm_shim::launch(&me, Path::new(spec), Path::new(run_dir), limit).await.unwrap();
        println!("{}", serde_json::to_string(&started).unwrap());
        std::future::pending().await
    })
}

/// Runs its steps one after the other:
/// `flood=BYTES` to the console, `say=TEXT`, `stderr=TEXT`, `exit=CODE`, `abort`, `stdin` (waits for one line and says
/// it back), `lines` (a console line for each byte that comes in on stdin), `chatter` (a console line now and then, and
/// never a look at stdin), `hang`,
/// `tell=SOCKET LINE` (greets the first client of an event socket and sends it the line when it has said that it listens),
/// `api=SOCKET PATH` (a control socket that takes requests, tells them on the console and refuses one to this path, until it has
/// taken one to `/actions`),
/// `tap=NAME` (tells whether it may attach to that tap), `pipe=PATH TEXT` (writes a line to a pipe as Firecracker does),
/// `see=PATH` (tells whether it is there), `write=PATH` (tries to), `greet=NUMBER` (the first client of an inherited listener),
/// `dead=SOCKET` (a vsock device whose guest answers nothing, beside the next steps),
/// `guest=SOCKET` (a guest; an ssh stream that says `!` makes it drop the session), `deaf=SOCKET` (ignores its first hello).
fn vmm(steps: &[&str]) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    for step in steps {
        let (name, value) = step.split_once('=').unwrap_or((step, ""));
        match name {
            "flood" => {
                let line = [b"flood ".as_slice(), &[b'x'; 93], b"\n"].concat();
                for _ in 0..value.parse::<usize>().unwrap() / line.len() {
                    stdout.write_all(&line).unwrap();
                }
            }
            "say" => stdout.write_all(value.as_bytes()).unwrap(),
            "stderr" => eprintln!("{value}"),
            "exit" => return ExitCode::from(value.parse::<u8>().unwrap()),
            "abort" => std::process::abort(),
            "stdin" => {
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).unwrap();
                stdout.write_all(line.as_bytes()).unwrap();
            }
            "lines" => {
                let mut byte = [0];
                while std::io::stdin().read(&mut byte).unwrap() == 1 {
                    stdout.write_all(b"tick\n").unwrap();
                    stdout.flush().unwrap();
                }
            }
            "chatter" => loop {
                stdout.write_all(b"tick\n").unwrap();
                stdout.flush().unwrap();
                std::thread::sleep(Duration::from_millis(50));
            },
            "hang" => loop {
                std::thread::park();
            },
            "tell" => {
                let (socket, line) = value.split_once(' ').unwrap();
                let listener = StdListener::bind(socket).unwrap();
                let (mut client, _) = listener.accept().unwrap();
                client.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
                let mut said = String::new();
                std::io::BufRead::read_line(&mut std::io::BufReader::new(&client), &mut said).unwrap();
                assert!(said.contains("qmp_capabilities"), "{said}");
                client.write_all(format!("{{\"return\": {{}}}}\r\n{line}\r\n").as_bytes()).unwrap();
                // It ends with the process, as a VMM's does.
                std::mem::forget(client);
            }
            "api" => {
                let (socket, refused) = value.split_once(' ').unwrap();
                api(&StdListener::bind(socket).unwrap(), refused, &mut stdout);
            }
            "tap" => {
                let attached = attach(value).map(drop).map_err(|error| error.kind());
                writeln!(stdout, "tap {value}: {attached:?}").unwrap();
            }
            "pipe" => {
                use std::os::unix::fs::OpenOptionsExt;
                let (path, text) = value.split_once(' ').unwrap();
                let mut options = std::fs::OpenOptions::new();
                options.read(true).write(true).custom_flags(nix::libc::O_NONBLOCK);
                options.open(path).unwrap().write_all(format!("{text}\n").as_bytes()).unwrap();
            }
            "see" => writeln!(stdout, "{value}: {}", Path::new(value).exists()).unwrap(),
            "write" => {
                let done =
                    std::fs::OpenOptions::new().write(true).open(value).and_then(|mut file| file.write(b"x"));
                writeln!(stdout, "write {value}: {:?}", done.map_err(|error| error.kind())).unwrap();
            }
            "greet" => {
                let listener = inherited(value.parse().unwrap());
                listener.accept().unwrap().0.write_all(b"hello\n").unwrap();
            }
            "dead" => {
                let listener = StdListener::bind(value).unwrap();
                std::thread::spawn(move || listener.incoming().map(std::mem::forget).for_each(drop));
            }
            "guest" => runtime().block_on(guest(value)),
            "deaf" => {
                // The first carrier is read to its end and never answered.
                let listener = StdListener::bind(value).unwrap();
                let (mut carrier, _) = listener.accept().unwrap();
                carrier.read_to_end(&mut Vec::new()).unwrap();
                drop(listener);
                std::fs::remove_file(value).unwrap();
            }
            other => panic!("no such step: {other}"),
        }
        stdout.flush().unwrap();
    }
    ExitCode::SUCCESS
}

#[expect(unsafe_code, reason = "an inherited descriptor is known by its number alone")]
fn inherited(number: i32) -> StdListener {
    // SAFETY: the shim has opened it for this process, in which nothing else owns it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}

/// As Firecracker attaches to its taps.
#[expect(unsafe_code, reason = "nix wraps no TUNSETIFF")]
fn attach(name: &str) -> std::io::Result<std::fs::File> {
    use std::os::fd::AsRawFd;
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which zeros are valid.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as nix::libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR) as nix::libc::c_short;
    // SAFETY: the descriptor is open and `request` is an ifreq that lives through the call.
    let set = unsafe { nix::libc::ioctl(tun.as_raw_fd(), nix::libc::TUNSETIFF, &raw mut request) };
    if set < 0 { Err(std::io::Error::last_os_error()) } else { Ok(tun) }
}

/// Takes requests as a VMM's API does.
fn api(listener: &StdListener, refused: &str, console: &mut impl Write) {
    let (client, _) = listener.accept().unwrap();
    let mut lines = std::io::BufReader::new(&client);
    loop {
        let (mut head, mut length) = (String::new(), 0);
        let mut line = String::new();
        while std::io::BufRead::read_line(&mut lines, &mut line).unwrap() > 2 {
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            head.push_str(&line);
            line.clear();
        }
        let mut body = vec![0; length];
        lines.read_exact(&mut body).unwrap();
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        writeln!(console, "{method} {path} {}", String::from_utf8_lossy(&body)).unwrap();
        console.flush().unwrap();
        let answer = if path == refused {
            let fault = r#"{"fault_message": "it is of no use"}"#;
            format!("HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{fault}", fault.len())
        } else {
            "HTTP/1.1 204 \r\n\r\n".to_owned()
        };
        (&client).write_all(answer.as_bytes()).unwrap();
        if path == "/actions" {
            return;
        }
    }
}

/// A guest: echoes on ssh streams, answers hello and sync on control streams.
async fn guest(socket: &str) {
    let listener = UnixListener::bind(socket).unwrap();
    loop {
        let (carrier, _) = listener.accept().await.unwrap();
        let over = std::sync::Arc::new(tokio::sync::Notify::new());
        let end = over.clone();
        let serving = vm_channel::serve_guest(carrier, move |service, stream| {
            let over = over.clone();
            tokio::spawn(async move {
                match service {
                    Service::Ssh => {
                        if echo(stream).await {
                            over.notify_one();
                        }
                    }
                    Service::Control => control(stream).await,
                }
            });
        });
        tokio::select! {
            _ = serving => {}
            () = end.notified() => {}
        }
    }
}

/// Echoes and, after end-of-file, says how much that was: either direction ends on its own. Whether it was told to drop
/// the session instead.
async fn echo(stream: ChannelStream) -> bool {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut buffer = vec![0; 32 * 1024];
    let mut copied = 0;
    while let Ok(n @ 1..) = read.read(&mut buffer).await {
        if &buffer[..n] == b"!" {
            return true;
        }
        if write.write_all(&buffer[..n]).await.is_err() {
            return false;
        }
        copied += n;
    }
    let _ = write.write_all(format!("\nafter eof: {copied}").as_bytes()).await;
    let _ = write.shutdown().await;
    false
}

async fn control(stream: ChannelStream) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while matches!(stream.read_line(&mut line).await, Ok(1..)) {
        let reply = match serde_json::from_str(&line).unwrap() {
            Request::Hello => Reply::Hello {
                agent_version: "test".into(),
                config_version: 1,
                kernel_release: "6.0-test".into(),
                init: InitKind::Agent,
            },
            Request::Sync => Reply::Done,
            Request::GrowRoot { drive_bytes } => Reply::Grown { bytes: drive_bytes - 1 },
            Request::EndProcesses { .. } => Reply::ProcessesEnded { count: 0, names: Vec::new() },
            // Never answers these.
            Request::WaitReady { .. } => std::future::pending().await,
            Request::Shutdown { .. } => std::process::exit(0),
            Request::Apply { .. } => {
                Reply::Error { code: "config.refused".into(), message: "no such thing".into() }
            }
        };
        let mut text = serde_json::to_string(&reply).unwrap();
        text.push('\n');
        stream.write_all(text.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        line.clear();
    }
}
