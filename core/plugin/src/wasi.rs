//! What the runtimes of some languages (Python, JavaScript, Rust's wasip2) import whether or not a plugin uses it: WASI 0.2, as
//! an empty shell. There are no arguments, no environment, no input, no directories and no network; what is written to stdout
//! and stderr goes to the plugin's log. Without the grant `clock` it is always the same time, without `random` the numbers
//! come from the call's input: the same input gives the same outcome.
//!
//! Nothing here reaches the host, so nothing here can give more than the grants do. A few functions have answers of their own, see
//! [`answer`]; all others, known by their types alone, say that it is not allowed, or end the call where their type has no
//! word for that. So any 0.2.x fits. The functions are added to a component's own linker, and only where it imports them.
//!
//! There is one kind of handle for all: none of them stands for anything but stdin, stdout or stderr.

use sha2::{Digest as _, Sha256};
use wasmtime::{
    Engine, StoreContextMut,
    component::{
        Component, ComponentType, Lift, Linker, LinkerInstance, Lower, Resource, ResourceType, Val,
        types::{ComponentFunc, ComponentItem, Type},
    },
};

use crate::{
    bindings::vm::plugin::log::{Host as _, Level},
    broker::Call,
    grant::Grant,
};

/// The packages that are given.
const PACKAGES: [&str; 7] = ["cli", "clocks", "filesystem", "http", "io", "random", "sockets"];

/// How the errors of these packages say that something is not allowed, or not there.
const REFUSALS: [&str; 5] =
    ["access-denied", "not-permitted", "HTTP-request-denied", "closed", "unsupported"];

/// What may be written at once, in bytes; longer texts come in parts.
const PART: u64 = 64 << 10;

/// Random bytes at once.
const MOST_RANDOM: u64 = 64 << 10;

/// A handle to nothing, or by its number to one of the streams.
struct Shell;

const NOTHING: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

fn shell(rep: u32) -> Resource<Shell> {
    Resource::new_own(rep)
}

/// The error of `wasi:io/streams`. Its cases are part of the type; writing never fails.
#[derive(ComponentType, Lift, Lower)]
#[component(variant)]
enum StreamError {
    #[component(name = "last-operation-failed")]
    LastOperationFailed(Resource<Shell>),
    #[component(name = "closed")]
    Closed,
}

/// The time of `wasi:clocks/wall-clock`.
#[derive(ComponentType, Lift, Lower)]
#[component(record)]
struct Datetime {
    seconds: u64,
    nanoseconds: u32,
}

/// A call's part in this.
#[derive(Default)]
pub(crate) struct Wasi {
    /// What was written and has no end of line yet, of stdout and stderr.
    lines: [Vec<u8>; 2],
    /// Nanoseconds that were waited for. They pass at once.
    waited: u64,
    /// Where random numbers come from, without the grant.
    seed: Option<[u8; 32]>,
}

/// `wasi:PACKAGE/INTERFACE@0.2.N`, without the version.
fn interface(name: &str) -> Option<&str> {
    let (interface, version) = name.strip_prefix("wasi:")?.split_once('@')?;
    let package = interface.split('/').next()?;
    (version.starts_with("0.2.") && PACKAGES.contains(&package)).then_some(interface)
}

/// Whether an import is one that every plugin is given.
pub(crate) fn given(import: &str) -> bool {
    interface(import).is_some()
}

