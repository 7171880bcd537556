//! `vm proxy`

use std::{io, net::Shutdown, os::unix::net::UnixStream, sync::Arc};

use clap::Args;
use vm_api::rpc::VmClient;

use crate::{context::Context, errors::CliError, ssh::SshError, stdio::Descriptor};

/// Connect stdin and stdout to a VM's SSH server
///
/// For OpenSSH and what builds on it: ssh -o ProxyCommand='vm proxy %h' root@NAME. `vm ssh-config` prints all that
/// OpenSSH needs to know.
#[derive(Debug, Args)]
pub(crate) struct ProxyArgs {
    /// Name or id
    name: String,
}

impl ProxyArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        let client = context.client().await?;
        let access = client.access(self.name).await?;
        drop(client);
        let socket = access.ssh_socket;
        let connect = |source| SshError::Connect { socket: socket.clone(), source };
        let stream = Arc::new(UnixStream::connect(&socket).map_err(connect)?);
        let local = |what| move |source| SshError::Local { what, source };
        let stdin = Descriptor::of(io::stdin()).map_err(local("stdin"))?;
        let stdout = Descriptor::of(io::stdout()).map_err(local("stdout"))?;
        match relay(stdin, stdout, stream) {
            Ok(()) => Ok(0),
            Err(source) => Err(CliError::Output { source }),
        }
    }
}

/// Copies both ways until the stream ends; the end of `input` closes only its own half.
fn relay(
    mut input: impl io::Read + Send + 'static,
    mut output: impl io::Write,
    stream: Arc<UnixStream>,
) -> io::Result<()> {
    let upward = Arc::clone(&stream);
    // Not joined: when the stream has ended, what is still to be read has nowhere to go.
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let _ = io::copy(&mut input, &mut &*upward);
        let _ = upward.shutdown(Shutdown::Write);
    })?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match io::Read::read(&mut &*stream, &mut buffer) {
            Ok(0) => return output.flush(),
            Ok(count) => output.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The guest went away without a goodbye; what it had said is written.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return output.flush(),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_end_of_input_leaves_the_other_direction_open() {
        let (near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut request = String::new();
            (&far).read_to_string(&mut request).unwrap();
            (&far).write_all(format!("got {request}").as_bytes()).unwrap();
        });
        let mut answer = Vec::new();
        relay(io::Cursor::new(b"hello".to_vec()), &mut answer, Arc::new(near)).unwrap();
        assert_eq!(answer, b"got hello");
        server.join().unwrap();
    }

    #[test]
    fn the_end_of_the_stream_ends_it_though_input_goes_on() {
        let (near, far) = UnixStream::pair().unwrap();
        let (silent, _kept) = UnixStream::pair().unwrap();
        (&far).write_all(b"bye").unwrap();
        drop(far);
        let mut answer = Vec::new();
        relay(silent, &mut answer, Arc::new(near)).unwrap();
        assert_eq!(answer, b"bye");
    }
}
