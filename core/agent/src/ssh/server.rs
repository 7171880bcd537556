//! What russh asks of a server: who may log in, and what a channel's requests start.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use nix::pty::Winsize;
use russh::{
    Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, Error, Pty, Sig,
    keys::PublicKey,
    server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, Session, VerifiedPublicKey},
};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet};
use vm_types::guest::FILES_SUBSYSTEM;

use super::{
    Settings,
    backlog::{self, Backlog},
    command::{self, Environments, Request},
    files, forward,
    process::{self, Event, Wire},
    pty::{self, Terminal},
    users::{self, User},
};

/// One connection.
pub(crate) struct Handler {
    settings: Arc<Settings>,
    backlog: Arc<Backlog>,
    user: Option<User>,
    channels: HashMap<ChannelId, Slot>,
    /// Forwarded connections; they end with this one.
    forwards: JoinSet<()>,
}

/// One channel.
struct Slot {
    input: backlog::Sender,
    /// Its drop is the command's hang-up.
    events: Option<mpsc::UnboundedSender<Event>>,
    forward: Option<tokio::task::AbortHandle>,
    /// What a request will need; gone once there has been one.
    start: Option<Start>,
}

struct Start {
    output: ChannelWriteHalf<Msg>,
    input: backlog::Receiver,
    environment: BTreeMap<String, String>,
    terminal: Option<Terminal>,
}

/// What a session's channel is for.
enum What {
    Command(Request),
    Files,
}

impl Handler {
    pub(crate) fn new(settings: Arc<Settings>, backlog: Arc<Backlog>) -> Self {
        Self { settings, backlog, user: None, channels: HashMap::new(), forwards: JoinSet::new() }
    }

    fn may_log_in(&self, user: &str, key: &PublicKey) -> Option<User> {
        let known = self.settings.keys.iter().any(|known| known.key_data() == key.key_data());
        known.then(|| users::find(Path::new("/"), user)).flatten()
    }

    fn start(&mut self, id: ChannelId, what: &What, session: &mut Session) -> Result<(), Error> {
        let (Some(user), Some(slot)) = (&self.user, self.channels.get_mut(&id)) else {
            return session.channel_failure(id);
        };
        // The file service acts as root.
        let allowed = !matches!(what, What::Files) || user.uid == 0;
        let Some(start) = slot.start.take_if(|_| allowed) else { return session.channel_failure(id) };
        session.channel_success(id)?;
        let (sender, events) = mpsc::unbounded_channel();
        slot.events = Some(sender);
        let wire = Wire { output: start.output, handle: session.handle(), input: start.input, events };
        match what {
            What::Files => drop(tokio::spawn(Box::pin(files::run(wire)))),
            What::Command(request) => {
                let environments =
                    Environments { configured: &self.settings.environment, client: &start.environment };
                let plan = command::plan(user, request, &environments);
                tokio::spawn(Box::pin(process::run(plan, user.clone(), start.terminal, wire)));
            }
        }
        Ok(())
    }

    fn pending(&mut self, id: ChannelId) -> Option<&mut Start> {
        self.channels.get_mut(&id)?.start.as_mut()
    }
}

fn answer(session: &mut Session, id: ChannelId, good: bool) -> Result<(), Error> {
    if good { session.channel_success(id) } else { session.channel_failure(id) }
}

impl server::Handler for Handler {
    type Error = Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Error> {
        Ok(if self.may_log_in(user, offer.public_key).is_some() { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Error> {
        self.user = self.may_log_in(user, key.public_key);
        Ok(if self.user.is_some() { Auth::Accept } else { Auth::reject() })
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Error> {
        let id = channel.id();
        let (_, output) = channel.split();
        let (sender, input) = backlog::queue(&self.backlog);
        let start = Start { output, input, environment: BTreeMap::new(), terminal: None };
        self.channels.insert(id, Slot { input: sender, events: None, forward: None, start: Some(start) });
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Error> {
        let Ok(port) = u16::try_from(port) else {
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
            return Ok(());
        };
        let id = channel.id();
        let (_, output) = channel.split();
        let (sender, input) = backlog::queue(&self.backlog);
        let host = host.to_owned();
        while self.forwards.try_join_next().is_some() {}
        // A refused channel has no close to go with.
        self.channels.retain(|_, slot| !slot.forward.as_ref().is_some_and(|task| task.is_finished()));
        let task = self.forwards.spawn(async move {
            match TcpStream::connect((host.as_str(), port)).await {
                Ok(stream) => {
                    let _ = stream.set_nodelay(true);
                    reply.accept().await;
                    forward::run(stream, output, input).await;
                }
                Err(_) => reply.reject(ChannelOpenFailure::ConnectFailed).await,
            }
        });
        self.channels.insert(id, Slot { input: sender, events: None, forward: Some(task), start: None });
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut Session) -> Result<(), Error> {
        if let Some(slot) = self.channels.remove(&id)
            && let Some(task) = slot.forward
        {
            task.abort();
        }
        Ok(())
    }

    fn adjust_window(&mut self, _: ChannelId, _: u32) -> u32 {
        self.backlog.window()
    }

    async fn channel_eof(&mut self, id: ChannelId, _: &mut Session) -> Result<(), Error> {
        if let Some(slot) = self.channels.get_mut(&id) {
            slot.input.end();
        }
        Ok(())
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _: &mut Session) -> Result<(), Error> {
        if let Some(slot) = self.channels.get(&id) {
            slot.input.send(data);
        }
        Ok(())
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Error> {
        let size: Winsize = pty::size(columns, rows, width, height);
        let start = self.pending(id);
        let good = start.is_some();
        if let Some(start) = start {
            start.terminal = Some(Terminal { name: term.to_owned(), size, modes: modes.to_vec() });
        }
        answer(session, id, good)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), Error> {
        let valid = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
        let start = self.pending(id).filter(|_| valid);
        let good = start.is_some();
        if let Some(start) = start {
            start.environment.insert(name.to_owned(), value.to_owned());
        }
        answer(session, id, good)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Error> {
        self.start(id, &What::Command(Request::Shell), session)
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        command: &[u8],
        session: &mut Session,
    ) -> Result<(), Error> {
        self.start(id, &What::Command(Request::Exec(command.to_vec())), session)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Error> {
        if name == FILES_SUBSYSTEM {
            self.start(id, &What::Files, session)
        } else {
            session.channel_failure(id)
        }
    }

    async fn window_change_request(
        &mut self,
        id: ChannelId,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        _: &mut Session,
    ) -> Result<(), Error> {
        let size = pty::size(columns, rows, width, height);
        match self.channels.get_mut(&id) {
            Some(Slot { events: Some(events), .. }) => drop(events.send(Event::Resize(size))),
            Some(Slot { start: Some(Start { terminal: Some(terminal), .. }), .. }) => terminal.size = size,
            _ => {}
        }
        Ok(())
    }

    async fn signal(&mut self, id: ChannelId, signal: Sig, _: &mut Session) -> Result<(), Error> {
        if let Some(Slot { events: Some(events), .. }) = self.channels.get(&id)
            && let Some(signal) = process::signal_of(&signal)
        {
            let _ = events.send(Event::Signal(signal));
        }
        Ok(())
    }
}
