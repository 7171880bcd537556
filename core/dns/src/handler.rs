//! From the bytes of a question to the bytes of its answer.
//!
//! Parsing, the question's echo and the answer's encoding are hickory's. What is decided here: who is
//! answered at all, what the protocol says about odd questions, and where an ordinary one goes.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use hickory_server::{
    net::xfer::Protocol,
    proto::{
        op::{Edns, Header, MessageType, Metadata, OpCode, ResponseCode},
        rr::{DNSClass, RecordType},
        serialize::binary::{BinDecodable, BinDecoder, BinEncoder},
    },
    server::Request,
    zone_handler::{MessageResponseBuilder, Queries},
};
use ipnet::IpNet;
use tracing::debug;

use crate::{
    Config, Networks, Question, Resolver,
    authority::{Authority, Found},
    forward::{Forwarder, Outside, PAYLOAD},
    gate::Bucket,
    reply::{ExtendedError, Reply},
    stats::{Counters, count},
    zones::{Zones, contains},
};

/// Smallest answer that every client takes (RFC 1035, section 4.2.1).
const MIN_PAYLOAD: u16 = 512;

/// Answers questions, whatever they came by.
pub(crate) struct Handler {
    policy: RwLock<Arc<Policy>>,
    /// Held while the policy is made anew from the one before.
    changing: Mutex<()>,
    authority: Authority,
    pub(crate) forwarder: Forwarder,
    refusals: Bucket,
    pub(crate) counters: Arc<Counters>,
}

/// What may change while questions are answered; a question sees one state of it.
struct Policy {
    networks: Networks,
    resolver: Arc<dyn Resolver>,
    zones: Zones,
}

impl Policy {
    fn new(networks: Networks, resolver: Arc<dyn Resolver>) -> Self {
        let zones = Zones::new(resolver.zones(), &networks.reverse);
        Self { networks, resolver, zones }
    }
}

impl Handler {
    pub(crate) fn new(config: Config, resolver: Arc<dyn Resolver>) -> Self {
        let counters = Arc::new(Counters::default());
        Self {
            policy: RwLock::new(Arc::new(Policy::new(config.networks, resolver))),
            changing: Mutex::default(),
            authority: Authority::new(&config.limits, Arc::clone(&counters)),
            forwarder: Forwarder::new(config.upstreams, &config.limits, Arc::clone(&counters)),
            refusals: Bucket::new(config.limits.refusals_per_second),
            counters,
        }
    }

    pub(crate) fn set_resolver(&self, resolver: Arc<dyn Resolver>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let networks = self.policy().networks.clone();
        self.set_policy(Policy::new(networks, resolver));
    }

    pub(crate) fn set_networks(&self, networks: Networks) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let resolver = Arc::clone(&self.policy().resolver);
        self.set_policy(Policy::new(networks, resolver));
    }

    fn set_policy(&self, policy: Policy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether somebody may ask.
    pub(crate) fn knows(&self, client: SocketAddr) -> bool {
        contains(&self.policy().networks.clients, client.ip())
    }

    /// The answer to a message, or nothing where silence is right.
    pub(crate) async fn answer(
        &self,
        message: Vec<u8>,
        client: SocketAddr,
        protocol: Protocol,
    ) -> Option<Vec<u8>> {
        let parsed = Parsed::new(message, client, protocol)?;
        let policy = self.policy();
        if !contains(&policy.networks.clients, client.ip()) {
            count(&self.counters.strangers);
            // Addresses of strangers may be forged, so even "no" is sent sparingly.
            let refused = Reply::refused(ExtendedError::prohibited("not for this client"));
            return self.refusals.take(Instant::now()).then(|| parsed.encode(&refused, false, protocol))?;
        }
        let reply = match parsed.question() {
            Ok(asked) => self.reply(&policy, &asked).await,
            Err(reply) => reply,
        };
        parsed.encode(&reply, true, protocol)
    }

    /// The answer to a message for which there is no room.
    pub(crate) fn overloaded(
        &self,
        message: &[u8],
        client: SocketAddr,
        protocol: Protocol,
    ) -> Option<Vec<u8>> {
        count(&self.counters.overload);
        if !self.knows(client) {
            return None;
        }
        let reply = Reply::failure(ExtendedError::other("too many questions at once"));
        Parsed::new(message.to_vec(), client, protocol)?.encode(&reply, true, protocol)
    }

    async fn reply(&self, policy: &Policy, asked: &Asked) -> Reply {
        let mut reply = match policy.zones.find(&asked.question.name).cloned() {
            None => self.outside(asked, asked.outside(asked.question.name.clone())).await,
            Some(zone) => {
                match self.authority.answer(&policy.resolver, &policy.zones, zone, &asked.question).await {
                    Found::Reply(reply) => reply,
                    Found::Pass => self.outside(asked, asked.outside(asked.question.name.clone())).await,
                    Found::Elsewhere(mut answers, target) => {
                        // A client that wants no recursion gets the alias alone (RFC 1034, section 4.3.2).
                        let mut rest = match asked.recursion_desired {
                            true => self.forwarder.answer(&asked.outside(target)).await,
                            false => Reply::with(ResponseCode::NoError),
                        };
                        answers.append(&mut rest.answers);
                        Reply { answers, authoritative: true, ..rest }
                    }
                }
            }
        };
        reply.spell(&asked.question.name);
        reply
    }

    async fn outside(&self, asked: &Asked, outside: Outside) -> Reply {
        if asked.recursion_desired {
            self.forwarder.answer(&outside).await
        } else {
            // What happens to be remembered is nobody's business.
            Reply::refused(ExtendedError::prohibited("outside the zones of this server"))
        }
    }
}