/// Adds what a component imports of it.
pub(crate) fn add(linker: &mut Linker<Call>, engine: &Engine, component: &Component) -> wasmtime::Result<()> {
    for (import, item) in component.component_type().imports(engine) {
        let (Some(interface), ComponentItem::ComponentInstance(instance)) = (interface(import), item.ty)
        else {
            continue;
        };
        let mut part = linker.instance(import)?;
        for (name, item) in instance.exports(engine) {
            match item.ty {
                ComponentItem::Resource(_) => {
                    part.resource(name, ResourceType::host::<Shell>(), |_, _| Ok(()))?;
                }
                ComponentItem::ComponentFunc(_) if !answer(&mut part, interface, name)? => {
                    let what = format!("{import} {name}");
                    part.func_new(name, move |mut store, function, arguments, results| {
                        give_back(&mut store, arguments)?;
                        refuse(&what, &function, results).inspect_err(|error| {
                            // This, and not what it wrote before, is why it ends.
                            store.data_mut().last_words = Some(error.to_string());
                        })
                    })?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Ends the loan of the handles among a function's arguments.
fn give_back(store: &mut Store<'_>, arguments: &[Val]) -> wasmtime::Result<()> {
    for argument in arguments {
        match argument {
            Val::Resource(handle) => {
                Resource::<Shell>::try_from_resource_any(*handle, &mut *store)?;
            }
            Val::Option(Some(inner)) | Val::Variant(_, Some(inner)) => {
                give_back(store, std::slice::from_ref(inner))?;
            }
            Val::Result(Ok(Some(inner)) | Err(Some(inner))) => give_back(store, std::slice::from_ref(inner))?,
            Val::List(inner) | Val::Tuple(inner) => give_back(store, inner)?,
            _ => {}
        }
    }
    Ok(())
}

/// Says no in the words of a function's type.
fn refuse(what: &str, function: &ComponentFunc, results: &mut [Val]) -> wasmtime::Result<()> {
    let word = match function.results().next() {
        Some(Type::Option(_)) => Some(Val::Option(None)),
        Some(Type::Result(result)) => match result.err() {
            Some(Type::Enum(cases)) => {
                cases.names().find(|name| REFUSALS.contains(name)).map(|name| Val::Enum(name.to_owned()))
            }
            Some(Type::Variant(cases)) => {
                let mut cases = cases.cases().filter(|case| case.ty.is_none());
                let case = cases.find(|case| REFUSALS.contains(&case.name));
                case.map(|case| Val::Variant(case.name.to_owned(), None))
            }
            _ => None,
        }
        .map(|error| Val::Result(Err(Some(Box::new(error))))),
        _ => None,
    };
    match (word, results) {
        (Some(word), [result]) => {
            *result = word;
            Ok(())
        }
        _ => Err(wasmtime::Error::msg(format!("it called {what}, which plugins do not have"))),
    }
}

type Store<'a> = StoreContextMut<'a, Call>;

/// Adds a function that has an answer; says whether it is one of those.
fn answer(part: &mut LinkerInstance<'_, Call>, interface: &str, name: &str) -> wasmtime::Result<bool> {
    match (interface, name) {
        ("cli/environment", "get-environment") => {
            part.func_wrap(name, |_: Store<'_>, ()| Ok((Vec::<(String, String)>::new(),)))
        }
        ("cli/environment", "get-arguments") => {
            part.func_wrap(name, |_: Store<'_>, ()| Ok((Vec::<String>::new(),)))
        }
        ("filesystem/preopens", "get-directories") => {
            part.func_wrap(name, |_: Store<'_>, ()| Ok((Vec::<(Resource<Shell>, String)>::new(),)))
        }
        ("cli/stdout", "get-stdout") => part.func_wrap(name, |_: Store<'_>, ()| Ok((shell(STDOUT),))),
        ("cli/stderr", "get-stderr") => part.func_wrap(name, |_: Store<'_>, ()| Ok((shell(STDERR),))),
        ("cli/stdin", "get-stdin")
        | ("sockets/instance-network", "instance-network")
        | ("io/streams", "[method]input-stream.subscribe" | "[method]output-stream.subscribe") => {
            if name.starts_with("[method]") {
                part.func_wrap(name, |_: Store<'_>, (_,): (Resource<Shell>,)| Ok((shell(NOTHING),)))
            } else {
                part.func_wrap(name, |_: Store<'_>, ()| Ok((shell(NOTHING),)))
            }
        }
        ("io/streams", "[method]output-stream.check-write") => {
            part.func_wrap(name, |_: Store<'_>, (_,): (Resource<Shell>,)| Ok((Ok::<_, StreamError>(PART),)))
        }
        ("io/streams", "[method]output-stream.write" | "[method]output-stream.blocking-write-and-flush") => {
            part.func_wrap(name, |mut store: Store<'_>, (to, bytes): (Resource<Shell>, Vec<u8>)| {
                store.data_mut().written(to.rep(), &bytes)?;
                Ok((Ok::<_, StreamError>(()),))
            })
        }
        ("io/streams", "[method]output-stream.flush" | "[method]output-stream.blocking-flush") => {
            part.func_wrap(name, |_: Store<'_>, (_,): (Resource<Shell>,)| Ok((Ok::<_, StreamError>(()),)))
        }
        ("io/poll", "[method]pollable.ready") => {
            part.func_wrap(name, |_: Store<'_>, (_,): (Resource<Shell>,)| Ok((true,)))
        }
        ("io/poll", "[method]pollable.block") => {
            part.func_wrap(name, |_: Store<'_>, (_,): (Resource<Shell>,)| Ok(()))
        }
        ("io/poll", "poll") => part.func_wrap(name, |_: Store<'_>, (all,): (Vec<Resource<Shell>>,)| {
            Ok(((0_u32..).zip(all).map(|(index, _)| index).collect::<Vec<_>>(),))
        }),
        ("clocks/monotonic-clock", "now") => {
            part.func_wrap(name, |store: Store<'_>, ()| Ok((store.data().wasi.waited,)))
        }
        ("clocks/monotonic-clock", "resolution") => part.func_wrap(name, |_: Store<'_>, ()| Ok((1_u64,))),
        ("clocks/monotonic-clock", "subscribe-instant") => {
            part.func_wrap(name, |mut store: Store<'_>, (until,): (u64,)| {
                let waited = &mut store.data_mut().wasi.waited;
                *waited = until.max(*waited);
                Ok((shell(NOTHING),))
            })
        }
        ("clocks/monotonic-clock", "subscribe-duration") => {
            part.func_wrap(name, |mut store: Store<'_>, (time,): (u64,)| {
                let waited = &mut store.data_mut().wasi.waited;
                *waited = waited.saturating_add(time);
                Ok((shell(NOTHING),))
            })
        }
        ("clocks/wall-clock", "now") => {
            part.func_wrap(name, |store: Store<'_>, ()| Ok((store.data().time(),)))
        }
        ("clocks/wall-clock", "resolution") => {
            part.func_wrap(name, |_: Store<'_>, ()| Ok((Datetime { seconds: 0, nanoseconds: 1_000_000 },)))
        }
        ("random/random", "get-random-bytes") | ("random/insecure", "get-insecure-random-bytes") => part
            .func_wrap(name, |mut store: Store<'_>, (length,): (u64,)| {
                Ok((store.data_mut().random_bytes(length)?,))
            }),
        ("random/random", "get-random-u64") | ("random/insecure", "get-insecure-random-u64") => {
            part.func_wrap(name, |mut store: Store<'_>, ()| Ok((store.data_mut().random_u64()?,)))
        }
        ("random/insecure-seed", "insecure-seed") => part.func_wrap(name, |mut store: Store<'_>, ()| {
            let call = store.data_mut();
            Ok(((call.random_u64()?, call.random_u64()?),))
        }),
        _ => return Ok(false),
    }?;
    Ok(true)
}

impl Call {
    /// Bytes for a stream: whole lines go to the log.
    fn written(&mut self, stream: u32, bytes: &[u8]) -> wasmtime::Result<()> {
        let most = self.identity.limits.text;
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let line = self.line(stream);
            line.extend_from_slice(&part[..part.len().min(most.saturating_sub(line.len()))]);
            if part.ends_with(b"\n") {
                let line = self.line(stream);
                if !line.ends_with(b"\n") {
                    line.push(b'\n');
                }
                self.end_line(stream)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, stream: u32) -> &mut Vec<u8> {
        &mut self.wasi.lines[usize::from(stream == STDERR)]
    }

    fn end_line(&mut self, stream: u32) -> wasmtime::Result<()> {
        let line = std::mem::take(self.line(stream));
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.is_empty() {
            return Ok(());
        }
        if stream == STDERR && line.ends_with(b"\n") {
            // What a runtime says of an exception that nobody caught ends with what it was.
            self.last_words = Some(text.to_owned());
        }
        self.write(if stream == STDERR { Level::Info } else { Level::Debug }, text.to_owned())
    }

    /// Logs what was written without an end of line.
    pub(crate) fn end_lines(&mut self) {
        for stream in [STDOUT, STDERR] {
            // Writing to the log cannot fail.
            let _ = self.end_line(stream);
        }
    }

    fn time(&self) -> Datetime {
        let granted = self.identity.grants.permit(&Grant::Clock {}).is_ok();
        let ms = if granted { self.input.now_unix_ms } else { 0 };
        let nanoseconds = u32::try_from(ms % 1000).unwrap_or_default() * 1_000_000;
        Datetime { seconds: ms / 1000, nanoseconds }
    }

    fn random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        let length = usize::try_from(length.min(MOST_RANDOM + 1)).unwrap_or_default();
        if length as u64 > MOST_RANDOM {
            return Err(wasmtime::Error::msg(format!(
                "it wanted more than {MOST_RANDOM} random bytes at once"
            )));
        }
        if self.identity.grants.permit(&Grant::Random {}).is_ok() {
            return Ok(self.random(length));
        }
        let seed = match self.wasi.seed {
            Some(seed) => seed,
            None => self.input_digest()?,
        };
        self.wasi.seed = Some(seed);
        Ok(self.random_from(&seed, length))
    }

    fn random_u64(&mut self) -> wasmtime::Result<u64> {
        let bytes = self.random_bytes(8)?;
        Ok(bytes.into_iter().fold(0, |number, byte| number << 8 | u64::from(byte)))
    }

    /// What stands for all that the component can learn in this call.
    fn input_digest(&self) -> wasmtime::Result<[u8; 32]> {
        let input = &self.input;
        let all = serde_json::to_vec(&(
            &self.identity.name,
            &self.identity.config,
            self.hook,
            &input.reason,
            &input.vm,
            &*input.facts,
            &input.references,
            (&input.config, &input.former_config, &input.job),
        ))?;
        Ok(Sha256::digest(&all).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_0_2_is_given_and_nothing_else() {
        for good in ["wasi:cli/environment@0.2.0", "wasi:io/streams@0.2.12", "wasi:http/types@0.2.10"] {
            assert!(given(good), "{good}");
        }
        for bad in [
            "wasi:cli/environment@0.3.0",
            "wasi:cli/environment",
            "wasi:nn/graph@0.2.0",
            "wasi:clip/x@0.2.0",
            "vm:plugin/log@0.1.0",
            "other:cli/environment@0.2.0",
            "wasi_snapshot_preview1",
        ] {
            assert!(!given(bad), "{bad}");
        }
    }
}
