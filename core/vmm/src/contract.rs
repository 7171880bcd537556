//! What every VMM driver has to do, as a suite that runs against real processes.
//!
//! Each function plans a launch, starts it as the shim would (console on piped stdin and stdout), and judges what an
//! onlooker sees. They panic where the driver breaks the contract.

pub mod tiny;

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::{Child, ChildStdin, Command},
    sync::watch,
    time::timeout,
};
use vm_host::HttpClient;
use vm_types::{
    VmPaths,
    machine::MachineSpec,
    shim::{GuestEnd, LastWords, LaunchPlan, QmpEvent},
};

use crate::{Vmm, VmmError};

/// Nothing in the suite takes this long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A driver with a machine whose guest greets on its console, sends back what it reads there, powers off when the
/// power button is pressed or it reads a line of the byte 0x0f (control-O), resets at 0x12 (control-R) and panics at 0x10
/// (control-P). It has a writable drive. The directories of `paths` are there and not shared with another subject.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The driver.
    pub vmm: &'a dyn Vmm,
    /// The machine.
    pub machine: MachineSpec,
    /// Its files.
    pub paths: VmPaths,
    /// What the guest says on its console when it is up.
    pub greeting: &'static str,
}

/// A VMM that was started as planned.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// The guest's console, towards the guest.
    pub stdin: ChildStdin,
    stdout: watch::Receiver<String>,
    stderr: watch::Receiver<String>,
}

impl Running {
    /// Starts it, with what was left there before out of its way, as the shim does; dropping what is returned kills it.
    pub fn launch(plan: &LaunchPlan) -> Self {
        clear(plan);
        let mut child = Command::new(&plan.program)
            .args(&plan.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the planned program starts");
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        Self {
            stdin: stdin.expect("stdin is piped"),
            stdout: collect(stdout.expect("stdout is piped")),
            stderr: collect(stderr.expect("stderr is piped")),
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
    async fn finish(mut self) {
        self.kill();
        self.ended().await;
    }

    /// Kills it as the shim does.
    pub fn kill(&mut self) {
        self.child.start_kill().expect("a running child can be killed");
    }
}

fn collect(mut from: impl AsyncRead + Unpin + Send + 'static) -> watch::Receiver<String> {
    let (text, seen) = watch::channel(String::new());
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let new = String::from_utf8_lossy(&buffer[..read]);
            text.send_modify(|text| text.push_str(&new));
        }
    });
    seen
}

/// Removes sockets that a former VMM has left.
fn clear(plan: &LaunchPlan) {
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

impl Subject<'_> {
    /// Plans, launches, and waits until the guest has greeted.
    ///
    /// # Panics
    /// Where the driver breaks the contract.
    pub async fn start(&self) -> Running {
        let plan = self.plan().await;
        let mut running = Running::launch(&plan);
        tokio::select! {
            biased;
            () = configure(&plan) => {}
            status = running.child.wait() => {
                panic!("the VMM ended ({status:?}); stderr: {:?}", *running.stderr.borrow());
            }
        }
        // Cancel-safe: a VMM that is up is not waited for, and one that ended is not waited for to come up.
        tokio::select! {
            up = self.vmm.wait_up(&self.paths, PATIENCE) => {
                assert!(up.is_ok(), "{up:?}; stderr: {:?}", *running.stderr.borrow());
            }
            status = running.child.wait() => {
                let _ = timeout(PATIENCE, running.stderr.wait_for(|text| !text.is_empty())).await;
                panic!("the VMM ended ({status:?}); stderr: {:?}", *running.stderr.borrow());
            }
        }
        running.shows(self.greeting).await;
        running
    }

    async fn plan(&self) -> LaunchPlan {
        self.vmm.plan(&self.machine, &self.paths).await.expect("a sound machine can be planned")
    }
}

