//! Questions about everything else go to the host's resolvers.
//!
//! The client's question is put to the upstreams in their order, as a libc does (so that a VPN's server that comes first is
//! believed first), each with retransmissions and TCP after a truncated answer, until one answers. What it says
//! is handed on whole, "no" included, and remembered as long as it allows.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use hickory_server::{
    net::{
        DnsError, NetError, NoRecords,
        runtime::TokioRuntimeProvider,
        xfer::{DnsHandle, FirstAnswer},
    },
    proto::{
        op::{DnsRequest, DnsRequestOptions, DnsResponse, Edns, Message, Query, ResponseCode},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{A, AAAA},
        },
    },
    resolver::{
        NameServerPool, PoolContext, ResponseCache, TlsConfig, TtlConfig,
        config::{ConnectionConfig, NameServerConfig, ProtocolConfig, ResolverOpts, ServerOrderingStrategy},
    },
};
use tokio::{sync::Semaphore, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    Limits,
    config::Upstreams,
    reply::{ExtendedError, Reply},
    stats::{Counters, count},
    upstreams::Source,
};

/// What we say we can take over UDP, so that nothing is fragmented (RFC 9715, section 3.2).
pub(crate) const PAYLOAD: u16 = 1232;
/// Largest answer that is remembered, so that the cache's memory is bounded by its number of entries.
const MAX_CACHED: usize = 1500;
/// What servers say that do not know EDNS: FORMERR, NOTIMP (RFC 6891, section 7), BADVERS; by number, because BADVERS
/// shares its own with another.
const NO_EDNS: [u16; 3] = [1, 4, 16];
/// Longest that an answer is remembered.
const MAX_CACHED_FOR: Duration = Duration::from_secs(3600);

/// A question for others.
#[derive(Debug, Clone)]
pub(crate) struct Outside {
    pub(crate) name: Name,
    pub(crate) qtype: RecordType,
    /// Wants signatures (DO; RFC 3225).
    pub(crate) dnssec_ok: bool,
    /// Checks signatures itself (CD; RFC 4035, section 3.2.2).
    pub(crate) checking_disabled: bool,
}

pub(crate) struct Forwarder {
    limits: Limits,
    slots: Semaphore,
    source: RwLock<Arc<Source>>,
    pools: RwLock<Arc<Pools>>,
    /// Where this server itself listens.
    own: RwLock<HashSet<SocketAddr>>,
    counters: Arc<Counters>,
}

/// One list of upstreams and what they said.
struct Pools {
    upstreams: Vec<Upstream>,
    plain: ResponseCache,
    with_signatures: ResponseCache,
}

struct Upstream {
    address: SocketAddr,
    pool: NameServerPool<TokioRuntimeProvider>,
    /// It did not answer and is asked last until then.
    down_until: Mutex<Option<Instant>>,
}

impl Forwarder {
    pub(crate) fn new(upstreams: Upstreams, limits: &Limits, counters: Arc<Counters>) -> Self {
        let forwarder = Self {
            slots: Semaphore::new(limits.forwards),
            source: RwLock::new(Arc::new(Source::new(upstreams))),
            pools: RwLock::new(Arc::new(Pools::new(Vec::new(), limits))),
            own: RwLock::default(),
            limits: limits.clone(),
            counters,
        };
        forwarder.pools();
        forwarder
    }

