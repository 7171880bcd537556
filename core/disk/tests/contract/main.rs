//! One contract for every way to make a disk: copies on ext4, reflinks on XFS and on btrfs, snapshots of device-mapper.
//!
//! Each test has a filesystem of its own, in a file, mounted in a mount namespace of its own. What this host has not is said
//! on stderr; with `VM_TEST_REQUIRE_DM=1` a missing device-mapper fails.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod bench;
mod cases;
mod leftovers;
mod measures;

use bench::{Ground, on};

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        mod copies { $(#[test] fn $case() { super::on(super::Ground::Copy, super::cases::$case); })* }
        mod reflinks_on_xfs { $(#[test] fn $case() { super::on(super::Ground::Xfs, super::cases::$case); })* }
        mod reflinks_on_btrfs { $(#[test] fn $case() { super::on(super::Ground::Btrfs, super::cases::$case); })* }
        mod snapshots { $(#[test] fn $case() { super::on(super::Ground::Dm, super::cases::$case); })* }
    };
}

suite!(
    a_disk_begins_as_its_base_and_keeps_its_writes_to_itself,
    a_disk_is_as_large_as_asked_and_zero_behind_the_base,
    what_was_written_is_there_after_another_start,
    a_disk_that_is_off_grows_and_keeps_what_is_on_it,
    a_disk_smaller_than_its_base_is_refused_and_leaves_nothing,
    what_is_somebody_elses_stays,
    discards_never_reach_the_base,
    a_hundred_disks_share_a_base,
    a_full_host_spoils_no_base_and_no_earlier_write,
    a_disk_in_use_goes_when_it_is_let_go,
    two_daemons_do_not_touch_each_other,
);

mod only_snapshots {
    use super::{Ground, leftovers, on};

    #[test]
    fn a_disk_in_use_grows() {
        on(Ground::Dm, leftovers::a_disk_in_use_grows);
    }
    #[test]
    fn what_a_killed_daemon_left_is_named_completed_and_removed() {
        on(Ground::Dm, leftovers::what_a_killed_daemon_left_is_named_completed_and_removed);
    }
    #[test]
    fn a_full_delta_says_so_and_every_chunk_has_room() {
        on(Ground::Dm, leftovers::a_full_delta_says_so_and_every_chunk_has_room);
    }
    #[test]
    fn devices_of_a_daemon_are_found() {
        on(Ground::Dm, leftovers::devices_of_a_daemon_are_found);
    }
}

/// For people: what a disk costs. See `make bench`.
mod costs {
    use super::{Ground, measures::what_a_disk_costs, on};

    #[test]
    #[ignore = "measures"]
    fn of_copies() {
        on(Ground::Copy, what_a_disk_costs);
    }
    #[test]
    #[ignore = "measures"]
    fn of_reflinks_on_xfs() {
        on(Ground::Xfs, what_a_disk_costs);
    }
    #[test]
    #[ignore = "measures"]
    fn of_reflinks_on_btrfs() {
        on(Ground::Btrfs, what_a_disk_costs);
    }
    #[test]
    #[ignore = "measures"]
    fn of_snapshots() {
        on(Ground::Dm, what_a_disk_costs);
    }
}
