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
        relay(stdin, stdout, stream)?;
        Ok(0)
    }
}

/// Copies both ways until the stream ends; the end of `input` closes only its own half.
fn relay(
    mut input: impl io::Read + Send + 'static,
    mut output: impl io::Write,
    stream: Arc<UnixStream>,
) -> Result<(), CliError> {
    let upward = Arc::clone(&stream);
    // Not joined: when the stream has ended, what is still to be read has nowhere to go.
    let copy = move || {
        let _ = io::copy(&mut input, &mut &*upward);
        let _ = upward.shutdown(Shutdown::Write);
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(copy)
        .map_err(|source| CliError::Setup { what: "a thread for stdin", source })?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match io::Read::read(&mut &*stream, &mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The guest went away without a goodbye; what it had said is written.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(SshError::Lost { reason: format!(": {error}") }.into()),
        };
        let write = |output: &mut dyn io::Write| match &buffer[..count] {
            [] => output.flush(),
            bytes => output.write_all(bytes),
        };
        write(&mut output).map_err(|source| CliError::Output { source })?;
        if count == 0 {
            return Ok(());
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

    #[test]
    fn failures_of_the_guests_side_and_of_ours_are_told_apart() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        (&far).write_all(b"hello").unwrap();
        let error = relay(io::empty(), full, Arc::new(near)).unwrap_err();
        assert!(matches!(error, CliError::Output { .. }), "{error:?}");

        let (near, _far) = UnixStream::pair().unwrap();
        // Nothing to read within the time is an error of the reading.
        near.set_read_timeout(Some(std::time::Duration::from_millis(1))).unwrap();
        let error = relay(io::empty(), io::sink(), Arc::new(near)).unwrap_err();
        assert!(matches!(error, CliError::Ssh(SshError::Lost { .. })), "{error:?}");
    }
}
