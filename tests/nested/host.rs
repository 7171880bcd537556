//! The nested host: a VM of ours that is a whole machine for what is run in it.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use vm_tests::{Output, World, wait_until};

use crate::{
    image::{self, NO_PLUGINS},
    say,
};

const NAME: &str = "host";
/// TCG wherever this runs: the processor it shows has SVM, so KVM is there inside.
const CONFIG: &str = "[vmm]\naccelerator = \"tcg\"\n[vm]\nstart_timeout_seconds = 600\n";
/// For what takes seconds on an idle machine.
pub(crate) const WHILE: Duration = Duration::from_secs(300);
/// For suites of tests, and VMs in the VM.
pub(crate) const LONG: Duration = Duration::from_secs(1800);
/// Options of the smallest VM there is inside.
pub(crate) const BUSYBOX: &str = "--image busybox --memory 128M --cpus 1";
/// The end-to-end tests.
pub(crate) const E2E: &str = "vm-tests.e2e";
/// Those that nothing inside asks for by itself.
const MODULES: &str = "kvm-amd loop dm-snapshot";

/// How often a host that runs guests is given something to do; see [`Nudges`].
const NUDGE: Duration = Duration::from_millis(200);

/// A host that is up.
pub(crate) struct Host {
    // Ends before the host does.
    nudges: Option<Nudges>,
    world: World,
}

/// Interrupts from outside. While a guest runs, QEMU's emulated SVM (7.2) now and then loses the host's timer: with one processor
/// the host then stands still, its clock too (a quarter of an hour was seen), until any other interrupt comes.
struct Nudges {
    end: mpsc::Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Nudges {
    fn begin(world: &World) -> Self {
        let mut stream = world.vm(&["ssh", NAME, "exec cat >/dev/null"]).open_stdin().start();
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            while ended.recv_timeout(NUDGE) == Err(mpsc::RecvTimeoutError::Timeout) && stream.runs() {
                stream.type_in("\n");
            }
        });
        Self { end, thread: Some(thread) }
    }
}

