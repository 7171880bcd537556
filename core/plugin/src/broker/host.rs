//! Interface `host`: what a hook is told.

use wasmtime::component::Resource;

use super::{Answer, BlobHandle, Call, Context, Facts, Reference, Report, Vm};
use crate::{
    WIT_VERSION,
    bindings::vm::plugin::host,
    call::{Finding, Severity, VmFacts},
    error::{Excess, PluginError, tame},
    forms,
    grant::Grant,
    plan::RefName,
};

impl Call {
    /// The call's VM. A component that has a handle to one is in a hook that has one.
    fn vm(&self) -> wasmtime::Result<&VmFacts> {
        self.input.vm.as_ref().ok_or_else(|| wasmtime::Error::msg("this call is not about a VM"))
    }

    pub(super) fn reference(&mut self, name: &str) -> Answer<Resource<Reference>> {
        forms::name(name)?;
        Ok(self.push(Reference(name.to_owned()))?)
    }

    fn find(
        &mut self,
        severity: Severity,
        subject: &str,
        message: &str,
        hint: Option<&str>,
    ) -> wasmtime::Result<()> {
        let most = self.limits().findings;
        if self.findings.len() >= most {
            return Err(Excess::Findings(most).into());
        }
        self.findings.push(Finding {
            severity,
            subject: tame(subject, 200),
            message: tame(message, 2000),
            hint: hint.map(|hint| tame(hint, 1000)),
        });
        Ok(())
    }
}

impl host::Host for Call {}

impl host::HostContext for Call {
    fn api_version(&mut self, _: Resource<Context>) -> wasmtime::Result<String> {
        Ok(WIT_VERSION.to_owned())
    }

    fn reason(&mut self, _: Resource<Context>) -> wasmtime::Result<String> {
        Ok(self.input.reason.clone())
    }

    fn plugin_name(&mut self, _: Resource<Context>) -> wasmtime::Result<String> {
        Ok(self.identity.name.clone())
    }

    fn config(&mut self, _: Resource<Context>) -> wasmtime::Result<String> {
        Ok(self.input.config.as_ref().map_or_else(|| self.identity.config.clone(), ToString::to_string))
    }

    fn time_limit(&mut self, _: Resource<Context>) -> wasmtime::Result<u64> {
        Ok(u64::try_from(self.patience().as_millis()).unwrap_or(u64::MAX))
    }

    fn reference(&mut self, _: Resource<Context>, name: String) -> Answer<Resource<Reference>> {
        // A file's name is its path.
        forms::relative_path(&name)?;
        Ok(self.push(Reference(name))?)
    }

    fn blob(&mut self, _: Resource<Context>, name: String) -> Answer<Resource<BlobHandle>> {
        let Some(blob) = self.input.blobs.get(&name).cloned() else {
            let there = self.input.blobs.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let error =
                PluginError::new("blob.unknown", format!("no file {name:.200?} came with the plugin"));
            return Err(error.hint(format!("there is: {there}")).into());
        };
        Ok(self.push(BlobHandle(Some(name), blob))?)
    }

    fn now(&mut self, _: Resource<Context>) -> Answer<u64> {
        self.permit(&Grant::Clock {})?;
        Ok(self.input.now_unix_ms)
    }

    fn random(&mut self, _: Resource<Context>, length: u32) -> Answer<Vec<u8>> {
        self.permit(&Grant::Random {})?;
        if length > 65_536 {
            return Err(PluginError::new("bad.length", "at most 65536 random bytes at once").into());
        }
        Ok(self.random(length as usize))
    }

    fn drop(&mut self, _: Resource<Context>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl host::HostVm for Call {
    fn id(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.id.to_string())
    }

    fn name(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.name.to_string())
    }

