//! Layers into one tree, by the rules of the OCI image specification ("Image Layer Filesystem Changeset").
//!
//! Nothing here touches a filesystem: names that nobody vouches for only ever lead from node to node. As umoci and
//! containerd have it, the root is all there is: an absolute name or link target starts there, and a ".." too many in a
//! link's target stays there. A name that passes through a symbolic link leads to where the link leads; directories that
//! are not there yet are made. A name that itself climbs out with ".." no tool writes, so it is refused; so are links that
//! lead in circles or to no directory.
//!
//! A whiteout hides what layers below have, never what its own layer has, whichever comes first in the archive. An entry
//! for a directory that is there changes its attributes; any other entry for a name that is there replaces that.
//!
//! Layers of Docker's first years have files of aufs's own, which are left out, as others do. Among them are files that stand for
//! those with several names: what is a hard link to one becomes a link to its content.

mod node;
mod path;

use std::collections::HashMap;

use self::{
    node::{attributes, device, symlink, weight},
    path::{components, shown},
};
use super::archive::{Entry, Kind as EntryKind};
use crate::ext4::{
    Attributes, Child, Extent, Extents, Filesystem, Kind, LINKS_MAX, LOST_FOUND, Node, NodeId, ROOT,
};

/// Entries of all layers together. One takes some 300 bytes of memory until the image is written.
const ENTRIES_MAX: u32 = 3_000_000;
/// What names, link targets, attributes and maps of fragments take beside that, in bytes.
const WEIGHT_MAX: usize = 1 << 30;
/// The longest path, in bytes (Linux's PATH_MAX counts a zero byte).
const PATH_MAX: usize = 4095;
const NAME_MAX: usize = 255;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What aufs kept its own files under.
const AUFS: &[u8] = b".wh..wh.";
/// And the files with several names, in this directory at the root.
const AUFS_LINKS: &[u8] = b".wh..wh.plnk";

/// Why an entry is refused, to be read behind its path.
pub(super) type Refusal = String;

/// The tree, layer upon layer.
pub(super) struct Tree {
    pub(super) filesystem: Filesystem,
    layer: u32,
    whiteouts: bool,
    /// Entries that were, and that may be.
    entries: u32,
    most: u32,
    weight: usize,
    /// Contents of files that are gone.
    dead: Vec<Extent>,
    /// The layer's files of [`AUFS_LINKS`]; each counts as one name.
    aufs: HashMap<Box<[u8]>, NodeId>,
}

impl Tree {
    /// An empty root. With `whiteouts` names like `.wh.x` mean what they mean in a layer; without they are names.
    pub(super) fn new(whiteouts: bool) -> Self {
        Self {
            filesystem: Filesystem::new(),
            layer: 0,
            whiteouts,
            entries: 0,
            most: ENTRIES_MAX,
            weight: 0,
            dead: Vec::new(),
            aufs: HashMap::new(),
        }
    }

    /// What comes next is above all that was before.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// What only the layer itself needed goes.
    pub(super) fn end_layer(&mut self) {
        for (_, node) in std::mem::take(&mut self.aufs) {
            self.unlink(node);
        }
    }

    /// Contents of files that are gone since the last call.
    pub(super) fn take_dead(&mut self) -> Vec<Extent> {
        std::mem::take(&mut self.dead)
    }

    pub(super) fn dead_extents(&self) -> usize {
        self.dead.len()
    }

    /// Checks what can be told before a file's content is read.
    pub(super) fn check(&mut self, entry: &Entry) -> Result<(), Refusal> {
        self.entries += 1;
        if self.entries > self.most {
            return Err(self.too_many());
        }
        if entry.path.len() > PATH_MAX {
            return Err(format!("is {} bytes long; a path has {PATH_MAX} at most", entry.path.len()));
        }
        if let Some(long) = components(&entry.path)?.iter().find(|part| part.len() > NAME_MAX) {
            return Err(format!("has a name of {} bytes in it; one has {NAME_MAX} at most", long.len()));
        }
        Ok(())
    }

