//! Interface `live`: the running guest. Acts at once, so each method asks for the grant first.

use std::sync::Arc;

use wasmtime::component::Resource;

use super::{Answer, BlobHandle, Call, CommandHandle, OutputHandle, SandboxHandle};
use crate::{
    bindings::vm::plugin::live,
    error::PluginError,
    forms,
    grant::Grant,
    ports::{Blob, FileMode, GuestCommand, MemoryBlob, Sandbox},
};

impl Call {
    pub(super) fn sandbox(&self) -> Answer<Arc<dyn Sandbox>> {
        self.permit(&Grant::GuestLive {})?;
        let none = || PluginError::new("guest.absent", "the guest does not run");
        Ok(self.input.sandbox.clone().ok_or_else(none)?)
    }

    fn blob_of(&self, blob: &Resource<BlobHandle>) -> wasmtime::Result<Arc<dyn Blob>> {
        Ok(self.table.get(blob)?.1.clone())
    }

    fn command(&mut self, this: &Resource<CommandHandle>) -> wasmtime::Result<&mut GuestCommand> {
        Ok(&mut self.table.get_mut(this)?.0)
    }

    /// Text for a command in the making. What is too long for any command is a fault, for these methods cannot say no.
    fn part(&self, text: &str) -> wasmtime::Result<()> {
        if text.len() > self.limits().text * 32 || text.contains('\0') {
            return Err(wasmtime::Error::msg("a part of a command is too long or holds a NUL"));
        }
        Ok(())
    }
}

fn memory(content: Vec<u8>) -> Arc<dyn Blob> {
    Arc::new(MemoryBlob(content.into()))
}

impl live::Host for Call {}

impl live::HostSandbox for Call {
    async fn command(
        &mut self,
        _: Resource<SandboxHandle>,
        program: String,
    ) -> Answer<Resource<CommandHandle>> {
        self.sandbox()?;
        self.text(&program)?;
        if program.is_empty() || program.contains('\0') {
            return Err(PluginError::new("bad.command", "a program has a name, without NUL").into());
        }
        Ok(self.push(CommandHandle(GuestCommand { command: vec![program], ..GuestCommand::default() }))?)
    }

    async fn write_file(
        &mut self,
        _: Resource<SandboxHandle>,
        path: String,
        content: Vec<u8>,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Answer {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&path)?;
        forms::mode(mode)?;
        Ok(sandbox.write_file(&path, memory(content), FileMode { mode, uid, gid }).await?)
    }

