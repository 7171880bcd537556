//! What a daemon relies on: records come back as they went in, rules hold, damage is told clearly,
//! and what was acknowledged outlives a kill.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use vm_store::{BuildStep, Store, StoreError, meta};
use vm_types::{
    ProcessRef, VmId,
    image::{ImageConfig, ImageLayer, ImageOrigin, ImageRecord, KernelRecord, RegisteredFile},
    vm::{DiskLimits, FailedAt, NetworkMode, Owner, RestartPolicy, VmRecord, VmSpec},
};

fn image(digit: char, references: &[&str]) -> ImageRecord {
    ImageRecord {
        digest: format!("sha256:{}", digit.to_string().repeat(64)).parse().unwrap(),
        references: references.iter().map(|&r| r.to_owned()).collect(),
        size_bytes: 2 << 30,
        used_bytes: 300 << 20,
        created_at: 1_700_000_000,
        source: "test".to_owned(),
        config: ImageConfig::default(),
        origin: None,
        registered: None,
        kernel: None,
    }
}

fn kernel(digit: char, release: &str, default: bool) -> KernelRecord {
    KernelRecord {
        id: digit.to_string().repeat(12).parse().unwrap(),
        release: release.to_owned(),
        source: "debian".to_owned(),
        created_at: 1_700_000_000,
        default,
        of_image: false,
    }
}

fn vm(number: u64, name: &str) -> VmRecord {
    VmRecord {
        id: format!("{number:012x}").parse().unwrap(),
        spec: VmSpec {
            name: name.parse().unwrap(),
            image_reference: "debian:bookworm".to_owned(),
            image: image('a', &[]).digest,
            kernel: kernel('b', "6.1", true).id,
            cpus: 2,
            memory_mib: 1024,
            disk_bytes: 8 << 30,
            disk_limits: DiskLimits { bytes_per_second: Some(1 << 20), operations_per_second: None },
            network: NetworkMode::Nat,
            labels: [("team".to_owned(), "core".to_owned())].into(),
            owner: Some(Owner {
                process: ProcessRef { pid: 4242, start_ticks: 99 },
                boot_id: "a-boot".into(),
            }),
            restart: RestartPolicy::OnFailure,
            idle_stop_seconds: Some(1800),
            expires_at: Some(1_700_100_000),
            vmm: None,
        },
        address: Some(Ipv4Addr::from(0x0ad5_0002 + u32::try_from(number).unwrap())),
        created_at: 1_700_000_000 + number,
        complete: false,
        wanted_running: false,
        failure: None,
    }
}

async fn filled(path: &Path) -> Store {
    let store = Store::open(path).unwrap();
    store.images().put(image('a', &["debian:bookworm"])).await.unwrap();
    store.kernels().put(kernel('b', "6.1.0-37-cloud-amd64", true)).await.unwrap();
    store
}

#[tokio::test]
async fn what_an_image_is_made_of_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let mut whole = image('a', &["localhost:5000/app:1"]);
    whole.config.env = vec!["A=b c".into()];
    whole.config.entrypoint = vec!["/app".into()];
    whole.origin = Some(ImageOrigin {
        manifest: Some("sha256:aa".into()),
        config: whole.digest.to_string(),
        layers: Vec::new(),
        history: Vec::new(),
    });
    whole.registered =
        Some(RegisteredFile { path: "/x.ext4".into(), size_bytes: 1, modified_nanos: -2, inode: 3 });
    whole.kernel = Some("0123456789ab".parse().unwrap());
    store.images().put(whole.clone()).await.unwrap();
    assert_eq!(store.images().by_digest("aaaa").await.unwrap(), Some(whole));
}

