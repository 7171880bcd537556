//! A component of world `dns`, alive: one instance, owned by one task. Questions come to it over a queue with an end, so that one that
//! is slow makes its own askers wait and nobody else.
//!
//! A trap ends the instance; the next question gets a new one. Too many in a row disable the plugin.

use std::{sync::Arc, time::Duration, time::Instant};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use wasmtime::{Store, component::Instance};

use crate::{
    bindings::exports::vm::plugin::resolver as guest,
    broker::{Call, Query},
    call::Input,
    error::{CallError, PluginError},
    forms,
    hook::Hook,
    parts::Parts,
    plugin::Plugin,
    ports::{Directory, StateStore},
};

/// Questions that may wait.
const QUEUE: usize = 256;

/// Records in one answer.
const RECORDS: usize = 64;

/// One record of an answer; class IN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The owner.
    pub name: String,
    /// The type's number.
    pub record_type: u16,
    /// How long it may be remembered.
    pub ttl_seconds: u32,
    /// In text form.
    pub data: String,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// Not its business.
    Pass,
    /// These.
    Records(Vec<Record>),
    /// No records of this type.
    NoData,
    /// No such name.
    NxDomain,
    /// Not for this asker.
    Refused,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Too many questions wait already, or too long.
    #[error("plugin {plugin} does not keep up with its questions")]
    Busy {
        /// Whose.
        plugin: String,
    },
    /// The component failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It was ended.
    #[error("plugin {plugin} does not answer any more")]
    Ended {
        /// Whose.
        plugin: String,
    },
}

impl ResolveError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Busy { plugin } => {
                format!("see how it is with `vm doctor`, or `vm plugin disable {plugin}`")
            }
            Self::Call(error) => error.hint(),
            Self::Ended { .. } => "it was disabled or replaced; ask again".to_owned(),
        }
    }
}

type Question = (Query, oneshot::Sender<Result<Resolved, CallError>>);

/// A component that answers. Dropping it ends its task.
#[derive(Debug)]
pub struct Resolver {
    plugin: Arc<Plugin>,
    zones: Vec<String>,
    queue: mpsc::Sender<Question>,
    task: JoinHandle<()>,
    patience: Duration,
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Resolver {
    /// Begins an instance and asks for its zones.
    ///
    /// # Errors
    /// The component failed, or gave a zone that is no name.
    pub async fn start(
        plugin: Arc<Plugin>,
        input: Input,
        state: Arc<dyn StateStore>,
        directory: Arc<dyn Directory>,
    ) -> Result<Self, CallError> {
        plugin.callable()?;
        let input = Arc::new(input);
        let mut server = Server { plugin: plugin.clone(), input, state, directory, alive: None };
        let zones = Box::pin(server.zones()).await?;
        let (queue, questions) = mpsc::channel(QUEUE);
        let patience = plugin.identity.limits.wall;
        let task = tokio::spawn(server.serve(questions));
        Ok(Self { plugin, zones, queue, task, patience })
    }

    /// The plugin.
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.plugin
    }

    /// The zones it answers for.
    pub fn zones(&self) -> &[String] {
        &self.zones
    }

    /// Whether a name, in lower case, is in one of its zones.
    pub fn covers(&self, name: &str) -> bool {
        self.zones.iter().any(|zone| {
            name.strip_suffix(zone.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }

    /// Asks. Cancel-safe.
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub async fn resolve(&self, query: Query) -> Result<Resolved, ResolveError> {
        let plugin = || self.plugin.name().to_owned();
        let (give, take) = oneshot::channel();
        self.queue.try_send((query, give)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ResolveError::Busy { plugin: plugin() },
            mpsc::error::TrySendError::Closed(_) => ResolveError::Ended { plugin: plugin() },
        })?;
        match tokio::time::timeout(self.patience, take).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => Err(ResolveError::Ended { plugin: plugin() }),
            Err(_) => Err(ResolveError::Busy { plugin: plugin() }),
        }
    }
}

/// The task's own.
struct Server {
    plugin: Arc<Plugin>,
    input: Arc<Input>,
    state: Arc<dyn StateStore>,
    directory: Arc<dyn Directory>,
    alive: Option<(Store<Call>, Instance, guest::Guest)>,
}

impl Server {
    async fn serve(mut self, mut questions: mpsc::Receiver<Question>) {
        while let Some((query, answer)) = questions.recv().await {
            // Whoever gave up needs no answer.
            if answer.is_closed() {
                continue;
            }
            let result = match self.plugin.callable() {
                Ok(()) => self.counted(query).await,
                Err(error) => Err(error),
            };
            let _ = answer.send(result);
        }
    }

    async fn counted(&mut self, query: Query) -> Result<Resolved, CallError> {
        let begin = Instant::now();
        let result = self.ask(query).await;
        self.plugin.count(Hook::Resolve, begin.elapsed(), result.as_ref().err());
        result
    }

