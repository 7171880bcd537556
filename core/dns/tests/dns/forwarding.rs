//! Names of others.

use std::{fs, net::SocketAddr, sync::atomic::Ordering, time::Duration};

use hickory_server::proto::{
    op::{Message, ResponseCode},
    rr::{RData, Record as WireRecord, RecordType, rdata::SOA},
};
use tokio::net::UdpSocket;
use vm_dns::{Answer, Limits, NoResolver, Upstreams};

use crate::{isolation::Fixed, support::*};

/// An address where nobody answers: bound, and never read.
async fn silent() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

#[tokio::test]
async fn other_names_come_from_the_upstream_and_are_remembered() {
    let upstream = knows([192, 0, 2, 1]).await;
    let (server, at) = serve(config(vec![upstream.address]), table()).await;
    for message in [question("example.test.", RecordType::A), question("EXAMPLE.test.", RecordType::A)] {
        for answer in [udp(GUEST, at, &message).await, tcp(GUEST, at, &message).await] {
            assert_eq!(data(&answer), ["A 192.0.2.1"]);
            assert!(!answer.metadata.authoritative && answer.metadata.recursion_available);
            assert!(answer.queries[0].name().eq_case(message.queries[0].name()));
            assert!(answer.answers[0].ttl <= 60);
        }
    }
    assert_eq!(upstream.asked(), 1, "the rest came from memory");
    assert_eq!((server.stats().forwarded, server.stats().cached), (1, 3));
    // An alias that leaves the zone is followed there.
    let answer = ask(at, "out.vm.", RecordType::A).await;
    assert_eq!(data(&answer), ["CNAME example.test.", "A 192.0.2.1"]);
    assert!(answer.metadata.authoritative);
    // This host's own name goes nowhere.
    assert_eq!(data(&ask(at, "localhost.", RecordType::A).await), ["A 127.0.0.1"]);
    assert_eq!(upstream.asked(), 1);
}