#[tokio::test]
async fn a_vm_comes_back_as_it_was_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("db")).await;
    let mut expected = vm(1, "web");
    store.vms().insert(expected.clone()).await.unwrap();
    assert_eq!(store.vms().get(&expected.id).await.unwrap().as_ref(), Some(&expected));

    store.vms().set_complete(&expected.id).await.unwrap();
    store.vms().set_wanted_running(&expected.id, true).await.unwrap();
    store.vms().set_failure(&expected.id, Some((FailedAt::Start, "no \"answer\"".into()))).await.unwrap();
    expected.complete = true;
    expected.wanted_running = true;
    expected.failure = Some((FailedAt::Start, "no \"answer\"".into()));
    assert_eq!(store.vms().by_name(&expected.spec.name).await.unwrap().as_ref(), Some(&expected));

    expected.spec.name = "web2".parse().unwrap();
    expected.spec.cpus = 4;
    expected.spec.restart = RestartPolicy::Always;
    expected.spec.expires_at = None;
    store.vms().set_spec(&expected.id, expected.spec.clone()).await.unwrap();
    store.vms().set_failure(&expected.id, None).await.unwrap();
    expected.failure = None;
    assert_eq!(store.vms().list().await.unwrap(), [expected.clone()]);

    assert!(store.vms().delete(&expected.id).await.unwrap());
    assert!(!store.vms().delete(&expected.id).await.unwrap());
    assert!(store.vms().list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_start_and_an_end_are_noted_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = filled(&path).await;
    let (web, db) = (vm(1, "web"), vm(2, "db"));
    store.vms().insert(web.clone()).await.unwrap();
    store.vms().insert(db.clone()).await.unwrap();
    store.vms().set_failure(&web.id, Some((FailedAt::Start, "no answer".into()))).await.unwrap();
    // Another connection sees both changes or none.
    let other = Store::open(&path).unwrap();
    store.vms().set_started(&web.id).await.unwrap();
    let seen = other.vms().get(&web.id).await.unwrap().unwrap();
    assert_eq!((seen.wanted_running, seen.failure), (true, None));

    let died = Some((FailedAt::Run, "signal 11".to_owned()));
    store.vms().set_ended(&web.id, false, died.clone()).await.unwrap();
    let seen = other.vms().get(&web.id).await.unwrap().unwrap();
    assert_eq!((seen.wanted_running, seen.failure), (false, died));
    store.vms().set_ended(&web.id, false, None).await.unwrap();
    assert_eq!(other.vms().get(&web.id).await.unwrap().unwrap().failure, None);
    assert_eq!(other.vms().get(&db.id).await.unwrap().unwrap(), db, "the other VM is as it was");
}

#[tokio::test]
async fn a_vm_of_an_older_daemon_has_the_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = filled(&path).await;
    store.vms().insert(vm(1, "web")).await.unwrap();
    let connection = rusqlite::Connection::open(&path).unwrap();
    let statement =
        "UPDATE vms SET spec = json_remove(spec, '$.restart', '$.idle_stop_seconds', '$.expires_at',
                                                       '$.labels', '$.owner')";
    assert_eq!(connection.execute(statement, []).unwrap(), 1);
    let spec: String = connection.query_row("SELECT spec FROM vms", [], |row| row.get(0)).unwrap();
    assert!(!spec.contains("restart") && !spec.contains("expires_at"), "{spec}");

    let mut old = vm(1, "web");
    old.spec.restart = RestartPolicy::No;
    old.spec.idle_stop_seconds = None;
    old.spec.expires_at = None;
    old.spec.labels.clear();
    old.spec.owner = None;
    assert_eq!(store.vms().list().await.unwrap(), [old.clone()]);
    // It can be changed, and keeps what it is given.
    old.spec.expires_at = Some(1_800_000_000);
    store.vms().set_spec(&old.id, old.spec.clone()).await.unwrap();
    assert_eq!(store.vms().get(&old.id).await.unwrap(), Some(old));
}