    /// Whether an entry is an instruction rather than a thing.
    pub(super) fn is_instruction(&self, entry: &Entry) -> bool {
        let told = |parts: Vec<&[u8]>| {
            parts.iter().any(|part| part.starts_with(WHITEOUT)) && !stands_for_links(&parts, entry)
        };
        self.whiteouts && components(&entry.path).is_ok_and(told)
    }

    /// Adds an entry; a file with what its content came to.
    pub(super) fn add(&mut self, entry: &Entry, content: Extents) -> Result<(), Refusal> {
        let parts = components(&entry.path)?;
        if self.is_instruction(entry) {
            return self.instruction(&parts);
        }
        let for_links = self.whiteouts && stands_for_links(&parts, entry);
        self.weight += weight(entry) + size_of_val(content.as_slice());
        if self.weight > WEIGHT_MAX {
            return Err(format!(
                "is too much: names, links, attributes and fragments of an image take {} MiB at most",
                WEIGHT_MAX >> 20
            ));
        }
        let Some((&name, parents)) = parts.split_last() else {
            if entry.kind != EntryKind::Directory {
                return Err("takes the place of the root directory".into());
            }
            self.filesystem.node_mut(ROOT).attributes = attributes(entry)?;
            return Ok(());
        };
        let kind = match &entry.kind {
            EntryKind::Hardlink(target) => return self.hard_link(parents, name, target),
            EntryKind::File => Kind::File { size: entry.size, extents: content },
            EntryKind::Symlink(target) => symlink(target)?,
            EntryKind::CharDevice(major, minor) => device(false, *major, *minor)?,
            EntryKind::BlockDevice(major, minor) => device(true, *major, *minor)?,
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Directory => {
                let attributes = attributes(entry)?;
                let parent = self.resolve(parents, true)?;
                let id = self.sub_directory(parent, name)?;
                self.filesystem.node_mut(id).attributes = attributes;
                return Ok(());
            }
        };
        let attributes = attributes(entry)?;
        if for_links {
            let id = self.push(Node { attributes, kind, links: 1 })?;
            if let Some(former) = self.aufs.insert(name.into(), id) {
                self.unlink(former);
            }
            return Ok(());
        }
        let parent = self.resolve(parents, true)?;
        not_lost_found(parent, name)?;
        let id = self.push(Node { attributes, kind, links: 1 })?;
        self.insert(parent, name, id);
        Ok(())
    }

