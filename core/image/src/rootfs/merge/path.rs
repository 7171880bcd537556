//! Where a name leads in the tree.

use super::{Refusal, Tree};
use crate::ext4::{Attributes, Child, Directory, Kind, Node, NodeId, ROOT};

/// How deep directories are nested; a path has no more components.
const DEPTH_MAX: u16 = 2048;
/// How many symbolic links one path passes through (path_resolution(7)), and how many names it comes to with them.
const FOLLOWED_MAX: usize = 40;
const STEPS_MAX: usize = 8192;

/// Splits a name, which starts at the root and whose ".." takes away what stands before it; an error says in words why
/// it must not be used.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.contains(&0) {
        return Err("contains a zero byte");
    }
    let mut parts = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("leads out of the archive with \"..\"")?;
            }
            name => parts.push(name),
        }
    }
    Ok(parts)
}

pub(super) fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}

impl Tree {
    /// The directory that components lead to. With `create` missing ones are made (root's, mode 0755), also where a link
    /// says so, and all of them count as this layer's.
    pub(super) fn resolve(&mut self, parts: &[&[u8]], create: bool) -> Result<NodeId, Refusal> {
        let mut at = ROOT;
        let (mut followed, mut steps) = (0, 0);
        // What is still to go, the next one last, and whether a link says so.
        let mut ahead: Vec<(Box<[u8]>, bool)> =
            parts.iter().rev().map(|part| ((*part).into(), false)).collect();
        let mut link = String::new();
        // Directories below `at` that are not there; a ".." behind them takes one away before it is made.
        let mut missing: Vec<(Box<[u8]>, bool)> = Vec::new();
        while let Some((part, by_link)) = ahead.pop() {
            steps += 1;
            let Some(directory) = self.filesystem.directory(at) else {
                return Err("lies below no directory".into());
            };
            if &*part == b".." {
                if missing.pop().is_none() {
                    // The root is its own parent.
                    at = directory.parent;
                }
                continue;
            }
            let child = match directory.children.get(&part) {
                Some(child) if missing.is_empty() => child.node,
                _ => {
                    missing.push((part, by_link));
                    continue;
                }
            };
            match &self.filesystem.node(child).kind {
                Kind::Directory(_) => {
                    if create {
                        self.touch(at, &part);
                    }
                    at = child;
                }
                Kind::Symlink(target) => {
                    followed += 1;
                    if !by_link {
                        link = shown(&part);
                    }
                    if followed > FOLLOWED_MAX || steps > STEPS_MAX {
                        return Err(format!(
                            "passes through the symbolic link {link}, which leads in circles"
                        ));
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    let names =
                        target.rsplit(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".");
                    ahead.extend(names.map(|name| (name.into(), true)));
                }
                _ => return Err(format!("lies below {}, which is no directory", shown(&part))),
            }
        }
        if !create && !missing.is_empty() {
            return Err("is not there".into());
        }
        for (name, by_link) in missing {
            at = self.sub_directory(at, &name)?;
            if by_link {
                // The entry's own path is weighed already.
                self.weight += name.len();
            }
        }
        Ok(at)
    }

    /// The directory of this name in another, made if it is not there or something else is.
    pub(super) fn sub_directory(&mut self, parent: NodeId, name: &[u8]) -> Result<NodeId, Refusal> {
        let Some(directory) = self.filesystem.directory(parent) else {
            return Err("lies below no directory".into());
        };
        let depth = directory.depth + 1;
        if let Some(&Child { node, .. }) = directory.children.get(name)
            && self.filesystem.directory(node).is_some()
        {
            self.touch(parent, name);
            return Ok(node);
        }
        if depth > DEPTH_MAX {
            return Err(format!("lies deeper than {DEPTH_MAX} directories"));
        }
        let directory = Directory { parent, depth, hidden: 0, children: Default::default() };
        let kind = Kind::Directory(Box::new(directory));
        let id = self.push(Node { attributes: Attributes::implied(), kind, links: 1 })?;
        self.insert(parent, name, id);
        Ok(id)
    }

    /// Marks a name as one of this layer's.
    fn touch(&mut self, parent: NodeId, name: &[u8]) {
        let layer = self.layer;
        let directory = self.filesystem.directory_mut(parent);
        if let Some(child) = directory.and_then(|directory| directory.children.get_mut(name)) {
            child.layer = layer;
        }
    }
}
