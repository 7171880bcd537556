//! Bundles, catalogues and kernels of registries: images and kernels that come ready made.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vm_tests::{
    FakeWorld, Running, World,
    fixtures::{self, Tarball},
    wait_until,
    world::SHORT,
};

use super::registry::{Registry, needs, path};

/// Where files are served, in the world's own network.
const FILES: &str = "127.0.0.1:8080";

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Serves what is in a directory.
#[track_caller]
fn serve(world: &World, directory: &Path) -> Running {
    let busybox = fixtures::busybox();
    let mut process =
        world.tool(path(&busybox), &["httpd", "-f", "-p", FILES, "-h", path(directory)]).start();
    let listens = || world.tool("ss", &["-Htln", "sport = :8080"]).run().text() != "";
    wait_until("files are served", SHORT, || {
        assert!(process.runs(), "the server has ended: {}", process.stderr_so_far());
        listens()
    });
    process
}

fn stop(mut process: Running) {
    process.signal(Signal::SIGKILL);
    process.finish(SHORT);
}

/// A tar archive in memory.
fn archive(write: impl FnOnce(&mut Tarball) -> io::Result<()>, scratch: &Path) -> Vec<u8> {
    let mut tar = tar::Builder::new(fs::File::create(scratch).expect("a file can be made"));
    write(&mut tar).and_then(|()| tar.into_inner().map(drop)).expect("an archive can be written");
    fs::read(scratch).expect("it can be read")
}

/// A bundle made as its documentation says, by nothing of ours.
fn bundle(name: &str, config: &Value, parts: &[(&str, &[u8])]) -> Vec<u8> {
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let described: serde_json::Map<_, _> = parts
        .iter()
        .map(|(part, bytes)| {
            let member = json!({ "digest": format!("sha256:{}", hex(bytes)), "size": bytes.len() });
            ((*part).to_owned(), member)
        })
        .collect();
    let metadata = json!({
        "format": 1, "name": name, "platform": format!("linux/{architecture}"), "parts": described,
        "config": config,
    })
    .to_string();
    let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).expect("an encoder"));
    for (name, bytes) in [("vm-bundle.json", metadata.as_bytes())].iter().chain(parts) {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, *bytes).expect("it can be written");
    }
    tar.into_inner().and_then(zstd::Encoder::finish).expect("it can be written")
}

/// What is in a bundle, by name.
fn parts(bundle: &Path) -> Vec<(String, Vec<u8>)> {
    let file = fs::File::open(bundle).expect("it can be opened");
    let mut archive = tar::Archive::new(zstd::Decoder::new(file).expect("it is compressed"));
    let entries = archive.entries().expect("it is an archive");
    entries
        .map(|entry| {
            let mut entry = entry.expect("it is whole");
            let (name, mut bytes) = (entry.path().expect("a name").display().to_string(), Vec::new());
            entry.read_to_end(&mut bytes).expect("it is whole");
            (name, bytes)
        })
        .collect()
}

/// A layout with a kernel's artifact under the tag `k`; the digest of its manifest.
fn kernel_layout(layout: &Path, layers: &[(&str, &[u8])]) -> String {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory can be made");
    let add = |media_type: &str, bytes: &[u8]| {
        fs::write(blobs.join(hex(bytes)), bytes).expect("a file can be written");
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", hex(bytes)), "size": bytes.len() })
    };
    let layers: Vec<_> = layers.iter().map(|(media_type, bytes)| add(media_type, bytes)).collect();
    let image = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": image, "artifactType": "application/vnd.vm.kernel.v1",
        "config": add("application/vnd.oci.empty.v1+json", b"{}"), "layers": layers,
    });
    let mut entry = add(image, manifest.to_string().as_bytes());
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "k" });
    let index: Value = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(layout.join("index.json"), index.to_string()).expect("a file can be written");
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")
        .expect("a file can be written");
    entry["digest"].as_str().expect("a digest").to_owned()
}

/// The kernel of a VM, and that it boots it.
#[track_caller]
fn boots(world: &World, image: &str, kernel: &str) {
    world.vm(&["create", "--name", "k", "--image", image, "--memory", "256M", "--start"]).run().exits(0);
    assert_eq!(world.ask(&["show", "k"])["kernel"], kernel);
    world.vm(&["ssh", "k", "uname -s"]).run().exits(0).says("Linux\n");
    world.vm(&["delete", "--force", "k"]).run().exits(0);
}

