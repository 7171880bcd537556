//! A VMM's process, as the shim would start it.

use std::{
    fmt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    process::{Child, ChildStdin, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use vm_host::HttpClient;
use vm_types::shim::{LaunchPlan, Told};

use super::PATIENCE;

/// A VMM that was started as planned.
#[derive(Debug)]
pub struct Running {
    pub(super) child: Child,
    /// The guest's console, towards the guest.
    pub stdin: ChildStdin,
    stdout: watch::Receiver<String>,
    reading: JoinHandle<()>,
    pub(super) stderr: watch::Receiver<String>,
    told: Vec<(Told, watch::Receiver<String>)>,
}

impl Running {
    /// Starts it, with what was left there before out of its way, as the shim does; dropping what is returned kills it.
    pub fn launch(plan: &LaunchPlan) -> Self {
        let mut command = Command::new(&plan.program);
        command.args(&plan.args);
        Self::run(plan, command)
    }

    /// Likewise, by another program that becomes the planned one.
    pub(super) fn run(plan: &LaunchPlan, mut command: Command) -> Self {
        clear(plan);
        let told = make_own_dir(plan);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the planned program starts");
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (stdout, reading) = collect_until_told(stdout.expect("stdout is piped"));
        Self {
            stdin: stdin.expect("stdin is piped"),
            stdout,
            reading,
            stderr: collect(stderr.expect("stderr is piped")),
            told,
            child,
        }
    }

    /// Its process id; 0 once its end has been seen.
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// What the console has shown so far.
    pub fn console(&self) -> String {
        self.stdout.borrow().clone()
    }

    /// Returns when the console has shown `text`.
    pub async fn shows(&mut self, text: &str) {
        self.shows_one_of(&[text]).await;
    }

    /// Returns when the console has shown one of these.
    pub async fn shows_one_of(&mut self, texts: &[impl AsRef<str> + fmt::Debug]) {
        let shown = self.stdout.wait_for(|console| texts.iter().any(|text| console.contains(text.as_ref())));
        let seen = matches!(timeout(PATIENCE, shown).await, Ok(Ok(_)));
        assert!(
            seen,
            "the console never showed {texts:?}; console: {:?}; stderr: {:?}",
            *self.stdout.borrow(),
            *self.stderr.borrow()
        );
    }

    /// What has come through a pipe of the plan's so far, and will.
    pub fn told(&self, what: Told) -> Option<watch::Receiver<String>> {
        self.told.iter().find(|(told, _)| *told == what).map(|(_, text)| text.clone())
    }

    /// Reads its console no more, and lets go of it.
    pub(super) fn stop_reading(&self) {
        self.reading.abort();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended.expect("the VMM ends in time").expect("a child can be waited for")
    }

    /// Whether it runs still.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it and sees it gone, so that its sockets cannot be taken for those of the next.
    pub(super) async fn finish(mut self) {
        self.kill();
        self.ended().await;
    }

    /// Kills it as the shim does.
    pub fn kill(&mut self) {
        self.child.start_kill().expect("a running child can be killed");
    }
}

fn collect(from: impl AsyncRead + Unpin + Send + 'static) -> watch::Receiver<String> {
    collect_until_told(from).0
}

fn collect_until_told(
    mut from: impl AsyncRead + Unpin + Send + 'static,
) -> (watch::Receiver<String>, JoinHandle<()>) {
    let (text, seen) = watch::channel(String::new());
    let reading = tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let new = String::from_utf8_lossy(&buffer[..read]);
            text.send_modify(|text| text.push_str(&new));
        }
    });
    (seen, reading)
}

/// Makes the directory that the VMM makes its sockets in, and reads its pipes.
fn make_own_dir(plan: &LaunchPlan) -> Vec<(Told, watch::Receiver<String>)> {
    use std::os::unix::fs::chown;
    let Some(own) = &plan.own_dir else { return Vec::new() };
    let user = plan.jail.as_ref().map(|jail| jail.user);
    let _ = std::fs::remove_dir_all(&own.path);
    std::fs::create_dir(&own.path).expect("the directory can be made");
    let pipes = own.pipes.iter().map(|pipe| {
        nix::unistd::mkfifo(&pipe.path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe can be made");
        let end = pipe::OpenOptions::new().read_write(true).open_receiver(&pipe.path);
        chown(&pipe.path, user, user).expect("it can be given away");
        (pipe.what, collect(end.expect("it can be opened")))
    });
    let pipes = pipes.collect();
    chown(&own.path, user, user).expect("it can be given away");
    pipes
}

/// Removes sockets that a former VMM has left.
pub(super) fn clear(plan: &LaunchPlan) {
    let control = plan.setup.as_ref().map(|setup| setup.socket.as_path());
    for socket in [Some(plan.channel.socket()), plan.events.as_deref(), control].into_iter().flatten() {
        vm_host::files::remove_if_there(socket).expect("what is left there can be removed");
    }
}

/// Makes the plan's requests, if it has any, as the shim does.
///
/// # Panics
/// Where one is refused.
pub async fn configure(plan: &LaunchPlan) {
    let Some(setup) = &plan.setup else { return };
    let mut client = timeout(PATIENCE, async {
        loop {
            match HttpClient::connect(&setup.socket, PATIENCE).await {
                Err(error) if error.is_nobody() => tokio::time::sleep(Duration::from_millis(5)).await,
                connected => return connected.expect("it takes connections"),
            }
        }
    })
    .await
    .expect("it listens in time");
    for request in &setup.requests {
        let made = client.request(&request.method, &request.path, Some(&request.body)).await;
        assert!(made.is_ok(), "{made:?}");
    }
}
