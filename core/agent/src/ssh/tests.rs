//! The server over an in-process stream, with russh's client at the other end.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use russh::{
    ChannelMsg, Sig, client,
    keys::{
        Algorithm, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate,
        ssh_key::{LineEnding, rand_core::UnwrapErr},
    },
};
use tokio::{io::AsyncWriteExt, time::timeout};
use vm_types::guest::{EXEC_ARGV_ENV, EXEC_CWD_ENV, config::SshConfig};

use super::*;

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Client {
    host_key: PublicKey,
}

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(
            matches!(key, PublicKeyOrCertificate::PublicKey { key, .. } if key.key_data() == self.host_key.key_data()),
        )
    }
}

pub(super) fn new_key() -> PrivateKey {
    PrivateKey::random(&mut UnwrapErr(russh::keys::key::safe_rng()), Algorithm::Ed25519).unwrap()
}

/// A connection as root of this machine, with a key that may log in or one that may not.
pub(super) async fn connect_as(user: &str, known: bool) -> (client::Handle<Client>, bool) {
    let (near, far) = tokio::io::duplex(64 << 10);
    connect_over(near, far, user, known, client::Config::default()).await
}

pub(super) async fn connect_over(
    near: tokio::io::DuplexStream,
    far: tokio::io::DuplexStream,
    user: &str,
    known: bool,
    config: client::Config,
) -> (client::Handle<Client>, bool) {
    let (host_key, key) = (new_key(), new_key());
    let ssh = SshConfig {
        host_key: host_key.to_openssh(LineEnding::LF).unwrap().to_string(),
        authorized_keys: vec![
            "# a comment".into(),
            "no key at all".into(),
            if known { key.clone() } else { new_key() }.public_key().to_openssh().unwrap(),
        ],
    };
    let environment = BTreeMap::from([("CONFIGURED".to_owned(), "yes indeed".to_owned())]);
    let settings = Settings::new(&ssh, &environment).unwrap();
    assert_eq!(settings.warnings.len(), 1);
    tokio::spawn(run(Arc::new(settings), far));
    let handler = Client { host_key: host_key.public_key().clone() };
    let mut handle = client::connect_stream(Arc::new(config), near, handler).await.unwrap();
    assert!(!handle.authenticate_none(user).await.unwrap().success());
    assert!(!handle.authenticate_password(user, "").await.unwrap().success());
    let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
    let good = handle.authenticate_publickey(user, key).await.unwrap().success();
    (handle, good)
}

pub(super) async fn connect() -> client::Handle<Client> {
    let (handle, good) = connect_as("root", true).await;
    assert!(good);
    handle
}

#[derive(Debug, Default, PartialEq)]
pub(super) struct Outcome {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
    pub(super) status: Option<u32>,
    signal: Option<String>,
}

pub(super) async fn outcome(channel: &mut russh::Channel<client::Msg>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut eof = false;
    let all = async {
        while let Some(message) = channel.wait().await {
            match message {
                ChannelMsg::Data { data } => {
                    assert!(outcome.status.is_none() && !eof, "data behind the exit status");
                    outcome.stdout.extend_from_slice(&data);
                }
                ChannelMsg::ExtendedData { data, ext: 1 } => {
                    outcome.stderr.push_str(&String::from_utf8_lossy(&data))
                }
                ChannelMsg::ExitStatus { exit_status } => outcome.status = Some(exit_status),
                ChannelMsg::ExitSignal { signal_name, .. } => {
                    outcome.signal = Some(format!("{signal_name:?}"))
                }
                ChannelMsg::Eof => eof = true,
                _ => {}
            }
        }
    };
    timeout(PATIENCE, all).await.expect("the channel is closed in time");
    assert!(eof, "end of data is said before the close");
    outcome
}

async fn exec(handle: &client::Handle<Client>, env: &[(&str, &str)], command: &str) -> Outcome {
    let mut channel = handle.channel_open_session().await.unwrap();
    for (name, value) in env {
        channel.set_env(true, *name, *value).await.unwrap();
    }
    channel.exec(true, command).await.unwrap();
    outcome(&mut channel).await
}

#[tokio::test]
async fn only_known_keys_of_existing_users_get_in() {
    assert!(!connect_as("root", false).await.1);
    assert!(!connect_as("no-such-user", true).await.1);
    assert!(connect_as("nobody", true).await.1);
}

#[tokio::test]
async fn a_command_has_output_environment_and_status() {
    let handle = connect().await;
    let got = exec(
        &handle,
        &[("A", "b c")],
        "printf '%s|%s|%s' \"$A\" \"$CONFIGURED\" \"$USER\"; echo oops >&2; exit 7",
    )
    .await;
    assert_eq!(got.stdout, b"b c|yes indeed|root");
    assert_eq!((got.stderr.as_str(), got.status), ("oops\n", Some(7)));
    let got = exec(&handle, &[], "kill -9 $$").await;
    assert_eq!((got.status, got.signal.as_deref()), (None, Some("KILL")));
}

