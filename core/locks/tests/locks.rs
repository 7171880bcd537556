//! What the locks do when they run: fair, visible, in order, and no mistake unseen.

use vm_locks::{CreateVm, Ctx, Lock, LockTable, Network, Unlocked, Vm};

async fn guest_io(_: &mut Ctx<Unlocked>) {
    tokio::task::yield_now().await;
}

/// As the engine wraps the body of every operation.
fn spawn<F>(
    table: &LockTable,
    body: impl FnOnce(Ctx<Unlocked>) -> F + 'static,
) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    tokio::spawn(table.root("test", body))
}

async fn deep(
    ctx: &mut Ctx<Unlocked>,
    vm: &Lock<Vm, u32>,
    create: &Lock<CreateVm, u32>,
    net: &Lock<Network, u32>,
) -> u32 {
    guest_io(ctx).await;
    let sum = {
        let mut held = ctx.lock(vm).await;
        let (vm, ctx) = held.split();
        let mut create = ctx.lock(create).await;
        *create += *vm;
        let sum = *create;
        let mut net = create.ctx().lock(net).await;
        *net += sum;
        *net
    };
    guest_io(ctx).await;
    sum
}

#[tokio::test]
async fn locks_are_taken_in_spawned_tasks() {
    let table = LockTable::default();
    let (vm, create, net) = (Lock::new("vm web", 1), Lock::new("create", 10), Lock::new("network", 100));
    let sum = spawn(&table, async move |mut ctx| deep(&mut ctx, &vm, &create, &net).await).await.unwrap();
    assert_eq!(sum, 111);
    assert_eq!(table.snapshot(), []);
}
