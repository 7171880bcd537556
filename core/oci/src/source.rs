//! Where an image comes from: what users write, made into one type.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    Digest, OciError, Reference, ReferenceDefaults, local,
    store::{Cancel, Cancelled, blocking},
};

/// Where to get an image from.
///
/// More kinds will come; what is not a set of layers, like a distribution's suite or a root filesystem in a tar archive, belongs to
/// whoever builds filesystems: recognise such texts before this, and take [`ImageSource::Tarball`] from [`ImageSource::identify`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageSource {
    /// `[REGISTRY[:PORT]/]NAME[:TAG][@DIGEST]`.
    Registry(Reference),
    /// `oci:DIR[:TAG][@DIGEST]`: an image layout.
    Layout {
        /// Its directory.
        dir: PathBuf,
        /// Which image of it.
        select: Select,
    },
    /// `oci-archive:FILE[:TAG][@DIGEST]`: an image layout in a tar archive.
    LayoutArchive {
        /// The archive, plain or by gzip or zstd.
        file: PathBuf,
        /// Which image of it.
        select: Select,
    },
    /// `docker-archive:FILE[:[NAME:]TAG]`: what `docker save` writes.
    DockerArchive {
        /// The archive, plain or by gzip or zstd.
        file: PathBuf,
        /// Which image of it.
        select: Select,
    },
    /// A root filesystem in a tar archive.
    Tarball {
        /// The archive.
        file: PathBuf,
    },
    /// A path: [`ImageSource::identify`] looks what is there.
    Path(PathBuf),
}

/// Which of several images; neither is needed where there is one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Select {
    /// Its tag.
    pub tag: Option<String>,
    /// Its manifest's digest.
    pub digest: Option<Digest>,
}

impl Select {
    /// As messages name it.
    pub(crate) fn asked(&self) -> String {
        let digest = self.digest.map(|digest| digest.to_string());
        [self.tag.clone(), digest].into_iter().flatten().collect::<Vec<_>>().join(" with ")
    }
}

impl ImageSource {
    /// Reads what a user wrote. Texts that begin with `/`, `./` or `../` are paths; where a tag begins in one with several colons
    /// depends on which files there are.
    ///
    /// # Errors
    /// [`OciError::Source`] or [`OciError::Reference`].
    pub fn parse(text: &str, defaults: &ReferenceDefaults) -> Result<Self, OciError> {
        if text.starts_with('/') || text.starts_with("./") || text.starts_with("../") {
            return Ok(Self::Path(PathBuf::from(text)));
        }
        let place = |rest: &str| match place(rest) {
            (path, _) if path.as_os_str().is_empty() => {
                Err(OciError::Source { text: text.to_owned(), rule: "a path is missing" })
            }
            place => Ok(place),
        };
        match text.split_once(':') {
            Some(("oci", rest)) => place(rest).map(|(dir, select)| Self::Layout { dir, select }),
            Some(("oci-archive", rest)) => {
                place(rest).map(|(file, select)| Self::LayoutArchive { file, select })
            }
            Some(("docker-archive", rest)) => {
                place(rest).map(|(file, select)| Self::DockerArchive { file, select })
            }
            _ => Reference::parse(text, defaults).map(Self::Registry),
        }
    }

    /// Looks at what a [`ImageSource::Path`] leads to; other sources are what they are. It reads the directory or the archive's
    /// entries on a thread of its own, which dropping the future ends.
    ///
    /// # Errors
    /// [`OciError::Read`], or [`OciError::NoImage`] for what is neither a layout nor an archive.
    pub async fn identify(self) -> Result<Self, OciError> {
        let cancel = Cancel::default();
        let cancelled = cancel.told();
        let known = blocking(move || self.known(&cancelled)).await;
        drop(cancel);
        known
    }

    pub(crate) fn known(self, cancelled: &Cancelled) -> Result<Self, OciError> {
        match self {
            Self::Path(path) => local::identify(path, cancelled),
            known => Ok(known),
        }
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, select) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Tarball { file } | Self::Path(file) => return write!(f, "{}", file.display()),
            Self::Layout { dir, select } => ("oci", dir, select),
            Self::LayoutArchive { file, select } => ("oci-archive", file, select),
            Self::DockerArchive { file, select } => ("docker-archive", file, select),
        };
        write!(f, "{kind}:{}", path.display())?;
        if let Some(tag) = &select.tag {
            write!(f, ":{tag}")?;
        }
        select.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

/// Path and selection of `PATH[:TAG][@DIGEST]`. A path may have colons in it.
pub(crate) fn place(text: &str) -> (PathBuf, Select) {
    let (text, digest) = match text.rsplit_once('@') {
        Some((rest, digest)) => match digest.parse() {
            Ok(digest) => (rest, Some(digest)),
            Err(_) => (text, None),
        },
        None => (text, None),
    };
    let exists = |text: &str| !text.is_empty() && Path::new(text).exists();
    let split =
        |at: usize| (PathBuf::from(&text[..at]), Select { tag: Some(text[at + 1..].to_owned()), digest });
    let whole = || (PathBuf::from(text), Select { tag: None, digest });
    if exists(text) {
        return whole();
    }
    let mut colons = text.rmatch_indices(':').map(|(at, _)| at).filter(|at| at + 1 < text.len());
    if let Some(at) = colons.clone().find(|at| exists(&text[..*at])) {
        return split(at);
    }
    // None is there: what is missed is the path before the last colon that can begin a tag.
    colons.find(|at| !text[*at..].contains('/')).map_or_else(whole, split)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ImageSource, OciError> {
        ImageSource::parse(text, &ReferenceDefaults::default())
    }

    #[test]
    fn what_users_write_names_its_kind() {
        assert_eq!(parse("debian:12").unwrap().to_string(), "docker.io/library/debian:12");
        assert!(matches!(parse("oci/tool").unwrap(), ImageSource::Registry(_)));
        assert_eq!(parse("./x.tar").unwrap(), ImageSource::Path("./x.tar".into()));
        let digest = Digest::of(b"x");
        for text in [
            "oci:/no/dir",
            "oci:/no/dir:v1",
            &format!("oci:/no/dir@{digest}"),
            &format!("oci:/no/dir:v1@{digest}"),
            "oci-archive:/no/file.tar:v1",
            "docker-archive:/no/file.tar",
        ] {
            let source = parse(text).unwrap();
            assert!(!matches!(source, ImageSource::Registry(_)), "{text}");
            assert_eq!(source.to_string(), text);
        }
        for text in ["oci:", "oci-archive:", "docker-archive:"] {
            assert!(parse(text).unwrap_err().to_string().contains("a path is missing"), "{text}");
        }
        assert!(parse("docker://debian").unwrap_err().hint().contains("leave that out"));
    }

    #[test]
    fn a_colon_in_a_name_begins_no_tag() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a:b");
        std::fs::create_dir(&odd).unwrap();
        let text = odd.to_str().unwrap();
        let tag = |tag: &str| Select { tag: Some(tag.to_owned()), digest: None };
        assert_eq!(place(text), (odd.clone(), Select::default()));
        assert_eq!(place(&format!("{text}:v1")), (odd.clone(), tag("v1")));
        assert_eq!(place(&format!("{text}:team/tool:v1")), (odd, tag("team/tool:v1")));
    }
}