#[tokio::test]
async fn argument_vectors_go_past_the_shell() {
    let handle = connect().await;
    let direct = [(EXEC_ARGV_ENV, "1"), (EXEC_CWD_ENV, "/usr")];
    assert_eq!(exec(&handle, &direct, "printf '%s' 'a  b;$HOME'").await.stdout, b"a  b;$HOME");
    assert_eq!(exec(&handle, &direct, "pwd").await.stdout, b"/usr\n");
    let clean = exec(&handle, &direct, "env").await.stdout;
    assert!(!String::from_utf8(clean).unwrap().contains("VMD_EXEC"));
    let got = exec(&handle, &direct, "no-such-program").await;
    assert_eq!(got.status, Some(127));
    assert!(got.stderr.contains("no-such-program: command not found"), "{}", got.stderr);
    assert_eq!(exec(&handle, &direct, "/etc/passwd").await.status, Some(126));
    assert_eq!(exec(&handle, &direct, "./no-such").await.status, Some(127));
    let got = exec(&handle, &[(EXEC_CWD_ENV, "/no/such")], "true").await;
    assert_eq!(got.status, Some(126));
    assert!(got.stderr.contains("/no/such"));
}

#[tokio::test]
async fn other_users_run_as_themselves() {
    let (handle, good) = connect_as("nobody", true).await;
    assert!(good);
    let got = exec(&handle, &[(EXEC_ARGV_ENV, "1")], "id -u").await;
    assert_eq!(got.stdout, b"65534\n");
    let got = exec(&handle, &[(EXEC_ARGV_ENV, "1")], "id -G").await;
    assert_eq!(got.stdout, b"65534\n", "no group of the server's is left");
}

#[tokio::test]
async fn bulk_data_passes_both_ways_at_once_and_eof_ends_it() {
    let handle = connect().await;
    let mut channel = handle.channel_open_session().await.unwrap();
    channel.exec(true, "cat").await.unwrap();
    let data: Vec<u8> = (0..12_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut writer = channel.make_writer();
    let sent = data.clone();
    let send = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let got = outcome(&mut channel).await;
    send.await.unwrap();
    assert!(got.stdout == data);
    assert_eq!(got.status, Some(0));
}

#[tokio::test]
async fn a_command_that_does_not_read_holds_up_no_other() {
    let handle = connect().await;
    let mut stuck = handle.channel_open_session().await.unwrap();
    stuck.exec(true, "exec sleep 1000").await.unwrap();
    let mut writer = stuck.make_writer();
    let flood = tokio::spawn(async move { while writer.write_all(&[0; 32 << 10]).await.is_ok() {} });
    for _ in 0..3 {
        assert_eq!(exec(&handle, &[], "echo alive").await.stdout, b"alive\n");
    }
    // The signal comes in behind all that nobody reads.
    stuck.signal(Sig::TERM).await.unwrap();
    assert_eq!(outcome(&mut stuck).await.signal.as_deref(), Some("TERM"));
    flood.abort();
}

#[tokio::test]
async fn signals_reach_the_whole_group() {
    let handle = connect().await;
    let mut channel = handle.channel_open_session().await.unwrap();
    // Not SIGINT, and no child in the foreground: bash 5.2 at times sends itself a SIGINT without end when both get one.
    let script = "trap 'echo caught' TERM
        sh -c 'echo ready; exec sleep 1000' &
        while kill -0 $! 2>/dev/null; do wait $!; done; exit 3";
    channel.exec(true, script).await.unwrap();
    loop {
        if let ChannelMsg::Data { data } = timeout(PATIENCE, channel.wait()).await.unwrap().unwrap() {
            assert_eq!(&data[..], b"ready\n");
            break;
        }
    }
    channel.signal(Sig::TERM).await.unwrap();
    let got = outcome(&mut channel).await;
    assert_eq!((got.stdout.as_slice(), got.status), (b"caught\n".as_slice(), Some(3)));
}

#[tokio::test]
async fn a_background_process_with_the_pipe_does_not_hang_the_client() {
    let handle = connect().await;
    let got = exec(&handle, &[], "sleep 1000 & echo $!").await;
    assert_eq!(got.status, Some(0));
    let pid = String::from_utf8(got.stdout).unwrap().trim().parse().unwrap();
    // It lives on: only the client has gone.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn a_terminal_is_a_terminal() {
    let handle = connect().await;
    let mut channel = handle.channel_open_session().await.unwrap();
    channel.request_pty(true, "xterm-test", 101, 37, 0, 0, &[(russh::Pty::ECHO, 0)]).await.unwrap();
    channel
        .exec(true, "tty; stty size; stty -a | grep -o -- '-echo '; echo $TERM; read x; stty size; exit 5")
        .await
        .unwrap();
    let mut text = String::new();
    let mut resized = false;
    let mut status = None;
    while let Some(message) = timeout(PATIENCE, channel.wait()).await.unwrap() {
        match message {
            ChannelMsg::Data { data } => text.push_str(&String::from_utf8_lossy(&data)),
            ChannelMsg::ExitStatus { exit_status } => status = Some(exit_status),
            _ => {}
        }
        if !resized && text.contains("xterm-test") {
            resized = true;
            channel.window_change(55, 22, 0, 0).await.unwrap();
            channel.data(&b"x\n"[..]).await.unwrap();
        }
    }
    assert!(text.starts_with("/dev/pts/"), "{text}");
    assert!(text.contains("37 101\r\n-echo \r\nxterm-test\r\n22 55\r\n"), "{text}");
    assert_eq!(status, Some(5));
}

#[tokio::test]
async fn a_connection_that_vanishes_hangs_up_commands_but_no_daemons() {
    let ((near, mut client), (mut server, far)) = (tokio::io::duplex(4096), tokio::io::duplex(4096));
    let wire = tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
    let (handle, good) = connect_over(near, far, "root", true, client::Config::default()).await;
    assert!(good);
    let mut channel = handle.channel_open_session().await.unwrap();
    let daemon = "setsid sh -c 'echo $$; exec sleep 1000 </dev/null >/dev/null 2>&1' &";
    channel.exec(true, format!("echo $$; {daemon} exec sleep 1000")).await.unwrap();
    let mut text = String::new();
    while text.lines().count() < 2 {
        if let ChannelMsg::Data { data } = timeout(PATIENCE, channel.wait()).await.unwrap().unwrap() {
            text.push_str(&String::from_utf8_lossy(&data));
        }
    }
    let pids: Vec<i32> = text.lines().map(|pid| pid.parse().unwrap()).collect();
    wire.abort();
    let alive = |pid: i32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    let gone = async {
        while alive(pids[0]) {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the command ends");
    assert!(alive(pids[1]), "what made itself independent stays");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pids[1]), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn connections_are_forwarded_with_half_close() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = stream.split();
        let mut all = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut read, &mut all).await.unwrap();
        all.reverse();
        write.write_all(&all).await.unwrap();
    });
    let handle = connect().await;
    let mut channel =
        handle.channel_open_direct_tcpip("127.0.0.1", u32::from(port), "127.0.0.1", 1).await.unwrap();
    channel.data(&b"olleh"[..]).await.unwrap();
    channel.eof().await.unwrap();
    assert_eq!(outcome(&mut channel).await.stdout, b"hello");
    assert!(handle.channel_open_direct_tcpip("127.0.0.1", 1, "127.0.0.1", 1).await.is_err());
}

