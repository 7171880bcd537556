//! The kernel's device-mapper interface (`linux/dm-ioctl.h`, version 4), as far as it is needed here.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use nix::{errno::Errno, libc};

/// Size of `struct dm_ioctl`.
const HEADER: usize = 312;
/// Size of `struct dm_target_spec`.
const SPEC: usize = 40;
const NAME: std::ops::Range<usize> = 48..176;
const UUID: std::ops::Range<usize> = 176..305;
/// What libdevmapper begins with too: enough for most answers.
const BUFFER: usize = 16 << 10;

const READ_ONLY: u32 = 1 << 0;
const SUSPENDED: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const ACTIVE_PRESENT: u32 = 1 << 5;
const INACTIVE_PRESENT: u32 = 1 << 6;
const BUFFER_FULL: u32 = 1 << 8;

/// What udev is told of our devices (libdevmapper.h, `DM_UDEV_*`, in the upper half of the cookie): not to look at what is on
/// them, which would keep them busy, and to make no names for them. No one waits for udev, hence no cookie in the lower half.
const UDEV: u32 = (0x02 | 0x04 | 0x08 | 0x20 | 0x40) << 16;

/// The requests, numbered as in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Version = 0,
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    Suspend = 6,
    Status = 7,
    TableLoad = 9,
    TableClear = 10,
    TableStatus = 12,
    ListVersions = 13,
    GetTargetVersion = 17,
}

/// A stretch of a device and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// In sectors of 512 bytes, as all lengths here.
    pub(crate) start: u64,
    pub(crate) sectors: u64,
    pub(crate) kind: String,
    /// Parameters of a table, or what the target says of itself.
    pub(crate) text: String,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Info {
    /// As `st_rdev` has it.
    pub(crate) dev: u64,
    pub(crate) uuid: String,
    pub(crate) suspended: bool,
    /// It has a table.
    pub(crate) live: bool,
    /// It has one that is to replace the table.
    pub(crate) loaded: bool,
}

/// An open control device.
#[derive(Debug)]
pub(crate) struct Control(File);

struct Answer {
    flags: u32,
    buffer: Vec<u8>,
}

impl Control {
    /// # Errors
    /// It does not answer as device-mapper's interface of version 4 does.
    pub(crate) fn new(device: File) -> io::Result<Self> {
        let this = Self(device);
        this.call(Request::Version, "", 0, &[])?;
        Ok(this)
    }

