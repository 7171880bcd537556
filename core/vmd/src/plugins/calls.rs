//! Recorded calls of one plugin: all that a call was told, and what came of it. The last ones are kept in memory; those that failed
//! also in files, until others have taken their place. Configuration may hold secrets, so the files are the daemon's alone.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_api::PluginCall;
use vm_host::files;
use vm_plugin::{CallError, Hook, Input, Outcome, VmFacts, plan::RefName};

use super::{
    describe,
    package::{digest, make_dir},
    state::Trace,
};

/// Calls in memory.
const RECENT: usize = 50;
/// Failed calls in files.
const FAILED: usize = 20;
/// More of an outcome is kept by its digest, in bytes of JSON.
const OUTCOME_MAX: usize = 256 << 10;

/// A call as it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Recorded {
    /// Unique to the plugin; 0 until it is kept.
    pub(crate) id: u64,
    pub(crate) hook: Hook,
    pub(crate) reason: String,
    pub(crate) vm: Option<VmFacts>,
    #[serde(with = "shared")]
    pub(crate) facts: Arc<BTreeMap<String, String>>,
    pub(crate) references: BTreeMap<RefName, String>,
    /// As the hook got it.
    pub(crate) config: Value,
    pub(crate) former_config: Option<Value>,
    pub(crate) now_unix_ms: u64,
    pub(crate) seed: [u8; 32],
    /// Whether it could act in a running guest.
    pub(crate) guest: bool,
    /// Whether it could look at a workspace.
    #[serde(default)]
    pub(crate) workspace: bool,
    pub(crate) state: Trace,
    /// The component's.
    pub(crate) digest: String,
    pub(crate) at_ms: u64,
    pub(crate) took_us: u64,
    pub(crate) effects: usize,
    pub(crate) outcome: Value,
    pub(crate) error: Option<String>,
}

/// A map that many have, written as if it were theirs alone.
mod shared {
    use std::{collections::BTreeMap, sync::Arc};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Map = BTreeMap<String, String>;

    pub(super) fn serialize<S: Serializer>(map: &Arc<Map>, serializer: S) -> Result<S::Ok, S::Error> {
        Map::serialize(map, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Map>, D::Error> {
        Map::deserialize(deserializer).map(Arc::new)
    }
}

impl Recorded {
    /// What a call that is about to be made is told. `config` is the plugin's own, which a new one of the input comes before.
    pub(crate) fn begin(hook: Hook, input: &Input, config: &str, digest: &str, at_ms: u64) -> Self {
        let own = || serde_json::from_str(config).unwrap_or_default();
        Self {
            id: 0,
            hook,
            reason: input.reason.clone(),
            vm: input.vm.clone(),
            facts: input.facts.clone(),
            references: input.references.clone(),
            config: input.config.clone().unwrap_or_else(own),
            former_config: input.former_config.clone(),
            now_unix_ms: input.now_unix_ms,
            seed: input.seed,
            guest: input.sandbox.is_some(),
            workspace: input.repository.is_some(),
            state: Trace::default(),
            digest: digest.to_owned(),
            at_ms,
            took_us: 0,
            effects: 0,
            outcome: Value::Null,
            error: None,
        }
    }

    /// What came of it.
    pub(crate) fn end(&mut self, result: &Result<Outcome, CallError>, state: Trace, took_us: u64) {
        self.state = state;
        self.took_us = took_us;
        self.outcome = outcome(result);
        match result {
            Ok(outcome) => self.effects = outcome.plan.len(),
            Err(error) => self.error = Some(told(error)),
        }
    }

    /// Why it cannot be made again.
    pub(crate) fn not_replayable(&self) -> Option<String> {
        if self.guest {
            Some("it worked in a running guest".to_owned())
        } else if self.workspace {
            Some("it looked at a workspace, which may have changed since".to_owned())
        } else if !self.state.is_whole() {
            Some("it read more of its state than is kept".to_owned())
        } else {
            None
        }
    }

    /// For clients.
    pub(crate) fn show(&self) -> PluginCall {
        PluginCall {
            id: self.id,
            hook: self.hook.to_string(),
            reason: self.reason.clone(),
            vm: self.vm.as_ref().map(|vm| vm.name.to_string()),
            at_ms: self.at_ms,
            took_us: self.took_us,
            effects: self.effects,
            error: self.error.clone(),
            not_replayable: self.not_replayable(),
            digest: self.digest.clone(),
        }
    }
}

/// Why a call failed, for people. A trap's own account is a backtrace in the component, which says nothing to them.
pub(crate) fn told(error: &CallError) -> String {
    match error {
        CallError::Trapped { .. } => error.to_string(),
        _ => vm_types::report::chain(error),
    }
}

/// An outcome as data that can be compared; what is large stands in it by its digest.
pub(crate) fn outcome(result: &Result<Outcome, CallError>) -> Value {
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(error) => return json!({ "error": told(error) }),
    };
    let state = outcome.state.iter().map(|change| {
        let vm = match &change.scope {
            vm_plugin::ports::StateScope::Plugin => None,
            vm_plugin::ports::StateScope::Vm(vm) => Some(vm),
        };
        let value =
            change.value.as_ref().map(|value| json!({ "bytes": value.len(), "digest": digest(value) }));
        json!({ "vm": vm, "key": change.key, "value": value })
    });
    let effects = describe::effects(&outcome.plan).into_iter().map(|effect| effect.detail);
    let whole = json!({
        "effects": effects.collect::<Vec<_>>(),
        "findings": outcome.findings,
        "offers": outcome.offers,
        "change": outcome.change,
        "state": state.collect::<Vec<_>>(),
    });
    // Few plans are large enough for their length to be in question.
    if outcome.plan.len() < 100 && outcome.state.len() < 100 && outcome.findings.len() < 100 {
        return whole;
    }
    let text = whole.to_string();
    if text.len() <= OUTCOME_MAX {
        return whole;
    }
    json!({ "effects_count": outcome.plan.len(), "bytes": text.len(), "digest": digest(text.as_bytes()) })
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    recent: VecDeque<Arc<Recorded>>,
    failed: VecDeque<Arc<Recorded>>,
}

/// The recorded calls of one plugin.
#[derive(Debug)]
pub(crate) struct Calls {
    dir: PathBuf,
    kept: Mutex<Kept>,
}

fn file(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id}.json"))
}

