//! The daemon's client of this server, over a Unix socket as in life.

use std::path::PathBuf;

use tokio::{
    net::UnixListener,
    time::{sleep, timeout},
};
use vm_guest::{Command, Guest, GuestError};

use super::{
    tests::{PATIENCE, new_key},
    *,
};

/// A server at a socket, and what is needed to log in.
pub(super) struct Served {
    pub(super) directory: tempfile::TempDir,
    pub(super) host_key: String,
    connections: Arc<tokio::sync::Mutex<tokio::task::JoinSet<()>>>,
}

impl Served {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (host_key, key) = (new_key(), new_key());
        let text = |key: &PrivateKey| key.to_openssh(ssh_key::LineEnding::LF).unwrap().to_string();
        std::fs::write(directory.path().join("key"), text(&key)).unwrap();
        let ssh = SshConfig {
            host_key: text(&host_key),
            authorized_keys: vec![key.public_key().to_openssh().unwrap()],
        };
        let environment = BTreeMap::from([("CONFIGURED".to_owned(), "yes".to_owned())]);
        let settings = Arc::new(Settings::new(&ssh, &environment).unwrap());
        let listener = UnixListener::bind(directory.path().join("ssh.sock")).unwrap();
        let connections = Arc::<tokio::sync::Mutex<tokio::task::JoinSet<()>>>::default();
        let all = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // A wire that can be cut, as the server's own tasks cannot.
                let (mut near, far) = tokio::io::duplex(64 << 10);
                tokio::spawn(Box::pin(run(Arc::clone(&settings), far)));
                all.lock().await.spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut near).await;
                });
            }
        });
        let host_key = host_key.public_key().to_openssh().unwrap();
        Self { directory, host_key, connections }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) async fn connect(&self) -> Result<Guest, GuestError> {
        Guest::connect(&self.path("ssh.sock"), &self.path("key"), &self.host_key).await
    }

    /// Ends all connections.
    async fn cut(&self) {
        self.connections.lock().await.shutdown().await;
    }
}

/// A guest, and the server that must outlive it.
pub(super) async fn guest() -> (Guest, Served) {
    let served = Served::new();
    (served.connect().await.unwrap(), served)
}

fn shell(script: &str) -> Command {
    Command::new(["/bin/sh", "-c", script])
}

#[tokio::test]
async fn commands_have_arguments_environment_directory_user_and_input() {
    let (guest, _served) = guest().await;
    let mut command =
        Command::new(["sh", "-c", "printf '%s|' \"$@\" \"$A\" \"$CONFIGURED\" \"$PWD\"; id -un; cat"]);
    command.argv.extend(["-", "a  b;$HOME", ""].map(str::to_owned));
    command.env.insert("A".into(), "c d".into());
    command.cwd = Some("/usr".into());
    command.user = Some("nobody".into());
    let got = guest.run(command.with_stdin(&b"in\xff"[..]), 1000).await.unwrap();
    assert_eq!(got.stdout, b"a  b;$HOME||c d|yes|/usr|nobody\nin\xff");
    assert_eq!((got.code, got.signal, got.truncated), (Some(0), None, false));
    let long = "x".repeat(95_000);
    let got = guest.run(Command::new(["printf", "%s%s", &long, &long]), 1 << 20).await.unwrap();
    assert_eq!(got.stdout.len(), 190_000, "as long as is let through");
    let got = guest.run(Command::new(["pwd"]), 1000).await.unwrap();
    assert_eq!(got.stdout, b"/\n", "where nobody says otherwise");
}

#[tokio::test]
async fn how_a_command_ends_is_no_error() {
    let (guest, _served) = guest().await;
    let got = guest.run(shell("echo oops >&2; exit 7"), 100).await.unwrap();
    assert_eq!((got.code, got.signal, got.stderr.as_slice()), (Some(7), None, b"oops\n".as_slice()));
    let got = guest.run(shell("kill -9 $$"), 100).await.unwrap();
    assert_eq!((got.code, got.signal), (None, Some(9)));
    let got = guest.run(shell("kill -34 $$"), 100).await.unwrap();
    assert_eq!((got.code, got.signal), (None, Some(34)));
    let got = guest.run(Command::new(["no-such-program"]), 100).await.unwrap();
    assert_eq!(got.code, Some(127));
    assert!(String::from_utf8_lossy(&got.stderr).contains("command not found"));
}

#[tokio::test]
async fn a_command_alone_does_not_wait_for_what_it_has_left_behind() {
    let (guest, served) = guest().await;
    let mark = served.path("pid");
    // All the time one more line comes, so it is never silent.
    let helper = "echo $$ > \"$0\"; while :; do echo more; sleep 0.01; done";
    let script = "sh -c \"$1\" \"$0\" & until grep -q . \"$0\" 2>/dev/null; do sleep 0.01; done; head -c 50000 /dev/zero; exit 5";
    let mut command = Command::new(["sh", "-c", script, mark.to_str().unwrap(), helper]);
    command.alone = true;
    let got = timeout(PATIENCE, guest.run(command, usize::MAX)).await.expect("it ends").unwrap();
    assert_eq!(got.code, Some(5));
    assert_eq!(got.stdout.iter().filter(|byte| **byte == 0).count(), 50_000, "all of its own is there");
    // Nobody reads what it writes any more.
    ended(&mark).await;
}

