//! The daemon's interface as any client has it, for tests that make thousands of calls.
//!
//! What is asked for and what is read are JSON, not the daemon's own types as a whole: a field more is no matter to a test.

use std::{fmt, net::Ipv4Addr, path::Path, time::Duration};

use jsonrpsee::core::{
    client::{Client, ClientT, Error, Subscription, SubscriptionClientT},
    params::ArrayParams,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use vm_api::{ErrorKind, OperationId, Problem};
use vm_types::{VmId, vm::VmState};

use crate::fixtures::TINY;

/// No answer takes longer, nor does an operation on a fake VM; one that does hangs.
pub const ANSWER: Duration = Duration::from_secs(60);

/// A connection to a daemon.
#[derive(Debug)]
pub struct Api {
    client: Client,
    limit: Duration,
}

/// A VM as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Seen {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub state: VmState,
    /// Its address, where it has a network.
    pub address: Option<Ipv4Addr>,
}

impl Seen {
    /// Whether nobody works on it.
    pub fn settled(&self) -> bool {
        match self.state {
            VmState::Stopped { .. }
            | VmState::Running { .. }
            | VmState::Paused { .. }
            | VmState::Failed { .. } => true,
            VmState::Defined
            | VmState::Creating { .. }
            | VmState::Starting { .. }
            | VmState::Stopping { .. }
            | VmState::Deleting { .. } => false,
        }
    }

    /// Its VMM's pid inside the world.
    pub fn pid(&self) -> Option<u32> {
        match self.state {
            VmState::Running { pid, .. } | VmState::Paused { pid, .. } => Some(pid),
            _ => None,
        }
    }
}

/// A call that brought nothing.
#[derive(Debug, Clone)]
pub enum Failure {
    /// The daemon says no.
    Refused(Problem),
    /// The daemon went away meanwhile; nobody knows what came of the call.
    Lost(String),
    /// It does not answer in time.
    Hangs(String),
}

impl Failure {
    /// What sort of refusal it is.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused(problem) => Some(problem.kind),
            Self::Lost(_) | Self::Hangs(_) => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(problem) => write!(f, "{}: {problem}", problem.kind.word()),
            Self::Lost(what) => write!(f, "lost the daemon: {what}"),
            Self::Hangs(what) => write!(f, "no answer to {what}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Call(object) => Self::Refused(Problem::from(&object)),
            other => Self::Lost(other.to_string()),
        }
    }
}

#[derive(Deserialize)]
struct Begun {
    operation: OperationId,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
enum Step {
    Running {},
    Succeeded { result: Value },
    Failed { error: Problem },
}

impl Api {
    /// Connects.
    ///
    /// # Errors
    /// No daemon there.
    pub async fn connect(socket: &Path) -> std::io::Result<Self> {
        Ok(Self { client: vm_api::client::connect(socket).await?, limit: ANSWER })
    }

    /// The same with more time for each answer, for VMs that truly boot.
    #[must_use]
    pub fn patient(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// One call.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn call<T: DeserializeOwned>(&self, method: &str, params: &[Value]) -> Result<T, Failure> {
        let answer = self.client.request::<T, _>(method, array(params));
        self.within(method, params, async { Ok(answer.await?) }).await
    }

    /// A call that begins an operation, to the end of that.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn run(&self, method: &str, params: &[Value]) -> Result<Value, Failure> {
        let begun: Begun = self.call(method, params).await?;
        self.within(method, params, self.wait(begun.operation)).await
    }

    async fn within<T>(
        &self,
        method: &str,
        params: &[Value],
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let hangs = |_| Failure::Hangs(format!("{method}({}) within {:?}", json!(params), self.limit));
        tokio::time::timeout(self.limit, work).await.map_err(hangs)?
    }

    async fn wait(&self, operation: OperationId) -> Result<Value, Failure> {
        let watch = array(&[json!(operation)]);
        let mut steps: Subscription<Step> =
            self.client.subscribe("operation.watch", watch, "operation.unwatch").await?;
        while let Some(step) = steps.next().await {
            match step.map_err(|error| Failure::Lost(error.to_string()))? {
                Step::Running {} => {}
                Step::Succeeded { result } => return Ok(result),
                Step::Failed { error } => return Err(Failure::Refused(error)),
            }
        }
        Err(Failure::Lost("the watch of an operation ended before it".into()))
    }

    /// All VMs.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn list(&self) -> Result<Vec<Seen>, Failure> {
        self.call("vm.list", &[]).await
    }

    /// Makes a VM of the [`TINY`] image.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn create(&self, name: &str, start: bool) -> Result<Value, Failure> {
        self.run("vm.create", &[json!({"name": name, "image": TINY, "start": start})]).await
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn start(&self, name: &str) -> Result<Value, Failure> {
        self.run("vm.start", &[json!(name)]).await
    }

    /// Stops a VM.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn stop(&self, name: &str) -> Result<Value, Failure> {
        self.run("vm.stop", &[json!(name), json!({})]).await
    }

    /// Deletes a VM, whatever it is.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn delete(&self, name: &str) -> Result<Value, Failure> {
        self.run("vm.delete", &[json!(name), json!(true)]).await
    }
}

fn array(params: &[Value]) -> ArrayParams {
    let mut array = ArrayParams::new();
    for param in params {
        array.insert(param).expect("a JSON value is JSON");
    }
    array
}
