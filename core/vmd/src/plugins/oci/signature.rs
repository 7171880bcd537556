//! Whether somebody whom the operator trusts has signed an artifact.
//!
//! The signatures are those of `cosign sign --key`: an artifact beside the signed one, under a tag made of its digest. Each of its layers
//! is a small document that names the digest, and has the signature of that document in an annotation. It takes a public key to judge
//! them, and nobody has to be asked. <https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md>

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use oci_distribution::manifest::OciImageManifest;
use p256::{
    ecdsa::{Signature, VerifyingKey, signature::Verifier},
    pkcs8::{DecodePublicKey, EncodePublicKey},
};
use serde::Deserialize;
use vm_api::PluginSignature;

use super::{OciError, artifact::Blob, plain};
use crate::plugins::package;

const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const KIND: &str = "cosign container image signature";

const MAX_KEY: u64 = 64 << 10;
const MAX_PAYLOAD: u64 = 64 << 10;
/// Of one artifact; more are left alone.
const MAX_SIGNATURES: usize = 32;

/// What the operator has said of signatures.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trust {
    /// Files of public keys.
    pub(crate) keys: Vec<PathBuf>,
    /// Whether what nobody has signed is refused.
    pub(crate) required: bool,
}

/// A public key that is trusted.
#[derive(Debug, Clone)]
pub(super) struct Key {
    path: PathBuf,
    key: VerifyingKey,
    fingerprint: String,
}

impl Trust {
    /// The keys, read anew each time: one that is exchanged or taken away counts at once.
    pub(super) fn read(&self) -> Result<Vec<Key>, OciError> {
        self.keys.iter().map(|path| Key::read(path)).collect()
    }

    /// Whether the keys can be used.
    pub(crate) fn check(&self) -> Result<(), OciError> {
        self.read().map(drop)
    }

    /// Whether a plugin of this source and signature may be installed.
    pub(crate) fn judge(&self, from: &str, signature: &PluginSignature) -> Result<(), OciError> {
        // Whoever can change what came with the daemon can change the daemon.
        if !self.required || from.starts_with("bundled:") {
            return Ok(());
        }
        let reason = match signature {
            PluginSignature::Trusted { .. } => return Ok(()),
            PluginSignature::Untrusted { reason } => reason.clone(),
            PluginSignature::Unsigned | PluginSignature::Unchecked if from.starts_with("oci") => {
                "it has no signature".to_owned()
            }
            PluginSignature::Unsigned | PluginSignature::Unchecked => {
                "a directory cannot be signed".to_owned()
            }
        };
        let keys = self.keys.iter().map(|path| path.display().to_string()).collect();
        Err(OciError::Unsigned { reason, keys })
    }
}

impl Key {
    fn read(path: &Path) -> Result<Self, OciError> {
        let failed = |source| OciError::Key { path: path.to_owned(), source };
        let mut text = String::new();
        File::open(path).and_then(|file| file.take(MAX_KEY).read_to_string(&mut text)).map_err(failed)?;
        Self::of(path, &text).map_err(|reason| failed(io::Error::new(io::ErrorKind::InvalidData, reason)))
    }

    fn of(path: &Path, text: &str) -> Result<Self, String> {
        if text.contains("PRIVATE KEY") {
            return Err("it is a private key, which belongs to nobody but who signs".to_owned());
        }
        let key = VerifyingKey::from_public_key_pem(text.trim())
            .map_err(|error| format!("it is no ECDSA P-256 key in PEM: {error}"))?;
        let der = key.to_public_key_der().map_err(|error| error.to_string())?;
        Ok(Self { path: path.to_owned(), key, fingerprint: package::digest(der.as_bytes()) })
    }

    fn has_signed(&self, payload: &[u8], signature: &Signature) -> bool {
        self.key.verify(payload, signature).is_ok()
    }
}

/// The tag of an artifact's signatures.
pub(super) fn tag(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

/// One signature, whose document is not read yet.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) payload: Blob,
    signature: Signature,
}

/// The signatures of the artifact that has them.
pub(super) fn claims(manifest: &[u8]) -> Result<Vec<Claim>, OciError> {
    let document: OciImageManifest = serde_json::from_slice(manifest).map_err(|error| {
        OciError::Malformed { what: "manifest of the signatures", reason: plain(&error.to_string()) }
    })?;
    let signed = document.layers.iter().filter(|layer| layer.media_type == PAYLOAD).filter_map(|layer| {
        let text = layer.annotations.as_ref()?.get(SIGNATURE)?;
        let text: String = text.split_ascii_whitespace().collect();
        // Those of other kinds of keys are not ours to judge.
        let signature = Signature::from_der(&BASE64_STANDARD.decode(text).ok()?).ok()?;
        Some((layer, signature))
    });
    signed
        .take(MAX_SIGNATURES)
        .map(|(layer, signature)| {
            let payload = Blob::new("signed document", &layer.digest, layer.size, MAX_PAYLOAD)?;
            Ok(Claim { payload, signature })
        })
        .collect()
}

/// What is signed, as far as it is looked at.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Comes to a judgement of one artifact, signature by signature.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    digest: &'a str,
    keys: &'a [Key],
    /// Why the last one was not good.
    reason: Option<String>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(digest: &'a str, keys: &'a [Key]) -> Self {
        Self { digest, keys, reason: None }
    }

    /// Whether this signature is a good one; then no other is needed.
    pub(super) fn look(&mut self, claim: &Claim, payload: &[u8]) -> Option<PluginSignature> {
        let Some(key) = self.keys.iter().find(|key| key.has_signed(payload, &claim.signature)) else {
            self.reason.get_or_insert_with(|| "none of its signatures is by a trusted key".to_owned());
            return None;
        };
        let reason = match serde_json::from_slice::<Payload>(payload) {
            Ok(Payload { critical }) if critical.kind != KIND => {
                format!("what {} has signed is no artifact", key.path.display())
            }
            Ok(Payload { critical }) if critical.image.digest != self.digest => {
                let other = plain(&critical.image.digest);
                format!("what {} has signed is another artifact, {other}", key.path.display())
            }
            Ok(_) => {
                let (key, fingerprint) = (key.path.display().to_string(), key.fingerprint.clone());
                return Some(PluginSignature::Trusted { key, fingerprint });
            }
            Err(error) => {
                let error = plain(&error.to_string());
                format!("what {} has signed cannot be understood: {error}", key.path.display())
            }
        };
        self.reason = Some(reason);
        None
    }

    /// None of them was good.
    pub(super) fn end(self) -> PluginSignature {
        let nothing = || "it has signatures, but none of a kind that is understood: ECDSA P-256".to_owned();
        PluginSignature::Untrusted { reason: self.reason.unwrap_or_else(nothing) }
    }
}