#[test]
fn an_image_brings_its_kernel_by_bundle_and_by_label() {
    let world = World::new();
    needs("umoci", "umoci");
    let file = |name: &str| world.directory().join(name);
    let files = file("files");
    fs::create_dir(&files).expect("a directory can be made");
    let usual = world.ask(&["kernel", "ls"])[0]["id"].as_str().expect("an id").to_owned();

    // What we export, with a kernel of the image's own.
    let digest = world.ask(&["image", "show", fixtures::BUSYBOX])["digest"].clone();
    let digest = digest.as_str().and_then(|digest| digest.parse().ok()).expect("a digest");
    let ext4 = file("mine.ext4");
    fs::copy(world.dirs().image_rootfs(&digest), &ext4).expect("it can be copied");
    world.tool("debugfs", &["-w", "-R", "mkdir /mine", path(&ext4)]).run().exits(0);
    world.vm(&["image", "register", path(&ext4), "--kernel", &usual, "--name", "mine"]).run().exits(0);
    let exported = file("mine.tar.zst");
    let export = || world.vm(&["image", "export", "mine", path(&exported), "--format", "bundle"]).run();
    export().exits(0).says("mine:latest\n");
    export().exits(4).complains("exists").complains("hint");
    let inside = parts(&exported);
    let names: Vec<_> = inside.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["vm-bundle.json", "kernel", "modules.tar", "kernel.config", "rootfs.ext4"]);
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    let back = world.ask(&["image", "import", path(&exported)]);
    assert_eq!((&back["references"], &back["kernel"]), (&json!(["mine:latest"]), &json!(usual)));
    world
        .vm(&["run", "--rm", "--image", "mine", "--memory", "256M", "--", "ls", "-d", "/mine"])
        .run()
        .exits(0)
        .says("/mine\n");

    // Another kernel: the same, but for bytes that nobody reads.
    let part = |wanted: &str| {
        let found = inside.iter().find(|(name, _)| name == wanted);
        &*found.expect("it is in it").1
    };
    let mut other = part("kernel").to_vec();
    other.extend(b"another one, 16B");
    let rootfs = archive(fixtures::busybox_tree, &file("rootfs.tar"));
    let config =
        json!({ "env": ["PATH=/bin", "GREETING=hello"], "cmd": ["sh", "-c", "echo $GREETING; uname -r"] });
    let kernel_parts =
        [("kernel", &*other), ("modules.tar", part("modules.tar")), ("kernel.config", part("kernel.config"))];
    let mut all = kernel_parts.to_vec();
    all.push(("rootfs.tar", &rootfs));
    let made = bundle("team/tool:v2", &config, &all);
    fs::write(files.join("tool.tar.zst"), &made).expect("a file can be written");
    let server = serve(&world, &files);
    let url = format!("http://{FILES}/tool.tar.zst");
    let image = world.ask(&["image", "import", &url, "--sha256", &hex(&made)]);
    assert_eq!(image["references"], json!(["team/tool:v2"]));
    let own = image["kernel"].as_str().expect("a kernel").to_owned();
    assert_ne!(own, usual);
    // It is that image's, and nobody else's.
    let kernels = world.ask(&["kernel", "ls"]);
    let is_default = |id: &str| {
        let mut kernels = kernels.as_array().into_iter().flatten();
        kernels.find(|kernel| kernel["id"] == *id).map(|kernel| kernel["default"] == json!(true))
    };
    assert_eq!((is_default(&own), is_default(&usual)), (Some(false), Some(true)), "{kernels}");
    boots(&world, "team/tool:v2", &own);
    let run = world.vm(&["run", "--rm", "--image", "team/tool:v2", "--memory", "256M"]).run();
    run.exits(0).tells("hello\n");
    world.vm(&["kernel", "delete", &own]).run().exits(4).complains("team/tool:v2").complains("hint");
    let blobs = world.dirs().state.join("content/blobs/sha256");
    assert!(!blobs.join(hex(&made)).exists(), "what was downloaded goes when it was imported");
    world.vm(&["image", "delete", "team/tool:v2"]).run().exits(0);
    world.vm(&["kernel", "delete", &own]).run().exits(0);

    // The kernel alone, from the bundle and from a registry.
    let alone = world.ask(&["kernel", "import", "--bundle", &url, "--sha256", &hex(&made)]);
    assert_eq!(alone["id"], json!(own));
    world.vm(&["kernel", "delete", &own]).run().exits(0);
    stop(server);

    let registry = Registry::start(&world);
    let layout = file("kernel-layout");
    let digest = kernel_layout(
        &layout,
        &[
            ("application/vnd.vm.kernel.image.v1", &other),
            ("application/vnd.vm.kernel.modules.v1.tar", part("modules.tar")),
            ("application/vnd.vm.kernel.config.v1", part("kernel.config")),
        ],
    );
    registry.push(&world, &layout, "k", "kernels/other:1");
    let pulled = world.ask(&["kernel", "pull", "localhost:5000/kernels/other:1"]);
    assert_eq!(pulled["id"], json!(own));
    assert_eq!(pulled["source"], json!(format!("localhost:5000/kernels/other@{digest}")));
    world.vm(&["kernel", "delete", &own]).run().exits(0);
    let of_layout = world.ask(&["kernel", "pull", &format!("oci:{}:k", layout.display())]);
    assert_eq!(of_layout["id"], json!(own));
    world.vm(&["kernel", "delete", &own]).run().exits(0);

    // An image of the registry that names it.
    let shop = file("workshop");
    let tagged = format!("{}:app", shop.display());
    world.tool("umoci", &["init", "--layout", path(&shop)]).run().exits(0);
    world.tool("umoci", &["new", "--image", &tagged]).run().exits(0);
    world.tool("umoci", &["raw", "add-layer", "--image", &tagged, path(&file("rootfs.tar"))]).run().exits(0);
    let label = format!("vm.kernel=localhost:5000/kernels/other@{digest}");
    world.tool("umoci", &["config", "--image", &tagged, "--config.label", &label]).run().exits(0);
    registry.push(&world, &shop, "app", "app:latest");
    let app = world.ask(&["image", "pull", "localhost:5000/app"]);
    assert_eq!(app["kernel"], json!(own));
    boots(&world, "localhost:5000/app", &own);
    world
        .vm(&["kernel", "pull", "localhost:5000/app"])
        .run()
        .exits(5)
        .complains("is no kernel")
        .complains("hint");
    world.vm(&["image", "pull", "localhost:5000/kernels/other:1"]).run().exits(5).complains("vm.kernel");
    world.vm(&["image", "delete", "localhost:5000/app", "mine"]).run().exits(0);
    world.vm(&["kernel", "delete", &own]).run().exits(0);
    registry.stop();
    world.leaves_nothing();
}

