//! Strangers, nonsense and floods.

use std::time::Duration;

use hickory_server::proto::{
    op::{Message, MessageType, ResponseCode},
    rr::RecordType,
};
use tokio::{io::AsyncWriteExt, net::UdpSocket};
use vm_dns::Networks;

use crate::support::*;

#[tokio::test]
async fn strangers_are_refused_whatever_they_ask() {
    let upstream = knows([192, 0, 2, 1]).await;
    let (server, at) = serve(config(vec![upstream.address]), table()).await;
    for (owner, qtype) in [
        ("web.vm.", RecordType::A),
        ("example.test.", RecordType::A),
        ("9.4.213.10.in-addr.arpa.", RecordType::PTR),
        ("localhost.", RecordType::A),
    ] {
        let message = question(owner, qtype);
        for answer in [udp(STRANGER, at, &message).await, tcp(STRANGER, at, &message).await] {
            assert_eq!(code(&answer), ResponseCode::Refused, "{owner}");
            assert!(answer.answers.is_empty() && answer.authorities.is_empty(), "{owner}");
            assert!(!answer.metadata.recursion_available, "{owner}");
        }
    }
    assert_eq!(upstream.asked(), 0);
    assert_eq!(server.stats().strangers, 8);
    // A stranger's connection ends with the first refusal.
    let mut stream = connect(STRANGER, at).await;
    write_frame(&mut stream, &question("web.vm.", RecordType::A)).await;
    write_frame(&mut stream, &question("web.vm.", RecordType::A)).await;
    assert!(read_frame(&mut stream).await.is_some());
    assert!(read_frame(&mut stream).await.is_none());
    // Who is a stranger can change.
    let clients = vec!["127.66.0.0/16".parse().unwrap()];
    server.set_networks(Networks { clients, reverse: vec![] });
    assert_eq!(data(&udp(STRANGER, at, &question("web.vm.", RecordType::A)).await), ["A 10.213.4.9"]);
    assert_eq!(code(&ask(at, "web.vm.", RecordType::A).await), ResponseCode::Refused);
}

#[tokio::test]
async fn refusals_are_rationed() {
    let mut config = config(vec![]);
    config.limits.refusals_per_second = 0;
    let (server, at) = serve(config, table()).await;
    let stranger = UdpSocket::bind((STRANGER, 0)).await.unwrap();
    stranger.connect(at).await.unwrap();
    stranger.send(&question("web.vm.", RecordType::A).to_vec().unwrap()).await.unwrap();
    let counted = async {
        while server.stats().strangers == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.unwrap();
    assert_eq!(data(&ask(at, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
    assert!(stranger.try_recv(&mut [0; 512]).is_err(), "silence");
}

#[tokio::test]
async fn nonsense_kills_nothing() {
    let (_server, at) = serve(config(vec![]), table()).await;
    let good = with_edns(question("web.vm.", RecordType::A), 1232).to_vec().unwrap();
    let socket = UdpSocket::bind((GUEST, 0)).await.unwrap();
    socket.connect(at).await.unwrap();
    // Every length, every single byte turned over, and headers that promise more than there is.
    for length in 0..good.len() {
        socket.send(&good[..length]).await.unwrap();
        let mut bent = good.clone();
        bent[length] ^= 0xff;
        socket.send(&bent).await.unwrap();
    }
    for promise in 4..12 {
        let mut header = good[..12].to_vec();
        header[promise] = 0xff;
        socket.send(&header).await.unwrap();
    }
    // A name that points at itself.
    let mut knot = good[..12].to_vec();
    knot.extend([0xc0, 0x0c, 0, 1, 0, 1]);
    knot[11] = 0;
    assert_eq!(code(&Message::from_vec(&udp_raw(GUEST, at, &knot).await).unwrap()), ResponseCode::FormErr);
    // Answers are not answered, whole or broken.
    let mut answer = question("web.vm.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    let quiet = UdpSocket::bind((GUEST, 0)).await.unwrap();
    quiet.connect(at).await.unwrap();
    quiet.send(&answer.to_vec().unwrap()).await.unwrap();
    quiet.send(&answer.to_vec().unwrap()[..20]).await.unwrap();
    // The same over TCP: half a length, half a message, a length of nothing.
    for bytes in [&[0_u8][..], &[0, 40, 1, 2, 3], &[0, 0], &[0, 3, 1, 2, 3]] {
        connect(GUEST, at).await.write_all(bytes).await.unwrap();
    }
    assert_eq!(data(&ask(at, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
    let over_tcp = tcp(GUEST, at, &question("web.vm.", RecordType::A)).await;
    assert_eq!(data(&over_tcp), ["A 10.213.4.9"]);
    assert!(quiet.try_recv(&mut [0; 512]).is_err(), "silence");
}

#[tokio::test]
async fn a_silent_connection_is_cut_and_half_closed_ones_get_their_answer() {
    let mut config = config(vec![]);
    config.limits.idle = Duration::from_millis(200);
    let (_server, at) = serve(config, table()).await;
    let mut silent = connect(GUEST, at).await;
    silent.write_all(&[0]).await.unwrap();
    assert!(read_frame(&mut silent).await.is_none());
    let (_server, at) = serve(crate::support::config(vec![]), table()).await;
    let mut half = connect(GUEST, at).await;
    write_frame(&mut half, &question("web.vm.", RecordType::A)).await;
    half.shutdown().await.unwrap();
    assert_eq!(data(&read_frame(&mut half).await.unwrap()), ["A 10.213.4.9"]);
    assert!(read_frame(&mut half).await.is_none());
}

#[tokio::test]
async fn connections_are_counted() {
    let mut config = config(vec![]);
    config.limits.connections = 2;
    config.limits.idle = PATIENCE * 10;
    let (_server, at) = serve(config, table()).await;
    let message = question("web.vm.", RecordType::A);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = connect(GUEST, at).await;
        write_frame(&mut stream, &message).await;
        assert!(read_frame(&mut stream).await.is_some());
        open.push(stream);
    }
    assert!(read_frame(&mut connect(GUEST, at).await).await.is_none(), "the third is turned away");
    open.clear();
    // When one has gone there is a place again.
    let again = async {
        loop {
            let mut stream = connect(GUEST, at).await;
            let frame = message.to_vec().unwrap();
            let length = u16::try_from(frame.len()).unwrap().to_be_bytes();
            let sent = stream.write_all(&[&length[..], &frame[..]].concat()).await;
            if sent.is_ok() && read_frame(&mut stream).await.is_some() {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, again).await.unwrap();
    let many: Vec<_> =
        (0..100).map(|_| tokio::spawn(async move { ask(at, "web.vm.", RecordType::A).await })).collect();
    for answer in many {
        assert_eq!(data(&answer.await.unwrap()), ["A 10.213.4.9"]);
    }
}
