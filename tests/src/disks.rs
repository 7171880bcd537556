//! A VM's disk as the host's own tools see it, whatever it is made of.

use crate::World;

/// Puts a disk of differences together again, from a copy of them, and looks at it: $1 base, $2 differences, $3 bytes.
const CHECK_DEVICE: &str = r#"
set -e
dm() { dmsetup --noudevrules --noudevsync "$@"; }
copy=$(mktemp "$2.XXXXXX") name=check-${copy##*.} node=$copy.node base= delta=
undo() {
    for device in "$name" "$name-origin"; do ! dm info "$device" >/dev/null 2>&1 || dm remove --retry "$device"; done
    for loop in $base $delta; do losetup -d "$loop"; done
    rm -f "$copy" "$node"
}
trap undo EXIT
cp --sparse=always "$2" "$copy"
base=$(losetup -rf --show "$1") delta=$(losetup -f --show "$copy")
chunk=$(od -An -tu4 -j12 -N4 "$2" | tr -d ' ')
held=$(blockdev --getsz "$base") whole=$(($3 / 512))
{
    echo "0 $held linear $base 0"
    [ "$whole" -le "$held" ] || echo "$held $((whole - held)) zero"
} | dm create "$name-origin"
origin=$(dm info -c --noheadings --separator : -o major,minor "$name-origin")
echo "0 $whole snapshot $origin $delta P $chunk" | dm create "$name"
# Of our own: udev may or may not make one here.
mknod "$node" b $(dm info -c --noheadings --separator ' ' -o major,minor "$name")
e2fsck -fn "$node"
"#;

impl World {
    /// `e2fsck` finds nothing on the disk of a VM that is off: it was shut down so that all was flushed and unmounted.
    ///
    /// # Panics
    /// It does.
    #[track_caller]
    pub fn disk_is_clean(&self, vm: &str) {
        let paths = self.paths(vm);
        let file = paths.disk();
        if file.exists() {
            self.tool("e2fsck", &["-fn", &file.to_string_lossy()]).run().exits(0);
            return;
        }
        let shown = self.ask(&["show", vm]);
        let digest = shown["image_digest"].as_str().and_then(|digest| digest.parse().ok());
        let base = self.dirs().image_rootfs(&digest.expect("a VM has an image"));
        let (base, delta) = (base.to_string_lossy(), paths.disk_delta());
        let bytes = shown["disk_bytes"].to_string();
        let arguments = ["-c", CHECK_DEVICE, "check", &base, &delta.to_string_lossy(), &bytes];
        self.tool("sh", &arguments).run().exits(0);
    }
}