    /// The instance, a new one where the last has ended.
    async fn instance(&mut self) -> Result<&mut (Store<Call>, Instance, guest::Guest), CallError> {
        if self.alive.is_none() {
            let call =
                Call::new(self.plugin.identity.clone(), Hook::Zones, self.input.clone(), self.state.clone());
            let mut store = self.plugin.runtime.store(call);
            store.data_mut().directory = Some(self.directory.clone());
            let limit = self.plugin.identity.limits.wall;
            let parts = &self.plugin.parts;
            let begun = tokio::time::timeout(limit, async {
                let instance = parts.pre.instantiate_async(&mut store).await?;
                let absent = || wasmtime::Error::msg("the component is no resolver");
                let guest = parts.resolver.as_ref().ok_or_else(absent)?.load(&mut store, &instance)?;
                Ok((instance, guest))
            })
            .await;
            let (instance, guest) = self.plugin.ended(Hook::Zones, limit, &mut store, begun)?;
            self.alive = Some((store, instance, guest));
        }
        match &mut self.alive {
            Some(alive) => Ok(alive),
            None => Err(CallError::Incomplete {
                plugin: self.plugin.name().to_owned(),
                hook: Hook::Zones,
                what: "an instance",
            }),
        }
    }

    async fn zones(&mut self) -> Result<Vec<String>, CallError> {
        let plugin = self.plugin.clone();
        let _running = plugin.runtime.running();
        let limit = plugin.identity.limits.wall;
        let begin = Instant::now();
        let (store, instance, _) = self.instance().await?;
        let ended = tokio::time::timeout(limit, plugin.parts.zones(&mut *store, instance)).await;
        let said = plugin.ended(Hook::Zones, limit, store, ended);
        plugin.count(Hook::Zones, begin.elapsed(), said.as_ref().err());
        let failed = |error| CallError::Failed { plugin: plugin.name().to_owned(), hook: Hook::Zones, error };
        let zones = said?.map_err(failed)?;
        let wrong =
            |reason| CallError::Impossible { plugin: plugin.name().to_owned(), hook: Hook::Zones, reason };
        if zones.is_empty() || zones.len() > plugin.identity.limits.findings {
            return Err(wrong(format!("{} zones", zones.len())));
        }
        zones.iter().try_for_each(|zone| forms::domain(zone)).map_err(|error| wrong(error.message))?;
        Ok(zones)
    }

    async fn ask(&mut self, query: Query) -> Result<Resolved, CallError> {
        let plugin = self.plugin.clone();
        let _running = plugin.runtime.running();
        let limit = plugin.identity.limits.wall;
        let (store, _, guest) = self.instance().await?;
        let call = store.data_mut();
        call.hook = Hook::Resolve;
        call.query = Some(query);
        call.ticks = 0;
        store.set_epoch_deadline(1);
        let ended = tokio::time::timeout(limit, Parts::resolve(&mut *store, guest)).await;
        let (log, _) = store.data_mut().take_log();
        plugin.log.add(Hook::Resolve, &log);
        let said = plugin.ended(Hook::Resolve, limit, store, ended);
        let failed =
            |error| CallError::Failed { plugin: plugin.name().to_owned(), hook: Hook::Resolve, error };
        let wrong =
            |reason| CallError::Impossible { plugin: plugin.name().to_owned(), hook: Hook::Resolve, reason };
        match said {
            Err(error) => {
                // What is left of an instance after a trap is of no use to anybody.
                self.alive = None;
                Err(error)
            }
            Ok(Err(error)) => Err(failed(error)),
            Ok(Ok(answer)) => {
                let changes = store.data_mut().take_state();
                if !changes.is_empty() {
                    let kept = self.state.commit(plugin.name(), &changes).await;
                    kept.map_err(|source| CallError::State {
                        plugin: plugin.name().to_owned(),
                        hook: Hook::Resolve,
                        source,
                    })?;
                }
                resolved(answer).map_err(|error| wrong(error.message))
            }
        }
    }
}

fn resolved(answer: guest::Answer) -> Result<Resolved, PluginError> {
    Ok(match answer {
        guest::Answer::Pass => Resolved::Pass,
        guest::Answer::Nodata => Resolved::NoData,
        guest::Answer::Nxdomain => Resolved::NxDomain,
        guest::Answer::Refused => Resolved::Refused,
        guest::Answer::Records(records) => {
            if records.is_empty() || records.len() > RECORDS {
                return Err(PluginError::new(
                    "bad.records",
                    format!("an answer of {} records", records.len()),
                ));
            }
            let check = |record: guest::DnsRecord| {
                forms::domain(&record.name)?;
                forms::line("data of a record", &record.data)?;
                if record.data.len() > 4096 {
                    return Err(PluginError::new("bad.records", "data of more than 4096 bytes"));
                }
                let guest::DnsRecord { name, record_type, ttl_seconds, data } = record;
                Ok(Record { name, record_type, ttl_seconds, data })
            };
            Resolved::Records(records.into_iter().map(check).collect::<Result<_, _>>()?)
        }
    })
}
