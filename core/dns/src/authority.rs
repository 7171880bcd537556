//! Answers about the names in our zones: the resolver is asked, kept at arm's length, and put in the form that the
//! protocol wants.

use std::{
    error::Error,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hickory_server::proto::{
    op::ResponseCode,
    rr::{
        Name, RData, Record as WireRecord, RecordType,
        rdata::{A, AAAA, CNAME, HINFO, PTR, TXT},
    },
};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    Answer, Limits, Question, Record, RecordData, Resolver,
    reply::{ExtendedError, Reply},
    stats::{Counters, count},
    zones::{Zone, Zones},
};

/// Most records of one answer that are looked at: more would not fit a message (RFC 1035, section 4.2.2) anyway.
const MAX_RECORDS: usize = 4096;
/// Longest chain of aliases that is followed.
const MAX_ALIASES: usize = 8;
/// Greatest time to live (RFC 2181, section 8).
const MAX_TTL: u32 = i32::MAX as u32;

/// What the zones say about one name.
#[derive(Debug)]
pub(crate) enum Found {
    /// This.
    Reply(Reply),
    /// An alias of a name that is elsewhere: these records, then whatever is known of that name.
    Elsewhere(Vec<WireRecord>, Name),
    /// Nothing: ask as if it were in no zone.
    Pass,
}

/// Asks the resolver. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Authority {
    calls: Arc<Semaphore>,
    deadline: Duration,
    negative_ttl: u32,
    counters: Arc<Counters>,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("more than the allowed number of calls are going on")]
    Busy,
    #[error("no answer after {0:?}")]
    Late(Duration),
    #[error("it panicked")]
    Panicked,
    #[error("it failed")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
}

impl Authority {
    pub(crate) fn new(limits: &Limits, counters: Arc<Counters>) -> Self {
        Self {
            calls: Arc::new(Semaphore::new(limits.resolver_calls)),
            deadline: limits.resolver_deadline,
            negative_ttl: u32::try_from(limits.negative_ttl.as_secs()).unwrap_or(MAX_TTL).min(MAX_TTL),
            counters,
        }
    }

    /// Answers a question about a name in `zone`, following aliases (RFC 1034, section 4.3.2) as far as they stay in our zones.
    pub(crate) async fn answer(
        &self,
        resolver: &Arc<dyn Resolver>,
        zones: &Zones,
        mut zone: Zone,
        question: &Question,
    ) -> Found {
        let qtype = RecordType::from(question.qtype);
        let mut name = question.name.clone();
        let mut answers = Vec::new();
        for _ in 0..=MAX_ALIASES {
            let mut reply = match self.step(resolver, &zone, name.clone(), qtype, question.client).await {
                Step::Records(records) => {
                    let (mut chain, target) = chain(&name, qtype, records);
                    if chain.is_empty() {
                        self.no(&zone, ResponseCode::NoError)
                    } else {
                        answers.append(&mut chain);
                        match target {
                            None => Reply::authoritative(ResponseCode::NoError),
                            Some(target) => match zones.find(&target) {
                                Some(next) => {
                                    (zone, name) = (next.clone(), target);
                                    continue;
                                }
                                None => return Found::Elsewhere(answers, target),
                            },
                        }
                    }
                }
                Step::Pass if answers.is_empty() => return Found::Pass,
                Step::Pass => return Found::Elsewhere(answers, name),
                // The code is that of the last name of the chain (RFC 6604, section 3).
                Step::No(code) => self.no(&zone, code),
                Step::Failed(reply) => return Found::Reply(reply),
            };
            reply.answers = answers;
            count(&self.counters.zone);
            return Found::Reply(reply);
        }
        Found::Reply(Reply::failure(ExtendedError::other("the aliases of this name go in a circle")))
    }

    /// "No", with the record that says for how long it may be remembered (RFC 2308, section 3).
    fn no(&self, zone: &Zone, code: ResponseCode) -> Reply {
        Reply { authorities: vec![zone.soa(self.negative_ttl)], ..Reply::authoritative(code) }
    }

    async fn step(
        &self,
        resolver: &Arc<dyn Resolver>,
        zone: &Zone,
        name: Name,
        qtype: RecordType,
        client: IpAddr,
    ) -> Step {
        let apex = name == zone.apex;
        match qtype {
            RecordType::SOA if apex => return Step::Records(vec![zone.soa(self.negative_ttl)]),
            RecordType::NS if apex => return Step::Records(vec![zone.ns(self.negative_ttl)]),
            // One record set is answer enough (RFC 8482, section 4.1), so resolvers need not know ANY.
            RecordType::ANY if apex => return Step::Records(vec![zone.soa(self.negative_ttl)]),
            _ => {}
        }
        let asked = if qtype == RecordType::ANY { RecordType::A } else { qtype };
        let question = Question { name: name.clone(), qtype: asked.into(), client };
        match self.ask(resolver, question).await {
            Ok(Answer::Records(records)) => {
                let mut records: Vec<_> = records.into_iter().take(MAX_RECORDS).map(wire).collect();
                if qtype == RecordType::ANY {
                    match records.iter().find(|record| record.name == name).map(WireRecord::record_type) {
                        Some(first) => records.retain(|record| record.record_type() == first),
                        None => records = vec![minimal_any(name, self.negative_ttl)],
                    }
                }
                Step::Records(records)
            }
            Ok(Answer::NoData) if qtype == RecordType::ANY => {
                Step::Records(vec![minimal_any(name, self.negative_ttl)])
            }
            Ok(Answer::NoData) => Step::No(ResponseCode::NoError),
            // A zone's apex exists, because its SOA does.
            Ok(Answer::NxDomain) if apex => Step::No(ResponseCode::NoError),
            Ok(Answer::NxDomain) => Step::No(ResponseCode::NXDomain),
            Ok(Answer::Pass) if zone.reverse => {
                Step::No(if apex { ResponseCode::NoError } else { ResponseCode::NXDomain })
            }
            Ok(Answer::Pass) => Step::Pass,
            Ok(Answer::Refused) => Step::Failed(Reply {
                error: Some(ExtendedError::prohibited("the zone's resolver refuses this client")),
                ..Reply::with(ResponseCode::Refused)
            }),
            Err(failure) => Step::Failed(self.failed(&name, &failure)),
        }
    }

