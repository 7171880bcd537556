//! A proxy in front of the registry that tells what was asked, and does on demand what networks and registries do.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::bench::AT;

/// What happens to one answer.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// So many bytes of the body, and then a reset.
    Reset(usize),
    /// So many bytes, and then the end.
    Truncate(usize),
    /// So many bytes, and then nothing more.
    Stall(usize),
    /// One byte of the body is another.
    Corrupt,
    /// Another answer: status line's rest, headers, body.
    Answer(&'static str, String, &'static str),
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
    /// Bytes of the body that were answered.
    pub(crate) bytes: u64,
}

/// When: for requests whose method and path has this in it, so often.
#[derive(Debug)]
struct Rule {
    on: String,
    times: usize,
    fault: Fault,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    asked: Vec<Asked>,
    /// What requests must show, and what is answered where they do not.
    gate: Option<(String, String)>,
}

#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Ends with the test's runtime.
    pub(crate) async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    pub(crate) async fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let proxy = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let own = proxy.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let own = own.clone();
                tokio::spawn(async move { own.serve(stream).await });
            }
        });
        proxy
    }

    pub(crate) fn on(&self, on: &str, times: usize, fault: Fault) {
        self.state.lock().unwrap().rules.push(Rule { on: on.to_owned(), times, fault });
    }

    /// Requests without this header get 401 with that challenge.
    pub(crate) fn gate(&self, authorization: &str, challenge: &str) {
        self.state.lock().unwrap().gate = Some((authorization.to_owned(), challenge.to_owned()));
    }

    pub(crate) fn asked(&self, part: &str) -> Vec<Asked> {
        let state = self.state.lock().unwrap();
        state
            .asked
            .iter()
            .filter(|asked| format!("{} {}", asked.method, asked.path).contains(part))
            .cloned()
            .collect()
    }

    pub(crate) fn bytes(&self, part: &str) -> u64 {
        self.asked(part).iter().map(|asked| asked.bytes).sum()
    }

    pub(crate) fn forget(&self) {
        self.state.lock().unwrap().asked.clear();
    }

    fn note(&self, at: usize, bytes: usize) {
        // Forgotten meanwhile, it is nobody's.
        if let Some(asked) = self.state.lock().unwrap().asked.get_mut(at) {
            asked.bytes += bytes as u64;
        }
    }

    /// What is to happen to a request, and where it is noted.
    fn judge(&self, asked: Asked) -> (usize, Option<Fault>) {
        let mut state = self.state.lock().unwrap();
        let line = format!("{} {}", asked.method, asked.path);
        let refused = state.gate.as_ref().filter(|(shown, _)| {
            !asked.path.starts_with("/token") && asked.authorization.as_ref() != Some(shown)
        });
        let refused = refused.map(|(_, challenge)| {
            Fault::Answer("401 Unauthorized", format!("WWW-Authenticate: {challenge}\r\n"), "{}")
        });
        state.asked.push(asked);
        let at = state.asked.len() - 1;
        let rule = state.rules.iter_mut().find(|rule| rule.times > 0 && line.contains(&rule.on));
        let fault = refused.or_else(|| {
            rule.map(|rule| {
                rule.times -= 1;
                rule.fault.clone()
            })
        });
        (at, fault)
    }

    /// One request of a connection; a client that goes away is its own affair.
    async fn serve(&self, mut client: TcpStream) -> Option<()> {
        let (head, rest) = head(&mut client).await?;
        let mut lines = head.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let header = |name: &str| {
            let found = head.split("\r\n").filter_map(|line| line.split_once(": "));
            found.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
        };
        let asked = Asked {
            method: first.next()?.to_owned(),
            path: first.next()?.to_owned(),
            range: header("range"),
            authorization: header("authorization"),
            bytes: 0,
        };
        let is_head = asked.method == "HEAD";
        let length: usize = header("content-length").and_then(|text| text.parse().ok()).unwrap_or_default();
        let (at, fault) = self.judge(asked);
        if let Some(Fault::Answer(status, headers, body)) = &fault {
            // What is sent is read, so that the answer is not lost to a reset.
            let mut left = length.saturating_sub(rest.len());
            let mut sink = vec![0; 8192];
            while left > 0 {
                left = left.saturating_sub(client.read(&mut sink).await.ok().filter(|n| *n > 0)?);
            }
            let size = body.len();
            let body = if is_head { "" } else { body };
            let text = format!(
                "HTTP/1.1 {status}\r\n{headers}Content-Length: {size}\r\nConnection: close\r\n\r\n{body}"
            );
            client.write_all(text.as_bytes()).await.ok()?;
            return client.shutdown().await.ok();
        }
        let mut registry = TcpStream::connect(AT).await.ok()?;
        let kept: Vec<&str> =
            head.split("\r\n").filter(|line| !line.to_ascii_lowercase().starts_with("connection:")).collect();
        let request = kept.join("\r\n").replacen("\r\n", "\r\nConnection: close\r\n", 1);
        registry.write_all(format!("{request}\r\n\r\n").as_bytes()).await.ok()?;
        registry.write_all(&rest).await.ok()?;
        let (mut from, mut to) = registry.split();
        let (mut reader, mut writer) = client.split();
        // Who answers early is not waited for.
        let body = async {
            let _ =
                tokio::io::copy(&mut (&mut reader).take((length - rest.len().min(length)) as u64), &mut to)
                    .await;
            std::future::pending::<()>().await;
        };
        let answer = self.answer(&mut from, &mut writer, at, fault);
        let end = tokio::select! {
            end = answer => end?,
            () = body => return None,
        };
        match end {
            End::Close => client.shutdown().await.ok(),
            End::Reset => {
                let socket = client.into_std().ok()?;
                let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).ok()
            }
            End::Hold => {
                // Until the client gives up.
                let mut byte = [0];
                client.read(&mut byte).await.ok().map(drop)
            }
        }
    }

    async fn answer(
        &self,
        from: &mut (impl AsyncReadExt + Unpin),
        to: &mut (impl AsyncWriteExt + Unpin),
        at: usize,
        fault: Option<Fault>,
    ) -> Option<End> {
        let (head, mut piece) = head(from).await?;
        to.write_all(format!("{head}\r\n\r\n").as_bytes()).await.ok()?;
        let (mut left, end) = match fault {
            Some(Fault::Reset(left)) => (left, End::Reset),
            Some(Fault::Truncate(left)) => (left, End::Close),
            Some(Fault::Stall(left)) => (left, End::Hold),
            _ => (usize::MAX, End::Close),
        };
        let mut corrupt = matches!(fault, Some(Fault::Corrupt));
        loop {
            if let (true, Some(byte)) = (corrupt, piece.last_mut()) {
                *byte ^= 1;
                corrupt = false;
            }
            let now = piece.len().min(left);
            to.write_all(&piece[..now]).await.ok()?;
            self.note(at, now);
            left -= now;
            if left == 0 {
                return Some(end);
            }
            piece.resize(16 << 10, 0);
            let read = from.read(&mut piece).await.ok()?;
            piece.truncate(read);
            if read == 0 {
                return Some(End::Close);
            }
        }
    }
}

enum End {
    Close,
    Reset,
    Hold,
}

/// The head without its empty line, and what came after it.
async fn head(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 8192];
    loop {
        let read = stream.read(&mut piece).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&piece[..read]);
        // Who speaks TLS here is hung up on.
        if !bytes[0].is_ascii_uppercase() {
            return None;
        }
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            bytes.truncate(end);
            return Some((String::from_utf8(bytes).ok()?, rest));
        }
    }
}