    fn instruction(&mut self, parts: &[&[u8]]) -> Result<(), Refusal> {
        let Some((&name, parents)) = parts.split_last() else { return Ok(()) };
        // What aufs left in images of its time.
        if parts.iter().any(|part| part.starts_with(AUFS) && *part != OPAQUE) {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err("lies below a whiteout".into());
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(hidden, b"" | b"." | b"..") {
            return Err("is a whiteout of no name".into());
        }
        // What is not there needs no hiding.
        let Ok(parent) = self.resolve(parents, false) else { return Ok(()) };
        if name == OPAQUE {
            self.hide_below(vec![parent]);
        } else if let Some(&child) =
            self.filesystem.directory(parent).and_then(|dir| dir.children.get(hidden))
        {
            if child.layer == self.layer {
                self.hide_below(vec![child.node]);
            } else {
                self.remove(parent, hidden);
            }
        }
        Ok(())
    }

    /// Takes away what lower layers have in directories. One that it was done to before in this layer cannot have got
    /// anything of theirs since.
    fn hide_below(&mut self, mut queue: Vec<NodeId>) {
        while let Some(id) = queue.pop() {
            let Some(directory) = self.filesystem.directory_mut(id) else { continue };
            if directory.hidden == self.layer {
                continue;
            }
            directory.hidden = self.layer;
            let mut lower = Vec::new();
            for (name, child) in &directory.children {
                if child.layer == self.layer {
                    queue.push(child.node);
                } else {
                    lower.push(name.clone());
                }
            }
            for name in lower {
                self.remove(id, &name);
            }
        }
    }

    fn hard_link(&mut self, parents: &[&[u8]], name: &[u8], target: &[u8]) -> Result<(), Refusal> {
        let to = components(target)
            .map_err(|reason| format!("is a hard link to {}, which {reason}", shown(target)))?;
        let Some((&to_name, to_parents)) = to.split_last() else {
            return Err("is a hard link to the root directory".into());
        };
        let there = match to_parents {
            [top] if self.whiteouts && *top == AUFS_LINKS => self.aufs.get(to_name).copied(),
            parents => {
                let from = self
                    .resolve(parents, false)
                    .map_err(|reason| format!("is a hard link to {}, which {reason}", shown(target)))?;
                let there = self.filesystem.directory(from).and_then(|dir| dir.children.get(to_name));
                there.map(|child| child.node)
            }
        };
        let Some(node) = there else {
            return Err(format!("is a hard link to {}, which is not there", shown(target)));
        };
        if self.filesystem.directory(node).is_some() {
            return Err(format!("is a hard link to {}, a directory", shown(target)));
        }
        let parent = self.resolve(parents, true)?;
        not_lost_found(parent, name)?;
        let links = &mut self.filesystem.node_mut(node).links;
        if *links >= LINKS_MAX {
            return Err(format!("is one hard link too many; ext4 has {LINKS_MAX} to one file"));
        }
        // First, so that replacing the last other name of the same file does not lose it.
        *links += 1;
        self.insert(parent, name, node);
        Ok(())
    }

    fn push(&mut self, node: Node) -> Result<NodeId, Refusal> {
        let id = self.filesystem.nodes.len() as NodeId;
        // One path can ask for a thousand directories that no entry names.
        if id > self.most {
            return Err(self.too_many());
        }
        self.filesystem.nodes.push(node);
        Ok(id)
    }

    fn too_many(&self) -> Refusal {
        format!("is one entry too many; an image has {} at most", self.most)
    }

    /// Gives a node a name, of which it has counted the link; what had the name loses it.
    fn insert(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let child = Child { node, layer: self.layer };
        let former =
            self.filesystem.directory_mut(parent).and_then(|dir| dir.children.insert(name.into(), child));
        if let Some(former) = former {
            self.unlink(former.node);
        }
    }

    fn remove(&mut self, parent: NodeId, name: &[u8]) {
        let former = self.filesystem.directory_mut(parent).and_then(|dir| dir.children.remove(name));
        if let Some(former) = former {
            self.unlink(former.node);
        }
    }

    /// Takes a name from a node; with the last one it goes, and what is below it.
    fn unlink(&mut self, id: NodeId) {
        let mut queue = vec![id];
        while let Some(id) = queue.pop() {
            let node = self.filesystem.node_mut(id);
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            node.attributes = Attributes::implied();
            match std::mem::replace(&mut node.kind, Kind::Fifo) {
                Kind::File { extents, .. } => self.dead.extend_from_slice(extents.as_slice()),
                Kind::Directory(directory) => {
                    queue.extend(directory.children.into_values().map(|child| child.node));
                }
                _ => {}
            }
        }
    }
}

/// Whether an entry is a file that aufs kept for its other names.
fn stands_for_links(parts: &[&[u8]], entry: &Entry) -> bool {
    matches!(parts, [top, _] if *top == AUFS_LINKS) && entry.kind == EntryKind::File
}

/// Only a directory can have this name at the root.
fn not_lost_found(parent: NodeId, name: &[u8]) -> Result<(), Refusal> {
    if parent == ROOT && name == LOST_FOUND {
        return Err("takes the place of a directory that each ext4 filesystem has".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind) -> Entry {
        let (path, size) = (path.as_bytes().to_vec(), 0);
        Entry {
            path,
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
            size,
            segments: Vec::new(),
        }
    }

    #[test]
    fn the_last_entry_that_fits_does_and_the_next_does_not() {
        let mut tree = Tree::new(true);
        tree.entries = ENTRIES_MAX - 1;
        let fifo = entry("fifo", EntryKind::Fifo);
        assert_eq!(tree.check(&fifo), Ok(()));
        assert!(tree.check(&fifo).unwrap_err().contains("3000000 at most"));
        tree.weight = WEIGHT_MAX - "fifo".len();
        assert_eq!(tree.add(&fifo, Extents::None), Ok(()));
        assert!(tree.add(&fifo, Extents::None).unwrap_err().contains("1024 MiB"));
    }

    #[test]
    fn directories_that_no_entry_names_count() {
        let mut tree = Tree::new(true);
        tree.most = 3000;
        tree.add(&entry(&"d/".repeat(2000), EntryKind::Directory), Extents::None).unwrap();
        assert_eq!(tree.filesystem.nodes.len(), 2001);
        let another = entry(&"e/".repeat(2000), EntryKind::Directory);
        assert!(tree.add(&another, Extents::None).unwrap_err().contains("3000 at most"));
    }

    #[test]
    fn only_a_directory_is_lost_and_found() {
        let mut tree = Tree::new(true);
        tree.add(&entry("root", EntryKind::Symlink(b"/".to_vec())), Extents::None).unwrap();
        tree.add(&entry("f", EntryKind::Fifo), Extents::None).unwrap();
        for kind in [EntryKind::Fifo, EntryKind::Hardlink(b"f".to_vec())] {
            let error = tree.add(&entry("root/lost+found", kind), Extents::None).unwrap_err();
            assert!(error.contains("each ext4 filesystem"), "{error}");
        }
        tree.add(&entry("root/lost+found", EntryKind::Directory), Extents::None).unwrap();
    }

    #[test]
    fn what_is_hidden_is_gone_through_once_for_each_layer() {
        let mut tree = Tree::new(true);
        let opaque = entry("d/.wh..wh..opq", EntryKind::File);
        let names = |tree: &Tree| {
            let Some(Child { node, .. }) = tree.filesystem.directory(ROOT).unwrap().children.get(&b"d"[..])
            else {
                panic!("d is gone")
            };
            tree.filesystem.directory(*node).unwrap().children.len()
        };
        tree.next_layer();
        tree.add(&entry("d/low", EntryKind::Fifo), Extents::None).unwrap();
        tree.next_layer();
        tree.add(&entry("d/high", EntryKind::Fifo), Extents::None).unwrap();
        tree.add(&opaque, Extents::None).unwrap();
        assert_eq!(names(&tree), 1);
        // What cannot be is not looked for: a name of the lowest layer stays.
        let id = tree.resolve(&[b"d"], false).unwrap();
        let children = &mut tree.filesystem.directory_mut(id).unwrap().children;
        children.get_mut(&b"high"[..]).unwrap().layer = 1;
        tree.add(&opaque, Extents::None).unwrap();
        assert_eq!(names(&tree), 1);
        tree.next_layer();
        tree.add(&opaque, Extents::None).unwrap();
        assert_eq!(names(&tree), 0);
    }

    #[test]
    fn ext4_has_no_more_links_than_65000() {
        let mut tree = Tree::new(true);
        tree.add(&entry("a", EntryKind::Fifo), Extents::None).unwrap();
        let mut link =
            |i| tree.add(&entry(&format!("l{i}"), EntryKind::Hardlink(b"a".to_vec())), Extents::None);
        for i in 1..LINKS_MAX {
            link(i).unwrap();
        }
        // A name that is one of them already may stay.
        assert!(link(0).unwrap_err().contains("65000"));
    }

    #[test]
    fn directories_end_somewhere() {
        let mut tree = Tree::new(true);
        let mut path = "d/".repeat(1000);
        tree.add(&entry(&path, EntryKind::Directory), Extents::None).unwrap();
        tree.add(&entry("deep", EntryKind::Symlink(path.clone().into_bytes())), Extents::None).unwrap();
        path.insert_str(0, "deep/");
        tree.add(&entry(&path, EntryKind::Directory), Extents::None).unwrap();
        tree.add(&entry("deeper", EntryKind::Symlink(path.clone().into_bytes())), Extents::None).unwrap();
        path.replace_range(.."deep/".len(), "deeper/");
        let error = tree.add(&entry(&path, EntryKind::Directory), Extents::None).unwrap_err();
        assert!(error.contains("deeper than 2048"), "{error}");
    }
}
