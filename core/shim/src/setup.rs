//! Configuring a VMM that takes no machine on its command line: the plan's requests, in order, over its own socket.

use std::{process::ExitStatus, time::Duration};

use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};
use vm_host::{HttpClient, HttpError};
use vm_types::shim::Setup;

use crate::error::StartError;

/// How long a VMM may take until it listens.
const LISTEN: Duration = Duration::from_secs(20);
/// How long each request may take. The last one makes the guest's memory and reads its kernel, from a cold disk at worst.
const REQUEST: Duration = Duration::from_secs(60);
/// How long all of it may take.
const WHOLE: Duration = Duration::from_secs(90);
/// Pause between attempts to reach the VMM, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Makes the requests, and `close`s what the VMM needs no longer before the one that starts the guest. On an error the VMM is good
/// for nothing but being killed.
pub(crate) async fn configure(
    setup: &Setup,
    vmm: &mut Child,
    close: impl FnOnce() -> Result<(), StartError>,
) -> Result<(), StartError> {
    // Cancel-safe: the VMM's end is kept by `Child`; of requests to a VMM that has ended, nothing matters.
    tokio::select! {
        biased;
        made = timeout(WHOLE, make(setup, close)) => made.unwrap_or_else(|_| Err(failed(late()))),
        ended = vmm.wait() => Err(StartError::Ended { status: ended.map_or_else(|error| error.to_string(), said) }),
    }
}

fn failed(source: HttpError) -> StartError {
    StartError::Configure { source }
}

fn late() -> HttpError {
    HttpError::TimedOut { request: "all that configures the VMM".to_owned(), millis: WHOLE.as_millis() }
}

async fn make(setup: &Setup, close: impl FnOnce() -> Result<(), StartError>) -> Result<(), StartError> {
    let mut client = connect(setup).await.map_err(failed)?;
    let Some((start, machine)) = setup.requests.split_last() else { return close() };
    for request in machine {
        client.request(&request.method, &request.path, Some(&request.body)).await.map_err(failed)?;
    }
    close()?;
    client.request(&start.method, &start.path, Some(&start.body)).await.map(drop).map_err(failed)
}

async fn connect(setup: &Setup) -> Result<HttpClient, HttpError> {
    let deadline = Instant::now() + LISTEN;
    let mut pause = PAUSE.0;
    loop {
        match HttpClient::connect(&setup.socket, REQUEST).await {
            Err(error) if error.is_nobody() && Instant::now() < deadline => sleep(pause).await,
            connected => return connected,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

fn said(status: ExitStatus) -> String {
    crate::prepare::exit_status(status).to_string()
}
