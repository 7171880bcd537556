//! `vm events`

use std::time::{Duration, SystemTime};

use clap::Args;
use vm_api::{ErrorKind, Event, Problem, rpc::EventsClient};

use crate::{
    context::Context,
    errors::{CliError, signalled},
    interrupts::Interrupts,
    output::{Output, for_stdout},
};

/// Show what happened
///
/// The events that the daemon has kept, oldest first, one a line: number, time (UTC), what, VM, message. With --json, one
/// JSON document a line.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only those after the one of this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    after: u64,
    /// Only those of this VM, by name or id; it may be gone
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

impl EventsArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        if !self.follow {
            for event in EventsClient::list(&client, self.after).await? {
                self.show(context.output, &event)?;
            }
            return Ok(0);
        }
        let mut interrupts = Interrupts::new()?;
        let mut last = self.after;
        let mut events = client.follow(last).await?;
        let mut got = false;
        loop {
            // Both branches are cancel-safe: an event or signal that was not taken is kept by its queue.
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        (last, got) = (event.sequence, true);
                        self.show(context.output, &event)?;
                    }
                    // One that a newer daemon knows and we do not; the next may be of the old sort.
                    Some(Err(error)) => context.output.warn(&format!("an event that does not fit: {error}")),
                    // Too slow for what happened: it is all still to be had.
                    None if got && client.is_connected() => {
                        got = false;
                        events = client.follow(last).await?;
                    }
                    None => return Err(ended(last).into()),
                },
                signal = interrupts.next() => return Ok(signalled(signal)),
            }
        }
    }

    fn show(&self, output: Output, event: &Event) -> Result<(), CliError> {
        if !self.vm.as_ref().is_none_or(|vm| concerns(event, vm)) {
            return Ok(());
        }
        if output.json { output.line(event) } else { output.raw(for_stdout(line(event)).as_bytes()) }
    }
}

fn concerns(event: &Event, vm: &str) -> bool {
    event.name.as_ref().is_some_and(|name| name.as_str() == vm)
        || event.vm.as_ref().is_some_and(|id| id.as_str() == vm)
}

/// An event on a line; further lines of its message are indented.
fn line(event: &Event) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(event.at_ms);
    let kind: &'static str = event.kind.into();
    let name = event.name.as_ref().map_or("-", |name| name.as_str());
    let message = event.message.trim_end().replace('\n', "\n    ");
    let at = humantime::format_rfc3339_seconds(at);
    format!("{:<5} {at}  {kind:<17} {name:<15} {message}", event.sequence).trim_end().to_owned() + "\n"
}

fn ended(last: u64) -> Problem {
    Problem::new(ErrorKind::ShuttingDown, "the daemon has ended, and its events with it")
        .hint(format!("go on when it is back: vm events --follow --after {last}"))
}

#[cfg(test)]
mod tests {
    use vm_api::EventKind;

    use super::*;

    fn event() -> Event {
        Event {
            sequence: 12,
            at_ms: 1_700_000_000_999,
            kind: EventKind::VmFailed,
            vm: Some("00000000000a".parse().unwrap()),
            name: Some("web".parse().unwrap()),
            operation: None,
            message: "its VMM ended:\npanic\n".to_owned(),
        }
    }

    #[test]
    fn an_event_is_a_line_with_its_message_set_in() {
        assert_eq!(
            line(&event()),
            "12    2023-11-14T22:13:20Z  vm_failed         web             its VMM ended:\n    panic\n"
        );
        let daemon = Event { vm: None, name: None, message: String::new(), ..event() };
        assert_eq!(line(&daemon), "12    2023-11-14T22:13:20Z  vm_failed         -\n");
    }

    #[test]
    fn a_vm_is_meant_by_name_or_id() {
        assert!(concerns(&event(), "web") && concerns(&event(), "00000000000a"));
        assert!(!concerns(&event(), "we"));
        assert!(!concerns(&Event { vm: None, name: None, ..event() }, "web"));
    }
}