    /// Whether a kind of target can be used; its module is loaded if need be.
    pub(crate) fn has_target(&self, kind: &str) -> io::Result<bool> {
        match self.call(Request::GetTargetVersion, kind, 0, &[]) {
            Ok(_) => Ok(true),
            // Before Linux 5.4 there is only a list of what is loaded.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                let answer = self.call(Request::ListVersions, "", 0, &[])?;
                // Entries: u32 next, u32 version[3], name.
                Ok(entries(answer.data(), 0, 16).any(|name| name == kind))
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names of all devices.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let answer = self.call(Request::ListDevices, "", 0, &[])?;
        // Entries: u64 dev, u32 next, name. With no devices there is one without a name.
        Ok(entries(answer.data(), 8, 12).filter(|name| !name.is_empty()).collect())
    }

    /// `None` where there is no device of that name.
    pub(crate) fn info(&self, name: &str) -> io::Result<Option<Info>> {
        absent(self.call(Request::Status, name, 0, &[])).map(|answer| answer.map(|answer| answer.info()))
    }

    /// Makes a device without a table.
    pub(crate) fn create(&self, name: &str, uuid: &str) -> io::Result<()> {
        let mut header = header(name, 0)?;
        put(&mut header[UUID], uuid)?;
        self.send(Request::Create, header, &[]).map(drop)
    }

    /// Gives a device a table that counts from the next [`Self::resume`] on.
    pub(crate) fn load(&self, name: &str, read_only: bool, table: &[Target]) -> io::Result<()> {
        let mut payload = Vec::new();
        for target in table {
            let begin = payload.len();
            payload.extend(target.start.to_ne_bytes());
            payload.extend(target.sectors.to_ne_bytes());
            payload.extend([0; 8]);
            let mut kind = [0; 16];
            put(&mut kind, &target.kind)?;
            payload.extend(kind);
            payload.extend(target.text.as_bytes());
            payload.push(0);
            payload.resize(payload.len().next_multiple_of(8), 0);
            let next = (payload.len() - begin) as u32;
            payload[begin + 20..begin + 24].copy_from_slice(&next.to_ne_bytes());
        }
        let mut header = header(name, if read_only { READ_ONLY } else { 0 })?;
        header[20..24].copy_from_slice(&(table.len() as u32).to_ne_bytes());
        self.send(Request::TableLoad, header, &payload).map(drop)
    }

    /// Forgets a loaded table.
    pub(crate) fn clear(&self, name: &str) -> io::Result<()> {
        self.call(Request::TableClear, name, 0, &[]).map(drop)
    }

    /// Holds back what is read and written from now on; what is under way ends first.
    pub(crate) fn suspend(&self, name: &str) -> io::Result<()> {
        self.call(Request::Suspend, name, SUSPENDED, &[]).map(drop)
    }

    /// Puts a loaded table in force, and lets what was held back go on.
    pub(crate) fn resume(&self, name: &str) -> io::Result<()> {
        self.call(Request::Suspend, name, 0, &[]).map(drop)
    }

    /// Whether there was one.
    ///
    /// # Errors
    /// EBUSY where somebody has it open.
    pub(crate) fn remove(&self, name: &str) -> io::Result<bool> {
        absent(self.call(Request::Remove, name, 0, &[])).map(|answer| answer.is_some())
    }

    /// The table in force.
    pub(crate) fn table(&self, name: &str) -> io::Result<Vec<Target>> {
        self.call(Request::TableStatus, name, STATUS_TABLE, &[]).map(|answer| answer.targets())
    }

    /// What the targets in force say of themselves.
    pub(crate) fn status(&self, name: &str) -> io::Result<Vec<Target>> {
        self.call(Request::TableStatus, name, 0, &[]).map(|answer| answer.targets())
    }

    fn call(&self, request: Request, name: &str, flags: u32, payload: &[u8]) -> io::Result<Answer> {
        self.send(request, header(name, flags)?, payload)
    }

    fn send(&self, request: Request, mut header: Vec<u8>, payload: &[u8]) -> io::Result<Answer> {
        if matches!(request, Request::Suspend | Request::Remove) {
            header[32..36].copy_from_slice(&UDEV.to_ne_bytes());
        }
        let mut size = BUFFER.max(HEADER + payload.len());
        loop {
            let mut buffer = header.clone();
            buffer[12..16].copy_from_slice(&(size as u32).to_ne_bytes());
            buffer.extend(payload);
            buffer.resize(size, 0);
            ioctl(self.0.as_raw_fd(), request, &mut buffer)?;
            let flags = u32_at(&buffer, 28);
            if flags & BUFFER_FULL == 0 {
                return Ok(Answer { flags, buffer });
            }
            size *= 2;
        }
    }
}

impl Answer {
    /// What is behind the header.
    fn data(&self) -> &[u8] {
        let (end, start) = (u32_at(&self.buffer, 12) as usize, u32_at(&self.buffer, 16) as usize);
        self.buffer.get(start..end.min(self.buffer.len())).unwrap_or_default()
    }

    fn info(&self) -> Info {
        let dev = u64_at(&self.buffer, 40);
        Info {
            // The kernel's huge_encode_dev.
            dev: libc::makedev(((dev >> 8) & 0xfff) as u32, ((dev & 0xff) | ((dev >> 12) & 0xf_ff00)) as u32),
            uuid: text(&self.buffer[UUID]),
            suspended: self.flags & SUSPENDED != 0,
            live: self.flags & ACTIVE_PRESENT != 0,
            loaded: self.flags & INACTIVE_PRESENT != 0,
        }
    }

