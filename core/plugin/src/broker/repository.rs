//! Interface `repository`: what an importer looks at.

use std::sync::Arc;

use wasmtime::component::Resource;

use super::{Answer, BlobHandle, Call, DifferenceHandle, JobHandle, Offers, RepoHandle, SandboxHandle};
use crate::{
    bindings::vm::plugin::repository,
    call::{Job, Offer},
    error::{Excess, PluginError, tame},
    forms,
    grant::Grant,
    ports::{Difference, RepoFacts, Repository},
};

impl Call {
    fn repo(&self) -> Answer<Arc<dyn Repository>> {
        self.permit(&Grant::Repository {})?;
        let none = || PluginError::new("repository.absent", "this call is not about a repository");
        Ok(self.input.repository.clone().ok_or_else(none)?)
    }

    fn repo_facts(&self) -> RepoFacts {
        self.repo().map(|repo| repo.facts()).unwrap_or_default()
    }

    fn difference(&self, this: &Resource<DifferenceHandle>) -> wasmtime::Result<Arc<dyn Difference>> {
        Ok(self.table.get(this)?.0.clone())
    }

    fn job(&self) -> wasmtime::Result<&Job> {
        self.input.job.as_ref().ok_or_else(|| wasmtime::Error::msg("there is no job"))
    }

    /// Paths for the component, no more than it may get in one answer.
    fn paths_that_fit(&self, paths: Vec<String>) -> Answer<Vec<String>> {
        let bytes: usize = paths.iter().map(|path| path.len() + 8).sum();
        if bytes > self.limits().read {
            let error = PluginError::new(
                "repository.too-many",
                format!("{} paths are too many at once", paths.len()),
            );
            return Err(error.hint("ask for those with a longer prefix").into());
        }
        Ok(paths)
    }
}

impl repository::Host for Call {}