/// A client that takes nothing for longer than the silence after a command's end still gets everything, whoever holds the pipe.
#[tokio::test]
async fn a_client_that_pauses_loses_nothing() {
    let config =
        client::Config { window_size: 32 << 10, channel_buffer_size: 1, ..client::Config::default() };
    let (near, far) = tokio::io::duplex(4096);
    let (handle, good) = connect_over(near, far, "root", true, config).await;
    assert!(good);
    let mut channel = handle.channel_open_session().await.unwrap();
    let mark = tempfile::NamedTempFile::new().unwrap();
    let helper = format!("(sleep 1000 & echo $! >&3) 3>{}", mark.path().display());
    // More than the client takes unread, no more than a pipe and a pump hold beyond that: the command ends.
    channel.exec(true, format!("{helper}; head -c 128000 /dev/zero; echo end >&2; exit 4")).await.unwrap();
    // The pause under test.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let got = outcome(&mut channel).await;
    let pid = std::fs::read_to_string(mark.path()).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!((got.stdout.len(), got.stderr.as_str(), got.status), (128_000, "end\n", Some(4)));
}

#[tokio::test]
async fn a_directory_that_may_not_be_entered_is_named() {
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let (handle, good) = connect_as("nobody", true).await;
    assert!(good);
    let path = closed.path().to_str().unwrap();
    let got = exec(&handle, &[(EXEC_ARGV_ENV, "1"), (EXEC_CWD_ENV, path)], "true").await;
    assert_eq!(got.status, Some(126));
    assert!(got.stderr.contains(&format!("directory {path}: Permission denied")), "{}", got.stderr);
}

#[tokio::test]
async fn real_time_signals_have_a_local_name() {
    let handle = connect().await;
    assert_eq!(exec(&handle, &[], "kill -34 $$").await.signal.as_deref(), Some(r#"Custom("RT34@vmd")"#));
}

#[tokio::test]
async fn signals_reach_helpers_that_write_on_after_their_leader() {
    let handle = connect().await;
    let mut channel = handle.channel_open_session().await.unwrap();
    channel.exec(true, "while :; do echo x; sleep 0.1; done & exit 3").await.unwrap();
    let mut lines = 0;
    while lines < 15 {
        if let ChannelMsg::Data { data } = timeout(PATIENCE, channel.wait()).await.unwrap().unwrap() {
            lines += data.len() / 2;
        }
    }
    channel.signal(Sig::TERM).await.unwrap();
    assert_eq!(outcome(&mut channel).await.status, Some(3));
}
