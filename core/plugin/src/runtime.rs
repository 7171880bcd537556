//! What all plugins share: wasmtime's engine, the clock that stops endless loops, the linker, the cache.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, Thread},
    time::Duration,
};

use wasmtime::{
    Config, Engine, Store, UpdateDeadline,
    component::{HasSelf, Linker},
};

use crate::{
    bindings::Everything,
    broker::Call,
    cache::{Cache, Compiler},
    error::{Excess, LoadError},
    limits::Limits,
};

/// How long a tick of processor time is.
const TICK: Duration = Duration::from_millis(2);

/// Ticks without any call after which the clock sleeps.
const IDLE_TICKS: u32 = 50;

/// The engine's settings. A change of them needs another [`crate::cache::REVISION`].
pub(crate) fn config() -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        // Components are called one by one; without this a warm call is three times as fast.
        .concurrency_support(false)
        .epoch_interruption(true)
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .max_wasm_stack(512 << 10)
        .async_stack_size(2 << 20);
    config
}

/// Lets time pass for components while there are calls, and sleeps while there is none.
struct Clock {
    active: AtomicU64,
    asleep: AtomicBool,
    thread: Thread,
}

impl Clock {
    fn start(engine: &Engine) -> std::io::Result<Arc<Self>> {
        let weak = engine.weak();
        let (give, take) = std::sync::mpsc::sync_channel::<Arc<Self>>(1);
        let thread = thread::Builder::new().name("plugin-clock".to_owned()).spawn(move || {
            let Ok(clock) = take.recv() else { return };
            let clock = Arc::downgrade(&clock);
            let mut idle = 0;
            loop {
                thread::sleep(TICK);
                let (Some(engine), Some(clock)) = (weak.upgrade(), clock.upgrade()) else { return };
                engine.increment_epoch();
                idle = if clock.active.load(Ordering::SeqCst) == 0 { idle + 1 } else { 0 };
                if idle < IDLE_TICKS {
                    continue;
                }
                idle = IDLE_TICKS;
                // Whoever comes next either sees that it sleeps, or is seen here.
                clock.asleep.store(true, Ordering::SeqCst);
                if clock.active.load(Ordering::SeqCst) == 0 {
                    drop((engine, clock));
                    // Now and then it looks whether there is still an engine.
                    thread::park_timeout(Duration::from_secs(5));
                }
            }
        })?;
        let clock = Arc::new(Self {
            active: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            thread: thread.thread().clone(),
        });
        // The thread waits for just this.
        let _ = give.send(clock.clone());
        Ok(clock)
    }

    fn run(self: &Arc<Self>) -> Running {
        self.active.fetch_add(1, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
        Running(self.clone())
    }
}

/// Keeps the clock going.
pub(crate) struct Running(Arc<Clock>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What all plugins of a process share. Make one.
pub struct Runtime {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<Call>,
    pub(crate) cache: Cache,
    pub(crate) limits: Limits,
    clock: Arc<Clock>,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Runtime {
    /// With compiled components in `cache`, a directory of this user's alone, made by `compiler` where they are missing.
    ///
    /// # Errors
    /// The directory is not there and cannot be made, or others may write to it; or this host cannot run components.
    pub fn new(cache: &std::path::Path, compiler: Compiler, limits: Limits) -> Result<Self, LoadError> {
        let unfit = |source| LoadError::Link { plugin: "(any)".to_owned(), source };
        let engine = Engine::new(&config()).map_err(unfit)?;
        let mut linker = Linker::new(&engine);
        Everything::add_to_linker::<_, HasSelf<Call>>(&mut linker, |call| call).map_err(unfit)?;
        let clock = Clock::start(&engine).map_err(|error| unfit(error.into()))?;
        Ok(Self { engine, linker, cache: Cache::open(cache, compiler)?, limits, clock })
    }

    /// Whether the compiled code of a component, named by the 64 digits of its digest, is in the cache and what was written.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub fn is_compiled(&self, hex: &str) -> std::io::Result<bool> {
        self.cache.check(hex)
    }

    /// Removes the compiled code of a component from the cache.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&self, hex: &str) -> Result<(), LoadError> {
        self.cache.forget(hex)
    }

    /// A store with all limits set, also for what happens while a component is instantiated.
    pub(crate) fn store(&self, call: Call) -> Store<Call> {
        let limits = &self.limits;
        let budget = u64::try_from(limits.processor.as_nanos().div_ceil(TICK.as_nanos())).unwrap_or(u64::MAX);
        let (most, transfer, handles) = (limits.processor, limits.transfer, limits.handles);
        let mut store = Store::new(&self.engine, call);
        store.limiter(|call| &mut call.totals);
        store.set_hostcall_fuel(transfer);
        // Beyond those of our own table, which says so in words.
        store.set_max_component_handles(handles + 64);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |mut store| {
            let call = store.data_mut();
            call.ticks += 1;
            // The tick it began in was not its own from the beginning.
            if call.ticks > budget + 1 {
                return Err(Excess::Processor(most).into());
            }
            Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now())))
        });
        store
    }

    pub(crate) fn running(&self) -> Running {
        self.clock.run()
    }
}
