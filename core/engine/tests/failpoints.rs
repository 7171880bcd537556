//! The failpoints: every kind of effect has all four, and a step that fails at one leaves nothing behind.
//!
//! A process of its own, for failpoints are the process's.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use strum::VariantArray;
use vm_disk::FakeCow;
use vm_engine::{
    EngineError,
    effects::{FakeShims, Host, Scope},
    journal::Phase,
};
use vm_locks::LockTable;
use vm_net::FakeNet;
use vm_types::{
    Cgroup, Effect, EffectKind, Handle, Layout, Observed, VmId,
    plan::{Answer, Chain, Condition, Protocol, Rule, Transport},
};

const POINTS: [&str; 4] = ["apply.before", "apply.after", "undo.before", "undo.after"];

struct Bench {
    dir: tempfile::TempDir,
    host: Host,
    scope: Scope,
    locks: LockTable,
}

impl Bench {
    async fn apply(&self, effect: Effect, phase: Phase) -> Result<Handle, EngineError> {
        self.locks.root("apply", async |mut ctx| self.scope.apply(&mut ctx, effect, phase).await).await
    }

    async fn unwind(&self, phase: Phase) -> Result<(), EngineError> {
        self.locks.root("unwind", async |mut ctx| self.scope.unwind(&mut ctx, phase).await).await
    }

    async fn close(&self) -> Result<(), EngineError> {
        self.locks.root("close", async |mut ctx| self.scope.close(&mut ctx).await).await
    }
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (net, cow, shims) = (Arc::new(FakeNet::new()), Arc::new(FakeCow::new()), Arc::new(FakeShims::new()));
    let host = Host::new(net, cow, shims, [root.to_owned()], Arc::new(vm_host::HostRunner));
    let layout = Layout { run: root.join("run"), state: root.join("state"), config: root.join("config") };
    std::fs::create_dir_all(layout.journals()).unwrap();
    let id: VmId = "0123456789ab".parse().unwrap();
    let scope = Scope::vm(&host, &layout, &id, None, "boot").unwrap();
    Bench { dir, host, scope, locks: LockTable::default() }
}

/// An effect of each kind: whoever adds one must say here how it looks.
fn sample(kind: EffectKind, dir: &Path) -> Effect {
    let (bridge, mode) = ("vmbr-aaaa".to_owned(), 0o700);
    let subnet = "10.9.0.0/24".parse().unwrap();
    match kind {
        EffectKind::Directory => Effect::Directory { path: dir.join("directory"), mode },
        EffectKind::File => Effect::File { path: dir.join("file"), mode, content: b"x".to_vec() },
        EffectKind::AppendedFile => {
            let base = dir.join("base");
            std::fs::write(&base, "x").unwrap();
            Effect::AppendedFile { path: dir.join("appended"), mode, base, tail: b"y".to_vec() }
        }
        EffectKind::CowDisk => Effect::CowDisk {
            base: dir.join("base"),
            path: dir.join("disk"),
            size_bytes: 1 << 20,
            delta: true,
        },
        EffectKind::DmSnapshot => Effect::DmSnapshot {
            name: "vmd-aaaa-0123456789ab".into(),
            base: dir.join("base"),
            delta: dir.join("disk"),
            node: dir.join("node"),
            size_bytes: 1 << 20,
        },
        EffectKind::Sysctl => Effect::Sysctl { key: "net/ipv4/ip_forward".into(), value: "1".into() },
        EffectKind::Bridge => Effect::Bridge { name: bridge, address: "10.9.0.1/24".parse().unwrap() },
        EffectKind::Firewall => Effect::Firewall { table: "vmd_aaaa".into(), bridge, subnet },
        EffectKind::Rules => Effect::Rules {
            table: "vmd_aaaa".into(),
            bridge,
            owner: "0123456789ab/p".into(),
            address: None,
            rules: vec![Rule {
                chain: Chain::Forward,
                conditions: vec![Condition::Protocol(Protocol::Tcp)],
                answer: Answer::Accept,
            }],
        },
        EffectKind::Port => Effect::Port {
            table: "vmd_aaaa".into(),
            bridge,
            owner: "0123456789ab/p/web".into(),
            protocol: Transport::Tcp,
            host: "127.0.0.1:18080".parse().unwrap(),
            guest: "10.9.0.2:80".parse().unwrap(),
        },
        EffectKind::LinkDns => Effect::LinkDns {
            link: bridge,
            server: "10.9.0.1:53".parse().unwrap(),
            domains: vec!["vm".into()],
        },
        EffectKind::NameRecord => Effect::NameRecord {
            owner: "0123456789ab/p".into(),
            name: "web.vm".into(),
            record_type: 1,
            ttl_seconds: 5,
            data: "10.9.0.2".into(),
        },
        EffectKind::Disk => {
            Effect::Disk { path: dir.join("plugin.img"), size_bytes: 1 << 20, filesystem: None }
        }
        EffectKind::Tool => {
            let script = |verb| vec!["-c".to_owned(), format!("{verb} \"$0\""), tool_file(dir)];
            let (arguments, undo) = (script("touch"), script("rm -f"));
            Effect::Tool { owner: "0123456789ab/p/t".into(), program: "/bin/sh".into(), arguments, undo }
        }
        EffectKind::Tap => Effect::Tap { name: "vtaaaa0001".into(), bridge },
        EffectKind::Cgroup => Effect::Cgroup {
            name: "vmd-aaaa-0123456789ab".into(),
            groups: vec![Cgroup { path: dir.join("cgroup"), settings: Vec::new() }],
        },
        EffectKind::Shim => Effect::Shim { run_dir: dir.join("run"), spec: dir.join("spec") },
    }
}