    fn image_reference(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.image_reference.clone())
    }

    fn image_digest(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.image_digest.clone())
    }

    fn image_property(&mut self, _: Resource<Vm>, name: String) -> wasmtime::Result<Option<String>> {
        Ok(self.vm()?.image_properties.get(&name).cloned())
    }

    fn kernel_release(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.kernel_release.clone())
    }

    fn cpus(&mut self, _: Resource<Vm>) -> wasmtime::Result<u32> {
        Ok(self.vm()?.cpus)
    }

    fn memory_bytes(&mut self, _: Resource<Vm>) -> wasmtime::Result<u64> {
        Ok(self.vm()?.memory_bytes)
    }

    fn disk_bytes(&mut self, _: Resource<Vm>) -> wasmtime::Result<u64> {
        Ok(self.vm()?.disk_bytes)
    }

    fn network(&mut self, _: Resource<Vm>) -> wasmtime::Result<String> {
        Ok(self.vm()?.network.clone())
    }

    fn addresses(&mut self, _: Resource<Vm>) -> wasmtime::Result<Vec<String>> {
        Ok(self.vm()?.addresses.iter().map(ToString::to_string).collect())
    }

    fn label_names(&mut self, _: Resource<Vm>) -> wasmtime::Result<Vec<String>> {
        Ok(self.vm()?.labels.keys().cloned().collect())
    }

    fn label(&mut self, _: Resource<Vm>, name: String) -> wasmtime::Result<Option<String>> {
        Ok(self.vm()?.labels.get(&name).cloned())
    }

    fn temporary(&mut self, _: Resource<Vm>) -> wasmtime::Result<bool> {
        Ok(self.vm()?.temporary)
    }

    fn drop(&mut self, _: Resource<Vm>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl host::HostFacts for Call {
    fn names(&mut self, _: Resource<Facts>) -> wasmtime::Result<Vec<String>> {
        Ok(self.input.facts.keys().cloned().collect())
    }

    fn get(&mut self, _: Resource<Facts>, name: String) -> wasmtime::Result<Option<String>> {
        Ok(self.input.facts.get(&name).cloned())
    }

    fn drop(&mut self, _: Resource<Facts>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl host::HostReference for Call {
    fn name(&mut self, this: Resource<Reference>) -> wasmtime::Result<String> {
        Ok(self.table.get(&this)?.0.clone())
    }

    fn value(&mut self, this: Resource<Reference>) -> wasmtime::Result<Option<String>> {
        let name = RefName(self.table.get(&this)?.0.clone());
        Ok(self.input.references.get(&name).cloned())
    }

    fn drop(&mut self, this: Resource<Reference>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl host::HostBlob for Call {
    // These two cannot say no: an error ends the call, and is the host's.
    async fn size(&mut self, this: Resource<BlobHandle>) -> wasmtime::Result<u64> {
        let blob = self.table.get(&this)?.1.clone();
        Ok(blob.size().await?)
    }

    async fn digest(&mut self, this: Resource<BlobHandle>) -> wasmtime::Result<String> {
        let blob = self.table.get(&this)?.1.clone();
        Ok(blob.digest().await?)
    }

    async fn read(&mut self, this: Resource<BlobHandle>, offset: u64, length: u32) -> Answer<Vec<u8>> {
        let blob = self.table.get(&this).map_err(wasmtime::Error::from)?.1.clone();
        Ok(blob.read(offset, (length as usize).min(self.limits().read)).await?)
    }

    fn drop(&mut self, this: Resource<BlobHandle>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl host::HostReport for Call {
    fn ok(&mut self, _: Resource<Report>, subject: String, message: String) -> wasmtime::Result<()> {
        self.find(Severity::Ok, &subject, &message, None)
    }

    fn warning(
        &mut self,
        _: Resource<Report>,
        subject: String,
        message: String,
        hint: Option<String>,
    ) -> wasmtime::Result<()> {
        self.find(Severity::Warning, &subject, &message, hint.as_deref())
    }

    fn failure(
        &mut self,
        _: Resource<Report>,
        subject: String,
        message: String,
        hint: Option<String>,
    ) -> wasmtime::Result<()> {
        self.find(Severity::Failure, &subject, &message, hint.as_deref())
    }

    fn progress(&mut self, _: Resource<Report>, message: String) -> wasmtime::Result<()> {
        if let Some(progress) = &self.input.progress {
            // It is shown on one line.
            progress.says(&tame(message.trim(), 200).replace(['\n', '\t'], " "));
        }
        Ok(())
    }

    fn drop(&mut self, _: Resource<Report>) -> wasmtime::Result<()> {
        Ok(())
    }
}