#[tokio::test]
async fn names_and_addresses_are_given_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("db")).await;
    store.vms().insert(vm(1, "web")).await.unwrap();
    let error = store.vms().insert(vm(2, "web")).await.unwrap_err();
    assert!(matches!(&error, StoreError::NameTaken { name } if name.as_str() == "web"), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("vm ssh web") && hint.contains("vm rm --force web"), "{hint}");

    let mut same_address = vm(2, "db");
    same_address.address = vm(1, "web").address;
    let error = store.vms().insert(same_address).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error:?}");

    store.vms().insert(vm(2, "db")).await.unwrap();
    let (first, second) = (vm(1, "web"), vm(2, "db"));
    let error = store.vms().set_address(&second.id, first.address).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error:?}");
    let error = store.vms().set_spec(&second.id, first.spec.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::NameTaken { .. }), "{error:?}");

    // Any number of VMs may have none, and a freed one can be given again.
    store.vms().set_address(&first.id, None).await.unwrap();
    store.vms().set_address(&second.id, None).await.unwrap();
    store.vms().set_address(&second.id, first.address).await.unwrap();
    let addresses: Vec<_> = store.vms().list().await.unwrap().iter().map(|vm| vm.address).collect();
    assert_eq!(addresses, [None, first.address]);
}

#[tokio::test]
async fn a_vm_that_is_not_there_is_told_by_every_setter() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("db")).await;
    let ghost: VmId = "000000000009".parse().unwrap();
    let vms = store.vms();
    for result in [
        vms.set_complete(&ghost).await,
        vms.set_wanted_running(&ghost, true).await,
        vms.set_failure(&ghost, None).await,
        vms.set_address(&ghost, None).await,
        vms.set_started(&ghost).await,
        vms.set_ended(&ghost, false, None).await,
        vms.set_spec(&ghost, vm(9, "ghost").spec).await,
    ] {
        assert!(matches!(result, Err(StoreError::NoSuchVm { .. })), "{result:?}");
    }
}

#[tokio::test]
async fn a_vm_needs_its_image_and_kernel_and_they_stay_while_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let record = vm(1, "web");
    let error = store.vms().insert(record.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSuchImage { .. }), "{error:?}");
    store.images().put(image('a', &[])).await.unwrap();
    let error = store.vms().insert(record.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSuchKernel { .. }), "{error:?}");
    store.kernels().put(kernel('b', "6.1", false)).await.unwrap();
    store.vms().insert(record.clone()).await.unwrap();

    let error = store.images().delete(&record.spec.image).await.unwrap_err();
    assert_eq!(error.to_string(), "image aaaaaaaaaaaa is used by web");
    let error = store.kernels().delete(&record.spec.kernel).await.unwrap_err();
    assert!(matches!(&error, StoreError::KernelInUse { vms, .. } if vms.len() == 1), "{error:?}");

    store.vms().delete(&record.id).await.unwrap();
    store.images().delete(&record.spec.image).await.unwrap();
    store.kernels().delete(&record.spec.kernel).await.unwrap();
    let error = store.images().delete(&record.spec.image).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSuchImage { .. }), "{error:?}");
}

#[tokio::test]
async fn references_move_merge_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let images = store.images();
    images.put(image('a', &["debian:12", "debian:bookworm"])).await.unwrap();
    images.put(image('c', &["debian:12"])).await.unwrap();
    assert_eq!(images.by_reference("debian:12").await.unwrap().unwrap().digest, image('c', &[]).digest);
    images.put(image('a', &["mine"])).await.unwrap();
    let first = images.by_digest("aaaa").await.unwrap().unwrap();
    assert_eq!(first.references, ["debian:bookworm", "mine"]);
    assert!(images.untag("mine").await.unwrap() && !images.untag("mine").await.unwrap());
    assert!(images.by_reference("mine").await.unwrap().is_none());
    // The references of a deleted image go with it.
    images.delete(&first.digest).await.unwrap();
    assert!(images.by_reference("debian:bookworm").await.unwrap().is_none());
}