/// All of the contract, one after the other.
///
/// # Panics
/// Where the driver breaks it.
pub async fn everything(subject: &Subject<'_>) {
    plans_alike_and_touches_nothing(subject).await;
    says_what_it_is(subject).await;
    console_works_both_ways(subject).await;
    offers_the_guest_channel(subject).await;
    quits_at_once(subject).await;
    a_kill_shows_and_leaves_nothing_in_the_way(subject).await;
    lives_without_a_console_reader(subject).await;
    pauses_and_resumes(subject).await;
    the_power_button_reaches_the_guest(subject).await;
    tells_how_the_guest_ended(subject).await;
    grows_a_disk(subject).await;
    an_absent_vmm_is_an_error(subject).await;
}

/// A plan is a function of its arguments, names its program absolutely and makes nothing on the host.
///
/// # Panics
/// Where the driver breaks it.
pub async fn plans_alike_and_touches_nothing(subject: &Subject<'_>) {
    let before = listing(&subject.paths);
    let (one, other) = (subject.plan().await, subject.plan().await);
    assert_eq!(one, other);
    assert!(one.program.is_absolute(), "{:?}", one.program);
    assert_eq!(one.channel.socket(), subject.paths.channel_sock());
    if let Some(events) = &one.events {
        assert_eq!(*events, subject.paths.events_sock());
    } else {
        assert!(one.last_words.is_some(), "nobody would learn how a guest ended");
    }
    assert_eq!(listing(&subject.paths), before);
}

/// Version and reason are there for doctor.
///
/// # Panics
/// Where the driver breaks it.
pub async fn says_what_it_is(subject: &Subject<'_>) {
    let found = subject.vmm.availability().await.expect("the VMM is installed");
    assert!(found.version.starts_with(|c: char| c.is_ascii_digit()), "{found:?}");
    assert!(!found.reason.is_empty(), "{found:?}");
}

/// stdout is what the guest prints, stdin what it reads.
///
/// # Panics
/// Where the driver breaks it.
pub async fn console_works_both_ways(subject: &Subject<'_>) {
    let mut running = subject.start().await;
    running.stdin.write_all(b"hello, guest\n").await.expect("the console takes input");
    running.shows("hello, guest").await;
    running.finish().await;
}

/// The channel's socket takes a connection as soon as the VMM is up.
///
/// # Panics
/// Where the driver breaks it.
pub async fn offers_the_guest_channel(subject: &Subject<'_>) {
    let running = subject.start().await;
    for _ in 0..2 {
        let connected = UnixStream::connect(subject.paths.channel_sock()).await;
        assert!(connected.is_ok(), "{connected:?}");
    }
    running.finish().await;
}

/// `quit` ends the VMM with status 0, also when another client has just used the control socket. Absent: typed, and harmless.
///
/// # Panics
/// Where the driver breaks it.
pub async fn quits_at_once(subject: &Subject<'_>) {
    let mut running = subject.start().await;
    subject.vmm.wait_up(&subject.paths, PATIENCE).await.expect("it is up still");
    if let Err(error) = subject.vmm.quit(&subject.paths).await {
        assert!(matches!(error, VmmError::Unsupported { .. }), "{error}");
        assert!(running.runs());
        return running.finish().await;
    }
    assert_eq!(running.ended().await.code(), Some(0));
    let error = subject.vmm.quit(&subject.paths).await.expect_err("it is gone");
    assert!(error.hint().is_some(), "{error}");
}

/// A killed VMM is seen as killed, and what it leaves behind does not keep the next one from starting.
///
/// # Panics
/// Where the driver breaks it.
pub async fn a_kill_shows_and_leaves_nothing_in_the_way(subject: &Subject<'_>) {
    use std::os::unix::process::ExitStatusExt;
    let mut running = subject.start().await;
    running.kill();
    let status = running.ended().await;
    assert_eq!((status.code(), status.signal()), (None, Some(9)), "{status}");
    let error = subject.vmm.wait_up(&subject.paths, Duration::from_millis(100)).await;
    assert!(matches!(error, Err(VmmError::NotUp { .. })), "{error:?}");
    let mut again = subject.start().await;
    assert!(again.runs());
    again.finish().await;
}

