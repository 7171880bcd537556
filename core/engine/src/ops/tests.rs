//! Operations without an engine.

use super::*;

const KIND: OperationKind = OperationKind::VmStart;

fn stage(snapshot: &Snapshot) -> &str {
    match &snapshot.status {
        Status::Running(progress) => &progress.stage,
        Status::Succeeded(_) => "succeeded",
        Status::Failed(_) => "failed",
    }
}

#[tokio::test]
async fn a_result_keeps_its_type_in_the_handle_and_can_be_read_by_id() {
    let operations = Operations::default();
    let vm: VmId = "00112233aabb".parse().unwrap();
    let operation = operations
        .begin(KIND, "a", {
            let vm = vm.clone();
            move |_, _| async { Ok(vm) }
        })
        .unwrap();
    assert_eq!(operation.wait().await.unwrap(), vm);
    assert_eq!(operation.wait().await.unwrap(), vm);
    assert!(matches!(operations.wait(operation.id()).await.unwrap(), Outcome::Vm(id) if id == vm));
    let snapshot = operations.get(operation.id()).unwrap();
    assert!(snapshot.ended_at.unwrap() >= snapshot.begun_at);
}

#[tokio::test]
async fn a_cancelled_operation_unwinds_before_it_ends() {
    let operations = Operations::default();
    let (unwound, mut seen) = tokio::sync::mpsc::channel(1);
    let operation = operations
        .begin(KIND, "a", |context, _| async move {
            let result = context.cancellable::<()>(std::future::pending()).await;
            unwound.send(()).await.unwrap();
            result
        })
        .unwrap();
    operation.cancel();
    let error = operation.wait().await.unwrap_err();
    assert!(matches!(*error, EngineError::Cancelled), "{error}");
    seen.try_recv().expect("it ended before it had unwound");
}

#[tokio::test]
async fn a_panic_is_a_failure_of_that_operation_only() {
    let operations = Operations::default();
    let boom = operations.begin::<(), _, _>(KIND, "a", |_, _| async { panic!("boom") }).unwrap();
    assert!(matches!(*boom.wait().await.unwrap_err(), EngineError::Panicked { .. }));
    let fine = operations.begin(KIND, "b", |_, _| async { Ok(()) }).unwrap();
    assert!(fine.wait().await.is_ok());
}

#[tokio::test]
async fn the_registry_forgets_what_ended_longest_ago_and_a_handle_nothing() {
    let operations = Operations::default();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let long = operations
        .begin(KIND, "long", |_, _| async move {
            let _ = finished.await;
            Ok(())
        })
        .unwrap();
    let mut short = Vec::new();
    for _ in 0..KEPT + 50 {
        let operation = operations.begin(KIND, "short", |_, _| async { Ok(()) }).unwrap();
        operation.wait().await.unwrap();
        short.push(operation);
    }
    finish.send(()).unwrap();
    long.wait().await.unwrap();
    operations.shut_down().await;
    let kept = operations.list();
    assert_eq!(kept.len(), KEPT);
    assert!(kept.is_sorted_by_key(|snapshot| snapshot.id));
    assert!(operations.get(long.id()).is_ok(), "the first to begin was the last to end");
    assert!(matches!(operations.get(short[0].id()), Err(EngineError::NotFound { .. })));
    short[0].wait().await.unwrap();
}

#[tokio::test]
async fn a_slow_watcher_is_told_every_stage_and_the_end() {
    let operations = Operations::default();
    let (go, gone) = tokio::sync::oneshot::channel::<()>();
    let operation = operations
        .begin(KIND, "a", |context, _| async move {
            let _ = gone.await;
            for step in ["network", "disk", "boot"] {
                for done in 0..100 {
                    context.progress(step, done, Some(100));
                }
            }
            Ok(())
        })
        .unwrap();
    let mut watcher = operations.watch(operation.id()).unwrap();
    assert_eq!(stage(&watcher.next().await.unwrap()), "queued");
    go.send(()).unwrap();
    operation.wait().await.unwrap();
    let mut told = Vec::new();
    while let Some(snapshot) = watcher.next().await {
        told.push(stage(&snapshot).to_owned());
    }
    assert_eq!(told, ["network", "disk", "boot", "succeeded"]);
    let mut late = operations.watch(operation.id()).unwrap();
    assert_eq!(stage(&late.next().await.unwrap()), "succeeded");
    assert!(late.next().await.is_none());
}

#[tokio::test]
async fn a_watcher_sees_each_change_of_a_running_one() {
    let operations = Operations::default();
    let (send, mut steps) = tokio::sync::mpsc::channel::<u64>(1);
    let operation = operations
        .begin(KIND, "a", |context, _| async move {
            while let Some(step) = steps.recv().await {
                context.progress("bytes", step, None);
            }
            Ok(())
        })
        .unwrap();
    let mut watcher = operations.watch(operation.id()).unwrap();
    watcher.next().await.unwrap();
    for step in 1..=3 {
        send.send(step).await.unwrap();
        let snapshot = watcher.next().await.unwrap();
        assert!(matches!(snapshot.status, Status::Running(progress) if progress.done == step));
    }
    drop(send);
    assert!(watcher.next().await.unwrap().status.ended());
}

#[tokio::test]
async fn shutting_down_waits_for_all_and_takes_no_more() {
    let operations = Operations::default();
    let operation = operations
        .begin(KIND, "a", |context, _| async move {
            let result = context.cancellable::<()>(std::future::pending()).await;
            tokio::task::yield_now().await;
            result
        })
        .unwrap();
    operations.shut_down().await;
    assert!(operation.snapshot().status.ended());
    let refused = operations.begin(KIND, "b", |_, _| async { Ok(()) });
    assert!(matches!(refused, Err(EngineError::ShuttingDown)));
}
