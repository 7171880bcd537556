#!/bin/bash
# From nothing to a command that ran inside a VM. Keeps images in .vm-dev for the next time; leaves nothing else.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
bin=$1
cd "$(dirname "$0")/.."

sudo=()
if ((EUID)); then
    command -v sudo >/dev/null || { echo "demo: VMs need root: run as root, or install sudo" >&2; exit 1; }
    sudo=(sudo)
fi
# Short, because a socket's path may have only 107 bytes.
run=$(mktemp -d /tmp/vm-demo.XXXXXX)
vm=("${sudo[@]}" "$bin/vm" --run-dir "$run" --state-dir "$PWD/.vm-dev/state" --config-dir "$PWD/.vm-dev/config")
log=$PWD/.vm-dev/state/vmd.log
instance=none

finish() {
    status=$?
    trap - EXIT
    mapfile -t left < <("${vm[@]}" --no-start ls -q 2>/dev/null)
    ((${#left[@]} == 0)) || "${vm[@]}" delete --force "${left[@]}" || status=1
    "${vm[@]}" -q daemon stop >/dev/null || status=1
    look_for_leftovers || status=1
    "${sudo[@]}" rm -rf "$run"
    if ((status)); then
        echo "demo: failed; what the host lacks, if anything:" >&2
        "${vm[@]}" -q doctor >&2 || true
        echo "demo: the daemon's log is $log" >&2
    fi
    exit "$status"
}
trap finish EXIT

# Everything that was made bears the instance's name or the run directory's.
look_for_leftovers() {
    local name found=0
    for name in $(ip -br link | grep -oE "^(vmbr-$instance|vt$instance)[^ ]*") $("${sudo[@]}" nft list tables | grep -o "vmd_$instance"); do
        echo "demo: $name is left" >&2
        found=1
    done
    # A pattern that does not match itself in grep's own arguments.
    if grep -sl -- "${run/vm-demo/[v]m-demo}" /proc/[0-9]*/cmdline; then
        echo "demo: these processes are left" >&2
        found=1
    fi
    return "$found"
}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
say_command() { say "\$ vm $*"; }

"${vm[@]}" -q doctor
"${vm[@]}" -q daemon start >/dev/null
instance=$("${vm[@]}" daemon status --json | sed -n 's/.*"instance": "\(.*\)".*/\1/p')

say_command "run --rm --image debian:bookworm -- sh -c 'echo \"hello from \$(uname -sr) …\"'"
"${vm[@]}" run --rm --image debian:bookworm -- sh -c \
    'echo "hello from $(uname -sr) on $(nproc) CPUs, $(. /etc/os-release; echo "$PRETTY_NAME")"; ps -o pid,args -p 1'
echo "this host runs $(uname -sr)"

say_command "run --rm -- sh -c 'exit 7'; echo \$?"
code=0
"${vm[@]}" run --rm -- sh -c 'exit 7' || code=$?
echo "$code"
((code == 7)) || { echo "demo: 7 was expected" >&2; exit 1; }

left=$("${vm[@]}" ls -q)
[[ -z $left ]] || { echo "demo: these VMs are left: $left" >&2; exit 1; }
say "Both VMs are gone. The binaries are in $bin; see README.md for a tour."
