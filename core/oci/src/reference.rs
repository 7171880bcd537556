//! References: how an image in a registry is named, as Docker and containerd normalise it.
//!
//! ```text
//!   debian                      docker.io/library/debian:latest
//!   team/tool:v2                docker.io/team/tool:v2
//!   ghcr.io/team/tool           ghcr.io/team/tool:latest
//!   localhost:5000/tool:v2      itself
//!   ghcr.io/team/tool@sha256:…  itself, without a tag
//! ```
//!
//! Where another registry is the default ([`ReferenceDefaults`]), the first two go there. What is printed is the full form, which
//! reads back as itself whatever the default is.
//! <https://github.com/distribution/reference>

use std::{fmt, net::IpAddr, str::FromStr};

use crate::{Digest, OciError};

/// Docker's own registry, as references have it.
const DOCKER: &str = "docker.io";
/// Where it listens.
const DOCKER_HOST: &str = "registry-1.docker.io";
/// Its other names.
const DOCKER_ALIASES: [&str; 2] = ["index.docker.io", DOCKER_HOST];
/// Where it keeps images whose name has one part.
const LIBRARY: &str = "library";
const LATEST: &str = "latest";

/// The longest repository name that registries take, its registry included.
const NAME_MAX: usize = 255;
/// <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#pulling-manifests>
const TAG_MAX: usize = 128;

/// What is assumed where a reference does not say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceDefaults {
    registry: String,
}

impl Default for ReferenceDefaults {
    fn default() -> Self {
        Self { registry: DOCKER.to_owned() }
    }
}

impl ReferenceDefaults {
    /// Another default registry, `HOST[:PORT]`.
    ///
    /// # Errors
    /// A text that is no host with an optional port.
    pub fn registry(text: &str) -> Result<Self, OciError> {
        match registry(text) {
            Ok(registry) => Ok(Self { registry }),
            Err(problem) => Err(OciError::Reference { text: text.to_owned(), problem }),
        }
    }
}

/// An image in a registry, named in full.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What is wrong with a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceProblem {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// `https://` or `docker://` in front.
    #[error("it begins with {0}://")]
    Scheme(String),
    /// The registry's part is no host.
    #[error("{0:?} is no registry")]
    Registry(String),
    /// A registry and nothing after it.
    #[error("it names no repository")]
    NoRepository,
    /// Upper case where registries have none.
    #[error("the name has upper-case letters")]
    UpperCase,
    /// A part between slashes that breaks the rule.
    #[error("{0:?} is no part of a name")]
    Component(String),
    /// Longer than registries take.
    #[error("the name has more than {NAME_MAX} characters")]
    TooLong,
    /// 64 hexadecimal digits look like an image's id.
    #[error("it is 64 hexadecimal digits, which would be an image's id")]
    LooksLikeId,
    /// A colon with nothing behind it.
    #[error("the tag is empty")]
    EmptyTag,
    /// A tag that breaks the rule.
    #[error("{0:?} is no tag")]
    Tag(String),
    /// What is behind `@`.
    #[error("what follows @ is no digest: {0}")]
    Digest(&'static str),
}

impl ReferenceProblem {
    /// What to write instead.
    pub fn hint(&self) -> String {
        match self {
            Self::Empty | Self::NoRepository => {
                "write [REGISTRY[:PORT]/]NAME[:TAG][@sha256:…], e.g. debian:12 or ghcr.io/team/tool:v1".into()
            }
            Self::Scheme(_) => "leave that out: a registry's images are named without a scheme".into(),
            Self::Registry(_) => {
                "a registry is a host name, an IPv4 address or an IPv6 one in brackets, with a port after a colon".into()
            }
            Self::UpperCase => "names are in lower case; only tags may have capitals".into(),
            Self::Component(_) => {
                "parts are made of a-z and 0-9, with '.', '_', '__' or any number of '-' between them".into()
            }
            Self::TooLong => "shorten it".into(),
            Self::LooksLikeId => "name the repository; an image by its digest is NAME@sha256:…".into(),
            Self::EmptyTag => "leave the colon out for the tag `latest`".into(),
            Self::Tag(_) => {
                "a tag is 1 to 128 of letters, digits, '_', '.' and '-', and begins with no '.' or '-'".into()
            }
            Self::Digest(_) => "copy it whole, as `skopeo inspect` or the registry shows it: sha256:…".into(),
        }
    }
}

