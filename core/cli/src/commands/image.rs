//! `vm image`

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use jsonrpsee::core::{ClientError, client::Client};
use serde::de::DeserializeOwned;
use serde_json::json;
use vm_api::{
    Begun, CatalogueImage, CommitImage, ExportImage, ImageFormat, ImageRecord, ImportImage, Login, MadeImage,
    PruneImages, RegisterImage, rpc::ImageClient,
};
use vm_types::image::{ImageLayer, ImageStep};

mod build;

use self::build::BuildArgs;
use super::session::quote;
use crate::{
    context::Context,
    errors::CliError,
    operations::{OnSignal, follow},
    output::{ago, for_stdout, table},
    progress::PATIENCE,
    size::human,
};

/// Manage images
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List images
    #[command(visible_alias = "list")]
    Ls,
    /// Acquire an image; Ctrl-C undoes it
    Pull {
        /// debian:SUITE, catalogue:NAME, [REGISTRY/]NAME[:TAG][@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:TAG]
        reference: String,
        /// The name it gets [default: its own]
        #[arg(long, value_name = "REFERENCE")]
        name: Option<String>,
    },
    /// Make an image of a bundle, a root filesystem's tarball, an image layout or what `docker save` writes
    Import {
        /// The file or directory, or the https address of a file
        #[arg(value_name = "FILE|URL")]
        source: String,
        /// The name it gets; a tarball has none of its own
        reference: Option<String>,
        /// The SHA-256 that the file must have; an address needs it
        #[arg(long, value_name = "DIGITS")]
        sha256: Option<String>,
    },
    /// List what the configured catalogues have for this host; `vm image pull catalogue:NAME` pulls one
    Catalogue,
    /// Make an image of a VM's files; Ctrl-C undoes it
    ///
    /// A VM that runs runs on; one that is off is booted for it, without its network and its own init, and shut down again.
    Commit {
        /// Name or id
        vm: String,
        /// The name it gets
        #[arg(value_name = "NAME")]
        reference: String,
        /// A remark for its history
        #[arg(short, long, value_name = "TEXT")]
        message: Option<String>,
        /// Change how it runs by an instruction of a Dockerfile, e.g. 'ENV A=b' or 'CMD ["/run"]'
        #[arg(short, long = "change", value_name = "INSTRUCTION")]
        changes: Vec<String>,
    },
    /// Build an image by a Dockerfile; Ctrl-C undoes it
    Build(BuildArgs),
    /// Send an image to a registry; layers that are there are not sent again
    Push {
        /// Reference or digest
        image: String,
        /// Where to [default: where its reference says]
        #[arg(value_name = "REFERENCE")]
        to: Option<String>,
    },
    /// Write an image to a file or directory
    Export {
        /// Reference or digest
        image: String,
        /// Where to; nothing may be there
        path: PathBuf,
        /// As what
        #[arg(long, value_enum, default_value = "oci-archive")]
        format: Format,
    },
    /// Keep name and password for a registry
    Login {
        /// HOST[:PORT]
        registry: String,
        /// The name there
        #[arg(short, long)]
        user: String,
        /// Read the password from stdin; else the terminal is asked
        #[arg(long)]
        password_stdin: bool,
    },
    /// Forget name and password for a registry
    Logout {
        /// HOST[:PORT]
        registry: String,
    },
    /// Remove images that no VM uses and that have no name, and layers of no image
    Prune {
        /// Those with a name, too
        #[arg(short, long)]
        all: bool,
        /// Say which, remove none
        #[arg(long)]
        dry_run: bool,
    },
    /// Make an image of a file with an ext4 filesystem, which is used where it is and never written
    Register {
        /// The file
        file: PathBuf,
        /// The name it gets
        #[arg(long, value_name = "REFERENCE")]
        name: String,
        /// What its VMs boot: a kernel of the catalogue, or a file
        #[arg(long, value_name = "KERNEL")]
        kernel: Option<String>,
        /// The module directory of that file, the one with modules.dep
        #[arg(long, value_name = "DIR", requires = "kernel")]
        modules: Option<PathBuf>,
    },
    /// Copy a registered image into the store; its file is no longer needed then
    Promote {
        /// Reference or digest
        image: String,
    },
    /// Give an image one more name
    Tag {
        /// Reference or digest
        image: String,
        /// The name it gets
        reference: String,
    },
    /// Show an image and how its commands run
    Show {
        /// Reference or digest
        image: String,
    },
    /// Show the steps that made an image
    History {
        /// Reference or digest
        image: String,
    },
    /// Delete images that no VM uses
    #[command(visible_alias = "rm")]
    Delete {
        /// References or digests
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

impl ImageArgs {
    pub(crate) async fn run(self, context: &Context) -> Result<u8, CliError> {
        match self.verb {
            Verb::Ls => ls(context).await,
            Verb::Pull { reference, name } => {
                let reference = from_here(reference)?;
                let asked = name.clone().unwrap_or_else(|| reference.clone());
                made(context, Some(&asked), async |client| client.pull(reference, name).await).await
            }
            Verb::Commit { vm, reference, message, changes } => {
                let params = CommitImage { vm, reference, message, changes };
                let name = params.reference.clone();
                let made: MadeImage = end_of(context, async |client| client.commit(params).await).await?;
                for warning in &made.warnings {
                    context.output.note(&format!("warning: {warning}"));
                }
                context.output.show(&made, || called(&made.image, Some(&name)))?;
                Ok(0)
            }
            Verb::Build(build) => build.run(context).await,
            Verb::Push { image, to } => {
                let asked = to.clone().unwrap_or_else(|| image.clone());
                made(context, Some(&asked), async |client| client.push(image, to).await).await
            }
            Verb::Export { image, path, format } => {
                let path = std::path::absolute(&path).map_err(|source| CliError::File { path, source })?;
                let params = ExportImage { image, path, format: format.into() };
                made(context, Some(&params.image.clone()), async |client| client.export(params).await).await
            }
            Verb::Login { registry, user, password_stdin } => {
                let password = password(&registry, password_stdin)?;
                let client = context.client().await?;
                client.login(Login { registry: registry.clone(), user, password }).await?;
                context.output.show(&json!({"registry": registry}), || format!("{registry}\n"))?;
                Ok(0)
            }
            Verb::Logout { registry } => {
                context.client().await?.logout(registry.clone()).await?;
                context.output.show(&json!({"registry": registry}), || format!("{registry}\n"))?;
                Ok(0)
            }
            Verb::Prune { all, dry_run } => {
                let client = context.client().await?;
                let pruned = ImageClient::prune(&client, PruneImages { all, dry_run }).await?;
                context.output.show(&pruned, || {
                    let names = pruned.images.iter().map(|image| name(image) + "\n").collect::<String>();
                    let verb = if dry_run { "would be freed" } else { "freed" };
                    format!("{names}{} {verb}\n", human(pruned.bytes))
                })?;
                Ok(0)
            }
            Verb::Import { source, reference, sha256 } => {
                let (source, asked) = (file_or_address(source)?, reference.clone());
                let params = ImportImage { source, reference, sha256 };
                let begin = async |client: &Client| ImageClient::import(client, params).await;
                made(context, asked.as_deref(), begin).await
            }
            Verb::Catalogue => catalogue(context).await,
            Verb::Register { file, name, kernel, modules } => {
                let kernel = match kernel {
                    Some(file) if Path::new(&file).exists() => {
                        Some(absolute(Path::new(&file))?.to_string_lossy().into_owned())
                    }
                    other => other,
                };
                let modules = modules.as_deref().map(absolute).transpose()?;
                let params = RegisterImage { path: absolute(&file)?, reference: name, kernel, modules };
                made(context, Some(&params.reference.clone()), async |client| client.register(params).await)
                    .await
            }
            Verb::Promote { image } => {
                made(context, Some(&image.clone()), async |client| client.promote(image).await).await
            }
            Verb::Tag { image, reference } => {
                let image = context.client().await?.tag(image, reference).await?;
                context.output.show(&image, || image.references.join("\n") + "\n")?;
                Ok(0)
            }
            Verb::Show { image } => {
                let client = context.client().await?;
                let image = ImageClient::show(&client, image).await?;
                context.output.show(&image, || for_stdout(describe(&image)))?;
                Ok(0)
            }
            Verb::History { image } => {
                let client = context.client().await?;
                let image = ImageClient::show(&client, image).await?;
                let steps = image.origin.map(|origin| origin.history).unwrap_or_default();
                context.output.show(&steps, || for_stdout(history(&steps)))?;
                Ok(0)
            }
            Verb::Delete { images } => {
                let client = context.client().await?;
                for image in &images {
                    ImageClient::delete(&client, image.clone()).await?;
                }
                let text = || images.iter().map(|image| format!("{image}\n")).collect();
                context.output.show(&json!({"deleted": images}), text)?;
                Ok(0)
            }
        }
    }
}

/// What an image is written as.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// An image layout in a tar archive
    OciArchive,
    /// An image layout in a directory
    Oci,
    /// What `docker load` takes
    DockerArchive,
    /// One file with the root filesystem and the image's own kernel, if it names one
    Bundle,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::OciArchive => Self::OciArchive,
            Format::Oci => Self::Oci,
            Format::DockerArchive => Self::DockerArchive,
            Format::Bundle => Self::Bundle,
        }
    }
}

