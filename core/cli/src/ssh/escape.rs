//! The escape that ends a hung session from a raw terminal, as OpenSSH has it: `~.` at the start of a line.

/// Finds escapes in what is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Escape {
    /// Within a line.
    Line,
    /// At the start of a line.
    Start,
    /// After `~` at the start of a line; it is held back.
    Tilde,
}

/// What to do with a chunk of typed bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// Send these.
    Send(Vec<u8>),
    /// End the session.
    Leave,
}

impl Escape {
    /// Judges the next chunk.
    pub(super) fn filter(&mut self, chunk: &[u8]) -> Typed {
        let mut send = Vec::with_capacity(chunk.len() + 1);
        for &byte in chunk {
            match (*self, byte) {
                (Self::Start, b'~') => {
                    *self = Self::Tilde;
                    continue;
                }
                (Self::Tilde, b'.') => return Typed::Leave,
                // `~~` is one tilde; another byte after it is sent with the one held back.
                (Self::Tilde, b'~') | (Self::Start | Self::Line, _) => {}
                (Self::Tilde, _) => send.push(b'~'),
            }
            send.push(byte);
            *self = if matches!(byte, b'\r' | b'\n') { Self::Start } else { Self::Line };
        }
        Typed::Send(send)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(chunks: &[&str]) -> Option<String> {
        let mut escape = Escape::Start;
        let mut sent = Vec::new();
        for chunk in chunks {
            match escape.filter(chunk.as_bytes()) {
                Typed::Send(bytes) => sent.extend(bytes),
                Typed::Leave => return None,
            }
        }
        Some(String::from_utf8(sent).unwrap())
    }

    #[test]
    fn only_a_tilde_and_a_dot_at_a_line_start_leave() {
        assert_eq!(typed(&["~."]), None);
        assert_eq!(typed(&["ls\r", "~", "."]), None);
        assert_eq!(typed(&["ls ~.\r"]).as_deref(), Some("ls ~.\r"));
        assert_eq!(typed(&["~/bin\r"]).as_deref(), Some("~/bin\r"));
        assert_eq!(typed(&["~~.\r"]).as_deref(), Some("~.\r"));
        assert_eq!(typed(&["~", "\r~."]), None);
    }
}
