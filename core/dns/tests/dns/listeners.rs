//! Addresses that come and go.

use std::{io, net::SocketAddr};

use hickory_server::proto::rr::RecordType;
use tokio::net::{TcpListener, UdpSocket};
use vm_dns::{DnsError, Server};

use crate::support::*;

#[tokio::test]
async fn listeners_come_and_go_and_come_again() {
    // An address of its own: a port that is given back here must not come to the server of another test.
    let own = "127.20.0.6:0".parse().unwrap();
    let server = Server::start(config(vec![]), table(), &[own]).await.unwrap();
    let first = server.listening().await[0];
    let second = server.listen("127.20.0.3:0".parse().unwrap()).await.unwrap();
    for at in [first, second] {
        assert_eq!(data(&ask(at, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
    }
    assert!(matches!(server.listen(second).await, Err(DnsError::Already { .. })));
    let open = connect(GUEST, first).await;
    assert!(server.unlisten(first).await);
    assert!(!server.unlisten(first).await);
    assert_eq!(server.listening().await, [second]);
    // The address is free for others at once, and the other listener does not notice.
    drop((UdpSocket::bind(first).await.unwrap(), TcpListener::bind(first).await.unwrap()));
    assert_eq!(data(&ask(second, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
    drop(open);
    assert_eq!(server.listen(first).await.unwrap(), first);
    assert_eq!(data(&tcp(GUEST, first, &question("web.vm.", RecordType::A)).await), ["A 10.213.4.9"]);
    server.stop().await;
    assert!(server.listening().await.is_empty());
    for at in [first, second] {
        drop((UdpSocket::bind(at).await.unwrap(), TcpListener::bind(at).await.unwrap()));
    }
}

#[tokio::test]
async fn an_address_that_cannot_be_had_says_why_and_leaves_nothing() {
    let taken = UdpSocket::bind("127.20.0.4:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    let good: SocketAddr = "127.20.0.5:0".parse().unwrap();
    let Err(error) = Server::start(config(vec![]), table(), &[good, at]).await else {
        panic!("{at} was taken")
    };
    assert!(
        error.to_string().contains(&at.to_string()) && error.hint().unwrap().contains("ss -lunpt"),
        "{error}"
    );
    drop(taken);
    let taken = TcpListener::bind(at).await.unwrap();
    let Err(error) = Server::start(config(vec![]), table(), &[at]).await else { panic!("{at} was taken") };
    assert!(matches!(error, DnsError::Bind { transport: "TCP", .. }));
    drop(taken);
    let server = Server::start(config(vec![]), table(), &[at]).await.unwrap();
    for everywhere in ["0.0.0.0:0", "[::]:0"] {
        let error = server.listen(everywhere.parse().unwrap()).await.unwrap_err();
        assert!(matches!(error, DnsError::Wildcard { .. }));
    }
    let error = server.listen("192.0.2.1:0".parse().unwrap()).await.unwrap_err();
    let DnsError::Bind { source, .. } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::AddrNotAvailable);
    assert!(error.hint().unwrap().contains("bridge"));
}
