//! What may be asked for as limits of a VM's root disk.

use vm_types::vm::DiskLimits;

use crate::EngineError;

/// Less than one block of a filesystem in a second is no use of a disk.
const BYTES_MIN: u64 = 4096;
/// No disk of ours comes near these, and QEMU counts to 10^15 only.
const BYTES_MAX: u64 = 1 << 40;
const OPERATIONS_MAX: u64 = 1_000_000_000;

/// Limits that are asked for: what is `None` stays as it is, 0 lifts a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitsRequest {
    /// Bytes read and written in a second.
    pub bytes_per_second: Option<u64>,
    /// Reads and writes in a second.
    pub operations_per_second: Option<u64>,
}

impl LimitsRequest {
    /// Whether they can be kept.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`].
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let bad = |message, hint| Err(EngineError::InvalidArgument { message, hint });
        match (self.bytes_per_second, self.operations_per_second) {
            (Some(bytes @ 1..BYTES_MIN), _) => bad(
                format!("a disk bandwidth of {bytes} bytes per second is less than one block"),
                format!("give at least {BYTES_MIN} bytes per second; 10M is slow, unlimited lifts the limit"),
            ),
            (Some(bytes), _) if bytes > BYTES_MAX => bad(
                format!("a disk bandwidth of {bytes} bytes per second is more than can be limited"),
                "1T per second is the most; unlimited lifts the limit".into(),
            ),
            (_, Some(operations)) if operations > OPERATIONS_MAX => bad(
                format!("{operations} disk operations per second are more than can be limited"),
                format!("{OPERATIONS_MAX} are the most; unlimited lifts the limit"),
            ),
            _ => Ok(()),
        }
    }

    /// These in place of others.
    pub(super) fn over(self, others: DiskLimits) -> DiskLimits {
        let limit = |wanted: Option<u64>, other| wanted.map_or(other, |limit| (limit > 0).then_some(limit));
        DiskLimits {
            bytes_per_second: limit(self.bytes_per_second, others.bytes_per_second),
            operations_per_second: limit(self.operations_per_second, others.operations_per_second),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(bytes_per_second: Option<u64>, operations_per_second: Option<u64>) -> LimitsRequest {
        LimitsRequest { bytes_per_second, operations_per_second }
    }

    #[test]
    fn limits_that_cannot_be_kept_are_refused_with_a_way_out() {
        for (wanted, part) in [
            (request(Some(1), None), "less than one block"),
            (request(Some(4095), None), "4095 bytes"),
            (request(Some(u64::MAX), Some(1)), "more than can be limited"),
            (request(None, Some(u64::MAX)), "operations"),
        ] {
            let error = wanted.check().unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert!(error.hint().unwrap().contains("unlimited"), "{error}");
        }
        for fine in [request(None, None), request(Some(0), Some(0)), request(Some(4096), Some(1))] {
            fine.check().unwrap();
        }
    }

    #[test]
    fn zero_lifts_a_limit_and_what_is_left_out_stays() {
        let limits =
            |bytes_per_second, operations_per_second| DiskLimits { bytes_per_second, operations_per_second };
        let had = limits(Some(1 << 20), None);
        assert_eq!(request(None, Some(50)).over(had), limits(Some(1 << 20), Some(50)));
        assert_eq!(request(Some(0), None).over(had), limits(None, None));
        assert_eq!(request(Some(2 << 20), Some(0)).over(had), limits(Some(2 << 20), None));
    }
}