/// A console whose reader is gone ends nothing.
///
/// # Panics
/// Where the driver breaks it.
pub async fn lives_without_a_console_reader(subject: &Subject<'_>) {
    let plan = subject.plan().await;
    clear(&plan);
    let mut child = Command::new(&plan.program)
        .args(&plan.args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("the planned program starts");
    drop(child.stdout.take());
    configure(&plan).await;
    subject.vmm.wait_up(&subject.paths, PATIENCE).await.expect("it comes up");
    if subject.vmm.quit(&subject.paths).await.is_err() {
        assert!(matches!(child.try_wait(), Ok(None)), "it did not survive");
        return child.kill().await.expect("a running child can be killed");
    }
    let status =
        timeout(PATIENCE, child.wait()).await.expect("it ends in time").expect("it can be waited for");
    assert_eq!(status.code(), Some(0));
}

/// A paused guest does nothing until it is resumed; saying either twice changes nothing. Absent: typed.
///
/// # Panics
/// Where the driver breaks it.
pub async fn pauses_and_resumes(subject: &Subject<'_>) {
    let Some(pause) = subject.vmm.pause() else {
        let refused = subject.vmm.require_pause().err();
        return assert!(matches!(refused, Some(VmmError::Unsupported { .. })), "{refused:?}");
    };
    let paths = &subject.paths;
    let is_paused = async || pause.is_paused(paths).await.expect("it says whether it is paused");
    let mut running = subject.start().await;
    assert!(!is_paused().await);
    for _ in 0..2 {
        pause.pause(paths).await.expect("it can be paused");
        assert!(is_paused().await);
    }
    running.stdin.write_all(b"said while paused\n").await.expect("the console takes input");
    // Nothing can be waited for where nothing may happen; asking it something again gives it the time to do wrong.
    for _ in 0..5 {
        assert!(is_paused().await);
    }
    assert!(!running.console().contains("said while paused"));
    for _ in 0..2 {
        pause.resume(paths).await.expect("it can be resumed");
        assert!(!is_paused().await);
    }
    running.shows("said while paused").await;
    running.finish().await;
}

/// The guest goes down when the button is pressed, and its VMM with it, with status 0. Absent: typed.
///
/// # Panics
/// Where the driver breaks it.
pub async fn the_power_button_reaches_the_guest(subject: &Subject<'_>) {
    let Some(button) = subject.vmm.power_button() else {
        let refused = subject.vmm.require_power_button().err();
        return assert!(matches!(refused, Some(VmmError::Unsupported { .. })), "{refused:?}");
    };
    let mut running = subject.start().await;
    button.press(&subject.paths).await.expect("it can be pressed");
    assert_eq!(running.ended().await.code(), Some(0));
}

/// The event socket says how the guest ended, and nothing where it was the host's doing; without one, the guest's last words do.
///
/// # Panics
/// Where the driver breaks it.
pub async fn tells_how_the_guest_ended(subject: &Subject<'_>) {
    if let Some(words) = &subject.plan().await.last_words {
        return the_guest_says_how_it_ended(subject, words).await;
    }
    for (typed, end) in
        [(b"\x0f\n", GuestEnd::PowerOff), (b"\x12\n", GuestEnd::Reboot), (b"\x10\n", GuestEnd::Panic)]
    {
        let mut running = subject.start().await;
        let told = listen(&subject.plan().await).await;
        running.stdin.write_all(typed).await.expect("the console takes input");
        assert_eq!(running.ended().await.code(), Some(0), "{end:?}");
        assert_eq!(told.await.expect("the listener ends"), Some(end));
    }
    let mut running = subject.start().await;
    let told = listen(&subject.plan().await).await;
    subject.vmm.quit(&subject.paths).await.expect("it can be ended");
    running.ended().await;
    assert_eq!(told.await.expect("the listener ends"), None);
    let mut running = subject.start().await;
    let told = listen(&subject.plan().await).await;
    running.kill();
    running.ended().await;
    assert_eq!(told.await.expect("the listener ends"), None);
}

async fn the_guest_says_how_it_ended(subject: &Subject<'_>, words: &LastWords) {
    let cases: [(&[u8], _); 3] =
        [(b"\x0f\n", &words.power_off), (b"\x12\n", &words.reboot), (b"\x10\n", &words.panic)];
    for (typed, texts) in cases {
        let mut running = subject.start().await;
        running.stdin.write_all(typed).await.expect("the console takes input");
        running.shows_one_of(texts).await;
        // Such a guest cannot switch its machine off, only reset it.
        if *texts != words.power_off {
            assert_eq!(running.ended().await.code(), Some(0), "{texts:?}");
        } else {
            running.finish().await;
        }
    }
}

/// Listens on the event socket to its end, as the shim does. Returns when the VMM knows.
///
/// # Panics
/// Where there is no such socket, or it does not speak QMP.
pub async fn listen(plan: &LaunchPlan) -> tokio::task::JoinHandle<Option<GuestEnd>> {
    let socket = plan.events.as_ref().expect("the plan has an event socket");
    let mut stream = BufReader::new(UnixStream::connect(socket).await.expect("the event socket is there"));
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").await.expect("it takes commands");
    let mut lines = stream.lines();
    let answered = async {
        while let Ok(Some(line)) = lines.next_line().await {
            if line.contains("\"return\"") {
                return;
            }
        }
        panic!("the event socket ends before it answers");
    };
    timeout(PATIENCE, answered).await.expect("it answers in time");
    tokio::spawn(async move {
        let mut end = None;
        while let Ok(Some(line)) = lines.next_line().await {
            end = serde_json::from_str::<QmpEvent>(&line).expect("it speaks QMP").guest_end(end);
        }
        end
    })
}

/// A drive grows while the guest runs, file and all, and neither shrinks nor appears. Absent: typed.
///
/// # Panics
/// Where the driver breaks it.
pub async fn grows_a_disk(subject: &Subject<'_>) {
    let Some(resize) = subject.vmm.resize() else {
        let refused = subject.vmm.require_resize().err();
        return assert!(matches!(refused, Some(VmmError::Unsupported { .. })), "{refused:?}");
    };
    let running = subject.start().await;
    let drive = subject.machine.drives.first().expect("the machine has a drive");
    let grow = async |serial, size| resize.grow_disk(&subject.paths, serial, size).await;
    let size = || std::fs::metadata(&drive.path).map_or(0, |meta| meta.len());
    let target = size() + 1024 * 1024;
    for _ in 0..2 {
        grow(&drive.serial, target).await.expect("it can be grown");
        assert_eq!(size(), target);
    }
    let smaller = grow(&drive.serial, target - 512).await.expect_err("it cannot shrink");
    assert!(matches!(smaller, VmmError::Growth { .. }) && smaller.hint().is_some(), "{smaller}");
    let odd = grow(&drive.serial, target + 1).await.expect_err("no sector is cut");
    assert!(matches!(odd, VmmError::Growth { .. }), "{odd}");
    let none = grow("no-such-drive", target).await.expect_err("it is not there");
    assert!(matches!(none, VmmError::NoDrive { .. }) && none.hint().is_some(), "{none}");
    assert_eq!(size(), target);
    running.finish().await;
}

/// Nobody there: every operation fails in time, with a hint.
///
/// # Panics
/// Where the driver breaks it.
pub async fn an_absent_vmm_is_an_error(subject: &Subject<'_>) {
    let nowhere = VmPaths { run: subject.paths.run.join("nowhere"), ..subject.paths.clone() };
    let error = subject.vmm.wait_up(&nowhere, Duration::from_millis(50)).await.expect_err("nobody is there");
    assert!(matches!(error, VmmError::NotUp { .. }) && error.hint().is_some(), "{error}");
    let error = subject.vmm.quit(&nowhere).await.expect_err("nobody is there");
    let expected = matches!(error, VmmError::Control { .. } | VmmError::Unsupported { .. });
    assert!(expected && error.hint().is_some(), "{error}");
}

/// Names and sizes of what is in the VM's directories.
fn listing(paths: &VmPaths) -> BTreeMap<std::path::PathBuf, u64> {
    let entries = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten();
    paths
        .directories()
        .into_iter()
        .flat_map(entries)
        .map(|entry| (entry.path(), entry.metadata().map(|meta| meta.len()).unwrap_or_default()))
        .collect()
}
