//! Makes an ext4 filesystem of a directory with `mke2fs -d` and puts right what that tool leaves out.

use std::{
    collections::HashMap,
    fmt::Write,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
    time::Duration,
};

use vm_host::{HostCommand, RunError, Runner};
use vm_types::ImageDigest;

use super::{
    archive::Entry,
    extract::{BLOCK, Tally, Unpacked},
};
use crate::{ImageError, progress::Reporter};

/// Label of every root filesystem.
pub const LABEL: &str = "vm-root";

const MIB: u64 = 1 << 20;
/// Empty room in the filesystem, beside a tenth of its content.
const SLACK: u64 = 64 * MIB;
const JOURNAL_MIB: u64 = 64;
/// The filesystem can be grown online up to this size.
const GROW_MAX: u64 = 4 << 40;
/// Bytes for each inode; growing keeps the ratio, so it is the usual one and not what the content happens to have.
const BYTES_PER_INODE: u64 = 16384;
/// A block group: as many blocks as one block of bitmap has bits.
const GROUP: u64 = 8 * BLOCK * BLOCK;
const INODE_SIZE: u64 = 256;
const TIMEOUT: Duration = Duration::from_secs(3600);
const STAGE: &str = "making the filesystem";

/// Features, spelled out so that a host's `mke2fs.conf` changes nothing. Every kernel since 4.5 knows them all.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Sizes of a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) blocks: u64,
    pub(super) inodes: u64,
    grow_max: u64,
}

/// How big the filesystem of some content is made: content, a tenth, the slack, and what ext4 itself needs.
pub(super) fn plan(tally: &Tally) -> Plan {
    let content = tally.blocks() * BLOCK;
    let wanted = content + content / 10 + SLACK;
    // Every group that is added by growing gets as many inodes as each has here, the last, partial one too.
    let inodes = (tally.inodes + tally.inodes / 10 + 1024)
        .max(((wanted + JOURNAL_MIB * MIB) / GROUP + 2) * (GROUP / BYTES_PER_INODE));
    let mut bytes = wanted + JOURNAL_MIB * MIB + inodes * INODE_SIZE;
    // Bitmaps and rounding of the inode tables for each group of 128 MiB; a reserve for group descriptors (1024 blocks
    // at most, resize2fs(8)) beside each backup of the superblock, in groups 0, 1 and powers of 3, 5 and 7.
    let groups = bytes / GROUP + 2;
    bytes += groups * 4 * BLOCK;
    let backups = 2 + [3u64, 5, 7].iter().map(|&base| u64::from(groups.ilog(base))).sum::<u64>();
    bytes += backups * (1024 + groups / 64 + 2) * BLOCK;
    let bytes = bytes.next_multiple_of(MIB);
    let inodes = inodes.max(bytes.div_ceil(GROUP) * (GROUP / BYTES_PER_INODE));
    Plan { blocks: bytes / BLOCK, inodes, grow_max: GROW_MAX.max(2 * bytes) }
}

/// Makes the filesystem in a new file.
pub(super) async fn make(
    runner: &dyn Runner,
    unpacked: &Unpacked,
    directory: &Path,
    out: &Path,
    reporter: &Reporter,
) -> Result<(), ImageError> {
    let mut plan = plan(&unpacked.tally);
    let total = unpacked.tally.blocks() * BLOCK;
    // The plan is an upper bound by construction. Should a version of the tool need more than any was seen to, a
    // larger sparse file costs nothing, a failed import costs the user.
    for attempt in 0.. {
        let action = "making the filesystem";
        let command = mke2fs(&plan, &unpacked.digest, directory, out);
        let work = runner.run(command);
        match watched(work, out, total, reporter).await {
            Ok(_) => break,
            Err(RunError::Failed { stderr_tail, command, .. }) if attempt < 3 && lacks_room(&stderr_tail) => {
                tracing::warn!(%command, %stderr_tail, "filesystem was planned too small; trying a larger one");
                plan = Plan { blocks: plan.blocks * 3 / 2, inodes: plan.inodes * 3 / 2, ..plan };
                fs::remove_file(out).map_err(|source| ImageError::File {
                    action: "remove",
                    path: out.to_owned(),
                    source,
                })?;
            }
            Err(source) => return Err(ImageError::Tool { action, package: "e2fsprogs", source }),
        }
    }
    amend(runner, unpacked, out).await
}

fn lacks_room(stderr: &str) -> bool {
    ["Could not allocate", "No free space", "inode table", "No space"]
        .iter()
        .any(|text| stderr.contains(text))
}

fn mke2fs(plan: &Plan, digest: &ImageDigest, directory: &Path, out: &Path) -> HostCommand {
    let mut command = HostCommand::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-e", "remount-ro"])
        .args(["-I", &INODE_SIZE.to_string(), "-N", &plan.inodes.to_string(), "-O", FEATURES])
        .args(["-J", &format!("size={JOURNAL_MIB}"), "-L", LABEL, "-U", &uuid(digest, 0)])
        .arg("-E")
        .arg(format!(
            "hash_seed={},root_owner=0:0,resize={},lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1,nodiscard",
            uuid(digest, 16),
            plan.grow_max / BLOCK
        ))
        .arg("-d")
        .arg(directory)
        .arg(out)
        .arg(plan.blocks.to_string())
        .timeout(TIMEOUT);
    // No configuration: everything is on the command line.
    command.env.push(("MKE2FS_CONFIG".into(), "/dev/null".into()));
    command.env.push(("LC_ALL".into(), "C".into()));
    command
}