impl Drop for Nudges {
    fn drop(&mut self) {
        // Fails where the thread has ended, with the host.
        let _ = self.end.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Host {
    /// Boots one.
    #[track_caller]
    pub(crate) fn boot() -> Self {
        Self::with_processors("2")
    }

    /// Boots one for VMs of its own. It has one processor: of QEMU's emulated ones (7.2) that run guests side by side, guests now
    /// and then reset or fall silent, under whatever VMM.
    #[track_caller]
    pub(crate) fn boot_for_guests() -> Self {
        let mut this = Self::with_processors("1");
        this.nudges = Some(Nudges::begin(&this.world));
        this
    }

    #[track_caller]
    fn with_processors(cpus: &str) -> Self {
        let seed = image::seed();
        let began = Instant::now();
        let world = World::with_seed(&seed, &format!("{NO_PLUGINS}{CONFIG}"));
        let machine = ["--cpus", cpus, "--memory", "4G", "--disk", "24G", "--net", "none", "--start"];
        let arguments = ["create", "--name", NAME, "--image", image::IMAGE];
        world.vm(&[&arguments[..], &machine].concat()).within(LONG).run().exits(0);
        let this = Self { nudges: None, world };
        this.settle(began);
        // A daemon's state directory that has images already.
        this.run(&format!("cp -a {} /var/lib/vmd", image::SEED));
        this
    }

    /// Boots it anew. Its own init ends everything first, unless it is to be as if the power had failed.
    #[track_caller]
    pub(crate) fn reboot(&self, power_fails: bool) {
        let began = Instant::now();
        if power_fails {
            self.world.vm(&["kill", NAME]).within(WHILE).run().exits(0);
            self.world.vm(&["start", NAME]).within(LONG).run().exits(0);
        } else {
            self.world.vm(&["restart", NAME]).within(LONG).run().exits(0);
        }
        self.settle(began);
    }

    #[track_caller]
    fn settle(&self, began: Instant) {
        wait_until("the nested host's init has started everything", WHILE, || {
            let state = self.begin("systemctl is-system-running").run().text();
            matches!(state.trim(), "running" | "degraded")
        });
        self.run(&format!("modprobe -a {MODULES} && exec 3<>/dev/kvm && grep -qw svm /proc/cpuinfo"));
        say(&format!("nested: the host is up after {:.0?}", began.elapsed()));
    }

    /// A command inside, by `sh`.
    #[track_caller]
    fn begin(&self, script: &str) -> vm_tests::world::Invocation<'_> {
        let path =
            format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", image::PROGRAMS);
        self.world.vm(&["ssh", NAME, &format!("export LC_ALL=C PATH={path}; {script}")]).within(WHILE)
    }

    /// Runs a command inside, which has to succeed.
    #[track_caller]
    pub(crate) fn run(&self, script: &str) -> Output {
        self.attempt(script).exits(0)
    }

    /// Runs a command inside.
    #[track_caller]
    pub(crate) fn attempt(&self, script: &str) -> Output {
        self.begin(script).within(LONG).run()
    }

    /// Waits until a command inside succeeds.
    #[track_caller]
    pub(crate) fn wait(&self, what: &str, script: &str) {
        wait_until(what, WHILE, || self.attempt(script).status.success());
    }

    /// Runs these tests of a test binary inside, all of which have to be there.
    #[track_caller]
    pub(crate) fn tests(&self, name: &str, environment: &str, tests: &[&str]) {
        let results = self.suite(name, environment, &format!("--exact {}", tests.join(" ")));
        assert!(
            results.contains(&format!(" {} passed", tests.len())),
            "{name} lacks some of {tests:?}: {results}"
        );
    }

    /// Runs a test binary inside, with these arguments, and says how it ended.
    #[track_caller]
    pub(crate) fn suite(&self, name: &str, environment: &str, arguments: &str) -> String {
        let began = Instant::now();
        say(&format!("nested: {name} {arguments}"));
        let directory = image::SUITES;
        // Two VMs in the VM wait for each other's processors more than they gain.
        let threads = if name == E2E { 1 } else { 2 };
        let output = self.run(&format!(
            "export VM_NESTED_HOST=1 {environment}; cd /root; {directory}/{name} --test-threads {threads} {arguments} 2>&1"
        ));
        let text = output.text();
        let missing: Vec<_> = text.lines().filter(|line| line.contains("NOT TESTED")).collect();
        assert!(missing.is_empty(), "{name} lacks something in a host that has all: {missing:?}");
        let results: Vec<_> = text.lines().filter(|line| line.starts_with("test result:")).collect();
        assert!(!results.is_empty(), "{name} is no test binary: {text}");
        let results = results.join("; ");
        say(&format!("nested: {name}: {results} in {:.0?}", began.elapsed()));
        results
    }

    /// The suites of a package that are inside.
    #[track_caller]
    pub(crate) fn suites(&self, package: &str) -> Vec<String> {
        let found = self.run(&format!("cd {} && ls -d {package}.*", image::SUITES)).text();
        found.lines().map(str::to_owned).collect()
    }

    /// What a daemon could leave on the host.
    #[track_caller]
    pub(crate) fn traces(&self) -> String {
        let script = "ip -br link | cut -d' ' -f1; nft list tables; losetup -nO BACK-FILE; dmsetup ls; \
                      ls /run/vmd/vms 2>/dev/null; pgrep -a 'vmd|qemu|firecracker' || true";
        self.run(script).text()
    }

    /// Deletes all VMs inside and ends their daemon; the host has to be as before.
    #[track_caller]
    pub(crate) fn leaves_nothing(&self, before: &str) {
        self.run("names=$(vm ls -q) && { [ -z \"$names\" ] || vm delete --force $names; } && vm daemon stop");
        assert_eq!(self.traces(), before, "VMs or their daemon left something");
    }

    /// Ends it; nothing may be left of it outside.
    #[track_caller]
    pub(crate) fn end(self) {
        drop(self.nudges);
        self.world.leaves_nothing();
    }
}
