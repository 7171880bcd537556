//! A resolver that misbehaves spoils its own answers only.

use std::{error::Error, future::pending, sync::Arc, time::Duration};

use async_trait::async_trait;
use hickory_server::proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use tokio::net::UdpSocket;
use vm_dns::{Answer, Name, Question, RecordData, Resolver};

use crate::support::*;

/// Says one thing about every name in `vm.`.
pub(crate) struct Fixed(Answer);

impl Fixed {
    pub(crate) fn new(answer: Answer) -> Arc<Self> {
        Arc::new(Self(answer))
    }
}

#[async_trait]
impl Resolver for Fixed {
    fn zones(&self) -> Vec<Name> {
        vec![name("vm.")]
    }

    async fn resolve(&self, _question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>> {
        Ok(self.0.clone())
    }
}

/// Does as the first label says.
struct Moody;

#[async_trait]
impl Resolver for Moody {
    fn zones(&self) -> Vec<Name> {
        vec![name("vm.")]
    }

    async fn resolve(&self, question: &Question) -> Result<Answer, Box<dyn Error + Send + Sync>> {
        let mood = question.name.to_string();
        match mood.split('-').next().unwrap_or_default() {
            "slow" => pending().await,
            "panic" => panic!("as the test asked"),
            "fail" => Err("as the test asked".into()),
            "refuse" => Ok(Answer::Refused),
            "alien" => Ok(Answer::Records(vec![record("other.vm.", RecordData::A([10, 0, 0, 1].into()))])),
            _ => Ok(Answer::Records(vec![vm_dns::Record {
                name: question.name.clone(),
                ttl: 1,
                data: RecordData::A([10, 213, 4, 77].into()),
            }])),
        }
    }
}

#[tokio::test]
async fn each_failure_is_one_answer() {
    let mut config = config(vec![]);
    // Waited for once, and time enough for the others on a busy machine.
    config.limits.resolver_deadline = Duration::from_secs(3);
    let (server, at) = serve(config, Arc::new(Moody)).await;
    for (owner, expected) in [
        ("slow-1.vm.", ResponseCode::ServFail),
        ("panic-1.vm.", ResponseCode::ServFail),
        ("fail-1.vm.", ResponseCode::ServFail),
        ("refuse-1.vm.", ResponseCode::Refused),
        ("good-1.vm.", ResponseCode::NoError),
    ] {
        let answer = ask(at, owner, RecordType::A).await;
        assert_eq!(code(&answer), expected, "{owner}");
        assert_eq!(answer.metadata.authoritative, expected == ResponseCode::NoError, "{owner}");
    }
    assert_eq!(server.stats().resolver_failures, 3);
    // Records of other names are no answer.
    let alien = ask(at, "alien-1.vm.", RecordType::A).await;
    assert_eq!((code(&alien), alien.answers.len(), alien.authorities.len()), (ResponseCode::NoError, 0, 1));
}

#[tokio::test]
async fn five_hundred_bad_questions_delay_no_good_one() {
    let mut config = config(vec![]);
    // The slow ones stay until the end of the test, in which a good one must be answered: no clock is in it.
    config.limits.resolver_deadline = PATIENCE * 10;
    config.limits.questions_per_client = 1000;
    let (server, at) = serve(config, Arc::new(Moody)).await;
    let bad = UdpSocket::bind((GUEST, 0)).await.unwrap();
    bad.connect(at).await.unwrap();
    for number in 0..500 {
        let mood = if number % 2 == 0 { "slow" } else { "panic" };
        bad.send(&question(&format!("{mood}-{number}.vm."), RecordType::A).to_vec().unwrap()).await.unwrap();
        // Every panic is answered, so all have arrived when the last one is.
        if number % 2 == 1 {
            assert_eq!(code(&Message::from_vec(&receive(&bad).await).unwrap()), ResponseCode::ServFail);
        }
    }
    for number in 0..100 {
        let answer = ask(at, &format!("good-{number}.vm."), RecordType::A).await;
        assert_eq!(data(&answer), ["A 10.213.4.77"]);
    }
    assert_eq!(server.stats().resolver_failures, 250);
    // A slow question of a connection does not hold up the next one.
    let mut stream = connect(GUEST, at).await;
    write_frame(&mut stream, &question("slow-x.vm.", RecordType::A)).await;
    let good = question("good-x.vm.", RecordType::A);
    write_frame(&mut stream, &good).await;
    assert_eq!(read_frame(&mut stream).await.unwrap().metadata.id, good.metadata.id);
    // Stopping waits for none of them.
    tokio::time::timeout(PATIENCE, server.stop()).await.unwrap();
}

#[tokio::test]
async fn calls_beyond_the_limit_fail_at_once_and_come_back() {
    let mut config = config(vec![]);
    config.limits.resolver_calls = 2;
    config.limits.resolver_deadline = Duration::from_secs(3);
    let (server, at) = serve(config, Arc::new(Moody)).await;
    let slow = UdpSocket::bind((GUEST, 0)).await.unwrap();
    slow.connect(at).await.unwrap();
    for number in 0..3 {
        slow.send(&question(&format!("slow-{number}.vm."), RecordType::A).to_vec().unwrap()).await.unwrap();
    }
    for _ in 0..3 {
        assert_eq!(code(&Message::from_vec(&receive(&slow).await).unwrap()), ResponseCode::ServFail);
    }
    assert_eq!(server.stats().overload, 1);
    // A place is free again when its call has really ended, which may be a moment after its answer.
    let good = async { while code(&ask(at, "good-1.vm.", RecordType::A).await) != ResponseCode::NoError {} };
    tokio::time::timeout(PATIENCE, good).await.unwrap();
}