    async fn read_file(&mut self, _: Resource<SandboxHandle>, path: String, limit: u64) -> Answer<Vec<u8>> {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&path)?;
        let most = usize::try_from(limit).unwrap_or(usize::MAX).min(self.limits().read);
        let mut bytes = sandbox.read_file(&path, most).await?;
        bytes.truncate(most);
        Ok(bytes)
    }

    async fn fetch_file(&mut self, _: Resource<SandboxHandle>, path: String) -> Answer<Resource<BlobHandle>> {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&path)?;
        let blob = sandbox.fetch_file(&path).await?;
        Ok(self.push(BlobHandle(None, blob))?)
    }

    async fn put_blob(
        &mut self,
        _: Resource<SandboxHandle>,
        content: Resource<BlobHandle>,
        path: String,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Answer {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&path)?;
        forms::mode(mode)?;
        let content = self.blob_of(&content)?;
        Ok(sandbox.write_file(&path, content, FileMode { mode, uid, gid }).await?)
    }

    async fn unpack(
        &mut self,
        _: Resource<SandboxHandle>,
        archive: Resource<BlobHandle>,
        directory: String,
        uid: u32,
        gid: u32,
    ) -> Answer {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&directory)?;
        let archive = self.blob_of(&archive)?;
        Ok(sandbox.unpack(archive, &directory, uid, gid).await?)
    }

    async fn is_empty(&mut self, _: Resource<SandboxHandle>, directory: String) -> Answer<bool> {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&directory)?;
        Ok(sandbox.is_empty(&directory).await?)
    }

    async fn clear(&mut self, _: Resource<SandboxHandle>, directory: String) -> Answer {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&directory)?;
        Ok(sandbox.clear(&directory).await?)
    }

    async fn remove(&mut self, _: Resource<SandboxHandle>, path: String) -> Answer {
        let sandbox = self.sandbox()?;
        forms::absolute_path(&path)?;
        Ok(sandbox.remove(&path).await?)
    }

    async fn drop(&mut self, _: Resource<SandboxHandle>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl live::HostCommand for Call {
    async fn argument(&mut self, this: Resource<CommandHandle>, argument: String) -> wasmtime::Result<()> {
        self.part(&argument)?;
        let command = self.command(&this)?;
        if command.command.len() >= 1024 {
            return Err(wasmtime::Error::msg("a command has at most 1024 arguments"));
        }
        command.command.push(argument);
        Ok(())
    }

    async fn environment(
        &mut self,
        this: Resource<CommandHandle>,
        name: String,
        value: String,
    ) -> wasmtime::Result<()> {
        self.part(&name)?;
        self.part(&value)?;
        let command = self.command(&this)?;
        if command.environment.len() >= 256 {
            return Err(wasmtime::Error::msg("a command has at most 256 variables"));
        }
        command.environment.insert(name, value);
        Ok(())
    }

    async fn directory(&mut self, this: Resource<CommandHandle>, path: String) -> wasmtime::Result<()> {
        self.part(&path)?;
        self.command(&this)?.directory = Some(path);
        Ok(())
    }

    async fn user(&mut self, this: Resource<CommandHandle>, name: String) -> wasmtime::Result<()> {
        self.part(&name)?;
        self.command(&this)?.user = Some(name);
        Ok(())
    }

    async fn input(&mut self, this: Resource<CommandHandle>, content: Vec<u8>) -> wasmtime::Result<()> {
        self.command(&this)?.input = Some(memory(content));
        Ok(())
    }

    async fn input_from_blob(
        &mut self,
        this: Resource<CommandHandle>,
        content: Resource<BlobHandle>,
    ) -> wasmtime::Result<()> {
        let content = self.blob_of(&content)?;
        self.command(&this)?.input = Some(content);
        Ok(())
    }

    async fn time_limit(&mut self, this: Resource<CommandHandle>, milliseconds: u64) -> wasmtime::Result<()> {
        self.command(&this)?.time_limit = Some(milliseconds);
        Ok(())
    }

    async fn run(&mut self, this: Resource<CommandHandle>) -> Answer<Resource<OutputHandle>> {
        let sandbox = self.sandbox()?;
        let command = self.command(&this)?.clone();
        if let Some(name) = command.environment.keys().find(|name| forms::variable(name).is_err()) {
            forms::variable(name)?;
        }
        let most = self.limits().read;
        let mut output = sandbox.run(command, most).await?;
        output.truncated |= output.stdout.len() > most || output.stderr.len() > most;
        output.stdout.truncate(most);
        output.stderr.truncate(most);
        Ok(self.push(OutputHandle(output))?)
    }

    async fn drop(&mut self, this: Resource<CommandHandle>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl live::HostOutput for Call {
    async fn code(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<Option<i32>> {
        Ok(self.table.get(&this)?.0.code)
    }

    async fn signal(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<Option<u32>> {
        Ok(self.table.get(&this)?.0.signal)
    }

    async fn stdout(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<Vec<u8>> {
        Ok(self.table.get(&this)?.0.stdout.clone())
    }

    async fn stderr(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<Vec<u8>> {
        Ok(self.table.get(&this)?.0.stderr.clone())
    }

    async fn truncated(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<bool> {
        Ok(self.table.get(&this)?.0.truncated)
    }

    async fn drop(&mut self, this: Resource<OutputHandle>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}
