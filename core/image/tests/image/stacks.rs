//! Random stacks of layers against a model that is too simple to be wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use proptest::{prelude::*, test_runner::TestRunner};
use sha2::{Digest, Sha256};

use crate::{
    common::{Bench, Tar, look, mounted},
    layers::flatten,
    layout::Layout,
};

#[derive(Debug, Clone)]
enum Step {
    Directory(Vec<u8>, u8),
    File(Vec<u8>, u8),
    Link(Vec<u8>),
    /// Which of the paths that are there, and where to.
    Hard(usize, Vec<u8>),
    Hide(Vec<u8>),
    HideBelow(Vec<u8>),
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0u8..3, 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (path(), any::<u8>()).prop_map(|(path, seed)| Step::Directory(path, seed)),
        4 => (path(), any::<u8>()).prop_map(|(path, seed)| Step::File(path, seed)),
        1 => path().prop_map(Step::Link),
        2 => (any::<usize>(), path()).prop_map(|(which, path)| Step::Hard(which, path)),
        2 => path().prop_map(Step::Hide),
        1 => path().prop_map(Step::HideBelow),
    ]
}

fn text(path: &[u8]) -> String {
    path.iter().map(|part| ["a", "b", "c"][usize::from(*part)]).collect::<Vec<_>>().join("/")
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Thing {
    kind: u8,
    mode: u32,
    owner: u32,
    time: u64,
    content: Vec<u8>,
    /// Which inode.
    id: usize,
}

/// Paths and what is there.
#[derive(Default)]
struct Model {
    things: BTreeMap<String, Thing>,
    next: usize,
}

impl Model {
    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.things.retain(|name, _| name != path && !name.starts_with(&below));
    }
    fn is_directory(&self, path: &str) -> bool {
        self.things.get(path).is_some_and(|thing| thing.kind == b'5')
    }
    /// Whether a directory is there to hold it.
    fn can_hold(&self, path: &str) -> bool {
        path.rsplit_once('/').is_none_or(|(parent, _)| self.is_directory(parent))
    }

    /// What a layer hides goes first, wherever the archive says so; then the rest in order. Answers the archive.
    fn layer(&mut self, steps: &[Step], number: u32) -> Vec<u8> {
        let mut entries: Vec<Tar> = Vec::new();
        let mut hidden = Vec::new();
        for step in steps {
            let (whiteout, path) = match step {
                Step::Hide(path) => {
                    let path = text(path);
                    self.remove(&path);
                    let (parent, name) = path.rsplit_once('/').unwrap_or((".", &path));
                    (format!("{parent}/.wh.{name}"), path.clone())
                }
                Step::HideBelow(path) => {
                    let path = text(path);
                    let below = format!("{path}/");
                    self.things.retain(|name, _| !name.starts_with(&below));
                    (format!("{path}/.wh..wh..opq"), path)
                }
                _ => continue,
            };
            hidden.push(Tar::default().add(b'0', &whiteout, "", b""));
            drop(path);
        }
        for step in steps {
            let (path, mut thing) = match step {
                Step::Directory(path, seed) => (path, self.thing(b'5', *seed, number, Vec::new())),
                Step::File(path, seed) => {
                    (path, self.thing(b'0', *seed, number, vec![*seed; usize::from(*seed) * 100]))
                }
                Step::Link(path) => (path, self.thing(b'2', 7, number, b"no where".to_vec())),
                Step::Hard(which, path) => {
                    let files: Vec<&String> = self
                        .things
                        .iter()
                        .filter(|(_, thing)| thing.kind != b'5')
                        .map(|(name, _)| name)
                        .collect();
                    let Some(from) = files.get(which % files.len().max(1)).map(|name| (*name).clone()) else {
                        continue;
                    };
                    let to = text(path);
                    if !self.can_hold(&to) {
                        continue;
                    }
                    entries.push(Tar::default().add(b'1', &to, &from, b""));
                    let thing = self.things[&from].clone();
                    self.remove(&to);
                    self.things.insert(to, thing);
                    continue;
                }
                _ => continue,
            };
            let path = text(path);
            if !self.can_hold(&path) {
                continue;
            }
            let link = if thing.kind == b'2' { "no where" } else { "" };
            let content = if thing.kind == b'0' { &thing.content[..] } else { b"" };
            let mut entry = Tar::default();
            entry.push_as(thing.kind, &path, link, content, (thing.mode, thing.owner.into(), thing.time));
            entries.push(entry);
            if thing.kind == b'5' && self.is_directory(&path) {
                thing.id = self.things[&path].id;
            } else {
                self.remove(&path);
            }
            self.things.insert(path, thing);
        }
        // Whiteouts somewhere among the others.
        for (i, whiteout) in hidden.into_iter().enumerate() {
            let place = (i * 7 + steps.len()) % (entries.len() + 1);
            entries.insert(place, whiteout);
        }
        Tar(entries.into_iter().flat_map(|entry| entry.0).collect()).end()
    }

    fn thing(&mut self, kind: u8, seed: u8, layer: u32, content: Vec<u8>) -> Thing {
        self.next += 1;
        let mode = if kind == b'2' { 0o777 } else { 0o600 | u32::from(seed) & 0o177 };
        Thing {
            kind,
            mode,
            owner: layer * 1000,
            time: 1_000_000_000 + u64::from(seed),
            content,
            id: self.next,
        }
    }
}

