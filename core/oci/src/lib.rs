//! Images as registries, layouts and archives have them, up to verified blobs on disk. Nothing is unpacked here.
//!
//! ```text
//!   "debian:12" ────────> Registry(Reference) ──> Client ── mirrors, logins, tries, ranges ─┐
//!   "oci:DIR:TAG" ──────> Layout ────────────────> read in place ───────────────────────────┤
//!   "oci-archive:FILE" ─> LayoutArchive ─────────> an index of the tar's entries ───────────┼─> Store ──> Pulled
//!   "docker-archive:F" ─> DockerArchive ─────────> the same, and a manifest made for it ────┘   blobs     manifest, config,
//!   "./file.tar" ───────> Path ── identify ──> one of these, or a Tarball for others            by digest  layers
//!
//!   "https://…" ────────> Address ─ Client::download ──> Store: a file by its digest
//!   any of the first three ─ Client::artifact ──> Artifact: what is no image, its layers by media type
//!
//!   a tar stream ──> LayerDraft ──> compose(…) ──> Pulled ──> Client::push, export(…)
//! ```
//!
//! # Use
//! ```no_run
//! # async fn example() -> Result<(), vm_oci::OciError> {
//! use vm_oci::{Client, ImageSource, ReferenceDefaults, Settings, Store};
//!
//! let store = Store::open("/var/lib/vmd/content".as_ref())?;
//! let client = Client::new(Settings::default())?;
//! let source = ImageSource::parse("debian:12", &ReferenceDefaults::default())?;
//! let image = client.fetch(&source, &store, &vm_oci::silent()).await?;
//! for layer in &image.layers {
//!     // Lowest first. What is unpacked must have the digest `layer.diff_id`: that is for who unpacks it to see.
//!     let file = store.open_blob("layer", &layer.digest)?;
//! }
//! // Record image.digests() before dropping `image`: until then it keeps its blobs from being collected.
//! # Ok(())
//! # }
//! ```
//! The same is true of an image that is there since long: [`Pulled::open`] by its manifest's digest.
//!
//! # What holds
//! - A blob in the store is whole and is what its digest says, whatever happened while it came ([`Store`]). Manifest, configuration
//!   and every layer are verified.
//! - Dropping a future cancels what it does. What has come so far is taken up by the next try, from another process, too.
//! - The user's layouts and archives are read, never written.
//! - Plain HTTP is spoken with loopback and with registries in [`Settings::insecure`]; a password never goes from TLS into the clear.
//! - Types that are not understood, foreign layers and images for other processors are refused by name.
//!
//! Futures want a tokio runtime with time and I/O; hashing and files are left to its threads for blocking work.

mod artifact;
mod compose;
mod config;
mod credentials;
mod digest;
mod document;
mod error;
mod export;
mod image;
mod local;
mod progress;
mod reference;
mod registry;
mod source;
mod store;

pub use artifact::{Artifact, ArtifactKind};
pub use compose::{LayerDraft, compose};
pub use config::{History, ImageConfig};
pub use credentials::{CredentialStore, Credentials, forget, remember};
pub use digest::{Digest, DigestError};
pub use document::{Compression, Descriptor, Entry, Layer, MAX_DOCUMENT, Platform};
pub use error::OciError;
pub use export::{Form, export};
pub use image::Pulled;
pub use local::Layout;
pub use progress::{Progress, ProgressSink, silent};
pub use reference::{Reference, ReferenceDefaults, ReferenceProblem, is_loopback};
pub use registry::{Address, Client, Downloaded, Repository, Settings};
pub use source::{ImageSource, Select};
pub use store::{Collected, Lease, Store, Usage};
