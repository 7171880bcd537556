//! What can go wrong, one enum per area, each with a hint for whoever meets it.

use std::{fmt, io, path::PathBuf, time::Duration};

use vm_types::Hook;

use crate::{grant::Denial, manifest::ManifestError};

pub use vm_types::plugin::PluginError;

/// What a component said, made fit for terminals and logs: no control characters, no excess of length.
pub(crate) fn tamed(error: PluginError) -> PluginError {
    let dotted = |code: &str| {
        (1..=64).contains(&code.len())
            && code.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-')
    };
    PluginError {
        code: if dotted(&error.code) { error.code } else { "plugin.bad-code".to_owned() },
        message: tame(&error.message, 2000),
        hint: error.hint.map(|hint| tame(&hint, 1000)),
        retryable: error.retryable,
    }
}

/// Text of a component, fit for terminals and logs: control characters replaced, cut after `most` bytes.
pub(crate) fn tame(text: &str, most: usize) -> String {
    let mut tamed = String::with_capacity(text.len().min(most + 3));
    for character in text.chars() {
        if tamed.len() + character.len_utf8() > most {
            tamed.push('…');
            break;
        }
        // Marks that turn the direction of writing hide what a line says.
        let hidden = matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        tamed.push(match character {
            '\n' | '\t' => character,
            _ if character.is_control() || hidden => '\u{fffd}',
            _ => character,
        });
    }
    tamed
}

/// A limit that a component ran into. Ends the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// Processor time.
    #[error("used more than {} ms of processor time", .0.as_millis())]
    Processor(Duration),
    /// Memory of all its instances.
    #[error("wanted more than {} MiB of memory", .0 >> 20)]
    Memory(usize),
    /// Table elements.
    #[error("wanted more than {0} table elements")]
    Table(usize),
    /// Handles open at the same time.
    #[error("held more than {0} handles")]
    Handles(usize),
    /// Planned effects of one call.
    #[error("planned more than {0} effects")]
    Effects(usize),
    /// Bytes in planned effects of one call.
    #[error("planned effects of more than {} MiB", .0 >> 20)]
    EffectBytes(usize),
    /// Findings of one call.
    #[error("reported more than {0} findings")]
    Findings(usize),
    /// Offers of one call.
    #[error("made more than {0} offers")]
    Offers(usize),
    /// Bytes handed over in one call of the host.
    #[error("handed over more than {} MiB at once", .0 >> 20)]
    Transfer(usize),
    /// Stack.
    #[error("used up its stack (endless recursion?)")]
    Stack,
}

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It trapped too often.
    #[error("plugin {plugin} is disabled: it failed {failures} times in a row, last with: {last}")]
    Disabled {
        /// Whose.
        plugin: String,
        /// How often.
        failures: u32,
        /// The last failure.
        last: String,
    },
    /// It broke off: a panic, an abort, a violation of its memory.
    #[error("plugin {plugin} broke off in {hook}: {reason}")]
    Trapped {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// Its own last words, or the machine's.
        reason: String,
        /// The machine's account.
        source: wasmtime::Error,
    },
    /// It ran into a limit.
    #[error("plugin {plugin} was stopped in {hook}: it {excess}")]
    Excess {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// Which.
        excess: Excess,
    },
    /// It took too long, waiting included.
    #[error("plugin {plugin} was stopped in {hook}: it took longer than {} ms", limit.as_millis())]
    TimedOut {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// How long it may take.
        limit: Duration,
    },
    /// It said that it failed.
    #[error("plugin {plugin} failed in {hook}: {error}")]
    Failed {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// Its words.
        error: PluginError,
    },
    /// What it planned cannot be.
    #[error("plugin {plugin} planned something impossible in {hook}: {reason}")]
    Impossible {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// What.
        reason: String,
    },
    /// It planned something that it may not.
    #[error("plugin {plugin} may not do what it planned in {hook}: {denial}")]
    Denied {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// What.
        denial: Box<Denial>,
    },
    /// Its changes of state could not be kept.
    #[error("the state of plugin {plugin} could not be kept after {hook}")]
    State {
        /// Whose.
        plugin: String,
        /// Where.
        hook: Hook,
        /// Why.
        source: crate::ports::StateError,
    },
    /// The hook needs something that the call does not have.
    #[error("{hook} of plugin {plugin} needs {what}")]
    Incomplete {
        /// Whose.
        plugin: String,
        /// Which.
        hook: Hook,
        /// What is not there.
        what: &'static str,
    },
}