/// An address, or a file as the daemon finds it.
pub(crate) fn file_or_address(text: String) -> Result<String, CliError> {
    if text.contains("://") {
        return Ok(text);
    }
    Ok(absolute(Path::new(&text))?.to_string_lossy().into_owned())
}

/// A source whose path, if it has one, is seen from the root.
pub(crate) fn from_here(source: String) -> Result<String, CliError> {
    let kinds = ["oci:", "oci-archive:", "docker-archive:", "./", "../"];
    let Some(kind) = kinds.into_iter().find(|kind| source.starts_with(kind)) else { return Ok(source) };
    let kind = if kind.ends_with(':') { kind } else { "" };
    let path = Path::new(&source[kind.len()..]);
    let path =
        std::path::absolute(path).map_err(|error| CliError::File { path: path.into(), source: error })?;
    Ok(format!("{kind}{}", path.display()))
}

/// The password, of which nothing is shown.
fn password(registry: &str, from_stdin: bool) -> Result<String, CliError> {
    if !from_stdin && !io::stdin().is_terminal() {
        return Err(CliError::Usage {
            message: "there is no terminal to ask for the password".into(),
            hint: "pipe it in and say --password-stdin".into(),
        });
    }
    let read = match from_stdin {
        true => io::read_to_string(io::stdin()),
        false => rpassword::prompt_password(format!("password for {registry}: ")),
    };
    let password = read.map_err(|source| CliError::File { path: "stdin".into(), source })?;
    Ok(password.trim_end_matches(['\r', '\n']).to_owned())
}