#[tokio::test]
async fn output_beyond_the_limit_is_dropped_and_said_to_be() {
    let (guest, _served) = guest().await;
    let got = guest.run(shell("head -c 5000000 /dev/zero; echo done >&2"), 1000).await.unwrap();
    assert_eq!((got.stdout.len(), got.stderr.as_slice(), got.truncated), (1000, b"done\n".as_slice(), true));
    assert_eq!(got.code, Some(0), "it was not held up");
    let got = guest.run(shell("printf abc"), 3).await.unwrap();
    assert_eq!((got.stdout.as_slice(), got.truncated), (b"abc".as_slice(), false));
}

#[tokio::test]
async fn bulk_input_and_output_pass_each_other_on_many_channels() {
    let (guest, _served) = guest().await;
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let one = || guest.run(Command::new(["cat"]).with_stdin(data.as_slice()), usize::MAX);
    let all = timeout(PATIENCE, futures::future::try_join_all((0..6).map(|_| one()))).await.unwrap().unwrap();
    assert!(all.iter().all(|got| got.stdout == data));
}

fn pid_in(mark: &Path) -> Option<i32> {
    std::fs::read_to_string(mark).ok().filter(|text| text.ends_with('\n'))?.trim().parse().ok()
}

/// Waits until a command has written its process id into a file.
async fn begun(mark: &Path) {
    let wait = async {
        while pid_in(mark).is_none() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("the command begins");
}

/// Waits until the process that a file names is gone.
async fn ended(mark: &Path) {
    let pid = pid_in(mark).unwrap();
    let gone = async {
        while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the command is ended");
}

#[tokio::test]
async fn a_command_that_nobody_waits_for_is_ended() {
    let (guest, served) = guest().await;
    let mut command = shell("exec sleep 1000");
    command.time_limit = Some(Duration::from_millis(300));
    let error = guest.run(command, 10).await.unwrap_err();
    assert!(matches!(error, GuestError::TimeLimit { .. }) && error.hint().is_some(), "{error:?}");
    assert_eq!(error.code(), "guest.time-limit");

    let mark = served.path("pid");
    let script = format!("echo $$ > {}; exec sleep 1000", mark.display());
    // The command never ends by itself.
    tokio::select! {
        got = guest.run(shell(&script), 10) => panic!("{got:?}"),
        () = begun(&mark) => {}
    }
    ended(&mark).await;
    assert_eq!(
        guest.run(shell("exit 3"), 10).await.unwrap().code,
        Some(3),
        "the connection is as good as before"
    );
}

#[tokio::test]
async fn only_the_right_guest_is_talked_to_and_only_with_the_right_key() {
    let (served, other) = (Served::new(), Served::new());
    let (socket, key) = (served.path("ssh.sock"), served.path("key"));
    let error = Guest::connect(&socket, &key, &other.host_key).await.unwrap_err();
    assert!(matches!(error, GuestError::HostKey), "{error:?}");
    let error = Guest::connect(&socket, &other.path("key"), &served.host_key).await.unwrap_err();
    assert!(matches!(error, GuestError::LoginRefused { .. }), "{error:?}");
    let error = Guest::connect(&socket, &key, "nonsense").await.unwrap_err();
    assert!(matches!(error, GuestError::RecordedKey { .. }), "{error:?}");
    let error = Guest::connect(&socket, &served.path("none"), &served.host_key).await.unwrap_err();
    assert!(matches!(error, GuestError::ReadKey { .. }), "{error:?}");
    let error =
        Guest::connect(&socket, &socket.with_file_name("x.sock"), &served.host_key).await.unwrap_err();
    assert!(matches!(error, GuestError::ReadKey { .. }), "{error:?}");
    let error = Guest::connect(&served.path("x.sock"), &key, &served.host_key).await.unwrap_err();
    assert!(matches!(error, GuestError::Connect { .. }), "{error:?}");
    let guest = served.connect().await.unwrap();
    let mut command = Command::new(["true"]);
    command.user = Some("no-such-user".into());
    let error = guest.run(command, 10).await.unwrap_err();
    assert!(matches!(&error, GuestError::LoginRefused { user } if user == "no-such-user"), "{error:?}");
}

#[tokio::test]
async fn a_lost_connection_is_told_and_made_anew() {
    let (guest, served) = guest().await;
    let mark = served.path("pid");
    let script = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let cut = async {
        begun(&mark).await;
        served.cut().await;
    };
    let (got, ()) =
        timeout(PATIENCE, async { tokio::join!(guest.run(shell(&script), 10), cut) }).await.unwrap();
    assert!(matches!(got, Err(GuestError::Lost { .. })), "{got:?}");
    ended(&mark).await;
    assert_eq!(guest.run(shell("exit 3"), 10).await.unwrap().code, Some(3));
    guest.close().await;
}
