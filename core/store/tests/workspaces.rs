//! Workspaces are recorded by VM and directory, and go with their VM.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use vm_store::{Store, StoreError};
use vm_types::{
    VmId,
    image::{ImageConfig, ImageRecord, KernelRecord},
    vm::{DiskLimits, NetworkMode, RestartPolicy, VmRecord, VmSpec},
    workspace::{WorkspaceRecord, WorkspaceState},
};

fn id(number: u64) -> VmId {
    format!("{number:012x}").parse().unwrap()
}

async fn with_vms(store: &Store) {
    let image = ImageRecord {
        digest: format!("sha256:{}", "a".repeat(64)).parse().unwrap(),
        references: vec!["debian:bookworm".into()],
        size_bytes: 1,
        used_bytes: 1,
        created_at: 1,
        source: "test".into(),
        config: ImageConfig::default(),
        origin: None,
        registered: None,
        kernel: None,
    };
    let kernel = KernelRecord {
        id: "b".repeat(12).parse().unwrap(),
        release: "6.1".into(),
        source: "debian".into(),
        created_at: 1,
        default: true,
        of_image: false,
    };
    for number in 1..=2 {
        let spec = VmSpec {
            name: format!("vm{number}").parse().unwrap(),
            image_reference: "debian:bookworm".into(),
            image: image.digest.clone(),
            kernel: kernel.id.clone(),
            cpus: 1,
            memory_mib: 512,
            disk_bytes: 1 << 30,
            disk_limits: DiskLimits::default(),
            network: NetworkMode::None,
            labels: [].into(),
            owner: None,
            restart: RestartPolicy::No,
            idle_stop_seconds: None,
            expires_at: None,
            vmm: None,
        };
        let record = VmRecord {
            id: id(number),
            spec,
            address: None,
            created_at: 1,
            complete: true,
            wanted_running: false,
            failure: None,
        };
        store.images().put(image.clone()).await.unwrap();
        store.kernels().put(kernel.clone()).await.unwrap();
        store.vms().insert(record).await.unwrap();
    }
}

fn workspace(path: &str, state: WorkspaceState) -> WorkspaceRecord {
    WorkspaceRecord {
        path: path.into(),
        source: "/home/somebody/project".into(),
        is_git: true,
        importer: "git".into(),
        strategy: "shallow".into(),
        base: Some("0123".into()),
        branch: None,
        user: "root".into(),
        by: 1000,
        at: 1_700_000_000,
        state,
    }
}

#[tokio::test]
async fn a_directory_has_one_workspace_and_all_go_with_their_vm() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db")).unwrap();
    with_vms(&store).await;
    let unfinished =
        workspace("/work/b", WorkspaceState::Unfinished { cause: Some("the guest is full".into()) });
    let whole = workspace("/work/b", WorkspaceState::Prepared { files: 3, bytes: 5 << 30 });
    let other = workspace("/work/a", WorkspaceState::Unfinished { cause: None });
    let workspaces = store.workspaces();
    workspaces.put(&id(1), unfinished.clone()).await.unwrap();
    workspaces.put(&id(1), other.clone()).await.unwrap();
    workspaces.put(&id(2), unfinished.clone()).await.unwrap();
    assert_eq!(workspaces.of(&id(1)).await.unwrap(), [other.clone(), unfinished.clone()]);
    workspaces.put(&id(1), whole.clone()).await.unwrap();
    assert_eq!(workspaces.get(&id(1), "/work/b").await.unwrap(), Some(whole.clone()));
    assert_eq!(workspaces.get(&id(1), "/work/c").await.unwrap(), None);
    assert_eq!(workspaces.of(&id(1)).await.unwrap(), [other, whole]);

    store.vms().delete(&id(1)).await.unwrap();
    assert_eq!(workspaces.of(&id(1)).await.unwrap(), []);
    assert_eq!(workspaces.of(&id(2)).await.unwrap(), std::slice::from_ref(&unfinished));
    let gone = workspaces.put(&id(1), unfinished).await.unwrap_err();
    assert!(matches!(gone, StoreError::NoSuchVm { .. }), "{gone}");
}
