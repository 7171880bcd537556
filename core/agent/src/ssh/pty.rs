//! Pseudo-terminals.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::fchown,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    pty::{Winsize, openpty},
    sys::termios::{
        self, ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices as Char,
    },
};
use russh::Pty as Mode;
use tokio::io::unix::AsyncFd;

use super::users::User;

nix::ioctl_write_ptr_bad!(
    /// `TIOCSWINSZ` of tty_ioctl(4).
    tiocswinsz,
    libc::TIOCSWINSZ,
    Winsize
);

/// What the client wants of a terminal.
#[derive(Debug, Clone)]
pub(crate) struct Terminal {
    pub name: String,
    pub size: Winsize,
    pub modes: Vec<(Mode, u32)>,
}

/// Columns, rows and pixels of a request.
pub(crate) fn size(columns: u32, rows: u32, width: u32, height: u32) -> Winsize {
    let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Winsize { ws_row: short(rows), ws_col: short(columns), ws_xpixel: short(width), ws_ypixel: short(height) }
}

/// The server's side of a terminal.
pub(crate) struct Master {
    file: AsyncFd<File>,
}

/// Opens a terminal for `user`: the server's side, the command's side and the latter's path.
pub(crate) fn open(terminal: &Terminal, user: &User) -> io::Result<(Master, OwnedFd, Option<String>)> {
    let pair = openpty(Some(&terminal.size), None)?;
    let mut settings = termios::tcgetattr(&pair.slave)?;
    settings.input_flags.insert(InputFlags::IUTF8);
    apply(&mut settings, &terminal.modes);
    termios::tcsetattr(&pair.slave, SetArg::TCSANOW, &settings)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", pair.slave.as_raw_fd()))
        .ok()
        .and_then(|path| path.into_os_string().into_string().ok());
    // The group stays what devpts made it, so that write(1) keeps working.
    fchown(&pair.slave, Some(user.uid), None)?;
    for fd in [&pair.master, &pair.slave] {
        fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok((Master { file: crate::port::watched(File::from(pair.master))? }, pair.slave, path))
}

impl Master {
    pub(crate) fn resize(&self, size: &Winsize) {
        #[expect(unsafe_code, reason = "ioctl")]
        // SAFETY: TIOCSWINSZ reads one winsize where the pointer says, which outlives the call.
        let _ = unsafe { tiocswinsz(self.file.as_raw_fd(), size) };
    }

    /// Reads what the terminal shows; 0 once every process has let go of it.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        none_left(self.file.async_io(tokio::io::Interest::READABLE, |file| (&*file).read(buffer)).await)
    }

    /// As [`Self::read`], without waiting.
    pub(crate) fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        none_left(self.file.get_ref().read(buffer))
    }

    /// Types.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let length =
                self.file.async_io(tokio::io::Interest::WRITABLE, |file| (&*file).write(bytes)).await?;
            bytes = &bytes[length..];
        }
        Ok(())
    }
}

/// A terminal without any process says EIO.
fn none_left(read: io::Result<usize>) -> io::Result<usize> {
    match read {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
        result => result,
    }
}

/// Encoded terminal modes (RFC 4254, section 8) onto terminal settings, as far as Linux has them.
fn apply(settings: &mut termios::Termios, modes: &[(Mode, u32)]) {
    for (mode, value) in modes {
        let on = *value != 0;
        let character = match mode {
            Mode::VINTR => Some(Char::VINTR),
            Mode::VQUIT => Some(Char::VQUIT),
            Mode::VERASE => Some(Char::VERASE),
            Mode::VKILL => Some(Char::VKILL),
            Mode::VEOF => Some(Char::VEOF),
            Mode::VEOL => Some(Char::VEOL),
            Mode::VEOL2 => Some(Char::VEOL2),
            Mode::VSTART => Some(Char::VSTART),
            Mode::VSTOP => Some(Char::VSTOP),
            Mode::VSUSP => Some(Char::VSUSP),
            Mode::VREPRINT => Some(Char::VREPRINT),
            Mode::VWERASE => Some(Char::VWERASE),
            Mode::VLNEXT => Some(Char::VLNEXT),
            Mode::VDISCARD => Some(Char::VDISCARD),
            _ => None,
        };
        if let Some(character) = character {
            // 255 is "none" on the wire, 0 on Linux.
            settings.control_chars[character as usize] =
                u8::try_from(*value).ok().filter(|value| *value != 255).unwrap_or(0);
            continue;
        }
        let (input, local, output, control) = (
            &mut settings.input_flags,
            &mut settings.local_flags,
            &mut settings.output_flags,
            &mut settings.control_flags,
        );
        match mode {
            Mode::IGNPAR => input.set(InputFlags::IGNPAR, on),
            Mode::INPCK => input.set(InputFlags::INPCK, on),
            Mode::ISTRIP => input.set(InputFlags::ISTRIP, on),
            Mode::INLCR => input.set(InputFlags::INLCR, on),
            Mode::IGNCR => input.set(InputFlags::IGNCR, on),
            Mode::ICRNL => input.set(InputFlags::ICRNL, on),
            Mode::IXON => input.set(InputFlags::IXON, on),
            Mode::IXANY => input.set(InputFlags::IXANY, on),
            Mode::IXOFF => input.set(InputFlags::IXOFF, on),
            Mode::IMAXBEL => input.set(InputFlags::IMAXBEL, on),
            Mode::IUTF8 => input.set(InputFlags::IUTF8, on),
            Mode::ISIG => local.set(LocalFlags::ISIG, on),
            Mode::ICANON => local.set(LocalFlags::ICANON, on),
            Mode::ECHO => local.set(LocalFlags::ECHO, on),
            Mode::ECHOE => local.set(LocalFlags::ECHOE, on),
            Mode::ECHOK => local.set(LocalFlags::ECHOK, on),
            Mode::ECHONL => local.set(LocalFlags::ECHONL, on),
            Mode::NOFLSH => local.set(LocalFlags::NOFLSH, on),
            Mode::TOSTOP => local.set(LocalFlags::TOSTOP, on),
            Mode::IEXTEN => local.set(LocalFlags::IEXTEN, on),
            Mode::ECHOCTL => local.set(LocalFlags::ECHOCTL, on),
            Mode::ECHOKE => local.set(LocalFlags::ECHOKE, on),
            Mode::PENDIN => local.set(LocalFlags::PENDIN, on),
            Mode::OPOST => output.set(OutputFlags::OPOST, on),
            Mode::ONLCR => output.set(OutputFlags::ONLCR, on),
            Mode::OCRNL => output.set(OutputFlags::OCRNL, on),
            Mode::ONOCR => output.set(OutputFlags::ONOCR, on),
            Mode::ONLRET => output.set(OutputFlags::ONLRET, on),
            Mode::PARENB => control.set(ControlFlags::PARENB, on),
            Mode::PARODD => control.set(ControlFlags::PARODD, on),
            _ => {}
        }
    }
}
