//! The verbs, one file each. A verb's `Args` hold its options; their doc comments are its help.

pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod daemon;
pub(crate) mod delete;
pub(crate) mod doctor;
pub(crate) mod image;
pub(crate) mod kernel;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod ls;
pub(crate) mod machine;
pub(crate) mod proxy;
pub(crate) mod run;
pub(crate) mod session;
pub(crate) mod several;
pub(crate) mod show;
pub(crate) mod ssh;
pub(crate) mod ssh_config;
pub(crate) mod start;
pub(crate) mod stop;
pub(crate) mod version;