fn groups<K: Ord>(pairs: impl Iterator<Item = (K, String)>) -> BTreeSet<BTreeSet<String>> {
    let mut groups: BTreeMap<K, BTreeSet<String>> = BTreeMap::new();
    for (key, path) in pairs {
        groups.entry(key).or_default().insert(path);
    }
    groups.into_values().collect()
}

#[test]
fn random_stacks_come_to_what_a_simple_model_says() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut runner = TestRunner::new(ProptestConfig { cases: 40, ..ProptestConfig::default() });
    let layer = prop::collection::vec(step(), 0..25);
    let strategy = prop::collection::vec(layer, 1..5);
    let checked = runner.run(&strategy, |stack| {
        let mut model = Model::default();
        let archives = stack.iter().zip(1..).map(|(steps, number)| model.layer(steps, number));
        let bench = Bench::new();
        let layout = bench.dir.path().join("layout");
        Layout::write(&layout, archives.collect(), "cat");
        runtime.block_on(flatten(&bench, &layout)).unwrap();
        bench.check();
        let mut seen = mounted(&bench.out(), look);
        seen.remove(&PathBuf::new());
        let seen: BTreeMap<String, _> =
            seen.into_iter().map(|(path, seen)| (path.to_str().unwrap().to_owned(), seen)).collect();
        prop_assert_eq!(seen.keys().collect::<Vec<_>>(), model.things.keys().collect::<Vec<_>>());
        for (path, thing) in &model.things {
            let seen = &seen[path];
            let kind = match thing.kind {
                b'5' => 0o040_000,
                b'2' => 0o120_000,
                _ => 0o100_000,
            };
            prop_assert_eq!(seen.mode, kind | thing.mode, "{}", path);
            prop_assert_eq!(seen.owner, (thing.owner, thing.owner), "{}", path);
            prop_assert_eq!(seen.mtime, (thing.time as i64, 0), "{}", path);
            if thing.kind == b'0' {
                let content = Sha256::digest(&thing.content).to_vec();
                prop_assert_eq!(seen.content.as_ref(), Some(&content), "{}", path);
            }
        }
        let theirs = groups(seen.iter().map(|(path, seen)| (seen.same_as.clone(), path.clone())));
        let ours = groups(model.things.iter().map(|(path, thing)| (thing.id, path.clone())));
        prop_assert_eq!(theirs, ours);
        Ok(())
    });
    checked.unwrap_or_else(|error| panic!("{error}"));
}
