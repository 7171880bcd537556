//! The order of locks: all that is allowed works, all that is not does not compile.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use vm_locks::{
    CreateVm, ImageOps, Initramfs, Journal, Lock, LockTable, Network, TapPool, Vm, Workspace, order::ORDER,
};

fn allowed() -> BTreeSet<(String, String)> {
    let pairs = ORDER.iter().flat_map(|(held, next)| next.iter().map(|next| (*held, *next)));
    pairs.map(|(held, next)| (held.to_owned(), next.to_owned())).collect()
}

/// Locks both levels of each pair in turn and tells what the table then showed.
macro_rules! lock_each {
    ($($held:ident then $($next:ident)*;)*) => {{
        let table = LockTable::default();
        let shown = table.clone();
        table.root("test", async move |mut ctx| {
            let mut seen = BTreeSet::new();
            let mut note = |held: &str, count: usize| {
                // Whoever came first is first, for the names are all the same.
                let levels: Vec<_> = shown.snapshot().into_iter().map(|entry| entry.level).collect();
                assert_eq!(levels.len(), count);
                seen.insert((held.to_owned(), levels[count - 1].clone()));
            };
            $(
                let lock = Lock::<$held, ()>::new("lock", ());
                let mut outer = ctx.lock(&lock).await;
                let (_, _outer) = outer.split();
                note("Unlocked", 1);
                $({
                    let lock = Lock::<$next, ()>::new("lock", ());
                    let inner = _outer.lock(&lock).await;
                    note(stringify!($held), 2);
                    drop(inner);
                })*
                drop(outer);
            )*
            seen
        }).await
    }};
}

#[tokio::test]
async fn locks_in_order_are_taken() {
    let seen = lock_each! {
        Vm then CreateVm ImageOps Network TapPool Initramfs Journal;
        Workspace then CreateVm ImageOps Network TapPool Initramfs Journal;
        CreateVm then Network TapPool Initramfs Journal;
        ImageOps then Network TapPool Initramfs Journal;
        Network then Journal;
        TapPool then Journal;
        Initramfs then;
        Journal then;
    };
    assert_eq!(seen, allowed(), "every allowed pair is tried here");
}

#[test]
fn locks_out_of_order_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}

/// `CreateVm` as in `after_create_vm.rs`.
fn snake(level: &str) -> String {
    let mut text = String::new();
    for letter in level.chars() {
        if letter.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(letter.to_lowercase());
    }
    text
}

#[test]
fn locks_in_every_wrong_order_are_among_the_programs() {
    let levels: Vec<_> = ORDER.iter().map(|(level, _)| *level).filter(|level| *level != "Unlocked").collect();
    let allowed = allowed();
    for held in &levels {
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/ui/after_{}.stderr", snake(held)));
        let errors = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        for next in &levels {
            let refused = errors.contains(&format!("error[E0277]: `{next}` is not locked after `{held}`"));
            let may = allowed.contains(&((*held).to_owned(), (*next).to_owned()));
            assert_ne!(refused, may, "{held} then {next}, in {}", file.display());
        }
    }
}

#[test]
fn locks_have_no_cycle() {
    let mut left: BTreeMap<_, _> = ORDER.iter().copied().collect();
    while !left.is_empty() {
        let free: Vec<_> = left
            .iter()
            .filter(|(_, next)| next.iter().all(|next| !left.contains_key(next)))
            .map(|(level, _)| *level)
            .collect();
        assert!(!free.is_empty(), "each of {:?} may be locked after another of them", left.keys());
        left.retain(|level, _| !free.contains(level));
    }
}

#[test]
fn locks_pass_on_no_more_than_they_were_given() {
    // Who holds A and then B holds both, so what may follow B must be allowed after A too.
    let allowed = allowed();
    for (first, second) in &allowed {
        for (_, third) in allowed.iter().filter(|(held, _)| held == second) {
            assert!(allowed.contains(&(first.clone(), third.clone())), "{first} then {second} then {third}");
        }
    }
}

#[test]
fn locks_are_documented_in_their_order() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/locking.md");
    let text = fs::read_to_string(&file).unwrap();
    for (held, next) in ORDER {
        let next = if next.is_empty() { "nothing".to_owned() } else { next.join(", ") };
        let row = format!("| `{held}` | {next} |");
        assert!(text.lines().any(|line| line.starts_with(&row)), "docs/locking.md lacks the row {row}");
    }
}