#[tokio::test]
async fn shortened_digests_must_be_unique() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    for tail in ["0", "f"] {
        let digest = format!("sha256:{}{tail}", "a".repeat(63)).parse().unwrap();
        store.images().put(ImageRecord { digest, ..image('a', &[]) }).await.unwrap();
    }
    let error = store.images().by_digest("sha256:aaa").await.unwrap_err();
    assert!(matches!(&error, StoreError::Ambiguous { matches, .. } if matches.len() == 2), "{error:?}");
    let whole = format!("{}f", "a".repeat(63));
    assert!(store.images().by_digest(&whole).await.unwrap().unwrap().digest.hex() == whole);
    for none in ["b", "", "%", "sha256:", "AAA", "debian:bookworm"] {
        assert!(store.images().by_digest(none).await.unwrap().is_none(), "{none}");
    }
}

#[tokio::test]
async fn one_kernel_at_most_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let kernels = store.kernels();
    assert!(kernels.default().await.unwrap().is_none());
    kernels.put(kernel('b', "6.1.0-37-cloud-amd64", true)).await.unwrap();
    kernels.put(kernel('c', "6.12.1", true)).await.unwrap();
    assert_eq!(kernels.default().await.unwrap().unwrap().release, "6.12.1");
    // Importing it again does not take that from it.
    kernels.put(kernel('c', "6.12.1", false)).await.unwrap();
    assert_eq!(kernels.default().await.unwrap().unwrap().release, "6.12.1");
    kernels.set_default(&kernel('b', "", false).id).await.unwrap();
    assert_eq!(kernels.list().await.unwrap().iter().filter(|k| k.default).count(), 1);
    let error = kernels.set_default(&kernel('d', "", false).id).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSuchKernel { .. }));
    // The refused change took nothing away.
    assert_eq!(kernels.default().await.unwrap().unwrap().id, kernel('b', "", false).id);

    assert_eq!(kernels.get("6.12.1").await.unwrap().unwrap().id, kernel('c', "", false).id);
    assert_eq!(kernels.get("ccc").await.unwrap().unwrap().release, "6.12.1");
    kernels.put(kernel('d', "6.12.1", false)).await.unwrap();
    assert!(matches!(kernels.get("6.12.1").await, Err(StoreError::Ambiguous { .. })));
}

#[tokio::test]
async fn settings_are_kept_and_the_first_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = Store::open(&path).unwrap();
    assert_eq!(store.meta().get(meta::INSTANCE_ID).await.unwrap(), None);
    assert_eq!(store.meta().get_or_set(meta::INSTANCE_ID, "3f2a").await.unwrap(), "3f2a");
    assert_eq!(store.meta().get_or_set(meta::INSTANCE_ID, "ffff").await.unwrap(), "3f2a");
    store.meta().set(meta::SUBNET, "10.213.0.0/24").await.unwrap();
    store.meta().set(meta::SUBNET, "10.213.1.0/24").await.unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.meta().get(meta::SUBNET).await.unwrap().unwrap(), "10.213.1.0/24");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_use_loses_nothing_and_gives_a_name_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = filled(&path).await;
    // A second connection, as another process would have.
    let other = Store::open(&path).unwrap();
    let tasks: Vec<_> = (0..100)
        .map(|number: u64| {
            let store = if number.is_multiple_of(2) { store.clone() } else { other.clone() };
            tokio::spawn(async move {
                // Every name is asked for twice.
                store.vms().insert(vm(number, &format!("vm{}", number / 2))).await
            })
        })
        .collect();
    let mut taken = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(()) => {}
            Err(StoreError::NameTaken { .. }) => taken += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!((taken, store.vms().list().await.unwrap().len()), (50, 50));
}

