//! Finding the beginning of a session on a carrier that may still hold bytes of a former one.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Host to guest: this, then a nonce of 16 bytes.
pub const HELLO: &[u8; 16] = b"\0vmd-channel-2?\n";
/// Guest to host: this, then the same nonce.
pub const ANSWER: &[u8; 16] = b"\0vmd-channel-2!\n";

const NONCE: usize = 16;

/// Host end: says hello and reads until the answer to just this hello.
pub(crate) async fn host<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    let nonce = nonce()?;
    let mut hello = HELLO.to_vec();
    hello.extend_from_slice(&nonce);
    stream.write_all(&hello).await?;
    stream.flush().await?;
    loop {
        skip_past(stream, ANSWER).await?;
        let mut got = [0; NONCE];
        stream.read_exact(&mut got).await?;
        if got == nonce {
            return Ok(());
        }
    }
}

/// Guest end: reads until a hello and answers it.
pub(crate) async fn guest<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    skip_past(stream, HELLO).await?;
    let mut nonce = [0; NONCE];
    stream.read_exact(&mut nonce).await?;
    let mut answer = ANSWER.to_vec();
    answer.extend_from_slice(&nonce);
    stream.write_all(&answer).await?;
    stream.flush().await
}

/// Reads single bytes, so that nothing behind the mark is taken. Both marks begin with a byte that
/// occurs in them only there; a mismatch can therefore restart only at its own first byte.
async fn skip_past<S: AsyncRead + Unpin>(stream: &mut S, mark: &[u8]) -> io::Result<()> {
    let mut matched = 0;
    while matched < mark.len() {
        let byte = stream.read_u8().await?;
        matched = if byte == mark[matched] { matched + 1 } else { usize::from(byte == mark[0]) };
    }
    Ok(())
}

fn nonce() -> io::Result<[u8; NONCE]> {
    use std::io::Read;
    let mut bytes = [0; NONCE];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // A nonce that contains a mark's first byte could be taken for the beginning of one.
    for byte in &mut bytes {
        *byte |= 1;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn leftovers_of_a_former_session_are_skipped() {
        let (mut near, mut far) = tokio::io::duplex(4096);
        // Towards the guest: garbage, half a hello, then the true one.
        near.write_all(b"garbage\0\0vmd-chan").await.unwrap();
        // Towards the host: an answer to somebody else's hello.
        far.write_all(ANSWER).await.unwrap();
        far.write_all(&[7; NONCE]).await.unwrap();
        let (a, b) = tokio::join!(host(&mut near), guest(&mut far));
        a.unwrap();
        b.unwrap();
        near.write_all(b"x").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'x');
    }
}