/// Follows what makes an image, and shows that, by the name that was asked for.
async fn made(
    context: &Context,
    asked: Option<&str>,
    begin: impl AsyncFnOnce(&Client) -> Result<Begun, ClientError>,
) -> Result<u8, CliError> {
    let image: ImageRecord = end_of(context, begin).await?;
    context.output.show(&image, || called(&image, asked))?;
    Ok(0)
}

/// Follows an operation to its end.
async fn end_of<T: DeserializeOwned>(
    context: &Context,
    begin: impl AsyncFnOnce(&Client) -> Result<Begun, ClientError>,
) -> Result<T, CliError> {
    let (client, mut interrupts) = context.client_and_interrupts().await?;
    let begun = begin(&client).await?;
    let done = follow(&client, begun, context.output, PATIENCE, OnSignal::Cancel, &mut interrupts).await?;
    Ok(done.result)
}

/// All that is known of it, a line each; what it does not have is left out.
fn describe(image: &ImageRecord) -> String {
    let config = &image.config;
    let mut lines: Vec<(&str, String)> = vec![("Digest", image.digest.to_string())];
    let mut add = |name, values: Vec<String>| lines.extend(values.into_iter().map(|value| (name, value)));
    add("Reference", image.references.clone());
    add("Size", vec![human(image.size_bytes)]);
    add("Used", vec![human(image.used_bytes)]);
    add("Source", vec![image.source.clone()]);
    add("File", image.registered.iter().map(|file| file.path.display().to_string()).collect());
    add("Kernel", image.kernel.iter().map(ToString::to_string).collect());
    add("Created", vec![ago(image.created_at)]);
    add("Entrypoint", command(&config.entrypoint));
    add("Command", command(&config.cmd));
    add("User", config.user.clone().into_iter().collect());
    add("Workdir", config.working_dir.clone().into_iter().collect());
    add("Env", config.env.clone());
    add("Port", config.exposed_ports.clone());
    add("Label", config.labels.iter().map(|(name, value)| format!("{name}={value}")).collect());
    if let Some(origin) = &image.origin {
        add("Manifest", origin.manifest.clone().into_iter().collect());
        let layer = |layer: &ImageLayer| format!("{}  {}", layer.digest, human(layer.size_bytes));
        add("Layer", origin.layers.iter().map(layer).collect());
    }
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default() + 2;
    lines.iter().map(|(name, value)| format!("{:width$}{}\n", format!("{name}:"), one_line(value))).collect()
}

/// A value with line breaks forges no line of ours.
fn one_line(text: &str) -> String {
    text.replace('\n', "\\n")
}