#[tokio::test]
async fn a_request_goes_through_though_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("db")).await;
    let meta = store.meta();
    let mut request = Box::pin(meta.set("k", "v"));
    // One poll hands it to the thread.
    let _ = std::future::poll_fn(|context| std::task::Poll::Ready(request.as_mut().poll(context))).await;
    drop(request);
    assert_eq!(meta.get("k").await.unwrap().as_deref(), Some("v"));
}

#[tokio::test]
async fn damage_is_told_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    std::fs::write(&path, b"this is no database at all, but text that is long enough").unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("-wal"), "{error:?}");

    // A real one with its middle overwritten.
    let path = dir.path().join("db2");
    let store = filled(&path).await;
    for number in 0..50 {
        store.vms().insert(vm(number, &format!("vm{number}"))).await.unwrap();
    }
    drop(store);
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    let mut bytes = std::fs::read(&path).unwrap();
    let page = 4096;
    assert!(bytes.len() > 8 * page);
    let end = bytes.len();
    bytes[page..end].iter_mut().for_each(|byte| *byte ^= 0xa5);
    std::fs::write(&path, bytes).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let error = Store::open(Path::new("/proc/no/such/place/db")).unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    assert!(error.to_string().contains("/proc/no/such/place/db") && error.hint().is_some());
}

#[test]
fn another_programs_database_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute_batch("PRAGMA application_id = 42; CREATE TABLE theirs (x);").unwrap();
    drop(connection);
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::NotOurs { application_id: 42, .. }), "{error:?}");
    let connection = rusqlite::Connection::open(&path).unwrap();
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0)).unwrap();
    assert_eq!(tables, 1);
}

#[tokio::test]
async fn what_a_newer_daemon_added_is_tolerated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    filled(&path).await.vms().insert(vm(1, "web")).await.unwrap();
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection
        .execute_batch(
            "CREATE TABLE snapshots (id TEXT PRIMARY KEY) STRICT;
             ALTER TABLE vms ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue';
             UPDATE vms SET spec = json_set(spec, '$.gpu', 'none');
             PRAGMA user_version = 99;",
        )
        .unwrap();
    drop(connection);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.vms().list().await.unwrap(), [vm(1, "web")]);
    store.vms().insert(vm(2, "db")).await.unwrap();
    drop(store);
    let connection = rusqlite::Connection::open(&path).unwrap();
    let version: i64 = connection.pragma_query_value(None, "user_version", |r| r.get(0)).unwrap();
    assert_eq!(version, 99);
}

#[tokio::test]
async fn an_unreadable_row_names_its_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = filled(&path).await;
    store.vms().insert(vm(1, "web")).await.unwrap();
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute("UPDATE vms SET spec = '{}'", []).unwrap();
    let error = store.vms().list().await.unwrap_err();
    assert!(error.to_string().contains("vms.spec"), "{error}");
    // It can still be deleted.
    assert!(store.vms().delete(&vm(1, "web").id).await.unwrap());
}

#[test]
fn the_file_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let _store = Store::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// How the statements find their rows; what reads a whole table grows with the number of VMs.
#[tokio::test]
async fn one_vm_is_found_by_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let _store = filled(&path).await;
    let connection = rusqlite::Connection::open(&path).unwrap();
    for statement in [
        "SELECT spec FROM vms WHERE id = '1' ORDER BY created_at, name",
        "SELECT spec FROM vms WHERE name = 'a' ORDER BY created_at, name",
        "UPDATE vms SET wanted_running = 0 WHERE id = '1'",
        "DELETE FROM vms WHERE id = '1'",
        "SELECT name FROM vms WHERE image = 'sha256:'",
        "SELECT name FROM vms WHERE kernel = '0'",
    ] {
        let plan: String = connection
            .query_row(&format!("EXPLAIN QUERY PLAN {statement}"), [], |row| row.get("detail"))
            .unwrap();
        assert!(plan.starts_with("SEARCH"), "{statement}: {plan}");
    }
}