impl Calls {
    /// With those that are in the files of `dir`. One that cannot be read is removed.
    pub(crate) fn open(dir: PathBuf) -> Self {
        let mut failed: Vec<Arc<Recorded>> = Vec::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match files::read_json(&entry.path()) {
                Ok(Some(recorded)) => failed.push(Arc::new(recorded)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(path = %entry.path().display(), "not a recorded call: {error}");
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        failed.sort_by_key(|recorded| recorded.id);
        let last = failed.last().map_or(0, |recorded| recorded.id);
        Self { dir, kept: Mutex::new(Kept { last, recent: VecDeque::new(), failed: failed.into() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a call.
    pub(crate) async fn keep(&self, mut recorded: Recorded) {
        let (recorded, gone) = {
            let mut kept = self.lock();
            kept.last += 1;
            recorded.id = kept.last;
            let recorded = Arc::new(recorded);
            kept.recent.push_back(recorded.clone());
            let excess = kept.recent.len().saturating_sub(RECENT);
            kept.recent.drain(..excess);
            if recorded.error.is_none() {
                return;
            }
            kept.failed.push_back(recorded.clone());
            let excess = kept.failed.len().saturating_sub(FAILED);
            let gone: Vec<_> = kept.failed.drain(..excess).map(|gone| gone.id).collect();
            (recorded, gone)
        };
        let dir = self.dir.clone();
        let write = move || {
            gone.into_iter().try_for_each(|id| files::remove_if_there(&file(&dir, id)))?;
            make_dir(&dir)?;
            files::write_volatile(&file(&dir, recorded.id), 0o600, &serde_json::to_vec(&*recorded)?)
        };
        let written: Result<std::io::Result<()>, _> = tokio::task::spawn_blocking(write).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(dir = %self.dir.display(), "a failed call could not be kept: {error}");
        }
    }

    /// All that are kept, newest first.
    pub(crate) fn list(&self) -> Vec<Arc<Recorded>> {
        let kept = self.lock();
        let all = kept.recent.iter().chain(&kept.failed);
        let by_id: BTreeMap<_, _> = all.map(|recorded| (recorded.id, recorded.clone())).collect();
        by_id.into_values().rev().collect()
    }

    /// One of them.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<Recorded>> {
        self.list().into_iter().find(|recorded| recorded.id == id)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn call(error: Option<&str>) -> Recorded {
        let input = Input { reason: "start".to_owned(), ..Input::default() };
        let mut recorded = Recorded::begin(Hook::Doctor, &input, "{\"a\":1}", "sha256:00", 7);
        recorded.error = error.map(str::to_owned);
        recorded
    }

    #[tokio::test]
    async fn the_last_ones_are_kept_and_failures_outlive_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("calls");
        let calls = Calls::open(dir.clone());
        for _ in 0..FAILED + 2 {
            calls.keep(call(Some("trap"))).await;
        }
        for _ in 0..RECENT {
            calls.keep(call(None)).await;
        }
        let ids: Vec<_> = calls.list().iter().map(|recorded| recorded.id).collect();
        assert_eq!(ids.len(), RECENT + FAILED);
        assert!(ids.is_sorted_by(|a, b| a > b) && !ids.contains(&1) && !ids.contains(&2));
        let path = file(&dir, 3);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(file(&dir, 4), b"{").unwrap();
        drop(calls);

        let calls = Calls::open(dir.clone());
        assert_eq!(calls.list().len(), FAILED - 1);
        assert_eq!(calls.get(3).unwrap().config, json!({ "a": 1 }));
        calls.keep(call(None)).await;
        assert_eq!(calls.list()[0].id, FAILED as u64 + 3, "an id is not given twice");
    }
}
