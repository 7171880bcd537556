//! The order of the locks: every level, and after which others it may be locked. There is no other place that says so.

/// Out of reach elsewhere, which keeps levels and their order in this file.
mod sealed {
    pub trait Level {}
    pub trait After<Held> {}
    pub trait Paired {}
}

/// What a lock is for, which decides its place in the order. Levels are types without values.
pub trait Level: sealed::Level + 'static {
    /// As people read it in the table of locks.
    const NAME: &'static str;
}

/// A level that may be locked while `Held`, and whatever `Held` itself may be locked after, is held.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not locked after `{Held}`",
    label = "against the order of locks",
    note = "docs/locking.md has the order"
)]
pub trait LockAfter<Held: Level>: Level {}

/// A level of which two locks may be held at once, by [`Ctx::lock_pair`](crate::Ctx::lock_pair) only.
#[diagnostic::on_unimplemented(
    message = "two locks of level `{Self}` are not held at once",
    label = "against the order of locks",
    note = "docs/locking.md has the order"
)]
pub trait Paired: Level {}

// By way of the sealed traits and not recommended, so that the compiler says what is above instead of listing all pairs.
#[diagnostic::do_not_recommend]
impl<Held: Level, Next: Level + sealed::After<Held>> LockAfter<Held> for Next {}
#[diagnostic::do_not_recommend]
impl<Both: Level + sealed::Paired> Paired for Both {}

macro_rules! levels {
    ($($(#[$doc:meta])* $level:ident,)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $level {}
        impl sealed::Level for $level {}
        impl Level for $level {
            const NAME: &'static str = stringify!($level);
        }
    )*};
}

macro_rules! order {
    ($($held:ident then [$($next:ident)*];)*) => {
        $($(
            impl sealed::After<$held> for $next {}
        )*)*

        /// The order as data: each level with those that may be locked while it is held.
        pub const ORDER: &[(&str, &[&str])] = &[$((stringify!($held), &[$(stringify!($next)),*])),*];
    };
}

levels! {
    /// Nothing is held. What takes long, or waits for somebody else, wants this.
    Unlocked,
    /// One VM: its state, record and live handles.
    Vm,
    /// One workspace.
    Workspace,
    /// The choosing of names and addresses until they are written.
    CreateVm,
    /// Changes of the catalogue of images and kernels.
    ImageOps,
    /// The host's bridge, firewall table and forwarding.
    Network,
    /// The taps that wait for a VM.
    TapPool,
    /// Leaf: the initramfs that VMs share.
    Initramfs,
    /// Leaf: one journal of effects, for as long as one of them takes.
    Journal,
}

order! {
    Unlocked  then [Vm Workspace CreateVm ImageOps Network TapPool Initramfs Journal];
    Vm        then [             CreateVm ImageOps Network TapPool Initramfs Journal];
    Workspace then [             CreateVm ImageOps Network TapPool Initramfs Journal];
    CreateVm  then [                               Network TapPool Initramfs Journal];
    ImageOps  then [                               Network TapPool Initramfs Journal];
    Network   then [                                                 Journal];
    TapPool   then [                                                 Journal];
    Initramfs then [];
    Journal   then [];
}

// Two VMs or workspaces are one operation's business when one is made from the other.
impl sealed::Paired for Vm {}
impl sealed::Paired for Workspace {}