fn tool_file(dir: &Path) -> String {
    dir.join("tool").display().to_string()
}

/// What it stands on.
async fn ground(bench: &Bench, kind: EffectKind) {
    let below: &[EffectKind] = match kind {
        EffectKind::Tap | EffectKind::LinkDns => &[EffectKind::Bridge],
        EffectKind::Rules | EffectKind::Port => &[EffectKind::Bridge, EffectKind::Firewall],
        EffectKind::DmSnapshot => &[EffectKind::CowDisk],
        _ => &[],
    };
    for &kind in below {
        bench.apply(sample(kind, bench.dir.path()), Phase::Host).await.unwrap();
    }
}

fn point(kind: EffectKind, point: &str) -> String {
    let kind: &str = kind.into();
    format!("effect.{kind}.{point}")
}

async fn present(bench: &Bench, effect: &Effect) -> bool {
    if matches!(effect, Effect::Tool { .. }) {
        // Nothing but what it did tells that it was run.
        return Path::new(&tool_file(bench.dir.path())).exists();
    }
    matches!(bench.host.observe(effect).await.unwrap(), Observed::Present(_))
}

#[tokio::test]
async fn every_kind_of_effect_has_a_point_on_both_sides_of_both_changes() {
    let _scenario = fail::FailScenario::setup();
    for &kind in EffectKind::VARIANTS {
        let bench = bench();
        ground(&bench, kind).await;
        let reached: Vec<_> = POINTS.iter().map(|_| Arc::new(AtomicUsize::new(0))).collect();
        for (name, count) in POINTS.iter().zip(&reached) {
            let count = count.clone();
            let count = move || {
                count.fetch_add(1, Ordering::Relaxed);
            };
            fail::cfg_callback(point(kind, name), count).unwrap();
        }
        let seen = || reached.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
        bench.apply(sample(kind, bench.dir.path()), Phase::Start).await.unwrap();
        assert_eq!(seen(), [1, 1, 0, 0], "{kind:?} applied");
        bench.unwind(Phase::Start).await.unwrap();
        assert_eq!(seen(), [1, 1, 1, 1], "{kind:?} undone");
    }
}

#[tokio::test]
async fn a_step_that_fails_on_either_side_is_undone_at_once() {
    let _scenario = fail::FailScenario::setup();
    for &kind in EffectKind::VARIANTS {
        for (point_name, errno) in [
            ("apply.before", nix::libc::ENOSPC),
            ("apply.after", nix::libc::EBUSY),
            ("apply.after", nix::libc::EPERM),
        ] {
            let bench = bench();
            ground(&bench, kind).await;
            let effect = sample(kind, bench.dir.path());
            let name = point(kind, point_name);
            let word = match errno {
                nix::libc::ENOSPC => "ENOSPC",
                nix::libc::EBUSY => "EBUSY",
                _ => "EPERM",
            };
            fail::cfg(&name, &format!("return({word})")).unwrap();
            let error = bench.apply(effect.clone(), Phase::Start).await.unwrap_err();
            assert!(
                matches!(&error, EngineError::Injected { point, source }
                    if *point == name && source.raw_os_error() == Some(errno)),
                "{error}"
            );
            assert!(!present(&bench, &effect).await, "{name} left it there");
            fail::remove(&name);
            bench.unwind(Phase::Host).await.unwrap();
            bench.close().await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_cannot_be_undone_is_undone_by_the_next_attempt() {
    let _scenario = fail::FailScenario::setup();
    for &kind in EffectKind::VARIANTS {
        for name in ["undo.before", "undo.after"] {
            let bench = bench();
            ground(&bench, kind).await;
            let effect = sample(kind, bench.dir.path());
            // The rollback of a failed step fails too.
            fail::cfg(point(kind, "apply.after"), "return(EBUSY)").unwrap();
            fail::cfg(point(kind, name), "return(EBUSY)").unwrap();
            bench.apply(effect.clone(), Phase::Start).await.unwrap_err();
            bench.unwind(Phase::Start).await.unwrap_err();
            assert!(bench.close().await.is_err(), "{kind:?} would be forgotten");
            fail::remove(point(kind, "apply.after"));
            fail::remove(point(kind, name));
            bench.unwind(Phase::Start).await.unwrap();
            assert!(!present(&bench, &effect).await, "{kind:?}");
            bench.unwind(Phase::Host).await.unwrap();
            bench.close().await.unwrap();
        }
    }
}