#[test]
fn what_a_catalogue_says_is_pulled_by_its_name_and_verified() {
    let mut host = FakeWorld::new("");
    let world = host.world();
    let files = world.directory().join("files");
    fs::create_dir(&files).expect("a directory can be made");
    let list = files.join("images.toml");
    let config = fs::read_to_string(world.dirs().config_file()).expect("it can be read");
    world.configure(&format!(
        "{config}\n[images]\ncatalogues = [\"http://{FILES}/images.toml\", \"{}\"]\n",
        list.display()
    ));
    host.start("");
    let world = host.world();
    let rootfs = archive(fixtures::static_tree, &world.directory().join("rootfs.tar"));
    let tool = bundle("tool", &json!({ "cmd": ["/prog"] }), &[("rootfs.tar", &rootfs)]);
    fs::write(files.join("tool.tar.zst"), &tool).expect("a file can be written");
    let platform = if cfg!(target_arch = "x86_64") { "linux/amd64" } else { "linux/arm64" };
    let entry = |name: &str, platform: &str, sha256: &str| {
        format!(
            "[[image]]\nname = \"{name}\"\nplatform = \"{platform}\"\nurl = \"tool.tar.zst\"\nsha256 = \"{sha256}\"\n\
             description = \"for tests\"\n"
        )
    };
    let text = [
        "version = 1\n".to_owned(),
        entry("tool", platform, &hex(&tool)),
        entry("foreign", "linux/s390x", &hex(&tool)),
        entry("changed", platform, &"0".repeat(64)),
    ];
    fs::write(&list, text.concat()).expect("a file can be written");

    // None is passed over that cannot be read.
    let pull = |name: &str| world.vm(&["image", "pull", &format!("catalogue:{name}")]).run();
    pull("tool").exits(1).complains(FILES).complains("hint");
    let server = serve(world, &files);
    let listed = world.ask(&["image", "catalogue"]);
    let listed: Vec<_> = listed.as_array().into_iter().flatten().collect();
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert_eq!((&listed[0]["name"], &listed[0]["description"]), (&json!("tool"), &json!("for tests")));
    assert_eq!(listed[0]["source"], json!(format!("http://{FILES}/tool.tar.zst")));
    world.vm(&["image", "catalogue"]).run().exits(0).tells("catalogue:tool");
    pull("tool").exits(0).says("catalogue:tool\n");
    let image = world.ask(&["image", "show", "catalogue:tool"]);
    assert_eq!(image["config"]["cmd"], json!(["/prog"]));
    assert_eq!(image["size_bytes"].as_u64().map(|size| size > 0), Some(true));
    pull("changed").exits(7).complains(&hex(&tool)).complains("hint");
    pull("foreign").exits(3).complains("linux/s390x only");
    pull("none").exits(3).complains("vm image catalogue");
    world.vm(&["image", "tag", "catalogue:tool", "catalogue:mine"]).run().exits(2).complains("catalogue has");
    world.vm(&["create", "--name", "t", "--image", "catalogue:tool"]).run().exits(0);
    world.vm(&["delete", "t"]).run().exits(0);

    // What is here already is not fetched again.
    fs::remove_file(files.join("tool.tar.zst")).expect("it can be removed");
    pull("tool").exits(0);
    world.vm(&["image", "pull", "catalogue:tool", "--name", "mine"]).run().exits(0).says("mine:latest\n");
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    world.vm(&["image", "delete", "catalogue:tool"]).run().exits(0);
    pull("tool").exits(3).complains("tool.tar.zst").complains("hint");

    // By hand: what must be said, and what is refused.
    fs::write(files.join("tool.tar.zst"), &tool).expect("a file can be written");
    let url = format!("http://{FILES}/tool.tar.zst");
    world.vm(&["image", "import", &url]).run().exits(2).complains("--sha256");
    world.vm(&["image", "import", &url, "--sha256", "xyz"]).run().exits(2).complains("64 digits");
    let import = |url: &str| world.vm(&["image", "import", url, "--sha256", &hex(&tool)]).run();
    import("http://192.0.2.1/tool.tar.zst").exits(2).complains("plain HTTP");
    import("https://me:secret@192.0.2.1/x")
        .exits(2)
        .must("not show the password", |output| !output.text().contains("secret"));
    import(&url).exits(0).says("tool:latest\n");
    world.vm(&["image", "delete", "tool"]).run().exits(0);
    let local = path(&files.join("tool.tar.zst")).to_owned();
    world.vm(&["image", "import", &local, "--sha256", &"0".repeat(64)]).run().exits(7).complains(&hex(&tool));
    import(&local).exits(0);
    let shown = world.ask(&["image", "show", "tool"]);
    assert_eq!(shown["source"], json!(local));

    // Hostile ones, by what they are.
    let refused = |name: &str, bytes: &[u8], said: &str| {
        let file = files.join(name);
        fs::write(&file, bytes).expect("a file can be written");
        world.vm(&["image", "import", path(&file), "bad"]).run().exits(7).complains(said).complains("hint");
    };
    let outside = archive(
        |tar| {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..10].copy_from_slice(b"../outside");
            header.set_size(0);
            header.set_cksum();
            tar.append(&header, io::empty())
        },
        &world.directory().join("outside.tar"),
    );
    refused("outside", &bundle("x", &json!({}), &[("rootfs.tar", &outside)]), "../outside");
    refused("text", &bundle("x", &json!({}), &[("rootfs.ext4", b"text")]), "root filesystem");
    // Not the one that is here: of that one nothing more than its name is needed.
    let other = bundle("other", &json!({}), &[("rootfs.tar", &rootfs)]);
    refused("cut", &other[..other.len() / 2], "the archive is");
    let kernel = [("kernel", &b"no kernel"[..]), ("rootfs.tar", &rootfs)];
    refused("kernel", &bundle("x", &json!({}), &kernel), "its kernel is none");
    let unknown = [("initrd", &b"x"[..]), ("rootfs.tar", &rootfs)];
    refused("unknown", &bundle("x", &json!({}), &unknown), "initrd");
    world.vm(&["kernel", "import", "--bundle", &local]).run().exits(2).complains("no kernel in it");
    world.vm(&["image", "delete", "tool"]).run().exits(0);
    let scratch: Vec<PathBuf> = fs::read_dir(world.dirs().state.join("content/blobs/sha256"))
        .expect("it can be read")
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    assert_eq!(scratch, Vec::<PathBuf>::new());
    stop(server);
    host.terminate();
    host.leaves_nothing();
}
