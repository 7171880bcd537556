//! What the tests of effects share: a namespace to act in, and the effects.

use std::{net::Ipv4Addr, process::Command, sync::Arc};

use vm_host::HostRunner;
use vm_net::{HostNet, Net, names};
use vm_types::{
    Effect, Handle, InstanceId, Observed,
    plan::{Answer, Chain, Condition, Device, Rule, Transport},
};

/// Runs a test on a thread with its own network namespace; the threads and processes it starts are in it too.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(HostNet) -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        run("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(HostNet::new(Arc::new(HostRunner))));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A command line without quotes, in the thread's namespace.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn instance() -> InstanceId {
    "3f2a".parse().unwrap()
}

pub(crate) fn bridge() -> Effect {
    Effect::Bridge { name: names::bridge_name(&instance()), address: "10.213.0.1/24".parse().unwrap() }
}

pub(crate) fn firewall() -> Effect {
    Effect::Firewall {
        table: names::table_name(&instance()),
        bridge: names::bridge_name(&instance()),
        subnet: "10.213.0.0/24".parse().unwrap(),
    }
}

pub(crate) async fn comes_and_goes(net: &dyn Net, effect: &Effect) {
    for _ in 0..2 {
        assert_eq!(net.former(effect).await.unwrap(), Handle::None);
        net.apply(effect).await.unwrap();
        assert_eq!(net.observe(effect).await.unwrap(), Observed::Present(Handle::None), "{}", effect.id());
    }
    for _ in 0..2 {
        net.undo(effect, &Handle::None).await.unwrap();
        assert_eq!(net.observe(effect).await.unwrap(), Observed::Absent, "{}", effect.id());
    }
}

pub(crate) fn rules(owner: &str, answers: &[Answer]) -> Effect {
    let rule = |answer: &Answer| Rule {
        chain: Chain::Forward,
        conditions: vec![Condition::FromDevice(Device::Vm)],
        answer: answer.clone(),
    };
    Effect::Rules {
        table: names::table_name(&instance()),
        bridge: names::bridge_name(&instance()),
        owner: owner.to_owned(),
        address: Some(Ipv4Addr::new(10, 213, 0, 2)),
        rules: answers.iter().map(rule).collect(),
    }
}

pub(crate) fn port(owner: &str, host: &str) -> Effect {
    Effect::Port {
        table: names::table_name(&instance()),
        bridge: names::bridge_name(&instance()),
        owner: owner.to_owned(),
        protocol: Transport::Tcp,
        host: host.parse().unwrap(),
        guest: "10.213.0.2:80".parse().unwrap(),
    }
}
