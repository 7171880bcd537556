//! An HTTP/1.1 client for JSON services on Unix sockets, as small as their use here: one connection, one request after the
//! other, every one with a limit.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request,
    body::Bytes,
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::time::timeout;

/// No answer we ask for comes near it; a process that a guest has taken over could send without end.
const BODY_LIMIT: usize = 1 << 20;

/// A failed exchange.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody could be reached.
    #[error("could not connect to {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The request is none that HTTP could carry.
    #[error("{request} is no HTTP request")]
    Request {
        /// Method and path.
        request: String,
        /// Why.
        source: hyper::http::Error,
    },
    /// The connection broke before the whole answer had come.
    #[error("the connection broke during {request}")]
    Broken {
        /// Method and path.
        request: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer came in time.
    #[error("no answer to {request} within {millis} ms")]
    TimedOut {
        /// Method and path.
        request: String,
        /// The limit.
        millis: u128,
    },
    /// The answer is no JSON.
    #[error("the answer to {request} is not understood")]
    Malformed {
        /// Method and path.
        request: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The service said no.
    #[error("{request} was refused ({status}): {message}")]
    Refused {
        /// Method and path.
        request: String,
        /// HTTP's status.
        status: u16,
        /// The service's own words.
        message: String,
    },
}

impl HttpError {
    /// Whether nobody listens: the service is not up yet, gone, or going at this moment.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Connect { source, .. }
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset))
    }
}

/// A connection. After an error other than [`HttpError::Refused`] it is good for nothing but being dropped.
#[derive(Debug)]
pub struct HttpClient {
    sender: SendRequest<Full<Bytes>>,
    limit: Duration,
}

impl HttpClient {
    /// Connects. That, and each request later, may take `limit`. Needs a runtime.
    ///
    /// # Errors
    /// [`HttpError::Connect`], [`HttpError::TimedOut`].
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self, HttpError> {
        let failed = |source| HttpError::Connect { socket: socket.to_owned(), source };
        let connecting = async {
            let stream = crate::socket::connect(socket).await.map_err(failed)?;
            handshake(TokioIo::new(stream)).await.map_err(|error| failed(io::Error::other(error)))
        };
        let (sender, connection) = timeout(limit, connecting)
            .await
            .map_err(|_| HttpError::TimedOut { request: "connecting".into(), millis: limit.as_millis() })??;
        // Ends with the sender. How it broke is told to whoever had a request under way.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, limit })
    }

    /// Makes one request and returns the answer's body; `Null` for an empty one.
    ///
    /// # Errors
    /// Every variant of [`HttpError`] but `Connect`.
    pub async fn request(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, HttpError> {
        let name = || format!("{method} {path}");
        let limit = self.limit;
        timeout(limit, self.exchange(method, path, body))
            .await
            .map_err(|_| HttpError::TimedOut { request: name(), millis: limit.as_millis() })?
    }

    async fn exchange(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, HttpError> {
        let name = || format!("{method} {path}");
        let broken = |source| HttpError::Broken { request: name(), source };
        let bad = |source| HttpError::Request { request: name(), source };
        let verb = Method::from_bytes(method.as_bytes()).map_err(|error| bad(error.into()))?;
        // Without a host no request is HTTP/1.1 (RFC 9112, section 3.2).
        let builder = Request::builder().method(verb).uri(path).header(header::HOST, "localhost");
        let (builder, content) = match body {
            Some(body) => {
                (builder.header(header::CONTENT_TYPE, "application/json"), body.to_string().into_bytes())
            }
            None => (builder, Vec::new()),
        };
        let request = builder.body(Full::new(content.into())).map_err(bad)?;
        self.sender.ready().await.map_err(|error| broken(error.into()))?;
        let answer = self.sender.send_request(request).await.map_err(|error| broken(error.into()))?;
        let status = answer.status();
        let content =
            Limited::new(answer.into_body(), BODY_LIMIT).collect().await.map_err(broken)?.to_bytes();
        if !status.is_success() {
            let (status, message) = (status.as_u16(), words(&content));
            return Err(HttpError::Refused { request: name(), status, message });
        }
        if content.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&content).map_err(|source| HttpError::Malformed { request: name(), source })
    }
}

/// A refusal's own words: Firecracker has them in a field, others have nothing else.
fn words(content: &[u8]) -> String {
    let field = serde_json::from_slice::<Value>(content)
        .ok()
        .and_then(|body| body["fault_message"].as_str().map(ToOwned::to_owned));
    field.unwrap_or_else(|| String::from_utf8_lossy(content).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Serves one connection: reads what comes and answers with the next text, until there are no more.
    fn service(
        answers: &'static [&'static str],
    ) -> (tempfile::TempDir, PathBuf, tokio::task::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let heard = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = String::new();
            for answer in answers {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).await.unwrap();
                heard.push_str(&String::from_utf8_lossy(&buffer[..read]));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            heard
        });
        (dir, socket, heard)
    }

    #[tokio::test]
    async fn requests_follow_each_other_on_one_connection() {
        let (_dir, socket, heard) = service(&[
            "HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 400 \r\nContent-Length: 36\r\n\r\n{\"fault_message\":\"No such drive: a\"}",
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{\"a\": 12}",
        ]);
        let mut client = HttpClient::connect(&socket, LIMIT).await.unwrap();
        let body = serde_json::json!({"is": 1});
        assert_eq!(client.request("PUT", "/drives/a", Some(&body)).await.unwrap(), Value::Null);
        let refused = client.request("PATCH", "/drives/a", Some(&body)).await.unwrap_err();
        assert_eq!(refused.to_string(), "PATCH /drives/a was refused (400): No such drive: a");
        assert_eq!(client.request("GET", "/", None).await.unwrap()["a"], 12);
        let heard = heard.await.unwrap().to_lowercase();
        assert!(heard.starts_with("put /drives/a http/1.1\r\n"), "{heard}");
        assert!(heard.contains("content-length: 8\r\n") && heard.contains("host: localhost\r\n"), "{heard}");
        // The service hangs up.
        let broken = client.request("GET", "/", None).await.unwrap_err();
        assert!(matches!(broken, HttpError::Broken { .. }), "{broken}");
    }

    #[tokio::test]
    async fn who_is_not_there_or_does_not_answer_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let nobody = HttpClient::connect(&dir.path().join("none"), LIMIT).await.unwrap_err();
        assert!(nobody.is_nobody(), "{nobody}");
        let socket = dir.path().join("mute");
        let _listener = UnixListener::bind(&socket).unwrap();
        let mut client = HttpClient::connect(&socket, Duration::from_millis(50)).await.unwrap();
        let late = client.request("GET", "/", None).await.unwrap_err();
        assert!(matches!(late, HttpError::TimedOut { millis: 50, .. }) && !late.is_nobody(), "{late}");
        let odd = client.request("GE T", "/", None).await.unwrap_err();
        assert!(matches!(odd, HttpError::Request { .. }), "{odd}");
    }
}
