//! Images of registries, layouts and archives: got, run, shown, given on, thrown away. Registries are Debian's own, filled by
//! `umoci` and `skopeo`.

use std::{fs, io, path::PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_tests::{
    FakeWorld, World,
    fixtures::{self, Tarball},
    wait_until,
    world::SHORT,
};

use super::registry::{AT, Registry, needs, path};

/// What users write for [`AT`].
const HOST: &str = "localhost:5000";

/// One entry of a layer.
enum Entry<'a> {
    Dir(&'a str),
    File { path: &'a str, mode: u32, uid: u64, bytes: &'a [u8], capability: Option<&'a [u8]> },
}

fn text<'a>(path: &'a str, text: &'a str) -> Entry<'a> {
    Entry::File { path, mode: 0o644, uid: 0, bytes: text.as_bytes(), capability: None }
}

fn write(tar: &mut Tarball, entries: &[Entry<'_>]) -> io::Result<()> {
    for entry in entries {
        let mut header = tar::Header::new_ustar();
        match entry {
            Entry::Dir(path) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                tar.append_data(&mut header, path, io::empty())?;
            }
            Entry::File { path, mode, uid, bytes, capability } => {
                // As docker writes extended attributes.
                tar.append_pax_extensions(
                    capability.iter().map(|value| ("SCHILY.xattr.security.capability", *value)),
                )?;
                header.set_mode(*mode);
                header.set_uid(*uid);
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, path, *bytes)?;
            }
        }
    }
    Ok(())
}

/// A layout that images are made in.
struct Workshop<'a> {
    world: &'a World,
    layout: PathBuf,
}

impl<'a> Workshop<'a> {
    #[track_caller]
    fn new(world: &'a World) -> Self {
        needs("umoci", "umoci");
        needs("skopeo", "skopeo");
        let layout = world.directory().join("workshop");
        world.tool("umoci", &["init", "--layout", path(&layout)]).run().exits(0);
        Self { world, layout }
    }

    fn tagged(&self, tag: &str) -> String {
        format!("{}:{tag}", self.layout.display())
    }

    /// An image without layers.
    #[track_caller]
    fn empty(&self, tag: &str) -> &Self {
        self.world.tool("umoci", &["new", "--image", &self.tagged(tag)]).run().exits(0);
        self
    }

    /// One more name, to be made into another image.
    #[track_caller]
    fn like(&self, tag: &str, new: &str) -> &Self {
        self.world.tool("umoci", &["tag", "--image", &self.tagged(tag), new]).run().exits(0);
        self
    }

    #[track_caller]
    fn layer(&self, tag: &str, write: impl FnOnce(&mut Tarball) -> io::Result<()>) -> &Self {
        let file = self.world.directory().join("layer.tar");
        let mut tar = tar::Builder::new(fs::File::create(&file).expect("a file can be made"));
        write(&mut tar).and_then(|()| tar.into_inner().map(drop)).expect("a layer can be written");
        let arguments =
            ["raw", "add-layer", "--history.created_by", tag, "--image", &self.tagged(tag), path(&file)];
        self.world.tool("umoci", &arguments).run().exits(0);
        self
    }

    #[track_caller]
    fn config(&self, tag: &str, options: &[&str]) -> &Self {
        let tagged = self.tagged(tag);
        let mut arguments = vec!["config", "--image", &tagged];
        arguments.extend(options);
        self.world.tool("umoci", &arguments).run().exits(0);
        self
    }

    /// Copies an image to where skopeo can write.
    #[track_caller]
    fn copy(&self, tag: &str, to: &str) {
        let from = format!("oci:{}", self.tagged(tag));
        self.world.tool("skopeo", &["copy", "--insecure-policy", &from, to]).run().exits(0);
    }

    #[track_caller]
    fn push(&self, registry: &Registry, tag: &str) {
        registry.push(self.world, &self.layout, tag, &format!("{tag}:latest"));
    }
}

/// How many blobs the daemon keeps.
fn blobs(world: &World) -> usize {
    fs::read_dir(world.dirs().state.join("content/blobs/sha256")).map_or(0, Iterator::count)
}