impl CallError {
    /// Whether it counts towards disabling the plugin: what it did, not what it said.
    pub fn is_fault(&self) -> bool {
        match self {
            // How long an import takes is the guest's doing and the repository's.
            Self::TimedOut { hook, .. } => *hook != Hook::Import,
            Self::Trapped { .. } | Self::Excess { .. } => true,
            Self::Disabled { .. }
            | Self::Failed { .. }
            | Self::Impossible { .. }
            | Self::Denied { .. }
            | Self::State { .. }
            | Self::Incomplete { .. } => false,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Disabled { plugin, .. } => {
                format!("see its messages with `vm plugin logs {plugin}`, then `vm plugin enable {plugin}`")
            }
            Self::TimedOut { hook: Hook::Import, plugin, .. } => format!(
                "bring less: have git ignore what is large and the guest can do without; `vm plugin logs {plugin}` may say what \
                 took so long"
            ),
            Self::Trapped { plugin, .. } | Self::Excess { plugin, .. } | Self::TimedOut { plugin, .. } => {
                format!("this is a fault of the plugin: tell its author, or `vm plugin disable {plugin}`")
            }
            Self::Failed { plugin, error, .. } => error
                .hint
                .clone()
                .unwrap_or_else(|| format!("see its messages with `vm plugin logs {plugin}`")),
            Self::Impossible { .. } => "this is a fault of the plugin: tell its author".to_owned(),
            Self::Denied { denial, .. } => denial.hint(),
            Self::State { .. } => "look at the daemon's log; is the disk full?".to_owned(),
            Self::Incomplete { .. } => "this is a fault of vmd: please report it".to_owned(),
        }
    }
}

/// Why a plugin could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of it could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is wrong.
    #[error("{} is not a plugin's manifest", path.display())]
    Manifest {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ManifestError,
    },
    /// The configuration does not fit the schema.
    #[error("the configuration of plugin {plugin} does not fit: {reason}")]
    Config {
        /// Whose.
        plugin: String,
        /// Where and why.
        reason: String,
    },
    /// It is no component, or too large, or does not compile.
    #[error("the component of plugin {plugin} could not be compiled: {reason}")]
    Compile {
        /// Whose.
        plugin: String,
        /// The compiler's words.
        reason: String,
    },
    /// The cache cannot be used.
    #[error("the cache of compiled plugins at {} cannot be used: {reason}", path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It was made for another version of the interface.
    #[error("plugin {plugin} speaks vm:plugin {theirs}, this host speaks {ours}")]
    Version {
        /// Whose.
        plugin: String,
        /// The version among its imports and exports.
        theirs: String,
        /// What the host has.
        ours: &'static str,
    },
    /// It wants something no plugin is given.
    #[error("plugin {plugin} imports {import}, which a plugin of this kind is not given")]
    Import {
        /// Whose.
        plugin: String,
        /// What.
        import: String,
    },
    /// It does not fit the host for another reason.
    #[error("plugin {plugin} does not fit this host")]
    Link {
        /// Whose.
        plugin: String,
        /// Why.
        source: wasmtime::Error,
    },
    /// It exports nothing that the world asks for.
    #[error("plugin {plugin} has no part of world {world}")]
    Empty {
        /// Whose.
        plugin: String,
        /// As the manifest says.
        world: crate::manifest::World,
    },
}

impl LoadError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "is it installed completely? `vm plugin verify` says".to_owned(),
            Self::Manifest { source, .. } => source.hint(),
            Self::Config { plugin, .. } => format!("change it with `vm plugin configure {plugin}`"),
            Self::Compile { .. } => {
                "it must be a WebAssembly component (not a core module), made for one of vm:plugin's worlds"
                    .to_owned()
            }
            Self::Cache { path, .. } => {
                format!("{} must be a directory of the daemon's user with mode 0700", path.display())
            }
            Self::Version { .. } => {
                "install a version of the plugin made for this host, or another version of the host"
                    .to_owned()
            }
            Self::Import { import, .. } if import.starts_with("wasi:") => {
                "of WASI only 0.2 is there; build it for a target without WASI, e.g. wasm32-unknown-unknown"
                    .to_owned()
            }
            Self::Import { .. } => {
                "the manifest's world must be the one that the component was made for".to_owned()
            }
            Self::Link { .. } => "build it anew with the SDK of this host's version".to_owned(),
            Self::Empty { .. } => {
                "export at least one hook, and name the component's world in the manifest".to_owned()
            }
        }
    }
}

/// An error with those it comes from, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        fmt::Write::write_fmt(&mut text, format_args!(": {error}")).unwrap_or_default();
        source = error.source();
    }
    text
}
