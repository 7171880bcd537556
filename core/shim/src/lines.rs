//! Lines of JSON with a bound, for peers that may send anything.

use std::io;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt};

/// Reads one line without its newline; `None` at the end of the stream. A last line without newline is `UnexpectedEof`.
/// Not cancel-safe: a line half read is lost.
pub(crate) async fn read_line<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    limit: usize,
) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let newline = available.iter().position(|&b| b == b'\n');
        let taken = newline.unwrap_or(available.len());
        if line.len() + taken > limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line exceeds {limit} bytes")));
        }
        line.extend_from_slice(&available[..taken]);
        reader.consume(taken + usize::from(newline.is_some()));
        if newline.is_some() {
            return Ok(Some(line));
        }
    }
}

/// [`read_line`] of a value.
pub(crate) async fn read_json<R: AsyncBufRead + Unpin, T: DeserializeOwned>(
    reader: &mut R,
    limit: usize,
) -> io::Result<Option<T>> {
    match read_line(reader, limit).await? {
        Some(line) => Ok(Some(serde_json::from_slice(&line)?)),
        None => Ok(None),
    }
}

/// Writes a value and a newline at once.
pub(crate) async fn write_json<W: AsyncWrite + Unpin, T: Serialize>(
    writer: &mut W,
    value: &T,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_cut_ones_are_told() {
        let mut ok = &b"one\n\ntwo\n"[..];
        assert_eq!(read_line(&mut ok, 3).await.unwrap().unwrap(), b"one");
        assert_eq!(read_line(&mut ok, 3).await.unwrap().unwrap(), b"");
        assert_eq!(read_line(&mut ok, 3).await.unwrap().unwrap(), b"two");
        assert!(read_line(&mut ok, 3).await.unwrap().is_none());
        assert!(read_line(&mut &b"four\n"[..], 3).await.is_err());
        assert!(read_line(&mut &b"cut"[..], 3).await.is_err());
    }
}