    fn targets(&self) -> Vec<Target> {
        let data = self.data();
        let mut targets = Vec::new();
        let mut at = 0;
        for _ in 0..u32_at(&self.buffer, 20) {
            let Some(spec) = data.get(at..at + SPEC) else { break };
            targets.push(Target {
                start: u64_at(spec, 0),
                sectors: u64_at(spec, 8),
                kind: text(&spec[24..40]),
                text: text(&data[at + SPEC..]),
            });
            // From the beginning of the data, other than in a table that is loaded.
            at = u32_at(spec, 20) as usize;
        }
        targets
    }
}

fn absent(answer: io::Result<Answer>) -> io::Result<Option<Answer>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn header(name: &str, flags: u32) -> io::Result<Vec<u8>> {
    let mut header = vec![0; HEADER];
    // The least version: newer kernels take it.
    header[0..4].copy_from_slice(&4_u32.to_ne_bytes());
    header[16..20].copy_from_slice(&(HEADER as u32).to_ne_bytes());
    header[28..32].copy_from_slice(&flags.to_ne_bytes());
    put(&mut header[NAME], name)?;
    Ok(header)
}

/// The names of a list whose entries say how far the next one is.
fn entries(data: &[u8], next: usize, name: usize) -> impl Iterator<Item = String> {
    let mut rest = Some(data);
    std::iter::from_fn(move || {
        let entry = rest.filter(|entry| entry.len() > name)?;
        let step = u32_at(entry, next) as usize;
        rest = (step > 0).then(|| entry.get(step..)).flatten();
        Some(text(&entry[name..]))
    })
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn put(field: &mut [u8], value: &str) -> io::Result<()> {
    if value.len() >= field.len() || value.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{value:?} is no name")));
    }
    field[..value.len()].copy_from_slice(value.as_bytes());
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(value)
}

#[expect(unsafe_code, reason = "nix wraps no ioctl of device-mapper")]
fn ioctl(control: RawFd, request: Request, buffer: &mut [u8]) -> io::Result<()> {
    let code = nix::request_code_readwrite!(0xfd, request as u8, HEADER);
    // SAFETY: `buffer` begins with a `struct dm_ioctl` whose `data_size` is its length; the kernel reads and writes no more.
    let result = unsafe { libc::ioctl(control, code as _, buffer.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_end_where_they_say() {
        let mut data = Vec::new();
        data.extend(7_u64.to_ne_bytes());
        data.extend(24_u32.to_ne_bytes());
        data.extend(b"vmd-a\0\0\0\0\0\0\0");
        data.extend(8_u64.to_ne_bytes());
        data.extend(0_u32.to_ne_bytes());
        data.extend(b"other\0");
        assert_eq!(entries(&data, 8, 12).collect::<Vec<_>>(), ["vmd-a", "other"]);
        assert_eq!(entries(&[], 8, 12).count(), 0);
        // Cut short, it is not read beyond its end.
        assert_eq!(entries(&data[..30], 8, 12).collect::<Vec<_>>(), ["vmd-a"]);
    }

    #[test]
    fn what_does_not_fit_is_no_name() {
        assert!(header(&"x".repeat(128), 0).is_err());
        assert!(header("a\0b", 0).is_err());
        assert_eq!(text(&header(&"x".repeat(127), 0).unwrap()[NAME]).len(), 127);
    }

    #[test]
    fn a_device_number_is_as_the_c_library_has_it() {
        let mut buffer = vec![0; HEADER];
        buffer[40..48].copy_from_slice(&((253_u64 << 8) | 0x12 | (0x345_u64 << 20)).to_ne_bytes());
        let info = Answer { flags: SUSPENDED, buffer }.info();
        assert_eq!((libc::major(info.dev), libc::minor(info.dev)), (253, 0x34512));
        assert!(info.suspended && !info.live);
    }
}