/// A UUID (RFC 9562, version 8: own use) out of 16 bytes of a digest.
fn uuid(digest: &ImageDigest, from: usize) -> String {
    let mut digits: Vec<char> = digest.hex().chars().skip(2 * from).take(32).collect();
    digits[12] = '8';
    digits[16] = 'a';
    let mut text = String::with_capacity(36);
    for (i, digit) in digits.into_iter().enumerate() {
        if matches!(i, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    text
}

/// Reports how much of a file is written while something writes it. Cancel-safe: dropping it drops the work.
async fn watched<T>(work: impl Future<Output = T>, out: &Path, total: u64, reporter: &Reporter) -> T {
    let mut work = std::pin::pin!(work);
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    loop {
        // Both branches are cancel-safe: `work` is only borrowed, a tick that is lost is no loss.
        tokio::select! {
            result = &mut work => return result,
            _ = ticks.tick() => {
                let written = fs::metadata(out).map_or(0, |file| file.blocks() * 512);
                reporter.report(STAGE, written.min(total), Some(total));
            }
        }
    }
}

/// Sets what `mke2fs -d` (1.47.0) does not take from the directory: the root's owner, mode and time, and of times what
/// is beyond 32 bits of seconds. Also tells the guest's kernel that inode tables need no zeroing, now or after growing:
/// the file's unwritten parts are zeros, and each VM would write them to its own disk.
async fn amend(runner: &dyn Runner, unpacked: &Unpacked, image: &Path) -> Result<(), ImageError> {
    let mut script = String::from("set_super_value mount_opts noinit_itable\n");
    if let Some(root) = &unpacked.root {
        amend_root(&mut script, root);
    } else {
        script.push_str("set_inode_field / mtime @0\nset_inode_field / mode 040755\n");
    }
    amend_times(&mut script, &unpacked.precise_times);
    let action = "setting times";
    let mut command =
        HostCommand::new("debugfs").args(["-w", "-f", "-"]).arg(image).stdin(script).timeout(TIMEOUT);
    command.env.push(("DEBUGFS_PAGER".into(), "__none__".into()));
    command.env.push(("LC_ALL".into(), "C".into()));
    // It echoes every command to stdout; what goes wrong it tells on stderr and exits with 0 all the same.
    let output = runner.run(command).await.map_err(|source| ImageError::Tool {
        action,
        package: "e2fsprogs",
        source,
    })?;
    let complaints: Vec<&str> = output
        .stderr_tail
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("debugfs 1."))
        .collect();
    if complaints.is_empty() {
        Ok(())
    } else {
        Err(ImageError::ToolOutput { action, output: complaints.join("; ") })
    }
}

fn amend_root(script: &mut String, root: &Entry) {
    // Writing to a String cannot fail.
    let _ = writeln!(script, "set_inode_field / mode 04{:04o}", root.mode);
    let _ = writeln!(script, "set_inode_field / uid {}", root.uid);
    let _ = writeln!(script, "set_inode_field / gid {}", root.gid);
    let _ = writeln!(script, "set_inode_field / mtime 0x{:x}", root.mtime.0 as u32);
    let _ = writeln!(script, "set_inode_field / mtime_extra 0x{:x}", extra(root.mtime));
}

fn amend_times(script: &mut String, times: &HashMap<Vec<u8>, (i64, u32)>) {
    for (path, mtime) in times {
        let Ok(path) = std::str::from_utf8(path) else { continue };
        // Quotation marks are doubled inside of quoted words (libss).
        let quoted = path.replace('"', "\"\"");
        // debugfs reads lines of 8 KiB at most; a name it cannot be told keeps its whole seconds.
        if quoted.contains('\n') || quoted.len() > 8000 {
            continue;
        }
        let _ = writeln!(script, "set_inode_field \"/{quoted}\" mtime_extra 0x{:x}", extra(*mtime));
    }
}

/// The field `i_mtime_extra`: nanoseconds above two bits of epoch (ext4 "Inode Timestamps").
fn extra((seconds, nanos): (i64, u32)) -> u32 {
    let low = i64::from(seconds as i32);
    let epoch = ((seconds - low) >> 32) as u32 & 3;
    (nanos << 2) | epoch
}

/// Flushes a file to the disk.
pub(super) fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_split_as_ext4_does() {
        assert_eq!(extra((0, 0)), 0);
        assert_eq!(extra((-1, 5)), 5 << 2);
        assert_eq!(extra((i64::from(i32::MAX) + 1, 0)), 1);
        assert_eq!(extra((4_102_444_801, 500_000_000)), (500_000_000 << 2) | 1);
    }

    #[test]
    fn plans_stay_near_their_content() {
        let tiny = plan(&Tally { inodes: 1, directories: 1, ..Tally::default() });
        assert!(tiny.blocks * BLOCK < 192 * MIB, "{tiny:?}");
        let gib = Tally { inodes: 30_000, data_blocks: (1 << 30) / BLOCK, ..Tally::default() };
        let planned = plan(&gib).blocks * BLOCK;
        assert!(planned > (1 << 30) + SLACK && planned < (1 << 30) * 13 / 10 + 128 * MIB, "{planned}");
    }
}