impl Reference {
    /// Reads a reference, with these defaults for what it leaves out.
    ///
    /// # Errors
    /// [`OciError::Reference`] with the rule that is broken.
    pub fn parse(text: &str, defaults: &ReferenceDefaults) -> Result<Self, OciError> {
        parse(text, defaults).map_err(|problem| OciError::Reference { text: text.to_owned(), problem })
    }

    /// The registry, `HOST[:PORT]`, in lower case.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry, e.g. `library/debian`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. Where a digest is given, too, the digest decides.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest or index.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository at another tag.
    ///
    /// # Errors
    /// [`OciError::Reference`] for what is no tag.
    pub fn with_tag(&self, tag: &str) -> Result<Self, OciError> {
        match check_tag(tag) {
            Ok(()) => Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() }),
            Err(problem) => Err(OciError::Reference { text: format!("{}:{tag}", self.name()), problem }),
        }
    }

    /// The same, pinned to this content.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// Registry and repository.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// As short as Docker prints it: without what it assumes. `debian`, `team/tool:v2`.
    pub fn familiar(&self) -> String {
        let name = match (self.registry.as_str(), self.repository.strip_prefix("library/")) {
            (DOCKER, Some(one)) if !one.contains('/') => one.to_owned(),
            // Its first part would read as a registry.
            (DOCKER, None) if !is_registry_like(self.repository.split('/').next().unwrap_or_default()) => {
                self.repository.clone()
            }
            _ => self.name(),
        };
        let tag = self.tag.as_deref().filter(|tag| *tag != LATEST || self.digest.is_some());
        self.written(name, tag)
    }

    /// What a registry's API knows it by: the digest, else the tag.
    pub(crate) fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_else(|| LATEST.to_owned()),
        }
    }

    /// Repository with tag and digest, as messages that name the registry have it.
    pub(crate) fn within(&self) -> String {
        self.written(self.repository.clone(), self.tag())
    }

    fn written(&self, mut text: String, tag: Option<&str>) -> String {
        if let Some(tag) = tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written(self.name(), self.tag()))
    }
}

/// With Docker's defaults.
impl FromStr for Reference {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Self, OciError> {
        Self::parse(text, &ReferenceDefaults::default())
    }
}

/// The host that serves a registry, with its port.
pub(crate) fn api_host(registry: &str) -> &str {
    if registry == DOCKER { DOCKER_HOST } else { registry }
}

/// The name that a registry goes by here, whichever of its names is given.
pub(crate) fn canonical_registry(registry: &str) -> String {
    let lower = registry.to_ascii_lowercase();
    if DOCKER_ALIASES.contains(&lower.as_str()) { DOCKER.to_owned() } else { lower }
}

/// Whether a registry, `HOST[:PORT]`, is on this host.
pub fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

fn is_registry_like(first: &str) -> bool {
    // Docker takes one with capitals for a registry, too, which then is none that it can reach.
    first.contains(['.', ':']) || first == "localhost"
}

