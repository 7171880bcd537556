//! The host's own resolver is told of the VMs' names.

use crate::host::{BUSYBOX, Host};

#[test]
#[ignore = "takes minutes"]
fn systemd_resolved_knows_the_names_of_vms_while_there_are_any() {
    let host = Host::boot();
    let before = host.traces();
    // Zones are a plugin's; the bundled ones are compiled once, after the daemon's first start.
    host.run("vm daemon start");
    host.wait("the bundled plugins are installed", "vm plugin ls -q | grep -qx zone");
    host.attempt("resolvectl query web.vm").must("no VM has been made", |output| !output.status.success());
    host.run(&format!("vm create --name web {BUSYBOX} --start"));
    let shown = host.run("vm show web --json").json();
    let address =
        shown["address"].as_str().unwrap_or_else(|| panic!("it has an address: {shown}")).to_owned();
    host.run("resolvectl --legend=no query web.vm").tells(&format!("web.vm: {address}"));
    // As any program of the host asks, and back.
    host.run("getent ahostsv4 web.vm").tells(&address);
    host.run(&format!("resolvectl --legend=no query {address}")).tells("web.vm");
    // Nothing else is asked of it.
    host.run("resolvectl domain").tells("~vm");
    host.run("vm delete --force web");
    host.attempt("resolvectl query web.vm").must("the VM is gone", |output| !output.status.success());
    host.leaves_nothing(&before);
    host.end();
}