impl repository::HostRepo for Call {
    fn name(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<String> {
        Ok(self.repo_facts().name)
    }

    fn is_git(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<bool> {
        Ok(self.repo_facts().is_git)
    }

    fn head(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<Option<String>> {
        Ok(self.repo_facts().head)
    }

    fn branch(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<Option<String>> {
        Ok(self.repo_facts().branch)
    }

    fn dirty(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<bool> {
        Ok(self.repo_facts().dirty)
    }

    async fn paths(&mut self, _: Resource<RepoHandle>, prefix: String) -> Answer<Vec<String>> {
        self.text(&prefix)?;
        let paths = self.repo()?.paths(&prefix).await?;
        self.paths_that_fit(paths)
    }

    async fn submodules(&mut self, _: Resource<RepoHandle>) -> Answer<Vec<String>> {
        let paths = self.repo()?.submodules().await?;
        self.paths_that_fit(paths)
    }

    async fn read_file(&mut self, _: Resource<RepoHandle>, path: String, limit: u64) -> Answer<Vec<u8>> {
        // The same rule as for absolute ones: no way up, nothing empty.
        forms::absolute_path(&format!("/{path}"))?;
        let most = usize::try_from(limit).unwrap_or(usize::MAX).min(self.limits().read);
        let mut bytes = self.repo()?.read_file(&path, most).await?;
        bytes.truncate(most);
        Ok(bytes)
    }

    async fn archive(
        &mut self,
        _: Resource<RepoHandle>,
        prefixes: Vec<String>,
    ) -> Answer<Resource<BlobHandle>> {
        prefixes.iter().try_for_each(|prefix| self.text(prefix))?;
        let blob = self.repo()?.archive(&prefixes).await?;
        Ok(self.push(BlobHandle(None, blob))?)
    }

    async fn bundle(&mut self, _: Resource<RepoHandle>, depth: Option<u32>) -> Answer<Resource<BlobHandle>> {
        let blob = self.repo()?.bundle(depth).await?;
        Ok(self.push(BlobHandle(None, blob))?)
    }

    async fn patch(&mut self, _: Resource<RepoHandle>) -> Answer<Resource<BlobHandle>> {
        let blob = self.repo()?.patch().await?;
        Ok(self.push(BlobHandle(None, blob))?)
    }

    async fn history(&mut self, _: Resource<RepoHandle>, depth: Option<u32>) -> Answer<Resource<BlobHandle>> {
        if depth == Some(0) {
            return Err(PluginError::new("bad.depth", "a history has at least one commit").into());
        }
        let blob = self.repo()?.history(depth).await?;
        Ok(self.push(BlobHandle(None, blob))?)
    }

    fn files(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<u64> {
        Ok(self.repo_facts().files)
    }

    fn bytes(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<u64> {
        Ok(self.repo_facts().bytes)
    }

    fn modified(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<u64> {
        Ok(self.repo_facts().modified)
    }

    fn deleted(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<u64> {
        Ok(self.repo_facts().deleted)
    }

    fn untracked(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<u64> {
        Ok(self.repo_facts().untracked)
    }

    fn traits(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<Vec<String>> {
        Ok(self.repo_facts().traits)
    }

    fn prepared(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<bool> {
        Ok(self.repo_facts().prepared)
    }

    async fn compare(
        &mut self,
        _: Resource<RepoHandle>,
        _: Resource<SandboxHandle>,
        directory: String,
    ) -> Answer<Resource<DifferenceHandle>> {
        // It looks into the guest.
        self.sandbox()?;
        forms::absolute_path(&directory)?;
        let difference = self.repo()?.compare(&directory).await?;
        Ok(self.push(DifferenceHandle(difference))?)
    }

    fn drop(&mut self, _: Resource<RepoHandle>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl repository::HostDifference for Call {
    fn known(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<bool> {
        Ok(self.difference(&this)?.summary().known)
    }

    fn changed(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<u64> {
        Ok(self.difference(&this)?.summary().changed)
    }

    fn removed(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<u64> {
        Ok(self.difference(&this)?.summary().removed)
    }

    fn bytes(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<u64> {
        Ok(self.difference(&this)?.summary().bytes)
    }

    fn overwritten(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<Vec<String>> {
        let mut left = self.limits().read;
        let mut paths = self.difference(&this)?.summary().overwritten;
        let cut = paths.iter().position(|path| {
            let fits = left.checked_sub(path.len() + 8);
            left = fits.unwrap_or_default();
            fits.is_none()
        });
        paths.truncate(cut.unwrap_or(paths.len()));
        Ok(paths)
    }

    async fn apply(&mut self, this: Resource<DifferenceHandle>, uid: u32, gid: u32) -> Answer {
        self.sandbox()?;
        let difference = self.difference(&this)?;
        Ok(difference.apply(uid, gid).await?)
    }

    fn drop(&mut self, this: Resource<DifferenceHandle>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl repository::HostOffers for Call {
    fn add(
        &mut self,
        _: Resource<Offers>,
        strategy: String,
        score: u32,
        description: String,
    ) -> wasmtime::Result<()> {
        let most = self.limits().findings;
        if self.offers.len() >= most {
            return Err(Excess::Offers(most).into());
        }
        self.offers.push(Offer {
            strategy: tame(&strategy, 100),
            score: score.min(100),
            description: tame(&description, 1000),
            warnings: Vec::new(),
        });
        Ok(())
    }

    fn warn(&mut self, _: Resource<Offers>, strategy: String, message: String) -> wasmtime::Result<()> {
        let most = self.limits().findings;
        if self.offers.iter().map(|offer| offer.warnings.len()).sum::<usize>() >= most {
            return Err(Excess::Findings(most).into());
        }
        let strategy = tame(&strategy, 100);
        // One of a strategy that is not offered concerns nobody.
        if let Some(offer) = self.offers.iter_mut().rfind(|offer| offer.strategy == strategy) {
            offer.warnings.push(tame(&message, 1000));
        }
        Ok(())
    }

    fn drop(&mut self, _: Resource<Offers>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl repository::HostJob for Call {
    fn strategy(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<String> {
        Ok(self.job()?.strategy.clone())
    }

    fn destination(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<String> {
        Ok(self.job()?.destination.clone())
    }

    fn user(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<String> {
        Ok(self.job()?.user.clone())
    }

    fn uid(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<u32> {
        Ok(self.job()?.uid)
    }

    fn gid(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<u32> {
        Ok(self.job()?.gid)
    }

    fn replace(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<bool> {
        Ok(self.job()?.replace)
    }

    fn drop(&mut self, _: Resource<JobHandle>) -> wasmtime::Result<()> {
        Ok(())
    }
}
