//! The daemon's locks. Their order is a matter of types: a wrong one does not compile. They are fair, and whoever holds one or
//! waits for one can be seen.
//!
//! ```text
//!               ┌─> Vm ────────┐   ┌─> CreateVm ──┐   ┌─> Network ─┐
//!   Unlocked ───┤              ├───┤              ├───┼─> TapPool ─┴─> Journal
//!               └─> Workspace ─┘   └─> ImageOps ──┘   └─> Initramfs
//! ```
//!
//! Every task that locks has one [`Ctx`], which [`LockTable::root`] makes. To lock is to borrow it mutably for as long as the
//! lock is held; what is locked meanwhile is locked through the inner context that the guard, [`Held`], offers. A function that
//! may take long (a guest's answer, a plugin's hook, a download) asks for a [`Ctx<Unlocked>`] by reference, which nobody has
//! who holds a lock.
//!
//! ```
//! use vm_locks::{CreateVm, Ctx, Lock, LockTable, Unlocked, Vm};
//!
//! async fn ask_guest(_: &mut Ctx<Unlocked>) {}
//!
//! async fn rename(ctx: &mut Ctx<Unlocked>, vm: &Lock<Vm, String>, names: &Lock<CreateVm, Vec<String>>) {
//!     let mut held = ctx.lock(vm).await;
//!     let (name, ctx) = held.split();
//!     let mut names = ctx.lock(names).await;
//!     *name = "web".to_owned();
//!     names.push(name.clone());
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! let table = LockTable::default();
//! let (vm, names) = (Lock::new("vm db", "db".to_owned()), Lock::new("names", Vec::new()));
//! table.root("request vm.set", async move |mut ctx| {
//!     rename(&mut ctx, &vm, &names).await;
//!     ask_guest(&mut ctx).await;
//!     assert_eq!(*ctx.lock(&names).await, ["web"]);
//! }).await;
//! # });
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! What the types cannot see, [`Ctx::lock`] and [`LockTable::root`] check when they run: a second root inside a root, a context
//! that has left its root, a guard that was forgotten instead of dropped. Each panics in a debug build and is logged in a
//! release build. `docs/locking.md` has the whole, what each lock is for, and how to add one.
//!
//! This crate knows no VM and does no I/O.

mod ctx;
mod lock;
pub mod order;
mod table;

pub use ctx::{Ctx, Held, HeldPair, SamePair};
pub use lock::Lock;
pub use order::{
    CreateVm, ImageOps, Initramfs, Journal, Level, LockAfter, Network, Paired, TapPool, Unlocked, Vm,
    Workspace,
};
pub use table::{LockEntry, LockState, LockTable, Origin};
