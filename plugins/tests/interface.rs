//! The interface that components were built against: what it had then it has still.

use std::{collections::BTreeSet, fs};

use wit_component::WitPrinter;
use wit_parser::Resolve;

use crate::host::{corpus, workspace};

/// Between an item and the blocks that it is in.
const IN: &str = " / ";

/// An item a line, after the blocks that it is in. The places of fields and cases count, those of functions do not.
fn items() -> BTreeSet<String> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(workspace().join("../wit")).unwrap();
    let mut printer = WitPrinter::default();
    printer.emit_docs(false).print(&resolve, package, &[]).unwrap();
    let printed = printer.output.to_string();

    let mut items = BTreeSet::new();
    let mut blocks: Vec<(String, u32)> = Vec::new();
    for line in printed.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "}" {
            blocks.pop();
            continue;
        }
        let mut path: String = blocks.iter().map(|(block, _)| format!("{block}{IN}")).collect();
        if let Some((block, place)) = blocks.last_mut() {
            *place += 1;
            if is_data(block) {
                path += &format!("{place}{IN}");
            }
        }
        let using = line.strip_suffix("};").and_then(|line| line.split_once(".{"));
        if let Some((from, names)) = using {
            items.extend(names.split(", ").map(|name| format!("{path}{from}.{name}")));
        } else {
            let block = line.strip_suffix(" {");
            items.insert(path + block.unwrap_or(line));
            blocks.extend(block.map(|block| (block.to_owned(), 0)));
        }
    }
    items
}

fn is_data(block: &str) -> bool {
    ["record ", "variant ", "enum ", "flags "].iter().any(|kind| block.starts_with(kind))
}

/// Whether nothing may come to a block: components have it in their own types, or export all of it.
fn is_frozen(block: &str) -> bool {
    let exported = ["interface hook-", "interface resolver", "interface importer"];
    is_data(block) || exported.iter().any(|name| block.starts_with(name))
}

#[test]
fn what_was_there_is_there_and_what_components_export_is_the_same() {
    let path = corpus().join("interface.txt");
    let (then, now) = (fs::read_to_string(&path).unwrap(), items());
    let then: BTreeSet<_> = then.lines().map(str::to_owned).collect();
    let gone: Vec<_> = then.difference(&now).collect();
    assert!(gone.is_empty(), "components were built against this: {gone:#?}");

    let new: Vec<_> = now.difference(&then).collect();
    let grown = new.iter().filter(|item| {
        let ends = item.match_indices(IN).map(|(at, _)| &item[..at]);
        ends.filter(|end| then.contains(*end)).any(|end| is_frozen(end.rsplit(IN).next().unwrap_or(end)))
    });
    let grown: Vec<_> = grown.collect();
    assert!(grown.is_empty(), "components exist that do not have this: {grown:#?}");
    assert!(new.is_empty(), "from now on to stay, so add it to {}: {new:#?}", path.display());
}