#[tokio::test]
async fn no_is_handed_on_with_its_reason_to_remember_it() {
    let upstream = Upstream::start(|question| {
        let exists = question.queries[0].name().to_string().starts_with("there");
        let code = if exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
        let mut reply = response(question, code);
        let soa = SOA::new(name("ns.test."), name("me.test."), 7, 1, 1, 1, 40);
        reply.add_authority(WireRecord::from_rdata(name("test."), 50, RData::SOA(soa)));
        Some(reply)
    })
    .await;
    let (_server, at) = serve(config(vec![upstream.address]), table()).await;
    for (owner, expected) in
        [("there.test.", ResponseCode::NoError), ("nowhere.test.", ResponseCode::NXDomain)]
    {
        for _ in 0..2 {
            let answer = ask(at, owner, RecordType::A).await;
            assert_eq!(
                (code(&answer), answer.answers.len(), answer.authorities.len()),
                (expected, 0, 1),
                "{owner}"
            );
        }
    }
    assert_eq!(upstream.asked(), 2, "each was asked once");
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_over_tcp() {
    let upstream =
        Upstream::start(|question| Some(addresses(question, (0..150).map(|low| [192, 0, 2, low].into()))))
            .await;
    let (_server, at) = serve(config(vec![upstream.address]), table()).await;
    let message = with_edns(question("big.test.", RecordType::A), 1232);
    assert!(udp(GUEST, at, &message).await.metadata.truncation);
    assert_eq!(tcp(GUEST, at, &message).await.answers.len(), 150);
    assert!(upstream.over_tcp.load(Ordering::SeqCst) > 0);
}

#[tokio::test]
async fn what_nobody_asked_for_is_left_out_before_an_answer_is_truncated() {
    let upstream = Upstream::start(|question| {
        let mut reply = addresses(question, [[192, 0, 2, 1].into()]);
        reply.add_additionals(addresses(question, (0..60).map(|low| [192, 0, 3, low].into())).answers);
        Some(reply)
    })
    .await;
    let (_server, at) = serve(config(vec![upstream.address]), table()).await;
    let answer = ask(at, "chatty.test.", RecordType::A).await;
    assert_eq!((data(&answer), answer.additionals.len()), (vec!["A 192.0.2.1".to_owned()], 0));
    assert!(!answer.metadata.truncation);
    let whole = tcp(GUEST, at, &question("chatty.test.", RecordType::A)).await;
    assert_eq!(whole.additionals.len(), 60);
}

#[tokio::test]
async fn the_next_upstream_is_asked_when_one_is_silent_or_cannot_help() {
    let helpless = Upstream::start(|question| Some(response(question, ResponseCode::ServFail))).await;
    let good = knows([192, 0, 2, 2]).await;
    let (_socket, dead) = silent().await;
    let mut config = config(vec![dead, helpless.address, good.address]);
    // Waited for once, by the first question; a good one must be answered in it, however busy the machine.
    config.limits.upstream_timeout = Duration::from_secs(3);
    config.limits.upstream_penalty = PATIENCE * 10;
    let (_server, at) = serve(config, table()).await;
    assert_eq!(data(&ask(at, "one.test.", RecordType::A).await), ["A 192.0.2.2"]);
    assert_eq!(data(&ask(at, "two.test.", RecordType::A).await), ["A 192.0.2.2"]);
    assert_eq!(helpless.asked(), 2);
}

#[tokio::test]
async fn an_upstream_without_edns_is_asked_without() {
    let old = Upstream::start(|question| {
        Some(match question.edns {
            Some(_) => response(question, ResponseCode::FormErr),
            None => addresses(question, [[192, 0, 2, 3].into()]),
        })
    })
    .await;
    let (_server, at) = serve(config(vec![old.address]), table()).await;
    assert_eq!(data(&ask(at, "old.test.", RecordType::A).await), ["A 192.0.2.3"]);
}

#[tokio::test]
async fn dead_upstreams_end_in_servfail_and_hold_nothing_else_up() {
    let (_socket, dead) = silent().await;
    let mut config = config(vec![dead]);
    // Longer than the test may take: nothing below waits for it.
    config.limits.upstream_timeout = PATIENCE * 10;
    config.limits.forward_deadline = PATIENCE * 10;
    config.limits.forwards = 20;
    let (server, at) = serve(config, table()).await;
    let socket = UdpSocket::bind((GUEST, 0)).await.unwrap();
    socket.connect(at).await.unwrap();
    for number in 0..20 {
        socket.send(&question(&format!("n{number}.test."), RecordType::A).to_vec().unwrap()).await.unwrap();
    }
    // The twenty have all the places there are, so one more is turned away at once …
    loop {
        let answer = ask(at, "more.test.", RecordType::A).await;
        if code(&answer) == ResponseCode::ServFail {
            break;
        }
    }
    // … and the zone does not notice.
    assert_eq!(data(&ask(at, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
    server.stop().await;

    let (_socket, dead) = silent().await;
    let mut config = crate::support::config(vec![dead]);
    config.limits.upstream_timeout = Duration::from_millis(100);
    let (server, at) = serve(config, table()).await;
    let answer = udp(GUEST, at, &with_edns(question("gone.test.", RecordType::A), 1232)).await;
    assert_eq!(code(&answer), ResponseCode::ServFail);
    assert!(answer.edns.unwrap().options().as_ref().iter().count() > 0, "it says why");
    assert_eq!(server.stats().upstream_failures, 1);
}

#[tokio::test]
async fn without_upstreams_and_with_only_itself_nothing_is_known() {
    let (server, at) = serve(config(vec![]), table()).await;
    assert_eq!(code(&ask(at, "example.test.", RecordType::A).await), ResponseCode::ServFail);
    server.set_upstreams(Upstreams::Given(vec![at]));
    assert_eq!(code(&ask(at, "example.test.", RecordType::A).await), ResponseCode::ServFail);
    let stats = server.stats();
    assert_eq!((stats.forwarded, stats.upstream_failures), (0, 2), "it did not ask itself");
    let upstream = knows([192, 0, 2, 4]).await;
    server.set_upstreams(Upstreams::Given(vec![at, upstream.address]));
    assert_eq!(data(&ask(at, "example.test.", RecordType::A).await), ["A 192.0.2.4"]);
}

#[tokio::test]
async fn a_name_that_the_resolver_passes_on_is_forwarded_but_no_private_address() {
    let upstream = knows([192, 0, 2, 5]).await;
    let (server, at) = serve(config(vec![upstream.address]), Fixed::new(Answer::Pass)).await;
    assert_eq!(data(&ask(at, "x.vm.", RecordType::A).await), ["A 192.0.2.5"]);
    let answer = ask(at, "7.4.213.10.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(code(&answer), ResponseCode::NXDomain);
    server.set_resolver(std::sync::Arc::new(NoResolver));
    assert_eq!(code(&ask(at, "7.4.213.10.in-addr.arpa.", RecordType::PTR).await), ResponseCode::NXDomain);
    assert_eq!(upstream.asked(), 1);
}

#[tokio::test]
async fn a_hosts_file_of_resolvers_without_any_is_no_accident() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    fs::write(&path, "search lan\n").unwrap();
    let mut config = config(vec![]);
    config.upstreams = Upstreams::ResolvConf(path);
    config.limits = Limits::default();
    let (_server, at) = serve(config, table()).await;
    assert_eq!(code(&ask(at, "example.test.", RecordType::A).await), ResponseCode::ServFail);
    assert_eq!(data(&ask(at, "web.vm.", RecordType::A).await), ["A 10.213.4.9"]);
}

#[tokio::test]
async fn signatures_are_asked_for_where_the_client_wants_them() {
    let upstream = Upstream::start(|question| {
        let wants = question.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        Some(addresses(question, [[192, 0, 2, if wants { 9 } else { 8 }].into()]))
    })
    .await;
    let (_server, at) = serve(config(vec![upstream.address]), table()).await;
    let mut signed: Message = with_edns(question("s.test.", RecordType::A), 1232);
    signed.edns.as_mut().unwrap().set_dnssec_ok(true);
    assert_eq!(data(&udp(GUEST, at, &signed).await), ["A 192.0.2.9"]);
    assert_eq!(data(&ask(at, "s.test.", RecordType::A).await), ["A 192.0.2.8"]);
}