/// An ordinary question.
struct Asked {
    question: Question,
    recursion_desired: bool,
    dnssec_ok: bool,
    checking_disabled: bool,
}

impl Asked {
    fn outside(&self, name: crate::Name) -> Outside {
        Outside {
            name,
            qtype: RecordType::from(self.question.qtype),
            dnssec_ok: self.dnssec_ok,
            checking_disabled: self.checking_disabled,
        }
    }
}

/// A message, as far as it can be understood.
struct Parsed {
    metadata: Metadata,
    request: Result<Request, ResponseCode>,
}

impl Parsed {
    /// Nothing for what is no question at all: less than a header, or an answer (to answer those is how two servers end up talking
    /// to each other for ever).
    fn new(message: Vec<u8>, client: SocketAddr, protocol: Protocol) -> Option<Self> {
        let header = Header::read(&mut BinDecoder::new(&message)).ok()?;
        if header.metadata.message_type == MessageType::Response {
            return None;
        }
        let request = match (header.metadata.op_code, header.counts.queries) {
            // The rest of the message may mean anything (RFC 8906, section 3.1.4).
            (opcode, _) if opcode != OpCode::Query => Err(ResponseCode::NotImp),
            (_, 1) => Request::from_bytes(message, client, protocol).map_err(|error| {
                debug!(%client, %error, "a question that cannot be read");
                ResponseCode::FormErr
            }),
            // One question is what a message has (RFC 9619, section 4).
            _ => Err(ResponseCode::FormErr),
        };
        Some(Self { metadata: header.metadata, request })
    }

    /// The question, if it is one we can go and answer.
    fn question(&self) -> Result<Asked, Reply> {
        let request = self.request.as_ref().map_err(|code| Reply::with(*code))?;
        let Some(query) = request.queries.queries().first().map(|query| query.original()) else {
            return Err(Reply::with(ResponseCode::FormErr));
        };
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            // RFC 6891, section 6.1.3.
            return Err(Reply::with(ResponseCode::BADVERS));
        }
        if query.query_class() != DNSClass::IN {
            return Err(Reply::refused(ExtendedError::prohibited("only class IN")));
        }
        let qtype = u16::from(query.query_type());
        match query.query_type() {
            // Whole zones are for nobody (RFC 5936, section 2.2.1).
            RecordType::AXFR | RecordType::IXFR => {
                return Err(Reply::refused(ExtendedError::prohibited("no zone transfers")));
            }
            RecordType::OPT => return Err(Reply::with(ResponseCode::FormErr)),
            RecordType::ANY => {}
            // Types of questions that are no data (RFC 6895, section 3.1).
            _ if (128..=255).contains(&qtype) => return Err(Reply::with(ResponseCode::NotImp)),
            _ => {}
        }
        Ok(Asked {
            question: Question {
                name: query.name().clone(),
                qtype,
                client: request.src().ip().to_canonical(),
            },
            recursion_desired: request.metadata.recursion_desired,
            dnssec_ok: request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: request.metadata.checking_disabled,
        })
    }

    /// Puts an answer into bytes: the question byte for byte, EDNS if the client uses it (RFC 6891, section 7), and if it does
    /// not fit, nothing but the flag that sends the client to TCP (RFC 2181, section 9).
    fn encode(&self, reply: &Reply, recursion_available: bool, protocol: Protocol) -> Option<Vec<u8>> {
        let request = self.request.as_ref().ok();
        let nothing;
        let queries = match request {
            Some(request) => &request.queries,
            None => {
                nothing = Queries::read(&mut BinDecoder::new(&[]), 0).ok()?;
                &nothing
            }
        };
        let asked = request.and_then(|request| request.edns.as_ref());
        let edns = asked.map(|asked| {
            let mut edns = Edns::new();
            edns.set_max_payload(PAYLOAD).set_dnssec_ok(asked.flags().dnssec_ok);
            if let Some(error) = reply.error {
                edns.options_mut().insert(error.option());
            }
            edns
        });
        let mut metadata = Metadata::response_from_request(&self.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = recursion_available;
        let max = match (protocol, asked) {
            (Protocol::Udp, None) => MIN_PAYLOAD,
            (Protocol::Udp, Some(asked)) => asked.max_payload().clamp(MIN_PAYLOAD, PAYLOAD),
            _ => u16::MAX,
        };
        // What was not asked for may go without a word; what was may not.
        let lean = Reply { additionals: Vec::new(), ..reply.clone() };
        let empty = Reply::with(reply.code);
        for (reply, truncated) in [(reply, false), (&lean, false), (&empty, true)] {
            let mut bytes = Vec::with_capacity(usize::from(MIN_PAYLOAD));
            let mut encoder = BinEncoder::new(&mut bytes);
            encoder.set_max_size(max);
            metadata.truncation = truncated;
            let response = MessageResponseBuilder::new(queries, edns.as_ref()).build(
                metadata,
                &reply.answers,
                &reply.authorities,
                [],
                &reply.additionals,
            );
            match response.destructive_emit(&mut encoder) {
                Ok(info) if info.truncation == truncated => return Some(bytes),
                Ok(_) => {}
                Err(error) => debug!(%error, "an answer that cannot be encoded"),
            }
        }
        None
    }
}

/// The networks of the host itself, for [`Networks::clients`].
pub fn loopback() -> [IpNet; 2] {
    [
        IpNet::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        IpNet::new_assert(std::net::Ipv6Addr::LOCALHOST.into(), 128),
    ]
}
