//! `kill -9` of the daemon at random moments while clients create, start, stop and delete.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fastrand::Rng;
use serde_json::Value;
use vm_api::ErrorKind;
use vm_tests::{
    FakeWorld,
    rpc::{Api, Failure, Seen},
    wait_until,
    world::SHORT,
};

/// How often it is killed.
const KILLS: usize = 50;
/// Clients at a time, each with VMs of its own.
const CLIENTS: usize = 4;
/// VMs of a client.
const VMS: usize = 2;
/// The daemon's longest life, in milliseconds; a VM is created and started in some 100 ms.
const LIFE_MS: u64 = 400;

/// What a client may rely on, for each of its VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Its creation was acknowledged, and nobody has asked for its deletion since.
    There,
    /// Its deletion was acknowledged, or it was never made.
    Gone,
    /// The daemon died over the question.
    Open,
}

struct Client {
    fates: BTreeMap<String, Fate>,
    random: Rng,
}

#[test]
fn fifty_times_at_random_moments() {
    let mut random = crate::seeded("kills");
    let mut host = FakeWorld::new("");
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|client| Client {
            fates: (0..VMS).map(|vm| (format!("c{client}-{vm}"), Fate::Gone)).collect(),
            random: random.fork(),
        })
        .collect();
    let mut done = 0;
    for kill in 1..=KILLS {
        host.start("");
        let life = Duration::from_millis(random.u64(0..LIFE_MS));
        let apis: Vec<_> = clients.iter().map(|_| host.connect()).collect();
        let (sent, mut received) = tokio::sync::mpsc::unbounded_channel();
        let mut working = Vec::new();
        for (mut client, api) in clients.drain(..).zip(apis) {
            let sent = sent.clone();
            working.push(host.spawn(async move {
                let wrong = client.work(&api, &sent).await;
                (client, wrong)
            }));
        }
        drop(sent);
        // The moment: nothing is waited for, the daemon just lives so long.
        host.block_on(async { drop(tokio::time::timeout(life, std::future::pending::<()>()).await) });
        host.kill();
        for working in working {
            let (client, wrong) = host.block_on(working).expect("a client does not panic");
            assert!(
                wrong.is_none(),
                "after {kill} kills: {}{}",
                wrong.unwrap_or_default(),
                host.world().context()()
            );
            clients.push(client);
        }
        while received.try_recv().is_ok() {
            done += 1;
        }
    }
    assert!(done > 0, "nothing was done over {KILLS} kills");
    host.start("");
    let vms = settled(&host);
    let names: BTreeSet<_> = vms.iter().map(|vm| vm.name.clone()).collect();
    for (name, fate) in clients.iter().flat_map(|client| &client.fates) {
        match fate {
            Fate::There => assert!(names.contains(name), "{name} was created, but is not in {vms:#?}"),
            Fate::Gone => assert!(!names.contains(name), "{name} was deleted, but is in {vms:#?}"),
            Fate::Open => {}
        }
    }
    host_agrees(&host, &vms);
    let up = vms.iter().filter(|vm| vm.pid().is_some()).count();
    crate::say(&format!(
        "{KILLS} kills over {done} requests that were done: {} VMs left, {up} of them up, and the host agrees",
        vms.len()
    ));
    for vm in &vms {
        let deleted = host.ask(async |api| api.delete(&vm.name).await);
        deleted
            .unwrap_or_else(|error| panic!("{vm:?} cannot be deleted: {error}{}", host.world().context()()));
    }
    assert!(host.ask(async |api| api.list().await).expect("the daemon answers").is_empty());
    assert!(host.terminate().success());
    host.leaves_nothing();
}

impl Client {
    /// Random requests, one after the other, until the daemon is gone. What it should not have answered, if anything.
    async fn work(&mut self, api: &Api, answered: &tokio::sync::mpsc::UnboundedSender<()>) -> Option<String> {
        loop {
            let names: Vec<_> = self.fates.keys().cloned().collect();
            let name = self.random.choice(&names)?.clone();
            let fate = self.fates[&name];
            let result = match self.random.u8(0..8) {
                0..=2 => {
                    let result = api.create(&name, self.random.bool()).await;
                    // One that is refused may still have been made, where only its start failed.
                    match &result {
                        Ok(_) if fate == Fate::There => return Some(format!("{name} was created twice")),
                        Ok(_) => self.note(&name, Fate::There),
                        Err(Failure::Lost(_)) if fate == Fate::There => {}
                        Err(_) => self.note(&name, if fate == Fate::There { fate } else { Fate::Open }),
                    }
                    result
                }
                3 | 4 => api.start(&name).await,
                5 => api.stop(&name).await,
                _ => {
                    let result = api.delete(&name).await;
                    let kind = result.as_ref().err().and_then(Failure::kind);
                    let gone = result.is_ok() || kind == Some(ErrorKind::NotFound);
                    self.note(&name, if gone { Fate::Gone } else { Fate::Open });
                    result
                }
            };
            let kind = result.as_ref().err().and_then(Failure::kind);
            match (fate, kind) {
                (Fate::There, Some(ErrorKind::NotFound)) => return Some(format!("{name} is lost")),
                (Fate::Gone, Some(ErrorKind::AlreadyExists)) => {
                    return Some(format!("{name} was not deleted"));
                }
                _ => {}
            }
            match result {
                Err(Failure::Lost(_)) => return None,
                Err(Failure::Hangs(what)) => return Some(what),
                Err(Failure::Refused(problem)) if problem.kind == ErrorKind::Internal => {
                    return Some(format!("{name}: {problem}"));
                }
                Ok(_) => drop(answered.send(())),
                Err(Failure::Refused(_)) => {}
            }
        }
    }

    fn note(&mut self, name: &str, fate: Fate) {
        self.fates.insert(name.to_owned(), fate);
    }
}

/// All VMs, once nobody works on any.
fn settled(host: &FakeWorld) -> Vec<Seen> {
    let mut vms = Vec::new();
    wait_until("all VMs settle", SHORT, || {
        vms = host.ask(async |api| api.list().await).expect("the daemon answers");
        vms.iter().all(Seen::settled)
    });
    vms
}

/// Each VM that is up has its VMM, its shim and its tap, and there is none besides.
fn host_agrees(host: &FakeWorld, vms: &[Seen]) {
    let up: Vec<_> = vms.iter().filter(|vm| vm.pid().is_some()).collect();
    let vmms = host.vmms();
    for vm in &up {
        let found = vmms.iter().find(|process| Some(process.inside) == vm.pid());
        let found = found.unwrap_or_else(|| panic!("{vm:?} has no VMM among {vmms:#?}"));
        assert!(found.arguments.contains(vm.id.as_str()), "{vm:?} is served by {found:?}");
    }
    let shims = host.shims();
    assert_eq!((vmms.len(), shims.len()), (up.len(), up.len()), "up: {up:#?}\n{vmms:#?}\n{shims:#?}");
    let links = host.world().tool("ip", &["-j", "-d", "link"]).run().exits(0).json();
    let taps = links.as_array().expect("links are a list").iter();
    let taps = taps.filter(|link| link["linkinfo"]["info_kind"] == "tun").count();
    // Those that wait for a VM are no VM's.
    let status: Value =
        host.ask(async |api| api.call("daemon.status", &[]).await).expect("the daemon answers");
    let ready = status["resources"]["taps_ready"].as_u64().unwrap_or(0);
    assert_eq!(taps as u64, up.len() as u64 + ready, "{links:#}\n{status:#}");
}