/// Not a check but a measurement: what the writes of one VM's life cost among so many others.
#[tokio::test]
#[ignore = "measures; run by hand with --release --nocapture"]
async fn cost_of_a_vms_life() {
    const ROUNDS: u32 = 50;
    for others in [1, 100, 1000] {
        let dir = tempfile::tempdir().unwrap();
        let store = filled(&dir.path().join("db")).await;
        for number in 0..others {
            store.vms().insert(vm(number, &format!("vm{number}"))).await.unwrap();
        }
        let begun = Instant::now();
        for _ in 0..ROUNDS {
            let record = vm(100_000, "new");
            store.vms().insert(record.clone()).await.unwrap();
            store.vms().set_complete(&record.id).await.unwrap();
            store.vms().set_incomplete(&record.id).await.unwrap();
            assert!(store.vms().delete(&record.id).await.unwrap());
        }
        let life = begun.elapsed() / ROUNDS;
        let begun = Instant::now();
        assert_eq!(store.vms().list().await.unwrap().len() as u64, others);
        println!("{others} VMs: create and delete {life:?}, list {:?}", begun.elapsed());
    }
}

const CHILD_DATABASE: &str = "VM_STORE_TEST_CHILD_DATABASE";

/// Not a test of its own: the process that the next one kills. Writes without end, a line for each acknowledged VM.
#[tokio::test]
#[ignore = "run by acknowledged_writes_outlive_a_kill"]
async fn child_writer() {
    let Some(path) = std::env::var_os(CHILD_DATABASE) else { return };
    let store = filled(Path::new(&path)).await;
    for number in 0.. {
        store.vms().insert(vm(number, &format!("vm{number}"))).await.unwrap();
        println!("stored vm{number}");
    }
}

#[tokio::test]
async fn what_a_build_has_done_is_found_until_it_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let layer = ImageLayer {
        digest: "sha256:1".into(),
        diff_id: "sha256:2".into(),
        size_bytes: 3,
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
    };
    let step = BuildStep { layer: Some(layer), made_at: "2026-01-01T00:00:00Z".into() };
    let empty = BuildStep { layer: None, ..step.clone() };
    assert_eq!(store.builds().get("a").await.unwrap(), None);
    store.builds().put("a", &empty).await.unwrap();
    store.builds().put("b", &empty).await.unwrap();
    store.builds().put("a", &step).await.unwrap();
    assert_eq!(store.builds().get("a").await.unwrap().as_ref(), Some(&step));
    assert_eq!(store.builds().list().await.unwrap(), [("a".to_owned(), step), ("b".to_owned(), empty)]);
    store.builds().forget(vec!["a".into(), "c".into()]).await.unwrap();
    assert_eq!(store.builds().get("a").await.unwrap(), None);
    assert_eq!(store.builds().list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn acknowledged_writes_outlive_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_writer", "--ignored", "--nocapture"])
        .env(CHILD_DATABASE, &path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut acknowledged = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        // The harness prints without a line break before the first one.
        if let Some((_, name)) = line.unwrap().split_once("stored ") {
            acknowledged.push(name.to_owned());
        }
        if acknowledged.len() == 20 {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert!(acknowledged.len() >= 20);
    let store = Store::open(&path).unwrap();
    for name in acknowledged {
        assert!(store.vms().by_name(&name.parse().unwrap()).await.unwrap().is_some(), "{name} is lost");
    }
}

#[tokio::test]
async fn an_images_kernel_is_everybodys_only_when_somebody_brings_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    let kernels = store.kernels();
    kernels.put(KernelRecord { of_image: true, ..kernel('a', "6.1", false) }).await.unwrap();
    assert!(kernels.get("6.1").await.unwrap().unwrap().of_image);
    kernels.put(kernel('a', "6.1", false)).await.unwrap();
    kernels.put(KernelRecord { of_image: true, ..kernel('a', "6.1", false) }).await.unwrap();
    assert!(!kernels.get("6.1").await.unwrap().unwrap().of_image);
}