fn command(words: &[String]) -> Vec<String> {
    let words: Vec<_> = words.iter().map(Into::into).collect();
    let line = String::from_utf8_lossy(&quote(&words)).into_owned();
    if words.is_empty() { Vec::new() } else { vec![line] }
}

/// The newest step first, as docker has it.
fn history(steps: &[ImageStep]) -> String {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    table(
        ["CREATED", "LAYER", "CREATED BY", "COMMENT"],
        steps.iter().rev().map(|step| {
            let layer = if step.empty_layer { "no" } else { "yes" };
            let comment = step.comment.clone().unwrap_or_default();
            [or_dash(&step.created), layer.to_owned(), or_dash(&step.created_by), comment]
                .map(|text| one_line(&text))
        }),
    )
}

async fn ls(context: &Context) -> Result<u8, CliError> {
    let client = context.client().await?;
    let images = ImageClient::list(&client).await?;
    context.output.show(&images, || {
        if context.output.quiet {
            return images.iter().map(|image| format!("{}\n", name(image))).collect();
        }
        table(
            ["REFERENCE", "DIGEST", "SIZE", "USED", "SOURCE", "CREATED"],
            // A line for each name, as elsewhere.
            images.iter().flat_map(|image| names(image).map(move |name| (image, name))).map(
                |(image, name)| {
                    [
                        name,
                        image.digest.short().to_owned(),
                        human(image.size_bytes),
                        human(image.used_bytes),
                        image.source.clone(),
                        ago(image.created_at),
                    ]
                },
            ),
        )
    })?;
    Ok(0)
}

async fn catalogue(context: &Context) -> Result<u8, CliError> {
    let client = context.client().await?;
    let images = ImageClient::catalogue(&client).await?;
    context.output.show(&images, || {
        if context.output.quiet {
            return images.iter().map(|image| for_stdout(format!("catalogue:{}\n", image.name))).collect();
        }
        let row = |image: &CatalogueImage| {
            let name = format!("catalogue:{}", image.name);
            [name, image.description.clone(), image.source.clone()].map(|text| one_line(&for_stdout(text)))
        };
        table(["NAME", "DESCRIPTION", "SOURCE"], images.iter().map(row))
    })?;
    Ok(0)
}

/// Of an image's names the one that was asked for, in full; else its first.
fn called(image: &ImageRecord, asked: Option<&str>) -> String {
    let Some(asked) = asked else { return name(image) };
    // What the daemon adds: a registry's address in front, a tag behind.
    let rest = |reference: &str| {
        let (before, after) = reference.rsplit_once(asked)?;
        let whole = before.is_empty() || before.ends_with('/');
        (whole && (after.is_empty() || after == ":latest")).then_some(before.len())
    };
    let found = image.references.iter().filter_map(|reference| Some((rest(reference)?, reference)));
    found.min_by_key(|(added, _)| *added).map_or_else(|| name(image), |(_, reference)| reference.clone())
}

/// Its names; one line stands for an image without any.
fn names(image: &ImageRecord) -> impl Iterator<Item = String> {
    let none = image.references.is_empty().then(|| "-".to_owned());
    image.references.iter().cloned().chain(none)
}

fn name(image: &ImageRecord) -> String {
    image.references.first().cloned().unwrap_or_else(|| image.digest.to_string())
}

/// The path as the daemon, which has another working directory, finds it.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    path.canonicalize().map_err(|source| CliError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_it_was_asked_for() {
        let image: ImageRecord = serde_json::from_value(json!({
            "digest": format!("sha256:{}", "a".repeat(64)),
            "references": ["docker.io/library/app:latest", "localhost:5000/my-app:1", "my-app:1", "x/app:latest"],
            "size_bytes": 0, "used_bytes": 0, "created_at": 0, "source": "",
        }))
        .unwrap();
        for (asked, name) in [
            ("my-app:1", "my-app:1"),
            ("localhost:5000/my-app:1", "localhost:5000/my-app:1"),
            ("x/app", "x/app:latest"),
            ("app", "x/app:latest"),
            ("p:1", "docker.io/library/app:latest"),
            ("oci:/some/where", "docker.io/library/app:latest"),
        ] {
            assert_eq!(called(&image, Some(asked)), name, "{asked}");
        }
        assert_eq!(called(&image, None), "docker.io/library/app:latest");
        assert_eq!(names(&image).collect::<Vec<_>>(), image.references);
        let nameless = ImageRecord { references: Vec::new(), ..image };
        assert_eq!(names(&nameless).collect::<Vec<_>>(), ["-"]);
    }
}
