//! What a store keeps, and what it does not.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn descriptor(content: &[u8]) -> Descriptor {
    let (digest, size) = (Digest::of(content), content.len() as u64);
    Descriptor { media_type: String::new(), digest, size, annotations: Default::default() }
}

fn bench() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

async fn write(store: &Store, lease: &Lease, of: &Descriptor, content: &[u8]) -> Result<(), OciError> {
    let mut ingest = store.ingest(lease, of).await?.expect("it is not there");
    let from = usize::try_from(ingest.offset()).unwrap();
    ingest.write(content[from..].to_vec().into()).await?;
    Ok(ingest.finish("blob".to_owned()).await?)
}

/// Begins a blob, and leaves it as a crash would.
async fn leave(store: &Store, of: &Descriptor, piece: &[u8]) {
    let mut ingest = store.ingest(&store.lease(), of).await.unwrap().unwrap();
    ingest.write(piece.to_vec().into()).await.unwrap();
    drop(ingest);
    // Its thread ends in its own time; who wants to write waits for it.
    drop(store.claim(of.digest).await);
}

#[tokio::test]
async fn a_blob_is_there_when_it_is_whole_and_verified_and_never_before() {
    let (_dir, store) = bench();
    let lease = store.lease();
    let blob = descriptor(b"hello");
    let mut ingest = store.ingest(&lease, &blob).await.unwrap().unwrap();
    ingest.write(b"hell"[..].to_vec().into()).await.unwrap();
    assert!(!store.has(&blob.digest).unwrap());
    ingest.write(b"o"[..].to_vec().into()).await.unwrap();
    ingest.finish("blob".to_owned()).await.unwrap();
    assert_eq!(store.list().unwrap(), [(blob.digest, 5)]);
    assert_eq!(store.usage().unwrap(), Usage { blobs: 5, partials: 0 });
    let mode = fs::metadata(store.path(&blob.digest)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    assert!(store.ingest(&lease, &blob).await.unwrap().is_none(), "nothing is left to do");

    let other = descriptor(b"world");
    let error = write(&store, &lease, &other, b"w0rld").await.unwrap_err();
    assert!(matches!(error, OciError::Digest { expected, .. } if expected == other.digest), "{error}");
    let error = write(&store, &lease, &other, b"wo").await.unwrap_err();
    assert!(matches!(error, OciError::Size { found: 2, expected: 5, .. }), "{error}");
    assert!(!store.has(&other.digest).unwrap());
    assert_eq!(store.usage().unwrap().partials, 0, "what is no blob is not taken up again");
    let error = store.open_blob("layer", &other.digest).unwrap_err();
    assert!(matches!(error, OciError::Gone { what: "layer", .. }), "{error}");
}

#[tokio::test]
async fn what_a_crash_left_is_taken_up_where_it_ends() {
    let (dir, store) = bench();
    let blob = descriptor(b"hello world");
    leave(&store, &blob, b"hello ").await;
    // Another process, later.
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest(&store.lease(), &blob).await.unwrap().unwrap();
    assert_eq!(ingest.offset(), 6);
    drop(ingest);
    write(&store, &store.lease(), &blob, b"hello world").await.unwrap();
    assert_eq!(fs::read(store.path(&blob.digest)).unwrap(), b"hello world");

    // What a loss of power made of it is seen, and gone then.
    let blob = descriptor(b"another world");
    fs::write(store.partial_path(&blob.digest), b"anot\0\0\0").unwrap();
    let mut ingest = store.ingest(&store.lease(), &blob).await.unwrap().unwrap();
    ingest.write(b" world"[..].to_vec().into()).await.unwrap();
    let rejected = ingest.finish("blob".to_owned()).await.unwrap_err();
    assert!(rejected.resumed && matches!(rejected.error, OciError::Digest { .. }));
    fs::write(store.partial_path(&blob.digest), b"more than the blob can be").unwrap();
    write(&store, &store.lease(), &blob, b"another world").await.unwrap();
    // A crash between the last two steps of a transfer leaves no second copy for good.
    fs::write(store.partial_path(&blob.digest), b"another world").unwrap();
    assert!(store.ingest(&store.lease(), &blob).await.unwrap().is_none());
    assert_eq!(store.usage().unwrap().partials, 0);
}

#[tokio::test]
async fn one_writes_and_others_find_it_written() {
    let (_dir, store) = bench();
    let blob = descriptor(b"hello");
    let lease = store.lease();
    let first = store.ingest(&lease, &blob).await.unwrap().unwrap();
    let other = tokio::spawn({
        let store = store.clone();
        let blob = blob.clone();
        async move { store.ingest(&store.lease(), &blob).await.unwrap().is_none() }
    });
    let mut first = first;
    first.write(b"hello"[..].to_vec().into()).await.unwrap();
    assert!(!other.is_finished());
    first.finish("blob".to_owned()).await.unwrap();
    assert!(other.await.unwrap());
}

#[tokio::test]
async fn another_process_is_kept_from_writing_the_same() {
    let (dir, store) = bench();
    let blob = descriptor(b"hello");
    let _ingest = store.ingest(&store.lease(), &blob).await.unwrap().unwrap();
    // A store of its own knows nothing of the first but its lock on the file.
    let other = Store::open(dir.path()).unwrap();
    let error = other.ingest(&other.lease(), &blob).await.unwrap_err();
    assert!(matches!(error, OciError::Locked { .. }), "{error}");
    assert_eq!(other.collect(&HashSet::new(), Duration::ZERO).unwrap(), Collected::default());
}

#[tokio::test]
async fn collecting_removes_what_nobody_uses_and_nothing_else() {
    let (dir, store) = bench();
    let lease = store.lease();
    let (live, kept, dead) = (
        store.put(&store.lease(), b"live".to_vec()).await.unwrap(),
        store.put(&lease, b"kept".to_vec()).await.unwrap(),
        store.put(&store.lease(), b"dead".to_vec()).await.unwrap(),
    );
    let (left, running) = (descriptor(b"left"), descriptor(b"running"));
    leave(&store, &left, b"le").await;
    let mut ingest = store.ingest(&lease, &running).await.unwrap().unwrap();
    fs::write(dir.path().join("blobs/sha256/README"), "not ours").unwrap();

    assert!(matches!(store.remove(&kept), Err(OciError::InUse { .. })));
    let live = HashSet::from([live]);
    let hour = Duration::from_secs(3600);
    let collected = store.collect(&live, hour).unwrap();
    assert_eq!(collected, Collected { blobs: 1, partials: 0, bytes: 4 });
    assert!(!store.has(&dead).unwrap() && store.has(&kept).unwrap());
    let collected = store.collect(&live, Duration::ZERO).unwrap();
    assert_eq!(collected, Collected { blobs: 0, partials: 1, bytes: 2 });
    assert!(dir.path().join("blobs/sha256/README").exists());

    ingest.write(b"running"[..].to_vec().into()).await.unwrap();
    ingest.finish("blob".to_owned()).await.unwrap();
    assert!(store.has(&running.digest).unwrap(), "what is being written is left alone");
    drop(lease);
    let collected = store.collect(&live, Duration::ZERO).unwrap();
    assert_eq!(collected, Collected { blobs: 2, partials: 0, bytes: 11 });
    assert_eq!(store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn two_leases_on_one_blob_both_count() {
    let (_dir, store) = bench();
    let (one, two) = (store.lease(), store.lease());
    let digest = store.put(&one, b"x".to_vec()).await.unwrap();
    two.add(digest);
    two.add(digest);
    drop(one);
    assert!(store.remove(&digest).is_err());
    drop(two);
    assert!(store.remove(&digest).unwrap() && !store.remove(&digest).unwrap());
}
