//! Kernel settings below `/proc/sys`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use vm_types::{Handle, Observed};

use crate::NetError;

/// One setting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sysctl<'a> {
    pub(crate) key: &'a str,
    pub(crate) value: &'a str,
}

impl Sysctl<'_> {
    pub(crate) fn observe(self) -> Result<Observed, NetError> {
        let value = self.read()?;
        Ok(if value == self.value { Observed::Present(Handle::None) } else { Observed::Absent })
    }

    pub(crate) fn former(self) -> Result<Handle, NetError> {
        Ok(Handle::Previous { value: self.read()? })
    }

    pub(crate) fn apply(self) -> Result<(), NetError> {
        // Not written in vain: e.g. a write to ip_forward resets other settings.
        if self.read()? == self.value { Ok(()) } else { self.write(self.value) }
    }

    pub(crate) fn undo(self, handle: &Handle) -> Result<(), NetError> {
        match handle {
            Handle::Previous { value } if value != self.value && self.read()? == self.value => {
                self.write(value)
            }
            _ => Ok(()),
        }
    }

    fn path(self) -> Result<PathBuf, NetError> {
        let part = |part: &str| {
            !matches!(part, "" | "." | "..")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if self.key.split('/').all(part) {
            Ok(Path::new("/proc/sys").join(self.key))
        } else {
            Err(NetError::BadKey { key: self.key.to_owned() })
        }
    }

    fn read(self) -> Result<String, NetError> {
        let text = fs::read_to_string(self.path()?);
        text.map(|text| text.trim().to_owned()).map_err(|source| self.failed("read", source))
    }

    fn write(self, value: &str) -> Result<(), NetError> {
        fs::write(self.path()?, value).map_err(|source| self.failed("write", source))
    }

    fn failed(self, action: &'static str, source: std::io::Error) -> NetError {
        NetError::Sysctl { action, key: self.key.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_below_proc_sys() {
        for key in ["", "/etc/passwd", "../../etc/passwd", "net/../../x", "net//x", "net/x\0"] {
            let refused = Sysctl { key, value: "1" }.observe();
            assert!(matches!(refused, Err(NetError::BadKey { .. })), "{key}");
        }
        assert!(Sysctl { key: "kernel/ostype", value: "Linux" }.observe().unwrap() != Observed::Absent);
    }
}