    fn failed(&self, name: &Name, failure: &Failure) -> Reply {
        let counter = match failure {
            Failure::Busy => &self.counters.overload,
            Failure::Late(_) | Failure::Panicked | Failure::Failed(_) => &self.counters.resolver_failures,
        };
        // Guests choose how often this happens, so the log gets the first and then fewer and fewer.
        let nth = counter.fetch_add(1, Ordering::Relaxed) + 1;
        if nth.is_power_of_two() {
            let source = failure.source().map(ToString::to_string);
            warn!(%name, %failure, source, times = nth, "a zone's resolver gave no answer");
        }
        Reply::failure(ExtendedError::other(match failure {
            Failure::Busy => "too many questions at once",
            Failure::Late(_) => "the zone's resolver did not answer in time",
            Failure::Panicked | Failure::Failed(_) => "the zone's resolver failed",
        }))
    }

    /// One call of the resolver, in a task of its own so that a panic ends there. Its place is given up when the call has really
    /// ended, so that calls which ignore their end cannot pile up.
    async fn ask(&self, resolver: &Arc<dyn Resolver>, question: Question) -> Result<Answer, Failure> {
        let place = Arc::clone(&self.calls).try_acquire_owned().map_err(|_| Failure::Busy)?;
        let resolver = Arc::clone(resolver);
        let call = AbortOnDropHandle::new(tokio::spawn(async move {
            let _place = place;
            resolver.resolve(&question).await
        }));
        match timeout(self.deadline, call).await {
            Err(_) => Err(Failure::Late(self.deadline)),
            Ok(Err(_)) => Err(Failure::Panicked),
            Ok(Ok(Err(source))) => Err(Failure::Failed(source)),
            Ok(Ok(Ok(answer))) => Ok(answer),
        }
    }
}

enum Step {
    Records(Vec<WireRecord>),
    No(ResponseCode),
    Pass,
    Failed(Reply),
}

/// The records that answer a question about `name`, in the order of the chain of aliases, and the name where the chain
/// leaves the records, if it does. The members of a set have one time to live (RFC 2181, section 5.2) and differ.
fn chain(name: &Name, qtype: RecordType, records: Vec<WireRecord>) -> (Vec<WireRecord>, Option<Name>) {
    let mut found = Vec::new();
    let mut name = name.clone();
    for _ in 0..=MAX_ALIASES {
        let mut set: Vec<WireRecord> = Vec::new();
        for record in &records {
            let fits = qtype == RecordType::ANY || record.record_type() == qtype;
            if fits && record.name == name && !set.iter().any(|other| other.data == record.data) {
                set.push(WireRecord::from_rdata(name.clone(), record.ttl, record.data.clone()));
            }
        }
        if !set.is_empty() {
            let ttl = set.iter().map(|record| record.ttl).min().unwrap_or_default();
            set.iter_mut().for_each(|record| record.ttl = ttl);
            found.append(&mut set);
            return (found, None);
        }
        let alias =
            records.iter().find(|record| record.name == name && record.record_type() == RecordType::CNAME);
        let Some((record, RData::CNAME(CNAME(target)))) = alias.map(|record| (record, &record.data)) else {
            break;
        };
        found.push(WireRecord::from_rdata(name, record.ttl, record.data.clone()));
        name = target.clone();
    }
    let target = (!found.is_empty()).then_some(name);
    (found, target)
}

/// What says "there is more than you need to know" (RFC 8482, section 4.2).
fn minimal_any(name: Name, ttl: u32) -> WireRecord {
    WireRecord::from_rdata(name, ttl, RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new())))
}

fn wire(record: Record) -> WireRecord {
    let absolute = |mut name: Name| {
        name.set_fqdn(true);
        name
    };
    let data = match record.data {
        RecordData::A(address) => RData::A(A(address)),
        RecordData::Aaaa(address) => RData::AAAA(AAAA(address)),
        RecordData::Ptr(name) => RData::PTR(PTR(absolute(name))),
        RecordData::Cname(name) => RData::CNAME(CNAME(absolute(name))),
        RecordData::Txt(strings) => {
            let pieces = |text: &String| match text.is_empty() {
                true => vec![Box::default()],
                false => text.as_bytes().chunks(255).map(Box::from).collect::<Vec<Box<[u8]>>>(),
            };
            let mut data: Vec<Box<[u8]>> = strings.iter().flat_map(pieces).collect();
            if data.is_empty() {
                data.push(Box::default());
            }
            RData::TXT(TXT::from_bytes(data.iter().map(|piece| &**piece).collect()))
        }
    };
    WireRecord::from_rdata(absolute(record.name), record.ttl.min(MAX_TTL), data)
}