fn parse(text: &str, defaults: &ReferenceDefaults) -> Result<Reference, ReferenceProblem> {
    if text.is_empty() {
        return Err(ReferenceProblem::Empty);
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(ReferenceProblem::Scheme(scheme.to_owned()));
    }
    let (text, digest) = match text.split_once('@') {
        Some((text, digest)) => {
            let digest =
                digest.parse().map_err(|error: crate::DigestError| ReferenceProblem::Digest(error.rule()))?;
            (text, Some(digest))
        }
        None => (text, None),
    };
    // A colon before the last slash belongs to a registry's port.
    let (name, tag) = match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if is_registry_like(first) => (registry(first)?, rest.to_owned()),
        _ => (defaults.registry.clone(), name.to_owned()),
    };
    if repository.is_empty() {
        return Err(ReferenceProblem::NoRepository);
    }
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(ReferenceProblem::UpperCase);
    }
    if let Some(bad) = repository.split('/').find(|part| !is_component(part)) {
        return Err(ReferenceProblem::Component(bad.to_owned()));
    }
    if Digest::from_hex(&repository).is_some() {
        return Err(ReferenceProblem::LooksLikeId);
    }
    let repository = if registry == DOCKER && !repository.contains('/') {
        format!("{LIBRARY}/{repository}")
    } else {
        repository
    };
    if registry.len() + 1 + repository.len() > NAME_MAX {
        return Err(ReferenceProblem::TooLong);
    }
    let tag = match (tag, digest) {
        (None, None) => Some(LATEST.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { registry, repository, tag, digest })
}

/// `HOST[:PORT]`, checked and in lower case.
fn registry(text: &str) -> Result<String, ReferenceProblem> {
    let bad = || ReferenceProblem::Registry(text.to_owned());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            match rest {
                "" => (text, None),
                rest => (text, Some(rest.strip_prefix(':').ok_or_else(bad)?)),
            }
        }
        None => {
            let (host, port) = match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            };
            let label = |label: &str| {
                let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
                (1..=63).contains(&label.len())
                    && label.bytes().all(inner)
                    && !label.starts_with('-')
                    && !label.ends_with('-')
            };
            if host.len() > 253 || !host.split('.').all(label) {
                return Err(bad());
            }
            (host, port)
        }
    };
    let port_fits = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|number| number != 0)
    };
    if host.is_empty() || port.is_some_and(|port| !port_fits(port)) {
        return Err(bad());
    }
    Ok(canonical_registry(text))
}

/// Runs of letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let Some(last) = text.bytes().next_back() else { return false };
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.bytes().next().is_some_and(alphanumeric)
        && alphanumeric(last)
        && separators
            .into_iter()
            .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'))
}

