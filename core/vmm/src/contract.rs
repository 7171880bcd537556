//! What every VMM driver has to do, as a suite that runs against real processes.
//!
//! Each function plans a launch, starts it as the shim would (console on piped stdin and stdout), and judges what an
//! onlooker sees. They panic where the driver breaks the contract.

mod running;
pub mod tiny;

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::Command,
    time::timeout,
};
use vm_types::{
    VmPaths,
    machine::MachineSpec,
    shim::{GuestEnd, LastWords, LaunchPlan, QmpEvent, ShimSpec, Told},
};

pub use running::{Running, configure};

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
    /// The program whose mode `jail --spec FILE` locks in what is planned so.
    pub jailer: Option<PathBuf>,
}

impl Subject<'_> {
    /// Plans, launches, and waits until the guest has greeted.
    ///
    /// # Panics
    /// Where the driver breaks the contract.
    pub async fn start(&self) -> Running {
        let plan = self.plan().await;
        let mut running = Running::run(&plan, self.command(&plan));
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

    /// What runs the plan, with the specification written that a daemon would have written.
    fn command(&self, plan: &LaunchPlan) -> Command {
        let spec = self.specification(plan);
        vm_host::files::write_json(&self.paths.shim_spec(), 0o600, &spec).expect("it can be written");
        if plan.jail.is_none() {
            let mut command = Command::new(&plan.program);
            command.args(&plan.args);
            return command;
        }
        let mut command = Command::new(self.jailer.as_ref().expect("the subject has a jailer"));
        command.arg("jail").arg("--spec").arg(self.paths.shim_spec());
        command
    }

    /// What a shim would be told.
    pub fn specification(&self, plan: &LaunchPlan) -> ShimSpec {
        ShimSpec {
            vm: self.machine.vm.clone(),
            run_dir: self.paths.run.clone(),
            state_dir: self.paths.state.clone(),
            launch: plan.clone(),
            vmm: Some(self.vmm.kind()),
            machine: Some(self.machine.clone()),
            console_log_bytes: 1 << 20,
            socket_group: None,
        }
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
    is_locked_in(subject).await;
    tells_what_it_counts(subject).await;
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
    assert!(one.channel.socket().starts_with(&subject.paths.run), "{:?}", one.channel);
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
    let plan = subject.plan().await;
    for _ in 0..2 {
        let connected = UnixStream::connect(plan.channel.socket()).await;
        assert!(connected.is_ok(), "{connected:?}");
    }
    running.finish().await;
}

/// One that is planned to be locked in is another user, and sees its own files and the machine's and nothing else.
///
/// # Panics
/// Where it is not so.
pub async fn is_locked_in(subject: &Subject<'_>) {
    let plan = subject.plan().await;
    let Some(jail) = &plan.jail else { return };
    let running = subject.start().await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("it runs");
    let words = |key: &str| -> Vec<&str> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.split_ascii_whitespace().collect()
    };
    let user = jail.user.to_string();
    assert!(words("Uid:").iter().all(|id| *id == user), "{status}");
    assert!(words("CapEff:").iter().all(|set| set.trim_matches('0').is_empty()), "{status}");
    let shown = jail.files.iter().map(|file| file.path.as_path()).chain([plan.program.as_path()]);
    let shown: Vec<_> = shown.collect();
    let root = PathBuf::from(format!("/proc/{}/root", running.pid()));
    for path in &shown {
        let inside = root.join(path.strip_prefix("/").expect("it is absolute"));
        assert!(inside.symlink_metadata().is_ok(), "{} is not seen", path.display());
    }
    let mut more = Vec::new();
    not_shown(&root, &root, &shown, &mut more);
    assert!(more.is_empty(), "{more:?} are seen");
    for own in std::fs::read_dir(subject.paths.vmm_dir()).into_iter().flatten().flatten() {
        assert_eq!(own.metadata().expect("it is there").uid(), jail.user, "{own:?}");
    }
    running.finish().await;
}

/// All below `directory` but directories that lead to what is shown, and that itself.
fn not_shown(root: &Path, directory: &Path, shown: &[&Path], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("the jail can be looked into").flatten() {
        let inside = Path::new("/").join(entry.path().strip_prefix(root).expect("it is below"));
        if shown.contains(&inside.as_path()) {
            continue;
        }
        let leads = shown.iter().any(|path| path.starts_with(&inside));
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && leads => not_shown(root, &entry.path(), shown, found),
            _ => found.push(inside),
        }
    }
}

/// A VMM that was given a pipe for that tells what it counts, in lines of JSON.
///
/// # Panics
/// Where it does not.
pub async fn tells_what_it_counts(subject: &Subject<'_>) {
    let running = subject.start().await;
    if let Some(mut told) = running.told(Told::Metrics) {
        let line = timeout(PATIENCE, told.wait_for(|text| text.contains('\n'))).await;
        let line = line.expect("it tells in time").expect("it lives").clone();
        let first = line.lines().next().unwrap_or_default();
        let counted: serde_json::Value = serde_json::from_str(first).expect("it is JSON");
        assert!(counted.is_object(), "{counted}");
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
    let mut running = Running::run(&plan, subject.command(&plan));
    running.stop_reading();
    configure(&plan).await;
    subject.vmm.wait_up(&subject.paths, PATIENCE).await.expect("it comes up");
    if subject.vmm.quit(&subject.paths).await.is_err() {
        assert!(running.runs(), "it did not survive");
        return running.finish().await;
    }
    assert_eq!(running.ended().await.code(), Some(0));
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
