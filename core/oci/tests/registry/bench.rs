//! What the tests share: a namespace, a registry in it, and commands.

use std::{
    fs::File,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use vm_oci::{Client, CredentialStore, Platform, Reference, Settings, Store};

/// As much time as a busy machine may need.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// Where registries listen, each in a namespace of its own.
pub(crate) const AT: &str = "127.0.0.1:5000";

/// `ann` with password `secret`, by bcrypt, which is all that the registry takes.
const HTPASSWD: &str = "ann:$2b$04$a5esgG5oq6D.hR5jqOb4QeXMeesB2DMcByr2M3Nt2CA0kGRB7f5SW\n";

/// Runs a test on a thread with its own network namespace; the threads and processes it starts are in it too.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Bench) -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench { dir: tempfile::tempdir().unwrap() };
            tokio::time::timeout(LONG * 2, test(bench)).await.expect("the test is stuck");
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command; what it says.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be run (install its Debian package): {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// `skopeo copy` within the namespace.
#[track_caller]
pub(crate) fn skopeo_copy(from: &str, to: &str, more: &[&str]) {
    let plain = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "-q"];
    run("skopeo", &[&plain, more, &[from, to]].concat());
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < LONG, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

/// A registry that ends with it.
pub(crate) struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bench {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.path("store")).unwrap()
    }

    pub(crate) async fn registry(&self) -> Registry {
        self.registry_with("").await
    }

    /// One that wants to know who it is.
    pub(crate) async fn registry_for_ann(&self) -> Registry {
        std::fs::write(self.path("htpasswd"), HTPASSWD).unwrap();
        self.registry_with(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", self.text("htpasswd")))
            .await
    }

    async fn registry_with(&self, more: &str) -> Registry {
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {AT}}}\n{more}",
            self.text("registry")
        );
        std::fs::write(self.path("registry.yml"), config).unwrap();
        let log = File::create(self.path("registry.log")).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", &self.text("registry.yml")])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed");
        let mut registry = Registry(child);
        let address: SocketAddr = AT.parse().unwrap();
        until("the registry listens", || {
            let log = || std::fs::read_to_string(self.path("registry.log")).unwrap();
            assert!(registry.0.try_wait().unwrap().is_none(), "the registry has ended: {}", log());
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
        .await;
        registry
    }
}

/// Quick to try again, slow to give up, with no user.
pub(crate) fn settings() -> Settings {
    Settings {
        platform: amd64(),
        credentials: CredentialStore::default(),
        stall_timeout: LONG,
        connect_timeout: LONG,
        backoff: Duration::from_millis(1),
        backoff_most: Duration::from_millis(5),
        ..Settings::default()
    }
}

pub(crate) fn client() -> Client {
    Client::new(settings()).unwrap()
}

pub(crate) fn amd64() -> Platform {
    Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: None }
}

/// A repository at an address.
pub(crate) fn at(address: impl std::fmt::Display, rest: &str) -> Reference {
    format!("{address}/{rest}").parse().unwrap()
}

pub(crate) fn with_credentials(path: &Path) -> Settings {
    Settings { credentials: CredentialStore::new([path.to_owned()]), ..settings() }
}
