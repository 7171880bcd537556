//! What is answered to what.

use hickory_server::{
    proto::{
        op::{Message, OpCode, ResponseCode},
        rr::{DNSClass, RData, RecordType},
    },
    resolver::{
        TokioResolver,
        config::{ConnectionConfig, NameServerConfig, ProtocolConfig, ResolverConfig},
    },
};

use crate::support::*;

async fn both(server: std::net::SocketAddr, message: &Message) -> Message {
    let (over_udp, over_tcp) = (udp(GUEST, server, message).await, tcp(GUEST, server, message).await);
    assert_eq!(over_udp.to_vec().unwrap(), over_tcp.to_vec().unwrap(), "UDP and TCP say the same");
    over_udp
}

#[tokio::test]
async fn every_kind_of_record() {
    let (_server, at) = serve(config(vec![]), table()).await;
    for (owner, qtype, expected) in [
        ("web.vm.", RecordType::A, vec!["A 10.213.4.9"]),
        ("web.vm.", RecordType::AAAA, vec!["AAAA fd00::9"]),
        ("9.4.213.10.in-addr.arpa.", RecordType::PTR, vec!["PTR web.vm."]),
        ("www.vm.", RecordType::A, vec!["CNAME web.vm.", "A 10.213.4.9"]),
        ("www.vm.", RecordType::CNAME, vec!["CNAME web.vm."]),
        ("web.vm.", RecordType::ANY, vec!["A 10.213.4.9"]),
        ("vm.", RecordType::NS, vec!["NS vm."]),
    ] {
        let answer = both(at, &question(owner, qtype)).await;
        assert_eq!(code(&answer), ResponseCode::NoError, "{owner} {qtype}");
        assert_eq!(data(&answer), expected, "{owner} {qtype}");
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available, "{owner} {qtype}");
        assert!(answer.metadata.recursion_desired && !answer.metadata.authentic_data);
    }
    let text = both(at, &question("text.vm.", RecordType::TXT)).await;
    let RData::TXT(txt) = &text.answers[0].data else { panic!("{text:?}") };
    assert_eq!(txt.txt_data.iter().map(|piece| piece.len()).collect::<Vec<_>>(), [5, 255, 45]);
    assert_eq!(both(at, &question("vm.", RecordType::SOA)).await.answers.len(), 1);
    let any = both(at, &question("vm.", RecordType::ANY)).await;
    assert_eq!(any.answers.len(), 1, "one record set for ANY");
}

