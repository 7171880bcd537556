//! The host goes down with VMs on it and comes up again, in an orderly way and as if the power had failed.

use crate::{
    host::{BUSYBOX, Host},
    say,
};

#[test]
#[ignore = "takes minutes"]
fn a_reboot_of_the_host_leaves_what_was_and_starts_what_should_run() {
    let host = Host::boot();
    let before = host.traces();
    for (name, policy) in [("never", "no"), ("failed", "on-failure"), ("ever", "always")] {
        host.run(&format!("vm create --name {name} {BUSYBOX} --restart {policy} --start"));
        host.run(&format!("vm ssh {name} 'echo of {name} > /root/file; sync'"));
    }
    for power_fails in [true, false] {
        say(&format!("nested: {}", if power_fails { "the power fails" } else { "the host reboots" }));
        host.reboot(power_fails);
        assert_eq!(host.traces(), before, "nothing of a VM outlives a reboot by itself");
        // The first to ask starts the daemon, which looks at what it finds.
        host.run("vm ls");
        for name in ["failed", "ever"] {
            host.wait(
                &format!("{name} runs again"),
                &format!("[ \"$(vm ssh {name} cat /root/file)\" = 'of {name}' ]"),
            );
        }
        let never = host.run("vm show never --json").json();
        assert!(never["state"] != "running", "{never}");
        host.run("vm start never");
        host.run("vm ssh never cat /root/file").says("of never\n");
    }
    host.leaves_nothing(&before);
    host.end();
}
