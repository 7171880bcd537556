//! What can go wrong, one variant per failed operation, each with a hint.

use std::{io, path::PathBuf, time::Duration};

use crate::{Digest, ReferenceProblem, is_loopback};

/// An image that cannot be had, kept or passed on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// A text that names no image of a registry.
    #[error("{text:?} is no image reference")]
    Reference {
        /// What was given.
        text: String,
        /// The rule it breaks.
        #[source]
        problem: ReferenceProblem,
    },
    /// A text that names no source of images.
    #[error("{text:?} names no image: {rule}")]
    Source {
        /// What was given.
        text: String,
        /// What is missing.
        rule: &'static str,
    },
    /// An address that nothing is downloaded from.
    #[error("{text} cannot be downloaded: {rule}")]
    Address {
        /// What was given, without what may be secret in it.
        text: String,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// An artifact of another kind.
    #[error("that is no {wanted} but {found}")]
    ArtifactType {
        /// What was looked for.
        wanted: &'static str,
        /// The type that it would have.
        media_type: &'static str,
        /// The type that it has.
        found: String,
    },
    /// A file that is no image with layers.
    #[error("{} is no image but {found}", path.display())]
    NoImage {
        /// The file or directory.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// No connection.
    #[error("could not reach {registry}")]
    Unreachable {
        /// `HOST[:PORT]`.
        registry: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No byte for too long.
    #[error("{registry} has stalled: nothing more of {what} came within {} s", within.as_secs_f32())]
    Stalled {
        /// `HOST[:PORT]`.
        registry: String,
        /// What was being transferred.
        what: String,
        /// How long nothing came.
        within: Duration,
    },
    /// The connection broke, again and again.
    #[error("{registry} broke off in the middle of {what}")]
    Interrupted {
        /// `HOST[:PORT]`.
        registry: String,
        /// What was being transferred.
        what: String,
        /// How.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The registry does not have it.
    #[error("{registry} has no {what}")]
    NotFound {
        /// `HOST[:PORT]`.
        registry: String,
        /// Repository and tag or digest, or which part of it.
        what: String,
    },
    /// The registry does not let this user.
    #[error("{registry} does not {} {what} {} {}", if *push { "take" } else { "give" }, if *push { "from" } else { "to" }, if *known { "this user" } else { "everybody" })]
    Unauthorized {
        /// `HOST[:PORT]`.
        registry: String,
        /// Repository and tag or digest.
        what: String,
        /// Whether the request was made with credentials.
        known: bool,
        /// Whether something was to be written.
        push: bool,
    },
    /// The registry refuses a name and password.
    #[error("{registry} refuses the user name and password")]
    LoginRefused {
        /// `HOST[:PORT]`.
        registry: String,
    },
    /// Too many requests.
    #[error("{registry} takes no more requests for now{}", after(*wait))]
    RateLimited {
        /// `HOST[:PORT]`.
        registry: String,
        /// How long, as the registry says.
        wait: Option<Duration>,
    },
    /// The registry answers with an error of its own.
    #[error("{registry} failed with status {status} over {what}{}", colon(message))]
    Failing {
        /// `HOST[:PORT]`.
        registry: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
        /// What it says.
        message: String,
    },
    /// An answer that makes no sense.
    #[error("{registry} gave no usable answer: {reason}")]
    Answer {
        /// `HOST[:PORT]`.
        registry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A client for registries cannot be made on this host.
    #[error("could not set up the client for registries")]
    Client {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file with credentials cannot be used.
    #[error("could not use the registries' credentials in {}", path.display())]
    Credentials {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A credential helper does not work.
    #[error("the credential helper {program} failed: {reason}")]
    Helper {
        /// Its program.
        program: String,
        /// How.
        reason: String,
    },
    /// Nothing for this host's processor.
    #[error("there is no image for {wanted}")]
    Platform {
        /// What was asked for.
        wanted: String,
        /// What there is.
        there: Vec<String>,
    },
    /// A type that is not understood.
    #[error("the {what} is of type {found}, which is not supported")]
    MediaType {
        /// Whose type it is.
        what: String,
        /// Its media type.
        found: String,
    },
    /// A layer that registries do not carry.
    #[error("layer {digest} is foreign ({media_type}): registries do not have it")]
    Foreign {
        /// Which.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// A document that is damaged.
    #[error("the {what} cannot be understood: {reason}")]
    Malformed {
        /// Which.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// More than is taken.
    #[error("the {what} has {bytes} bytes; the most is {most}")]
    Large {
        /// Which document.
        what: String,
        /// How many.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// Not as long as its descriptor says.
    #[error("the {what} has {found} bytes; its descriptor says {expected}")]
    Size {
        /// Which blob.
        what: String,
        /// How many there are, or were when it was clear.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// Not what its digest says.
    #[error("the {what} is {found}; its digest should be {expected}")]
    Digest {
        /// Which blob.
        what: String,
        /// What it is.
        found: Digest,
        /// What it should be.
        expected: Digest,
    },
    /// A layout or archive cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A part of a layout or archive is not there.
    #[error("{} has no {name}", path.display())]
    NoPart {
        /// The layout or archive.
        path: PathBuf,
        /// What is missing.
        name: String,
    },
    /// A link that leads out of a layout.
    #[error("{path} of the image layout leads out of it")]
    Outside {
        /// The link.
        path: String,
    },
    /// No image of this tag or digest.
    #[error("there is no image{} in it", asked_for(asked))]
    NoEntry {
        /// Tag and digest, as far as given.
        asked: String,
        /// What there is.
        there: Vec<String>,
    },
    /// Several images, and none was named.
    #[error("it has more than one image")]
    Ambiguous {
        /// What there is.
        there: Vec<String>,
    },
    /// The store of blobs fails.
    #[error("could not {action} {}", path.display())]
    Store {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A blob that should be in the store is not.
    #[error("the store of images has no {what} {digest}")]
    Gone {
        /// What it would be.
        what: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// A blob that is in use.
    #[error("{digest} is in use")]
    InUse {
        /// Its digest.
        digest: Digest,
    },
    /// A blob that another process writes.
    #[error("another process is fetching {digest}")]
    Locked {
        /// Its digest.
        digest: Digest,
    },
    /// An export cannot be written.
    #[error("could not write {}", path.display())]
    Export {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is where an export should be.
    #[error("{} exists", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// A part of this program broke.
    #[error("the transfer broke")]
    Broken {
        /// How.
        source: tokio::task::JoinError,
    },
}

fn after(wait: Option<Duration>) -> String {
    wait.map(|wait| format!(", for {} s", wait.as_secs())).unwrap_or_default()
}

fn colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

fn asked_for(asked: &str) -> String {
    if asked.is_empty() { String::new() } else { format!(" {asked}") }
}

fn listed(there: &[String]) -> String {
    match there {
        [] => "there is none at all".to_owned(),
        some => format!("there is: {}", some.join(", ")),
    }
}

impl OciError {
    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Reference { problem, .. } => problem.hint(),
            Self::Source { .. } => {
                "write a registry's NAME[:TAG][@sha256:…], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:TAG]"
                    .into()
            }
            Self::Address { .. } => {
                "give an https address without a user in it, e.g. https://example.org/image.tar.zst".into()
            }
            Self::ArtifactType { wanted, media_type, .. } => {
                format!("a {wanted} is an artifact of type {media_type}")
            }
            Self::NoImage { .. } => {
                "an image is a layout (a directory or tar with oci-layout and index.json) or what `docker save` writes; \
                 a root filesystem in a tar archive is imported"
                    .into()
            }
            Self::Unreachable { registry, .. } if is_loopback(registry) => {
                "does anybody listen there? This host is spoken with in plain HTTP".into()
            }
            Self::Unreachable { .. } => {
                "is the name right, and does it speak TLS with a certificate this host trusts? Plain HTTP is for loopback, and \
                 for registries that are configured as insecure"
                    .into()
            }
            Self::Stalled { .. } | Self::Interrupted { .. } => {
                "try again: what is there already is not fetched twice".into()
            }
            Self::NotFound { what, .. } if what.contains("://") => "is the address right?".into(),
            Self::NotFound { what, .. } if what.contains('@') => {
                "is the digest that of a manifest, and in this repository? What was deleted there is gone".into()
            }
            Self::NotFound { .. } => "are name and tag right? Without a tag it is `latest`".into(),
            Self::Unauthorized { registry, known: false, .. } => {
                format!("it is private, or not there; log in to {registry} first")
            }
            Self::Unauthorized { registry, known: true, .. } => {
                format!("log in to {registry} again, or as somebody who may")
            }
            Self::LoginRefused { .. } => "some registries want an access token in the place of the password".into(),
            Self::RateLimited { .. } => "wait, log in (known users may do more), or configure a mirror".into(),
            Self::Failing { status: 500.., .. } => "the registry has a problem; try again later, or configure a mirror".into(),
            Self::Failing { .. } | Self::Answer { .. } => "is it a registry, and does it work?".into(),
            Self::Client { .. } => "are the proxy variables of the daemon's environment right?".into(),
            Self::Credentials { .. } => {
                "it is what `docker login` writes: {\"auths\": {\"HOST\": {\"auth\": BASE64}}}; log in again".into()
            }
            Self::Helper { program, .. } => {
                format!("try it: `echo HOST | {program} get`; it must be in the PATH of the daemon and work without a terminal")
            }
            Self::Platform { there, .. } => listed(there),
            Self::MediaType { .. } => {
                "supported are images of Docker's schema 2 and of OCI, with layers of tar, plain or by gzip or zstd".into()
            }
            Self::Foreign { .. } => "images with foreign layers are Windows ones, or old; build it anew without".into(),
            Self::Malformed { .. } | Self::Size { .. } | Self::Digest { .. } => {
                "it is damaged, or somebody has changed it; get it from where it was made".into()
            }
            Self::Large { .. } => "no registry takes such a document; is it an image?".into(),
            Self::Read { .. } => "is the path right, and may the daemon read it?".into(),
            Self::NoPart { .. } => "it is incomplete, or no image; make it again".into(),
            Self::Outside { .. } => "copy the layout with the files that its links lead to".into(),
            Self::NoEntry { there, .. } => listed(there),
            Self::Ambiguous { there } => format!("name one by its tag; {}", listed(there)),
            Self::Store { source, .. } | Self::Export { source, .. }
                if source.raw_os_error() == Some(nix::libc::ENOSPC) =>
            {
                "the disk is full: remove images that nobody uses".into()
            }
            Self::Store { .. } => "does the daemon own its state directory, and is the disk in order?".into(),
            Self::Gone { .. } => "pull or import the image again".into(),
            Self::InUse { .. } => "wait for what uses it, or remove that".into(),
            Self::Locked { .. } => "wait for it; does another daemon use the same state directory?".into(),
            Self::Export { .. } => "does the directory exist, and may the daemon write to it?".into(),
            Self::Exists { .. } => "remove it or write to another place; nothing is overwritten".into(),
            Self::Broken { .. } => "this is a defect of the program; its log says more".into(),
        }
    }
}

/// Text of a registry or an image, fit for terminals and logs.
pub(crate) fn plain(text: &str) -> String {
    const MOST: usize = 300;
    let mut plain: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        plain.push('…');
    }
    plain.trim().to_owned()
}
