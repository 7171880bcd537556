//! Listening, admitting peers, and handing connections to the methods.

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use jsonrpsee::{
    RpcModule,
    core::RegisterMethodError,
    server::{HttpBody, HttpResponse, Server, serve_with_graceful_shutdown, stop_channel},
};
use nix::unistd::Uid;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use vm_api::rpc::{
    DaemonServer, EventsServer, ImageServer, KernelServer, OperationServer, PluginsServer, VmServer,
    WorkspacesServer,
};
use vm_engine::Engine;

use crate::{config::Config, dns::NameService, plugins::Manager};

/// How long open connections get for their last answers when the daemon ends.
const LAST_ANSWERS: std::time::Duration = std::time::Duration::from_secs(5);

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    /// Its process, unless it is in a PID namespace that the daemon does not see.
    pub(crate) pid: Option<u32>,
    /// Its user.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
}

/// Who may connect.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    group: Option<u32>,
}

impl Access {
    pub(crate) fn new(group: Option<u32>) -> Self {
        Self { group }
    }

    /// Root, the daemon's own user, and processes that have the configured group. The socket's mode says the same; this holds
    /// where somebody has loosened it.
    fn admits(&self, uid: u32, groups: &[u32]) -> bool {
        uid == 0
            || uid == Uid::effective().as_raw()
            || self.group.is_some_and(|group| groups.contains(&group))
    }
}

/// What every namespace's methods have.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) engine: Engine,
    pub(crate) plugins: Arc<Manager>,
    pub(crate) names: NameService,
    pub(crate) config: Arc<Config>,
    pub(crate) stop: CancellationToken,
    pub(crate) started_at: u64,
}

/// Binds the socket. The caller holds the daemon's lock, so a socket file that is there belongs to nobody.
pub(crate) fn bind(path: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    vm_host::files::remove_if_there(path)?;
    let listener = UnixListener::bind(path)?;
    std::os::unix::fs::chown(path, None, group)?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Accepts connections until `stop`; those that are open then live on until `close`.
pub(crate) async fn serve(
    listener: UnixListener,
    context: Context,
    access: Access,
    close: CancellationToken,
) {
    let stop = context.stop.clone();
    let methods = match methods(&context) {
        Ok(methods) => methods,
        Err(error) => {
            // A bug that the first test finds; half an interface would only hide it.
            tracing::error!(%error, "two methods have one name");
            stop.cancel();
            return;
        }
    };
    let (stop_handle, server_handle) = stop_channel();
    let builder = Server::builder()
        .set_config(jsonrpsee::server::ServerConfig::builder().max_connections(1024).build())
        .to_service_builder();
    loop {
        // Cancel-safe: accepting loses no connection when dropped.
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    // Out of descriptors, most likely: let some go before the next try.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let Some(peer) = admit(&stream, access) else {
            tokio::spawn(refuse(stream));
            continue;
        };
        let service = builder.clone().build(methods.clone(), stop_handle.clone());
        let service = tower::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            use tower::Service;
            request.extensions_mut().insert(peer);
            let mut service = service.clone();
            service.call(request)
        });
        tokio::spawn(serve_with_graceful_shutdown(stream, service, stop_handle.clone().shutdown()));
    }
    close.cancelled().await;
    let _ = server_handle.stop();
    // `stopped` waits for every clone of the handle, this one included.
    drop(stop_handle);
    if tokio::time::timeout(LAST_ANSWERS, server_handle.stopped()).await.is_err() {
        tracing::warn!("some connections did not end");
    }
}

fn admit(stream: &UnixStream, access: Access) -> Option<Peer> {
    let known = stream.peer_cred().and_then(|cred| {
        let mut groups = vm_host::socket::peer_groups(stream)?;
        groups.push(cred.gid());
        Ok((cred, groups))
    });
    match known {
        Ok((cred, groups)) if access.admits(cred.uid(), &groups) => {
            let pid = cred.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
            Some(Peer { pid, uid: cred.uid(), gid: cred.gid() })
        }
        Ok((cred, _)) => {
            tracing::warn!(uid = cred.uid(), "refused a connection");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "a connection without credentials");
            None
        }
    }
}

/// Answers the first request of somebody who may not connect.
async fn refuse(stream: UnixStream) {
    let refuse = tower::service_fn(|_: hyper::Request<hyper::body::Incoming>| async {
        let body =
            HttpBody::from("you are neither root nor in the group that the daemon's config.toml names\n");
        let mut answer = HttpResponse::new(body);
        *answer.status_mut() = hyper::StatusCode::FORBIDDEN;
        Ok::<_, std::convert::Infallible>(answer)
    });
    let served = serve_with_graceful_shutdown(stream, refuse, std::future::pending());
    let _ = tokio::time::timeout(LAST_ANSWERS, served).await;
}

fn methods(context: &Context) -> Result<RpcModule<()>, RegisterMethodError> {
    let mut module = RpcModule::new(());
    module.merge(VmServer::into_rpc(context.clone()))?;
    module.merge(ImageServer::into_rpc(context.clone()))?;
    module.merge(KernelServer::into_rpc(context.clone()))?;
    module.merge(OperationServer::into_rpc(context.clone()))?;
    module.merge(DaemonServer::into_rpc(context.clone()))?;
    module.merge(EventsServer::into_rpc(context.clone()))?;
    module.merge(PluginsServer::into_rpc(context.clone()))?;
    module.merge(WorkspacesServer::into_rpc(context.clone()))?;
    Ok(module)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn whoever_has_the_group_is_admitted() {
        let access = Access::new(Some(700));
        assert!(access.admits(0, &[]) && access.admits(1000, &[5, 700]));
        assert!(!access.admits(1000, &[5]) && !Access::new(None).admits(1000, &[700]));
    }

    #[tokio::test]
    async fn who_is_not_admitted_is_told() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let (read, ()) = tokio::join!(far.read_to_string(&mut answer), refuse(near));
        read.unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("config.toml"), "{answer}");
    }
}
