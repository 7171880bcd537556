//! Connections forwarded into the guest (RFC 4254, section 7.2).

use russh::{ChannelWriteHalf, server::Msg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::backlog::Receiver;

/// Copies both ways until both are done. Dropping the future ends it, as the channel's end must.
pub(crate) async fn run(stream: TcpStream, output: ChannelWriteHalf<Msg>, mut input: Receiver) {
    let (mut read, mut write) = stream.into_split();
    let up = async {
        while let Some(data) = input.next().await {
            if write.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let down = async {
        let mut buffer = bytes::BytesMut::new();
        loop {
            buffer.resize(32 << 10, 0);
            match read.read(&mut buffer).await {
                Ok(length @ 1..) if output.data_bytes(buffer.split_to(length).freeze()).await.is_ok() => {}
                _ => break,
            }
        }
        let _ = output.eof().await;
    };
    tokio::join!(up, down);
    let _ = output.close().await;
}
