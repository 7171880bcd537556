//! One step after the other: what it depends on, whether it was done before, and doing it.

use std::time::SystemTime;

use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use vm_locks::{Ctx, Unlocked};
use vm_oci::Layer;
use vm_store::BuildStep;

use super::{
    Bench, Build,
    context::Item,
    file::{Copy, FileError, Instruction, Step},
    hint_of, layer_of, nothing, recorded,
    sections::{Section, no_mode, no_stage, octal, source_named},
    stage::{Runs, SCRIPT},
    workshop::{Source, Workshop, named},
};
use crate::EngineError;

/// Bumped when the same steps make something else.
const VERSION: u32 = 3;

/// What has to be done in a guest.
enum Work {
    Run(Runs),
    Directory(String),
    Copy { to: To, items: Vec<Item>, one_file: bool },
    CopyFrom { to: To, stage: usize, sources: Vec<String> },
}

/// Where files are copied to, and whose they are.
#[derive(Debug, Clone, Serialize)]
struct To {
    path: String,
    /// It was written with a slash at its end.
    slash: bool,
    chown: Option<String>,
    mode: Option<u32>,
}

impl Build<'_> {
    /// Does one step.
    pub(super) async fn step(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        sections: &[Section],
        number: usize,
        step: &Step,
    ) -> Result<(), EngineError> {
        let wrong = |message: String| {
            let line = step.line;
            EngineError::from(FileError { line, hint: hint_of(&message), message })
        };
        let (given, globals) = (&mut self.given, &self.globals);
        let stage = &mut self.benches.get_mut(&number).ok_or_else(nothing)?.stage;
        let work = match &step.instruction {
            Instruction::Run(command) => Work::Run(stage.runs(command)),
            Instruction::Workdir(_) => {
                let steps = stage.config.history.len();
                stage.configure(&step.instruction, &step.text, given, globals).map_err(wrong)?;
                // It is told of below, with what it has made.
                stage.config.history.truncate(steps);
                Work::Directory(stage.config.working_dir.clone())
            }
            Instruction::Copy(copy) => self.copy(sections, number, step, copy).await?,
            other => {
                stage.configure(other, &step.text, given, globals).map_err(wrong)?;
                return Ok(());
            }
        };
        let layers = self.layers(number)?;
        let key = match &work {
            Work::Run(runs) => json!({ "run": runs, "layers": layers }),
            Work::Directory(path) => json!({ "directory": path, "layers": layers }),
            Work::Copy { to, items, one_file } => {
                json!({ "copy": items, "one": one_file, "to": to, "layers": layers })
            }
            Work::CopyFrom { to, stage, sources } => {
                json!({ "copy": sources, "from": self.layers(*stage)?, "to": to, "layers": layers })
            }
        };
        let key = key_of(&key);
        if self.known(number, &key, &step.text).await? {
            self.operation.say(b"      done before\n");
            return Ok(());
        }
        if let Work::CopyFrom { stage, .. } = &work {
            Box::pin(self.open(ctx, *stage)).await?;
        }
        Box::pin(self.open(ctx, number)).await?;
        self.operation.progress(step.text.clone(), self.done as u64, Some(self.total as u64));
        self.operation.cancellable(Box::pin(self.work(number, step, work))).await?;
        let bench = self.benches.get_mut(&number).ok_or_else(nothing)?;
        let workshop = bench.workshop.as_mut().ok_or_else(nothing)?;
        let layer = workshop.layer(self.engine, &self.lease, self.operation);
        let (layer, warnings) = self.operation.cancellable(layer).await?;
        self.warnings.extend(warnings);
        let made_at = now();
        self.keep(&key, layer.as_ref(), &made_at).await?;
        add(self.benches.get_mut(&number).ok_or_else(nothing)?, layer, made_at, &step.text);
        Ok(())
    }

    /// What is to be copied.
    async fn copy(
        &self,
        sections: &[Section],
        number: usize,
        step: &Step,
        copy: &Copy,
    ) -> Result<Work, EngineError> {
        let line = step.line;
        let wrong = |message: String| EngineError::from(FileError { line, hint: hint_of(&message), message });
        let stage = &self.benches.get(&number).ok_or_else(nothing)?.stage;
        let sources = stage.expand_all(&copy.sources).map_err(wrong)?;
        let target = stage.expand(&copy.to).map_err(wrong)?;
        let mode = copy.chmod.as_deref().map(|text| stage.expand(text)).transpose().map_err(wrong)?;
        let octal = |text: String| octal(&text).ok_or_else(|| no_mode(line, &text));
        let to = To {
            path: stage.path(&target),
            slash: target.ends_with('/') || target == "." || target.ends_with("/.") || target.is_empty(),
            chown: copy.chown.as_deref().map(|text| stage.expand(text)).transpose().map_err(wrong)?,
            mode: mode.map(octal).transpose()?,
        };
        if let Some(from) = &copy.from {
            let stage = source_named(sections, from, number).ok_or_else(|| no_stage(line, from))?;
            return Ok(Work::CopyFrom { to, stage, sources });
        }
        let mut written = Vec::new();
        for document in &copy.documents {
            let text = document.text();
            let text = if document.expands { stage.expand_text(&text).map_err(wrong)? } else { text };
            written.push(Item::written(&document.name, text));
        }
        let context = self.context.clone();
        let selected = tokio::task::spawn_blocking(move || {
            Ok::<_, EngineError>((context.select(&sources, None)?, context.is_one_file(&sources)?))
        });
        let selected =
            async { selected.await.map_err(|error| EngineError::Panicked { detail: error.to_string() })? };
        let (mut items, one_file) = self.operation.cancellable(selected).await?;
        let one_file = if written.is_empty() { one_file } else { items.is_empty() && written.len() == 1 };
        items.retain(|item| written.iter().all(|other| other.name != item.name));
        items.extend(written);
        Ok(Work::Copy { to, items, one_file })
    }

    /// Does it in the guest.
    async fn work(&self, number: usize, step: &Step, work: Work) -> Result<(), EngineError> {
        let bench = self.benches.get(&number).ok_or_else(nothing)?;
        let workshop = bench.workshop.as_ref().ok_or_else(nothing)?;
        match work {
            Work::Run(runs) => {
                if let Some(text) = &runs.script {
                    let (items, context) = ([Item::written(SCRIPT.1, text.clone())], self.context.clone());
                    let archive = move |writer| context.archive(&items, writer);
                    workshop.put(SCRIPT.0, (0, 0), Some(0o755), archive).await?;
                }
                let proxies = bench.stage.proxies(&self.given);
                match workshop.run(&runs, proxies, self.operation).await? {
                    Ok(()) => Ok(()),
                    Err(failed) => Err(EngineError::BuildCommand {
                        line: step.line,
                        text: step.text.clone(),
                        how: failed.how,
                        output: failed.output,
                    }),
                }
            }
            Work::Directory(path) => workshop.directory(&path).await,
            Work::Copy { to, items, one_file } => {
                let target = workshop.target(&to.path, to.slash, one_file).await?;
                let owner = workshop.owner(to.chown.as_deref()).await?;
                let (items, context) = (named(items, &target), self.context.clone());
                let archive = move |writer| context.archive(&items, writer);
                workshop.put(&target.directory, owner.unwrap_or_default(), to.mode, archive).await
            }
            Work::CopyFrom { to, stage, sources } => {
                let other = self.benches.get(&stage).and_then(|bench| bench.workshop.as_ref());
                give(other.ok_or_else(nothing)?, workshop, &to, &sources).await
            }
        }
    }

    /// Digests of a stage's layers, unpacked.
    fn layers(&self, number: usize) -> Result<Vec<String>, EngineError> {
        let bench = self.benches.get(&number).ok_or_else(nothing)?;
        Ok(bench.stage.layers.iter().map(|layer| layer.diff_id.to_string()).collect())
    }

    /// Has a VM for a stage, which knows its files.
    async fn open(&mut self, ctx: &mut Ctx<Unlocked>, number: usize) -> Result<(), EngineError> {
        if self.benches.get(&number).is_some_and(|bench| bench.workshop.is_some()) {
            return Ok(());
        }
        let mut again = true;
        let workshop = loop {
            let image = self.bootable(ctx, number).await?;
            match Box::pin(Workshop::open(self.engine, ctx, &image, self.machine, self.operation)).await {
                // Another build that had it made has just ended.
                Err(EngineError::NotFound { what: "image", .. }) if again => again = false,
                opened => break opened?,
            }
        };
        let bench = self.benches.get_mut(&number).ok_or_else(nothing)?;
        let workshop = bench.workshop.insert(workshop);
        self.operation.cancellable(workshop.look()).await
    }

    /// Takes a step's layer from the store, if it is there.
    async fn known(&mut self, number: usize, key: &str, text: &str) -> Result<bool, EngineError> {
        let Some((layer, made_at)) = self.found(key).await? else { return Ok(false) };
        let bench = self.benches.get_mut(&number).ok_or_else(nothing)?;
        // Its VM, if it has one, is without this step.
        if layer.is_some() && bench.workshop.is_some() {
            return Ok(false);
        }
        add(bench, layer, made_at, text);
        Ok(true)
    }

    async fn found(&self, key: &str) -> Result<Option<(Option<Layer>, String)>, EngineError> {
        if self.no_cache {
            return Ok(None);
        }
        let Some(step) = self.engine.inner.store.builds().get(key).await? else { return Ok(None) };
        let Some(record) = &step.layer else { return Ok(Some((None, step.made_at))) };
        let Some(layer) = layer_of(record) else { return Ok(None) };
        // First, so that nobody collects it after it was looked for.
        self.lease.add(layer.digest);
        let there = self.engine.inner.content.store.has(&layer.digest)?;
        Ok(there.then_some((Some(layer), step.made_at)))
    }

    async fn keep(&self, key: &str, layer: Option<&Layer>, made_at: &str) -> Result<(), EngineError> {
        let step = BuildStep { layer: layer.map(recorded), made_at: made_at.to_owned() };
        Ok(self.engine.inner.store.builds().put(key, &step).await?)
    }

    /// Has all of an image that was not made of layers as the first layer of a stage.
    pub(super) async fn whole(
        &mut self,
        ctx: &mut Ctx<Unlocked>,
        bench: &mut Bench,
        name: &str,
    ) -> Result<(), EngineError> {
        let image = bench.image.clone().ok_or_else(nothing)?;
        let key = key_of(&json!({ "all of": image.digest.to_string() }));
        let text = format!("FROM {name}");
        // What an image is does not change, so this is no matter of doing steps anew.
        if let Some(step) = self.engine.inner.store.builds().get(&key).await?
            && let Some(layer) = step.layer.as_ref().and_then(layer_of)
        {
            self.lease.add(layer.digest);
            if self.engine.inner.content.store.has(&layer.digest)? {
                bench.stage.layers.push(layer);
                bench.stage.note(&text, Some(step.made_at), false);
                return Ok(());
            }
        }
        let mut workshop =
            Box::pin(Workshop::open(self.engine, ctx, &image, self.machine, self.operation)).await?;
        let packed = async {
            let whole = workshop.whole(self.engine, &self.lease, self.operation).await?;
            workshop.look().await?;
            Ok(whole)
        };
        match self.operation.cancellable(packed).await {
            Ok((layer, warnings)) => {
                self.warnings.extend(warnings);
                bench.workshop = Some(workshop);
                let made_at = now();
                // That it cannot be kept costs the next build time, and this one nothing.
                let kept = self.keep(&key, Some(&layer), &made_at).await;
                bench.stage.layers.push(layer);
                bench.stage.note(&text, Some(made_at), false);
                if let Err(error) = kept {
                    tracing::warn!(error = %error.chain(), "a step of a build could not be kept");
                }
                Ok(())
            }
            Err(error) => {
                workshop.close(self.engine, ctx, self.operation).await;
                Err(error)
            }
        }
    }
}

/// Copies from one guest to another.
async fn give(from: &Workshop, to: &Workshop, place: &To, sources: &[String]) -> Result<(), EngineError> {
    let mut found = Vec::new();
    for source in sources {
        found.extend(from.matching(source).await?);
    }
    let one_file = matches!(found.as_slice(), [source] if !source.is_directory);
    let target = to.target(&place.path, place.slash, one_file).await?;
    let owner = to.owner(place.chown.as_deref()).await?;
    for Source { path, name, is_directory } in found {
        let name = (!is_directory).then(|| target.name.clone().unwrap_or(name));
        from.give(&path, name, to, &target.directory, owner, place.mode).await?;
    }
    Ok(())
}

fn add(bench: &mut Bench, layer: Option<Layer>, made_at: String, text: &str) {
    let empty = layer.is_none();
    if let Some(layer) = layer {
        bench.stage.layers.push(layer);
        bench.image = None;
    }
    bench.stage.note(text, (!empty).then_some(made_at), empty);
}

fn key_of(what: &serde_json::Value) -> String {
    let mut hasher = Sha256::new();
    hasher.update(VERSION.to_le_bytes());
    hasher.update(what.to_string());
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}