fn check_tag(text: &str) -> Result<(), ReferenceProblem> {
    if text.is_empty() {
        return Err(ReferenceProblem::EmptyTag);
    }
    let well_formed = text.len() <= TAG_MAX
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if well_formed { Ok(()) } else { Err(ReferenceProblem::Tag(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[test]
    fn references_become_what_docker_makes_of_them() {
        let digest = format!("sha256:{HEX}");
        for (text, full, familiar) in [
            ("debian", "docker.io/library/debian:latest", "debian"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("team/tool", "docker.io/team/tool:latest", "team/tool"),
            ("docker.io/debian", "docker.io/library/debian:latest", "debian"),
            ("index.docker.io/library/debian:12", "docker.io/library/debian:12", "debian:12"),
            ("library/debian", "docker.io/library/debian:latest", "debian"),
            ("localhost/a", "localhost/a:latest", "localhost/a"),
            ("localhost:5000/a/b:V1.0", "localhost:5000/a/b:V1.0", "localhost:5000/a/b:V1.0"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a"),
            ("GHCR.io/a__b/c---d.e", "ghcr.io/a__b/c---d.e:latest", "ghcr.io/a__b/c---d.e"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest", "127.0.0.1:5000/a"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(
                (reference.to_string(), reference.familiar()),
                (full.to_owned(), familiar.to_owned()),
                "{text}"
            );
            assert_eq!(full.parse::<Reference>().unwrap(), reference);
            assert_eq!(familiar.parse::<Reference>().unwrap(), reference);
        }
        let pinned: Reference = format!("debian@{digest}").parse().unwrap();
        assert_eq!((pinned.tag(), pinned.to_string()), (None, format!("docker.io/library/debian@{digest}")));
        let both: Reference = format!("debian:12@{digest}").parse().unwrap();
        assert_eq!((both.tag(), both.wanted()), (Some("12"), digest));
    }

    #[test]
    fn another_registry_is_the_default_where_one_is_configured() {
        let defaults = ReferenceDefaults::registry("registry.example:5000").unwrap();
        let parse = |text| Reference::parse(text, &defaults).unwrap().to_string();
        assert_eq!(parse("debian"), "registry.example:5000/debian:latest");
        assert_eq!(parse("team/tool:1"), "registry.example:5000/team/tool:1");
        assert_eq!(parse("docker.io/library/debian"), "docker.io/library/debian:latest");
        assert!(ReferenceDefaults::registry("a/b").unwrap_err().hint().contains("host name"));
    }

    #[test]
    fn a_bad_reference_says_what_is_wrong_and_what_to_write() {
        let (long, long_tag) = ("a".repeat(250), "t".repeat(129));
        for (text, says, hint) in [
            ("", "empty", "NAME"),
            ("docker://debian", "docker://", "leave that out"),
            ("ghcr.io/", "names no repository", "NAME"),
            ("Debian", "upper-case", "lower case"),
            ("Team/x", "upper-case", "lower case"),
            ("ghcr.io/Team/x", "upper-case", "lower case"),
            ("a//b", "\"\" is no part", "a-z"),
            ("a/../b", "\"..\" is no part", "a-z"),
            ("a/b-", "\"b-\" is no part", "a-z"),
            ("a___b", "\"a___b\" is no part", "a-z"),
            ("a._b", "no part", "a-z"),
            ("a b", "\"a b\" is no part", "a-z"),
            ("é", "no part", "a-z"),
            ("debian:", "tag is empty", "latest"),
            ("debian:.x", "\".x\" is no tag", "128"),
            ("debian:a b", "no tag", "128"),
            (&format!("debian:{long_tag}"), "no tag", "128"),
            ("debian@sha256:00", "no digest", "sha256:"),
            ("debian@", "no digest", "sha256:"),
            ("debian@sha512:00", "only sha256", "sha256:"),
            (HEX, "image's id", "@sha256"),
            (&long, "more than 255", "shorten"),
            ("host:port/x", "no registry", "port"),
            ("host:99999/x", "no registry", "port"),
            ("host:+80/x", "no registry", "port"),
            ("-a.b/x", "no registry", "host name"),
            ("a..b/x", "no registry", "host name"),
            ("[::g]:5000/x", "no registry", "brackets"),
            ("[::1]5000/x", "no registry", "brackets"),
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            let said = vm_types::report::chain(&error);
            assert!(said.contains(says), "{text}: {said}");
            assert!(error.hint().contains(hint), "{text}: {}", error.hint());
        }
    }

    #[test]
    fn only_this_host_is_loopback() {
        for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000", "[::1]"]
        {
            assert!(is_loopback(registry), "{registry}");
        }
        for registry in [
            "localhost.example",
            "128.0.0.1",
            "127.0.0.1.example",
            "10.0.0.1:5000",
            "registry.example",
            "[::2]:5000",
        ] {
            assert!(!is_loopback(registry), "{registry}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back_as_itself(text in "([a-zA-Z0-9.:\\[\\]-]{1,12}/)?[a-z0-9._/-]{1,20}(:[a-zA-Z0-9._-]{1,8})?") {
            if let Ok(reference) = text.parse::<Reference>() {
                let other = ReferenceDefaults::registry("registry.example").unwrap();
                prop_assert_eq!(&Reference::parse(&reference.to_string(), &other).unwrap(), &reference);
                prop_assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC*") {
            let _ = text.parse::<Reference>();
        }
    }
}
