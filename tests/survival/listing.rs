//! What a listing shows is kept from one to the next: it has to be what the VMs are, whatever has changed meanwhile.

use std::{fs, io::Write};

use serde_json::{Value, json, value::RawValue};
use vm_tests::{FakeWorld, rpc::Failure, wait_until, world::SHORT};
use vm_types::VmPaths;

/// The listing, once it is to the byte what `vm.get` says of each VM.
#[track_caller]
fn listed(host: &FakeWorld) -> Vec<Value> {
    let get = |name: &str| -> Result<Box<RawValue>, Failure> {
        host.ask(async |api| api.call("vm.get", &[json!(name)]).await)
    };
    let list = || -> Vec<Box<RawValue>> {
        host.ask(async |api| api.call("vm.list", &[]).await).expect("the daemon answers")
    };
    let mut last = Vec::new();
    wait_until("the listing is what the VMs are", SHORT, || {
        let names: Vec<_> = list().iter().map(|vm| name(&value(vm)).to_owned()).collect();
        let all = || names.iter().map(|name| get(name)).collect::<Result<Vec<_>, _>>();
        let (Ok(before), listed, Ok(after)) = (all(), list(), all()) else { return false };
        let text = |vms: &[Box<RawValue>]| vms.iter().map(|vm| vm.get().to_owned()).collect::<Vec<_>>();
        let (before, listed, after) = (text(&before), text(&listed), text(&after));
        if before != after {
            // It is changing; then nobody can say what it is.
            return false;
        }
        last = listed.iter().map(|vm| serde_json::from_str(vm).expect("it is JSON")).collect();
        if listed == after {
            return true;
        }
        // What a disk takes may be a second old, and nothing else.
        let without = |vms: &[String]| vms.iter().map(|vm| without_usage(vm)).collect::<Vec<_>>();
        assert_eq!(without(&listed), without(&after), "{}", host.world().context()());
        false
    });
    last
}

fn value(vm: &RawValue) -> Value {
    serde_json::from_str(vm.get()).expect("it is JSON")
}

fn without_usage(vm: &str) -> Value {
    let mut vm: Value = serde_json::from_str(vm).expect("it is JSON");
    vm["disk_used_bytes"].take();
    vm
}

fn name(vm: &Value) -> &str {
    vm["name"].as_str().expect("a VM has a name")
}

fn words(vms: &[Value]) -> Vec<(&str, &str)> {
    vms.iter().map(|vm| (name(vm), vm["state"].as_str().expect("a VM has a state"))).collect()
}

fn paths(host: &FakeWorld, vm: &Value) -> VmPaths {
    let id = vm["id"].as_str().expect("a VM has an id");
    host.world().dirs().vm(&id.parse().expect("its id is one"))
}

/// An operation that succeeds.
#[track_caller]
fn done(host: &FakeWorld, method: &str, params: &[Value]) {
    let result = host.ask(async |api| api.run(method, params).await);
    result.unwrap_or_else(|error| panic!("{method}: {error}{}", host.world().context()()));
}

#[test]
fn it_is_what_each_vm_is_after_every_kind_of_change() {
    let mut host = FakeWorld::new("");
    host.start("");
    assert!(listed(&host).is_empty());
    for (vm, start) in [("m", false), ("z", false), ("a", true)] {
        host.ask(async |api| api.create(vm, start).await).expect("it is created");
        listed(&host);
    }
    assert_eq!(words(&listed(&host)), [("a", "running"), ("m", "stopped"), ("z", "stopped")]);

    done(&host, "vm.pause", &[json!("a")]);
    assert_eq!(words(&listed(&host))[0], ("a", "paused"));
    done(&host, "vm.resume", &[json!("a")]);
    assert_eq!(words(&listed(&host))[0], ("a", "running"));

    let cpus = listed(&host)[0]["cpus"].as_u64().expect("a VM has CPUs") + 1;
    done(&host, "vm.set", &[json!("a"), json!({"cpus": cpus, "labels": {"tier": "\"web\"\n"}})]);
    let vms = listed(&host);
    assert_eq!(
        (&vms[0]["needs_restart"], &vms[0]["labels"]),
        (&json!(["cpus"]), &json!({"tier": "\"web\"\n"}))
    );
    done(&host, "vm.set", &[json!("m"), json!({"disk_bytes": 96 << 20, "ttl_seconds": 3600})]);
    let vms = listed(&host);
    assert_eq!(vms[1]["disk_bytes"], 96 << 20);
    assert!(vms[1]["expires_at"].is_u64(), "{}", vms[1]);

    // What the guest writes.
    let disk = paths(&host, &vms[0]).disk();
    let mut file = fs::OpenOptions::new().append(true).open(disk).expect("a running VM has a disk");
    file.write_all(&vec![b'x'; 4 << 20]).and_then(|()| file.sync_all()).expect("its disk can be written to");
    let used = |vms: &[Value]| vms[0]["disk_used_bytes"].as_u64();
    assert!(used(&listed(&host)) >= used(&vms).map(|used| used + (4 << 20)));

    done(&host, "vm.stop", &[json!("a"), json!({})]);
    assert_eq!(words(&listed(&host))[0], ("a", "stopped"));
    done(&host, "vm.start", &[json!("a")]);
    let vms = listed(&host);
    assert_eq!((words(&vms)[0], &vms[0]["needs_restart"]), (("a", "running"), &json!([])));
    let vmm = host.vmms().pop().expect("its VMM runs");
    host.world().kill(vmm.outside);
    wait_until("its end is noticed", SHORT, || words(&listed(&host))[0] == ("a", "failed"));

    // A guest that never answers: the start is under way until somebody ends it.
    let silent = paths(&host, &listed(&host)[2]).state.join("fake-behaviour.json");
    fs::write(silent, r#"{"boot":"silent"}"#).expect("a VM has a directory");
    let begun = host.ask(async |api| api.call::<Value>("vm.start", &[json!("z")]).await);
    let operation = begun.expect("its start begins")["operation"].take();
    wait_until("it is starting", SHORT, || words(&listed(&host))[2] == ("z", "starting"));
    assert_eq!(listed(&host)[2]["operation"], operation);
    done(&host, "vm.kill", &[json!("z")]);
    assert_eq!(words(&listed(&host))[2], ("z", "stopped"));

    done(&host, "vm.delete", &[json!("m"), json!(false)]);
    assert_eq!(words(&listed(&host)), [("a", "failed"), ("z", "stopped")]);
    host.ask(async |api| api.create("m", false).await).expect("its name is free again");
    assert_eq!(words(&listed(&host)), [("a", "failed"), ("m", "stopped"), ("z", "stopped")]);

    host.terminate();
    host.start("");
    assert_eq!(words(&listed(&host)), [("a", "failed"), ("m", "stopped"), ("z", "stopped")]);
    for vm in ["a", "m", "z"] {
        done(&host, "vm.delete", &[json!(vm), json!(false)]);
    }
    assert!(listed(&host).is_empty());
    assert!(host.terminate().success());
    host.leaves_nothing();
}
