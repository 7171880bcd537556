//! Real VMs, many at once: started, stopped, killed and deleted in overlap.

use std::{fs, sync::Arc, thread::available_parallelism, time::Duration};

use serde_json::json;
use tokio::sync::Semaphore;
use vm_tests::{
    World, fixtures,
    rpc::{Api, Failure, Seen},
};

/// Of each VM, MiB.
const MEMORY: u64 = 128;
/// What one takes of the host besides, MiB.
const OVERHEAD: u64 = 64;
/// A boot takes its turn behind others, on processors that are busy.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn four_real_vms_in_overlap() {
    overlap(4, 1);
}

#[test]
#[ignore = "takes minutes"]
fn eight_real_vms_for_each_processor() {
    let cores = available_parallelism().map_or(2, usize::from);
    overlap(8 * cores, 2);
}

/// As many VMs as there are, or as fit into half of the memory that is free; each comes up, goes and comes again `rounds` times.
fn overlap(vms: usize, rounds: usize) {
    let vms = vms.min(usize::try_from(available_mib() / 2 / (MEMORY + OVERHEAD)).unwrap_or(vms)).max(2);
    let world = World::with_config("version = 1\n[vm]\nstart_timeout_seconds = 600\n");
    world.vm(&["daemon", "start"]).run().exits(0);
    let cores = available_parallelism().map_or(2, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime can be made");
    // Emulated boots beyond that only wait for each other.
    let boots = Arc::new(Semaphore::new(2 * cores));
    let working: Vec<_> = (0..vms)
        .map(|number| {
            let (socket, boots) = (world.dirs().socket(), boots.clone());
            runtime.spawn(async move {
                let api = Api::connect(&socket).await.expect("the daemon listens").patient(PATIENCE);
                life(&api, number, rounds, &boots).await
            })
        })
        .collect();
    for working in working {
        let result = runtime.block_on(working).expect("a client does not panic");
        result.unwrap_or_else(|failure| panic!("{failure}{}", world.context()()));
    }
    let left: Vec<Seen> = runtime.block_on(async {
        let api = Api::connect(&world.dirs().socket()).await.expect("the daemon listens");
        api.list().await.expect("the daemon answers")
    });
    assert!(left.is_empty(), "{left:?}");
    drop(runtime);
    world.leaves_nothing();
}

/// Each VM's requests are in another order than its neighbour's, so that all kinds overlap.
async fn life(api: &Api, number: usize, rounds: usize, boots: &Semaphore) -> Result<(), Failure> {
    let name = format!("r{number}");
    let machine = json!({"name": name, "image": fixtures::BUSYBOX, "memory_mib": MEMORY, "cpus": 1});
    api.run("vm.create", &[machine]).await?;
    for round in 0..rounds {
        let turn = boots.acquire().await.expect("nobody closes it");
        api.start(&name).await?;
        drop(turn);
        match (number + round) % 3 {
            0 => api.stop(&name).await?,
            1 => api.run("vm.kill", &[json!(name)]).await?,
            // Deleted while it runs, and made anew unless that was all.
            _ => {
                api.delete(&name).await?;
                let machine =
                    json!({"name": name, "image": fixtures::BUSYBOX, "memory_mib": MEMORY, "cpus": 1});
                api.run("vm.create", &[machine]).await?
            }
        };
    }
    api.delete(&name).await.map(drop)
}

fn available_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse::<u64>().ok());
    kib.unwrap_or(2 << 20) >> 10
}
