//! The daemon's name server as that of a link, told to systemd-resolved by `resolvectl`.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use vm_host::{HostCommand, RunError, Runner};
use vm_types::{Effect, Handle, Observed};

use crate::{NetError, links::Links, names::check_device_name};

/// systemd-resolved, or its absence.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    pub(crate) runner: Arc<dyn Runner>,
    /// Where systemd-resolved keeps its files while it runs.
    pub(crate) directory: PathBuf,
    /// The system bus, on which resolvectl speaks to it. Where that is not, as in a container that sees its host's `/run/systemd`,
    /// nobody here has told it anything.
    pub(crate) bus: PathBuf,
}

/// [`Effect::LinkDns`], checked.
struct LinkDns<'a> {
    link: &'a str,
    server: String,
    /// As resolvectl takes them: only asked about, not searched.
    domains: Vec<String>,
}

impl<'a> LinkDns<'a> {
    fn of(effect: &'a Effect) -> Result<Self, NetError> {
        let Effect::LinkDns { link, server, domains } = effect else {
            return Err(NetError::NotMine { effect: effect.id() });
        };
        check_device_name(link)?;
        if link.starts_with('-') {
            return Err(NetError::BadName { name: link.clone() });
        }
        let fits = |domain: &str| {
            (1..=253).contains(&domain.len())
                && domain.split('.').all(|label| {
                    !label.is_empty()
                        && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
                })
        };
        if let Some(domain) = domains.iter().find(|domain| !fits(domain)) {
            return Err(NetError::BadDomain { domain: domain.clone() });
        }
        let server = match server {
            SocketAddr::V4(it) if it.port() == 53 => it.ip().to_string(),
            SocketAddr::V6(it) if it.port() == 53 => it.ip().to_string(),
            other => other.to_string(),
        };
        Ok(Self { link, server, domains: domains.iter().map(|domain| format!("~{domain}")).collect() })
    }
}

impl Resolved {
    pub(crate) async fn observe(&self, effect: &Effect) -> Result<Observed, NetError> {
        let wanted = LinkDns::of(effect)?;
        if Links::open()?.find(wanted.link).await?.is_none() {
            return Ok(Observed::Absent);
        }
        if !self.runs() {
            // Nothing is to be done, so nothing is missing.
            return Ok(Observed::Present(Handle::None));
        }
        let (Some(servers), Some(domains)) =
            (self.say(&["dns", wanted.link]).await?, self.say(&["domain", wanted.link]).await?)
        else {
            return Ok(Observed::Present(Handle::None));
        };
        let (servers, mut domains) = (words(&servers), words(&domains));
        let mut wanted_domains: Vec<_> = wanted.domains.iter().map(String::as_str).collect();
        wanted_domains.sort_unstable();
        domains.sort_unstable();
        Ok(if servers.is_empty() && domains.is_empty() {
            Observed::Absent
        } else if servers == [wanted.server.as_str()] && domains == wanted_domains {
            Observed::Present(Handle::None)
        } else {
            Observed::Foreign(format!("it has the name servers {servers:?} for {domains:?}"))
        })
    }

    pub(crate) async fn apply(&self, effect: &Effect) -> Result<(), NetError> {
        let wanted = LinkDns::of(effect)?;
        if !self.runs() {
            tracing::debug!(
                link = wanted.link,
                "no systemd-resolved: the host asks its own name servers only"
            );
            return Ok(());
        }
        let mut domains = vec!["domain", wanted.link];
        domains.extend(wanted.domains.iter().map(String::as_str));
        if wanted.domains.is_empty() {
            // The word for none.
            domains.push("");
        }
        // The domains last: until the link has a server of ours, nothing is to be asked there.
        for arguments in
            [&["default-route", wanted.link, "no"][..], &["dns", wanted.link, &wanted.server], &domains]
        {
            if self.say(arguments).await?.is_none() {
                return Ok(());
            }
        }
        Ok(())
    }

    pub(crate) async fn undo(&self, effect: &Effect) -> Result<(), NetError> {
        let Effect::LinkDns { link, .. } = effect else {
            return Err(NetError::NotMine { effect: effect.id() });
        };
        let gone = async || Ok::<_, NetError>(Links::open()?.find(link).await?.is_none());
        // One that has no name for a device cannot be there either.
        if !self.runs() || check_device_name(link).is_err() || gone().await? {
            return Ok(());
        }
        match self.say(&["revert", link]).await {
            // It may have gone meanwhile.
            Err(_) if gone().await? => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn runs(&self) -> bool {
        self.directory.exists() && self.bus.exists()
    }

    /// What resolvectl printed; `None` where it is not installed.
    async fn say(&self, arguments: &[&str]) -> Result<Option<String>, NetError> {
        let command = HostCommand::new("resolvectl").args(arguments.iter().copied());
        match self.runner.run(command).await {
            Ok(output) => Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned())),
            Err(RunError::NotInstalled { .. }) => Ok(None),
            Err(source) => Err(NetError::Resolvectl { action: arguments.join(" "), source }),
        }
    }
}

