//! An answer before it is put into bytes.

use hickory_server::proto::{
    op::ResponseCode,
    rr::{Name, Record, rdata::opt::EdnsOption},
};

/// The parts of an answer that depend on the question's subject.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) code: ResponseCode,
    /// Whether we are the authority (AA) for the question's name.
    pub(crate) authoritative: bool,
    pub(crate) answers: Vec<Record>,
    pub(crate) authorities: Vec<Record>,
    pub(crate) additionals: Vec<Record>,
    pub(crate) error: Option<ExtendedError>,
}

/// Why, in words, for clients that show it, e.g. `dig` (RFC 8914).
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExtendedError {
    code: u16,
    text: &'static str,
}

impl Reply {
    pub(crate) fn with(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            error: None,
        }
    }

    pub(crate) fn authoritative(code: ResponseCode) -> Self {
        Self { authoritative: true, ..Self::with(code) }
    }

    /// SERVFAIL.
    pub(crate) fn failure(error: ExtendedError) -> Self {
        Self { error: Some(error), ..Self::with(ResponseCode::ServFail) }
    }

    pub(crate) fn refused(error: ExtendedError) -> Self {
        Self { error: Some(error), ..Self::with(ResponseCode::Refused) }
    }

    /// Writes the asked name as the client wrote it: some check (draft-vixie-dnsext-dns0x20), and it is compressed better.
    pub(crate) fn spell(&mut self, name: &Name) {
        for record in self.answers.iter_mut().filter(|record| record.name == *name) {
            record.name = name.clone();
        }
    }
}

impl ExtendedError {
    /// Code 0, "other".
    pub(crate) fn other(text: &'static str) -> Self {
        Self { code: 0, text }
    }

    /// Code 18, "prohibited".
    pub(crate) fn prohibited(text: &'static str) -> Self {
        Self { code: 18, text }
    }

    /// Code 22, "no reachable authority".
    pub(crate) fn unreachable(text: &'static str) -> Self {
        Self { code: 22, text }
    }

    pub(crate) fn option(self) -> EdnsOption {
        const EXTENDED_ERROR: u16 = 15;
        let mut data = self.code.to_be_bytes().to_vec();
        data.extend_from_slice(self.text.as_bytes());
        EdnsOption::Unknown(EXTENDED_ERROR, data)
    }
}