    pub(crate) fn set_upstreams(&self, upstreams: Upstreams) {
        *self.source.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Source::new(upstreams));
        self.pools();
    }

    /// Tells where this server listens, so that it never asks itself.
    pub(crate) fn set_own(&self, own: HashSet<SocketAddr>) {
        *self.own.write().unwrap_or_else(PoisonError::into_inner) = own;
    }

    /// Asks the upstreams.
    pub(crate) async fn answer(&self, question: &Outside) -> Reply {
        if let Some(reply) = localhost(question) {
            return reply;
        }
        let pools = self.pools();
        let query = Query::query(question.name.clone(), question.qtype);
        let cache = match (question.checking_disabled, question.dnssec_ok) {
            (true, _) => None,
            (false, true) => Some(&pools.with_signatures),
            (false, false) => Some(&pools.plain),
        };
        if let Some(reply) = cache.and_then(|cache| cache.get(&query, Instant::now())).and_then(reply) {
            count(&self.counters.cached);
            return reply;
        }
        let Ok(_slot) = self.slots.try_acquire() else {
            count(&self.counters.overload);
            return Reply::failure(ExtendedError::other("too many questions at once"));
        };
        // Boxed: the library's futures are large, and most questions never come here.
        let asking = Box::pin(self.ask_in_turn(&pools, question));
        let result = timeout(self.limits.forward_deadline, asking).await.unwrap_or(None);
        let Some(result) = result else {
            count(&self.counters.upstream_failures);
            let text = if pools.upstreams.is_empty() {
                "this host has no resolvers"
            } else {
                "none of this host's resolvers answers"
            };
            return Reply::failure(ExtendedError::unreachable(text));
        };
        count(&self.counters.forwarded);
        let (small, result) = match result {
            Ok(response) => (response.as_buffer().len() <= MAX_CACHED, Ok(response.into_message())),
            Err(no_records) => (true, Err(NetError::from(no_records))),
        };
        if let Some(cache) = cache.filter(|_| small) {
            cache.insert(query, result.clone(), Instant::now());
        }
        reply(result).unwrap_or_else(|| Reply::failure(ExtendedError::other("an answer without meaning")))
    }

    /// The first answer, "no" included; none where nobody answers.
    async fn ask_in_turn(&self, pools: &Pools, question: &Outside) -> Option<Result<DnsResponse, NoRecords>> {
        for upstream in pools.in_order(Instant::now()) {
            if self.own.read().unwrap_or_else(PoisonError::into_inner).contains(&upstream.address) {
                debug!(upstream = %upstream.address, "left out, because it is this server");
                continue;
            }
            let mut result = upstream.ask(question, true).await;
            if let Err(NetError::Dns(DnsError::ResponseCode(code))) = &result
                && NO_EDNS.contains(&u16::from(*code))
            {
                result = upstream.ask(question, false).await;
            }
            match result {
                Ok(response) => {
                    upstream.set_down(None);
                    return Some(Ok(response));
                }
                Err(NetError::Dns(DnsError::NoRecordsFound(no_records))) => {
                    upstream.set_down(None);
                    return Some(Err(no_records));
                }
                // It is there and cannot help; another may, as for a libc.
                Err(NetError::Dns(error)) => {
                    debug!(upstream = %upstream.address, name = %question.name, %error, "no help from an upstream");
                }
                Err(error) => {
                    if upstream.set_down(Some(Instant::now() + self.limits.upstream_penalty)) {
                        warn!(upstream = %upstream.address, %error, "one of the host's resolvers does not answer");
                    }
                }
            }
        }
        None
    }

    /// The upstreams of now.
    fn pools(&self) -> Arc<Pools> {
        let source = Arc::clone(&self.source.read().unwrap_or_else(PoisonError::into_inner));
        if let Some(list) = source.changed(Instant::now()) {
            info!(upstreams = ?list, "the resolvers that guests' questions go to");
            *self.pools.write().unwrap_or_else(PoisonError::into_inner) =
                Arc::new(Pools::new(list, &self.limits));
        }
        Arc::clone(&self.pools.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Pools {
    fn new(list: Vec<SocketAddr>, limits: &Limits) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = limits.upstream_timeout;
        options.edns_payload_len = PAYLOAD;
        options.num_concurrent_reqs = 1;
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        let cache = || {
            let mut capped = ResolverOpts::default();
            capped.positive_max_ttl = Some(MAX_CACHED_FOR);
            capped.negative_max_ttl = Some(MAX_CACHED_FOR);
            ResponseCache::new(limits.cache_entries / 2, TtlConfig::from_opts(&capped))
        };
        let upstreams = list
            .into_iter()
            .filter_map(|address| {
                // Without TLS in the build there is nothing in it that could fail.
                let context = PoolContext::new(options.clone(), TlsConfig::new().ok()?);
                let connections = [ProtocolConfig::Udp, ProtocolConfig::Tcp].map(|protocol| {
                    let mut connection = ConnectionConfig::new(protocol);
                    connection.port = address.port();
                    connection
                });
                let server = NameServerConfig::new(address.ip(), true, connections.into());
                let provider = TokioRuntimeProvider::default();
                let pool = NameServerPool::from_config([server], Arc::new(context), provider);
                Some(Upstream { address, pool, down_until: Mutex::new(None) })
            })
            .collect();
        Self { upstreams, plain: cache(), with_signatures: cache() }
    }

    fn in_order(&self, now: Instant) -> impl Iterator<Item = &Upstream> {
        let up = self.upstreams.iter().filter(move |upstream| !upstream.is_down(now));
        up.chain(self.upstreams.iter().filter(move |upstream| upstream.is_down(now)))
    }
}

impl Upstream {
    async fn ask(&self, question: &Outside, edns: bool) -> Result<DnsResponse, NetError> {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = question.checking_disabled;
        message.add_query(Query::query(question.name.clone(), question.qtype));
        if edns {
            let mut edns = Edns::new();
            edns.set_max_payload(PAYLOAD).set_dnssec_ok(question.dnssec_ok);
            message.set_edns(edns);
        }
        let request = DnsRequest::new(message, DnsRequestOptions::default());
        self.pool.send(request).first_answer().await
    }

    fn is_down(&self, now: Instant) -> bool {
        self.down_until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now < until)
    }

    /// Whether it was not known to be down.
    fn set_down(&self, until: Option<Instant>) -> bool {
        let mut down = self.down_until.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *down, until).is_none()
    }
}

/// What an upstream said, in our words; none for what is no answer.
fn reply(result: Result<Message, NetError>) -> Option<Reply> {
    match result {
        Ok(message) => Some(Reply {
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
            ..Reply::with(message.metadata.response_code)
        }),
        Err(NetError::Dns(DnsError::NoRecordsFound(no_records))) => Some(Reply {
            authorities: no_records.authorities.map(|records| records.to_vec()).unwrap_or_default(),
            ..Reply::with(no_records.response_code)
        }),
        Err(_) => None,
    }
}

/// Names under `localhost.` are this very host, whoever asks (RFC 6761, section 6.3).
fn localhost(question: &Outside) -> Option<Reply> {
    if !question.name.is_localhost() {
        return None;
    }
    let address = match question.qtype {
        RecordType::A => Some(RData::A(A(Ipv4Addr::LOCALHOST))),
        RecordType::AAAA => Some(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
        _ => None,
    };
    let answers =
        address.map(|data| Record::from_rdata(question.name.clone(), 86_400, data)).into_iter().collect();
    Some(Reply { answers, ..Reply::authoritative(ResponseCode::NoError) })
}