#[tokio::test]
async fn no_such_name_and_no_such_type_differ_and_say_how_long() {
    let (_server, at) = serve(config(vec![]), table()).await;
    for (owner, qtype, expected) in [
        ("nobody.vm.", RecordType::A, ResponseCode::NXDomain),
        ("web.vm.", RecordType::MX, ResponseCode::NoError),
        ("deep.vm.", RecordType::A, ResponseCode::NoError),
        ("vm.", RecordType::A, ResponseCode::NoError),
        ("8.4.213.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NXDomain),
        ("4.213.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NoError),
    ] {
        let answer = both(at, &question(owner, qtype)).await;
        assert_eq!((code(&answer), answer.answers.len()), (expected, 0), "{owner} {qtype}");
        assert!(answer.metadata.authoritative, "{owner} {qtype}");
        let [soa] = &answer.authorities[..] else { panic!("{owner} {qtype}: {:?}", answer.authorities) };
        let RData::SOA(data) = &soa.data else { panic!("{soa:?}") };
        assert_eq!((soa.ttl, data.minimum), (5, 5));
        assert!(soa.name.zone_of(&name(owner)));
    }
    // An alias of nothing: the alias is there, the code is that of its end.
    let answer = both(at, &question("gone.vm.", RecordType::A)).await;
    assert_eq!((code(&answer), data(&answer)), (ResponseCode::NXDomain, vec!["CNAME nobody.vm.".to_owned()]));
    assert_eq!(answer.authorities.len(), 1);
}

#[tokio::test]
async fn a_circle_of_aliases_ends() {
    let (_server, at) = serve(config(vec![]), table()).await;
    let answer = both(at, &question("ring.vm.", RecordType::A)).await;
    assert_eq!(code(&answer), ResponseCode::ServFail);
}

#[tokio::test]
async fn the_question_comes_back_as_it_was_spelled() {
    let (_server, at) = serve(config(vec![]), table()).await;
    let answer = both(at, &question("wEb.Vm.", RecordType::A)).await;
    assert_eq!(data(&answer), ["A 10.213.4.9"]);
    assert!(answer.queries[0].name().eq_case(&name("wEb.Vm.")));
    assert!(answer.answers[0].name.eq_case(&name("wEb.Vm.")));
}

#[tokio::test]
async fn what_does_not_fit_is_asked_again_over_tcp() {
    let (_server, at) = serve(config(vec![]), table()).await;
    for payload in [None, Some(100), Some(1232), Some(65_535)] {
        let plain = question("big.vm.", RecordType::A);
        let message = payload.map_or(plain.clone(), |payload| with_edns(plain, payload));
        let bytes = udp_raw(GUEST, at, &message.to_vec().unwrap()).await;
        assert!(bytes.len() <= 512, "{payload:?}: {} bytes", bytes.len());
        let answer = Message::from_vec(&bytes).unwrap();
        assert!(answer.metadata.truncation && answer.answers.is_empty(), "{payload:?}");
        assert_eq!(answer.edns.is_some(), payload.is_some(), "{payload:?}");
        let answer = tcp(GUEST, at, &message).await;
        assert!(!answer.metadata.truncation);
        assert_eq!(answer.answers.len(), 200, "{payload:?}");
    }
    // Between the old limit and the new one EDNS decides.
    let table = table();
    for low in 0..40 {
        table.add(record("mid.vm.", vm_dns::RecordData::A([10, 213, 6, low].into())));
    }
    let (_server, at) = serve(config(vec![]), table).await;
    let plain = question("mid.vm.", RecordType::A);
    assert!(udp(GUEST, at, &plain).await.metadata.truncation);
    assert_eq!(udp(GUEST, at, &with_edns(plain, 1232)).await.answers.len(), 40);
}

#[tokio::test]
async fn odd_questions_get_the_answers_that_the_protocol_wants() {
    let (_server, at) = serve(config(vec![]), table()).await;
    let asked = || question("web.vm.", RecordType::A);
    let mut update = asked();
    update.metadata.op_code = OpCode::Update;
    let mut two = asked();
    two.add_query(two.queries[0].clone());
    let mut none = asked();
    none.queries.clear();
    let mut chaos = asked();
    chaos.queries[0].set_query_class(DNSClass::CH);
    let mut future = with_edns(asked(), 1232);
    future.edns.as_mut().unwrap().set_version(1);
    let mut no_recursion = question("example.test.", RecordType::A);
    no_recursion.metadata.recursion_desired = false;
    for (what, message, expected) in [
        ("an update", update, ResponseCode::NotImp),
        ("two questions", two, ResponseCode::FormErr),
        ("no question", none, ResponseCode::FormErr),
        ("another class", chaos, ResponseCode::Refused),
        ("a future EDNS", future, ResponseCode::BADVERS),
        ("a zone transfer", question("vm.", RecordType::AXFR), ResponseCode::Refused),
        ("a question type that is none", question("web.vm.", RecordType::from(249)), ResponseCode::NotImp),
        ("what may be remembered", no_recursion, ResponseCode::Refused),
    ] {
        let answer = both(at, &message).await;
        // By number: 16 is BADVERS here and BADSIG in a signed message.
        assert_eq!(u16::from(code(&answer)), u16::from(expected), "{what}");
        assert!(answer.answers.is_empty() && !answer.metadata.authoritative, "{what}");
    }
}

#[tokio::test]
async fn a_real_client_that_checks_spelling_finds_its_way() {
    let (_server, at) = serve(config(vec![]), table()).await;
    let connections = [ProtocolConfig::Udp, ProtocolConfig::Tcp].map(|protocol| {
        let mut connection = ConnectionConfig::new(protocol);
        connection.port = at.port();
        connection.bind_addr = Some((GUEST, 0).into());
        connection
    });
    let server = NameServerConfig::new(at.ip(), true, connections.into());
    let config = ResolverConfig::from_parts(None, vec![], vec![server]);
    let mut builder = TokioResolver::builder_with_config(config, Default::default());
    builder.options_mut().case_randomization = true;
    let client = builder.build().unwrap();
    assert_eq!(client.ipv4_lookup("www.vm.").await.unwrap().answers().len(), 2);
    assert_eq!(client.ipv4_lookup("big.vm.").await.unwrap().answers().len(), 200, "by way of TCP");
    let address: std::net::IpAddr = [10, 213, 4, 9].into();
    let back = client.reverse_lookup(address).await.unwrap();
    assert_eq!(back.answers()[0].data.to_string(), "web.vm.");
    let error = client.ipv4_lookup("nobody.vm.").await.unwrap_err();
    assert!(error.is_nx_domain() && error.into_soa().is_some());
}