/// The words behind `Link 3 (vmbr-3f2a):`.
fn words(answer: &str) -> Vec<&str> {
    answer.split_once("):").map(|(_, words)| words.split_whitespace().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use vm_host::RunOutput;

    use super::*;

    /// Answers as resolvectl does, about the one link that every network namespace has.
    #[derive(Debug, Default)]
    struct FakeResolvectl {
        said: Mutex<Vec<String>>,
        dns: Mutex<String>,
        domain: Mutex<String>,
        missing: bool,
    }

    #[async_trait]
    impl Runner for FakeResolvectl {
        async fn run(&self, command: HostCommand) -> Result<RunOutput, RunError> {
            assert_eq!(command.program, "resolvectl");
            if self.missing {
                return Err(RunError::NotInstalled { program: "resolvectl".to_owned() });
            }
            self.said.lock().unwrap().push(command.display());
            let words: Vec<_> = command.args.iter().map(|word| word.to_str().unwrap()).collect();
            let says = match words[..] {
                ["dns", "lo"] => format!("Link 1 (lo): {}\n", self.dns.lock().unwrap()),
                ["domain", "lo"] => format!("Link 1 (lo): {}\n", self.domain.lock().unwrap()),
                ["default-route", "lo", "no"] => String::new(),
                ["revert", "lo"] => {
                    self.dns.lock().unwrap().clear();
                    self.domain.lock().unwrap().clear();
                    String::new()
                }
                ["dns", "lo", ref servers @ ..] => {
                    *self.dns.lock().unwrap() = servers.join(" ");
                    String::new()
                }
                ["domain", "lo", ref domains @ ..] => {
                    *self.domain.lock().unwrap() = domains.join(" ");
                    String::new()
                }
                _ => panic!("{words:?}"),
            };
            Ok(RunOutput { stdout: says.into(), stderr_tail: String::new() })
        }
    }

    fn effect(link: &str, server: &str, domains: &[&str]) -> Effect {
        let domains = domains.iter().map(|&domain| domain.to_owned()).collect();
        Effect::LinkDns { link: link.to_owned(), server: server.parse().unwrap(), domains }
    }

    fn with(runner: FakeResolvectl, directory: &str) -> (Arc<FakeResolvectl>, Resolved) {
        let runner = Arc::new(runner);
        (Arc::clone(&runner), Resolved { runner, directory: directory.into(), bus: "/".into() })
    }

    #[tokio::test]
    async fn the_link_gets_the_server_for_these_domains_only_and_loses_it() {
        let (fake, resolved) = with(FakeResolvectl::default(), "/");
        let effect = effect("lo", "10.213.0.1:53", &["vm", "0.213.10.in-addr.arpa"]);
        assert_eq!(resolved.observe(&effect).await.unwrap(), Observed::Absent);
        resolved.apply(&effect).await.unwrap();
        assert_eq!(resolved.observe(&effect).await.unwrap(), Observed::Present(Handle::None));
        let said = fake.said.lock().unwrap().clone();
        for wanted in [
            "resolvectl default-route lo no",
            "resolvectl dns lo 10.213.0.1",
            "resolvectl domain lo ~vm ~0.213.10.in-addr.arpa",
        ] {
            assert!(said.iter().any(|line| line == wanted), "{wanted}: {said:?}");
        }
        *fake.dns.lock().unwrap() = "192.0.2.1".to_owned();
        assert!(matches!(resolved.observe(&effect).await.unwrap(), Observed::Foreign(_)));
        for _ in 0..2 {
            resolved.undo(&effect).await.unwrap();
            assert_eq!(resolved.observe(&effect).await.unwrap(), Observed::Absent);
        }
    }

    #[tokio::test]
    async fn another_port_is_named() {
        let (fake, resolved) = with(FakeResolvectl::default(), "/");
        resolved.apply(&effect("lo", "10.213.0.1:5353", &["vm"])).await.unwrap();
        assert_eq!(*fake.dns.lock().unwrap(), "10.213.0.1:5353");
    }

    #[tokio::test]
    async fn without_the_resolver_there_is_nothing_to_do() {
        let effect = effect("lo", "10.213.0.1:53", &["vm"]);
        let (fake, without_a_bus) = with(FakeResolvectl::default(), "/");
        let without_a_bus = Resolved { bus: "/no/such/socket".into(), ..without_a_bus };
        for (fake, resolved) in [
            (fake, without_a_bus),
            with(FakeResolvectl::default(), "/no/such/directory"),
            with(FakeResolvectl { missing: true, ..FakeResolvectl::default() }, "/"),
        ] {
            resolved.apply(&effect).await.unwrap();
            assert_eq!(resolved.observe(&effect).await.unwrap(), Observed::Present(Handle::None));
            resolved.undo(&effect).await.unwrap();
            assert!(fake.said.lock().unwrap().is_empty());
        }
    }

    #[tokio::test]
    async fn a_link_that_is_gone_has_no_server_to_lose() {
        let (fake, resolved) = with(FakeResolvectl::default(), "/");
        let effect = effect("no-such-link", "10.213.0.1:53", &["vm"]);
        resolved.undo(&effect).await.unwrap();
        assert_eq!(resolved.observe(&effect).await.unwrap(), Observed::Absent);
        assert!(fake.said.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn nothing_but_a_domain_becomes_an_argument() {
        let (fake, resolved) = with(FakeResolvectl::default(), "/");
        for bad in ["", ".", "a..b", "vm.", "a b", "x\ny", "~vm"] {
            let error = resolved.apply(&effect("lo", "10.213.0.1:53", &[bad])).await.unwrap_err();
            assert!(matches!(error, NetError::BadDomain { .. }), "{bad}: {error}");
        }
        let error = resolved.apply(&effect("--help", "10.213.0.1:53", &[])).await.unwrap_err();
        assert!(matches!(error, NetError::BadName { .. }), "{error}");
        assert!(fake.said.lock().unwrap().is_empty());
    }
}