/// All of an image's names.
fn names(image: &Value) -> Vec<&str> {
    image["references"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Bytes that do not compress, the same for a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

/// A few small files: an image for whoever looks at no running VM.
#[track_caller]
fn small(shop: &Workshop<'_>, tag: &str) {
    shop.empty(tag)
        .layer(tag, |tar| write(tar, &[Entry::Dir("etc"), text("etc/one", "1\n")]))
        .layer(tag, |tar| write(tar, &[text("etc/two", "2\n")]))
        .config(tag, &["--config.cmd", "/etc/one", "--config.label", "made.by=tests"]);
}

/// `CAP_DAC_READ_SEARCH`, permitted and effective: `struct vfs_cap_data` of revision 2.
const READS_ALL: [u8; 20] = [1, 0, 0, 2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn an_image_of_a_registry_runs_as_its_maker_said() {
    let world = World::new();
    let registry = Registry::start(&world);
    let shop = Workshop::new(&world);
    let busybox = fs::read(fixtures::busybox()).expect("there is busybox");
    let program = |path, mode, capability| Entry::File { path, mode, uid: 0, bytes: &busybox, capability };
    shop.empty("app")
        .layer("app", |tar| {
            fixtures::busybox_tree(tar)?;
            let secret = Entry::File {
                path: "root/secret",
                mode: 0o600,
                uid: 0,
                bytes: b"hidden\n",
                capability: None,
            };
            write(
                tar,
                &[
                    text("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/srv:/bin/sh\n"),
                    text("etc/group", "root:x:0:\nteam:x:1001:\n"),
                    secret,
                    text("etc/gone", "of layer 1\n"),
                    Entry::Dir("opt"),
                    text("opt/old", "of layer 1\n"),
                    program("bin/busybox-reads", 0o755, Some(&READS_ALL)),
                    program("bin/busybox-root", 0o4755, None),
                ],
            )
        })
        .layer("app", |tar| {
            let own =
                Entry::File { path: "srv/own", mode: 0o640, uid: 1000, bytes: b"mine\n", capability: None };
            let entries = [
                text("etc/.wh.gone", ""),
                text("opt/.wh..wh..opq", ""),
                text("opt/new", ""),
                Entry::Dir("srv"),
            ];
            write(tar, &entries)?;
            write(tar, &[own])
        })
        .config("app", &["--config.env", "PATH=/bin", "--config.env", "GREETING=hello there"])
        .config("app", &["--config.workingdir", "/srv", "--config.user", "app"])
        .config("app", &["--config.entrypoint", "sh", "--config.entrypoint", "-c"])
        .config("app", &["--config.cmd", "echo \"$GREETING\" $(id -u):$(id -g) $(pwd); cat own; exit 7"])
        .config("app", &["--config.exposedports", "80/tcp", "--config.label", "made.by=tests"])
        .like("app", "numbers")
        .config("numbers", &["--config.user", "1234:5678", "--config.workingdir", "/tmp"]);
    shop.empty("static")
        .layer("static", fixtures::static_tree)
        .config("static", &["--config.entrypoint", "/prog", "--config.cmd", "cat"]);
    for tag in ["app", "numbers", "static"] {
        shop.push(&registry, tag);
    }
    // The same layers by Zstandard, as registries have ever more of them. With the same configuration it would be the same image.
    shop.like("app", "zstd").config("zstd", &["--config.label", "packed.by=zstd"]);
    let zstd = world.directory().join("zstd");
    let (from, to) = (format!("oci:{}", shop.tagged("zstd")), format!("oci:{}:zstd", path(&zstd)));
    let copy = ["copy", "--insecure-policy", "--dest-compress-format", "zstd", &from, &to];
    world.tool("skopeo", &copy).run().exits(0);
    registry.push(&world, &zstd, "zstd", "zstd:latest");

    let before = blobs(&world);
    let app = format!("{HOST}/app");
    world.vm(&["image", "pull", &app]).run().exits(0).says("localhost:5000/app:latest\n");
    assert_eq!(blobs(&world) - before, 4, "manifest, configuration, two layers");
    let run = |image: &str, more: &[&str]| {
        let image = format!("{HOST}/{image}");
        let mut arguments = vec!["run", "--rm", "--image", &image, "--memory", "256M"];
        arguments.extend(more);
        world.vm(&arguments).stdin("hi\n").run()
    };
    // What it runs by itself; the code is the command's.
    run("app", &[]).exits(7).says("hello there 1000:1001 /srv\nmine\n");
    // What is asked for instead, in layers that lie on each other as they should.
    let look = "ls /etc/gone /opt 2>&1; stat -c '%a %u' /bin/busybox-root own; \
         cat /root/secret 2>&1; busybox-reads cat /root/secret; echo \"$GREETING\"";
    run("app", &["--env", "GREETING=good bye", "--", "sh", "-c", look]).exits(0).says(
        "ls: /etc/gone: No such file or directory\n/opt:\nnew\n4755 0\n640 1000\n\
         cat: can't open '/root/secret': Permission denied\nhidden\ngood bye\n",
    );

    // By another compression, the same files.
    // What the boot writes is another each time, and so are the times of the directories it is in.
    let all = "cd / && for dir in bin etc opt root srv; do \
         find $dir -mindepth 1 ! -name 'host*' ! -name resolv.conf ! -name machine-id \
         -exec stat -c '%n %F %a %u %g %h %s %Y %t %T' {} + ; \
         find $dir -type f ! -name 'host*' ! -name resolv.conf ! -name machine-id -exec sha256sum {} + ; \
         done | sort; busybox-reads cat /root/secret";
    let listed = |image: &str| run(image, &["--user", "root", "--", "sh", "-c", all]).exits(0).text();
    let gzip = listed("app");
    assert_eq!(listed("zstd"), gzip);
    assert!(gzip.contains("4755") && gzip.ends_with("hidden\n"), "{gzip}");
    let shown = world.ask(&["image", "show", &format!("{HOST}/zstd")]);
    let layers = shown["origin"]["layers"].as_array().expect("it has layers");
    let is_zstd = |layer: &Value| layer["media_type"].as_str().is_some_and(|text| text.ends_with("+zstd"));
    assert!(layers.len() == 2 && layers.iter().all(is_zstd), "{shown}");
    world.vm(&["image", "delete", &format!("{HOST}/zstd")]).run().exits(0);
    assert_eq!(blobs(&world) - before, 4);

    // A sibling brings a manifest and a configuration of its own; its layers are there.
    world.vm(&["image", "pull", &format!("{HOST}/numbers")]).run().exits(0);
    assert_eq!(blobs(&world) - before, 6);
    run("numbers", &["--", "sh", "-c", "id -u; id -g; pwd"]).exits(0).says("1234\n5678\n/tmp\n");
    run("numbers", &["--user", "root", "--workdir", "/opt", "--", "sh", "-c", "id -u; pwd"])
        .exits(0)
        .says("0\n/opt\n");

    // One that nobody has pulled yet, without a shell.
    run("static", &[]).exits(0).says("hi\n");
    run("none", &["--", "true"]).exits(125).complains("no image localhost:5000/none").complains("hint");
    world.vm(&["create", "--image", &format!("{HOST}/none")]).run().exits(3).complains("has no none:latest");
    assert!(world.names().is_empty());

    let shown = world.ask(&["image", "show", &app]);
    assert_eq!(shown["config"]["exposed_ports"], json!(["80/tcp"]));
    assert_eq!(shown["config"]["labels"]["made.by"], "tests");
    world.vm(&["create", "--name", "a", "--image", &app]).run().exits(0);
    world.vm(&["image", "delete", &app]).run().exits(4).complains("hint");
    world.vm(&["image", "prune", "--all", "--dry-run"]).run().exits(0).tells("localhost:5000/numbers:latest");
    world.vm(&["image", "delete", &format!("{HOST}/numbers"), &format!("{HOST}/static")]).run().exits(0);
    assert_eq!(blobs(&world) - before, 4, "what the VM's image needs");
    world.vm(&["delete", "a"]).run().exits(0);
    world.vm(&["image", "delete", &app]).run().exits(0);
    assert_eq!(blobs(&world), before);
    registry.stop();
    world.leaves_nothing();
}

#[test]
fn images_go_from_archives_to_registries_and_back() {
    let mut host = FakeWorld::new("");
    host.start("");
    let world = host.world();
    let shop = Workshop::new(world);
    small(&shop, "v1");
    let file = |name: &str| world.directory().join(name);
    let layout = format!("oci:{}", shop.tagged("v1"));

    // A layout's tag is no name.
    world
        .vm(&["image", "pull", &layout])
        .run()
        .exits(2)
        .complains("v1 only, which is a tag")
        .complains("--name");
    let made = world.ask(&["image", "pull", &layout, "--name", "mine"]);
    assert_eq!(names(&made), ["mine:latest"]);
    let digest = made["digest"].as_str().expect("a digest").to_owned();
    let manifest = made["origin"]["manifest"].clone();

    // The same image by whatever way.
    shop.copy("v1", &format!("docker-archive:{}:example.org/team/tool:3", path(&file("docker.tar"))));
    let loaded = world.ask(&["image", "import", path(&file("docker.tar"))]);
    assert!(names(&loaded).contains(&"example.org/team/tool:3"), "{loaded}");
    assert_eq!(loaded["digest"], json!(digest));
    world.tool("tar", &["-C", path(&shop.layout), "-cf", path(&file("layout.tar")), "."]).run().exits(0);
    for source in [path(&shop.layout), path(&file("layout.tar"))] {
        let again = world.ask(&["image", "import", source, "again"]);
        assert_eq!(again["digest"], json!(digest), "{source}");
        assert!(names(&again).contains(&"again:latest"), "{again}");
    }
    world.vm(&["image", "import", path(&shop.layout)]).run().exits(2).complains("NAME");
    let nothing = file("nothing");
    fs::create_dir(&nothing).expect("a directory can be made");
    world.vm(&["image", "import", path(&nothing), "x"]).run().exits(7).complains("index.json");

    let listed = world.ask(&["image", "ls"]);
    let mine = |image: &&Value| names(image).contains(&"mine:latest");
    assert!(listed.as_array().expect("a list").iter().any(|image| mine(&image)), "{listed}");
    let history = world.ask(&["image", "history", "mine"]);
    let steps = history.as_array().expect("steps");
    assert_eq!(steps.iter().filter(|step| step["empty_layer"] == json!(false)).count(), 2, "{history}");
    assert!(world.ask(&["system", "df"])["layers"].as_u64() > Some(0));
    world.vm(&["image", "show", "mine"]).run().exits(0).tells("made.by=tests").tells(&digest);

    // To a registry and back.
    world.vm(&["image", "push", "mine", &format!("{HOST}/team/tool:3")]).run().exits(1).complains("hint");
    let registry = Registry::start(world);
    world.vm(&["image", "push", "mine", &format!("{HOST}/team/tool:3")]).run().exits(0);
    let inspected = ["inspect", "--tls-verify=false", &format!("docker://{AT}/team/tool:3")];
    let inspected = world.tool("skopeo", &inspected).run().exits(0).json();
    assert_eq!((&inspected["Digest"], &inspected["Labels"]["made.by"]), (&manifest, &json!("tests")));
    let back = world.ask(&["image", "pull", &format!("{HOST}/team/tool:3")]);
    assert_eq!((back["digest"].as_str(), &back["origin"]["manifest"]), (Some(&*digest), &manifest));
    assert!(names(&back).contains(&"localhost:5000/team/tool:3"), "{back}");

    // To files that others read, and nothing is overwritten.
    for (form, tool) in [("oci-archive", "oci-archive"), ("oci", "oci"), ("docker-archive", "docker-archive")]
    {
        let to = file(&format!("export-{form}"));
        let export = || world.vm(&["image", "export", "again", path(&to), "--format", form]).run();
        export().exits(0);
        export().exits(4).complains("exists");
        let source = format!("{tool}:{}", path(&to));
        let inspected = world.tool("skopeo", &["inspect", "--config", &source]).run().exits(0).json();
        assert_eq!(inspected["config"]["Labels"]["made.by"], "tests", "{form}");
    }

    let pruned = world.ask(&["image", "prune", "--all", "--dry-run"]);
    assert!(pruned["images"].as_array().expect("a list").iter().any(|image| mine(&image)), "{pruned}");
    world.vm(&["image", "show", "mine"]).run().exits(0);
    world.vm(&["image", "tag", "mine", "other"]).run().exits(0).tells("other:latest");
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    world.vm(&["image", "show", "other"]).run().exits(0);
    world.vm(&["image", "delete", &digest]).run().exits(0);
    assert_eq!(blobs(world), 0);
    registry.stop();
    host.terminate();
    host.leaves_nothing();
}

/// `user` with the password `secret`, by bcrypt.
const USERS: &str = "user:$2b$04$hziOI415IzNKAdIik9gEmeYACzTwvSvEa/ce5Vrk8E0h5n69z6uzK\n";

#[test]
fn a_registry_lets_in_who_has_logged_in() {
    let mut host = FakeWorld::new("");
    host.start("");
    let world = host.world();
    let shop = Workshop::new(world);
    small(&shop, "v1");
    world.vm(&["image", "pull", &format!("oci:{}", shop.tagged("v1")), "--name", "mine"]).run().exits(0);
    let users = world.directory().join("users");
    fs::write(&users, USERS).expect("a file can be written");
    let auth = format!("auth: {{htpasswd: {{realm: tests, path: {}}}}}\n", users.display());
    let registry = Registry::start_with(world, &auth);
    let to = format!("{HOST}/private/tool:1");

    let push = || world.vm(&["image", "push", "mine", &to]).run();
    push().exits(8).complains("log in");
    let login = |password: &str| {
        world.vm(&["image", "login", HOST, "--user", "user", "--password-stdin"]).stdin(password).run()
    };
    login("wrong\n").exits(8).complains("refuses the user name and password").complains("hint");
    world.vm(&["image", "login", HOST, "--user", "user"]).run().exits(2).complains("--password-stdin");
    login("secret\n").exits(0);
    push().exits(0);
    world.vm(&["image", "delete", "mine"]).run().exits(0);
    world.vm(&["image", "pull", &to]).run().exits(0);
    world.vm(&["image", "logout", HOST]).run().exits(0);
    world.vm(&["image", "logout", HOST]).run().exits(3);
    world.vm(&["image", "pull", &to]).run().exits(8);
    world.vm(&["image", "delete", &to]).run().exits(0);
    registry.stop();
    host.terminate();
    host.leaves_nothing();
}

#[test]
fn a_pull_that_breaks_or_is_cancelled_can_be_made_again() {
    let mut host = FakeWorld::new("");
    host.start("");
    let world = host.world();
    let mut registry = Registry::start(world);
    let shop = Workshop::new(world);
    let large = noise(7, 4 << 20);
    shop.empty("large").layer("large", |tar| {
        write(tar, &[Entry::File { path: "large", mode: 0o644, uid: 0, bytes: &large, capability: None }])
    });
    shop.push(&registry, "large");
    let large = format!("{HOST}/large");
    let connected =
        || world.tool("ss", &["-Htn", "state", "established", "dport = :5000"]).run().text() != "";

    // It takes the connection and says nothing.
    registry.process.signal(Signal::SIGSTOP);
    let mut pull = world.vm(&["image", "pull", &large]).start();
    wait_until("the daemon is connected", SHORT, connected);
    pull.signal(Signal::SIGINT);
    pull.finish(SHORT).exits(130).complains("cancelled");
    world.vm(&["image", "show", &large]).run().exits(3);
    wait_until("the connection is gone", SHORT, || !connected());

    // It dies in the middle.
    let pull = world.vm(&["image", "pull", &large]).start();
    wait_until("the daemon is connected", SHORT, connected);
    registry.stop();
    pull.finish(SHORT).exits(1).complains(HOST).complains("hint");

    // A blob that it does not have any more.
    let registry = Registry::start(world);
    let shown = world.tool("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{AT}/large")]);
    let shown = shown.run().exits(0).json();
    let layer = registry.blob(shown["Layers"][0].as_str().expect("a layer"));
    let aside = layer.with_extension("aside");
    fs::rename(&layer, &aside).expect("it can be moved");
    world.vm(&["image", "pull", &large]).run().exits(3).complains("has no blob sha256:").complains("hint");
    fs::rename(&aside, &layer).expect("it can be moved");
    world.vm(&["image", "pull", &large]).run().exits(0);
    world.vm(&["image", "pull", &format!("{large}:none")]).run().exits(3).complains("large:none");

    // A dry run says what then happens, layers included.
    let would = world.ask(&["image", "prune", "--all", "--dry-run"]);
    assert_eq!(blobs(world), 3);
    assert_eq!(world.ask(&["image", "prune", "--all"]), would);
    assert!(would["bytes"].as_u64() > Some(8 << 20), "filesystem and layer: {would}");
    assert_eq!(blobs(world), 0);
    registry.stop();
    host.terminate();
}
