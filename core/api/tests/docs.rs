//! `docs/api.md` has every method and every code.

use std::collections::{BTreeMap, BTreeSet};

use vm_api::ErrorKind;

const DOCS: &str = include_str!("../../../docs/api.md");
const TRAITS: &str = include_str!("../src/rpc.rs");

/// The cells of the documentation's rows that have so many.
fn rows(cells: usize) -> impl Iterator<Item = Vec<&'static str>> {
    DOCS.lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|'))
        .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>())
        .filter(move |row| row.len() == cells)
}

/// What stands between each two of these quotes.
fn quoted(text: &str, quote: char) -> impl Iterator<Item = &str> {
    text.split(quote).skip(1).step_by(2)
}

/// Methods and subscriptions by namespace, as the traits' attributes have them.
fn offered() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let mut all: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let mut namespace = "";
    for line in TRAITS.lines().map(str::trim) {
        let name = quoted(line, '"').next();
        if line.contains("namespace = ") {
            namespace = name.expect("a namespace has a name");
        } else if line.starts_with("#[method(name = ") || line.starts_with("#[subscription(name = ") {
            all.entry(namespace).or_default().insert(name.expect("a method has a name"));
        }
    }
    all
}

#[test]
fn every_method_is_documented_and_no_other() {
    let documented: BTreeMap<_, BTreeSet<_>> = rows(3)
        .filter_map(|row| Some((quoted(row[0], '`').next()?, row)))
        .map(|(namespace, row)| (namespace, row[1..].iter().flat_map(|cell| quoted(cell, '`')).collect()))
        .collect();
    let offered = offered();
    assert!(offered.values().flatten().count() > 50, "the traits are not read: {offered:?}");
    assert_eq!(documented, offered);
}

#[test]
fn what_begins_an_operation_has_a_star() {
    let mut namespace = "";
    let mut method = None;
    for line in TRAITS.lines().map(str::trim) {
        let name = quoted(line, '"').next();
        if line.contains("namespace = ") {
            namespace = name.expect("a namespace has a name");
        } else if line.starts_with("#[method(name = ") {
            method = name;
        } else if let Some(method) = method.filter(|_| line.contains("-> RpcResult<")) {
            let row = rows(3).find(|row| row[0] == format!("`{namespace}`")).expect("a row");
            let starred = row[1].contains(&format!("`{method}`*"));
            assert_eq!(starred, line.contains("RpcResult<Begun>"), "{namespace}.{method}");
        }
    }
}

#[test]
fn every_kind_of_error_is_documented_with_its_code() {
    let documented: Vec<_> = rows(3)
        .filter_map(|row| Some((row[0].parse::<i32>().ok()?, row[1].trim_matches('`').to_owned())))
        .collect();
    let kinds: Vec<_> = ErrorKind::ALL.iter().map(|kind| (kind.code(), kind.word().to_owned())).collect();
    assert_eq!(documented, kinds);
}
