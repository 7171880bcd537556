//! Images built by a Dockerfile: what their commands did is in them, what was done before is not done again, and nothing is left of
//! builds that fail.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use serde_json::json;
use vm_tests::{
    Output, World, fixtures,
    world::{BOOT, SHORT},
};

use super::registry::{needs, path};

/// A directory with these files.
#[track_caller]
fn directory(world: &World, files: &[(&str, &str)]) -> PathBuf {
    let directory = world.directory().join("build");
    for (name, text) in files {
        let file = directory.join(name);
        fs::create_dir_all(file.parent().expect("it has one")).expect("a directory can be made");
        fs::write(file, text).expect("a file can be written");
    }
    directory
}

/// How many VMs there have been.
#[track_caller]
fn made(world: &World) -> usize {
    let text = world.vm(&["events"]).run().exits(0).text();
    text.lines().filter(|line| line.contains("created from")).count()
}

const SMALL: [&str; 2] = ["--memory", "256M"];

const APP: &str = r#"
ARG BASE=none
FROM $BASE AS base
ENV NAME=base VERSION="1 2"
WORKDIR /srv/app
RUN echo building $NAME && echo one > first && echo gone > gone && mkdir -p deep/er && echo x > deep/er/x && \
    # Comments may come in between.
    ln first second && chmod 4751 first
COPY --chown=12:34 --chmod=0640 src/*.txt texts/
COPY run.sh /usr/local/bin/run
ARG TOKEN
RUN rm -rf gone deep && echo "$NAME $VERSION $TOKEN" > said && ln -s said link && touch -d '2001-02-03 04:05:06' said
USER 1000:1001
RUN ["/bin/sh", "-c", "id -u > /tmp/who; id -g >> /tmp/who"]
LABEL made.by="tests of $NAME"
EXPOSE 80
ENTRYPOINT ["sh", "/usr/local/bin/run"]
CMD ["/tmp/who"]

FROM scratch
COPY --from=base /bin/busybox /bin/
COPY --from=base /srv/app/texts /texts/
COPY src/a.txt /copied
CMD ["/bin/busybox", "cat", "/texts/b.txt", "/copied"]
"#;

#[test]
fn a_dockerfile_becomes_an_image_and_nothing_is_done_twice() {
    let world = World::new();
    needs("umoci", "umoci");
    needs("skopeo", "skopeo");
    let files = [
        ("Dockerfile", APP),
        (".dockerignore", "src/not.txt\n"),
        ("src/a.txt", "a\n"),
        ("src/b.txt", "b\n"),
        ("src/not.txt", "not\n"),
        (
            "run.sh",
            "cat said; cat $1; ls; ls texts; test ! -e gone && stat -c '%a %u %g %h' first texts/a.txt\n",
        ),
    ];
    let directory = directory(&world, &files);
    let base = format!("BASE={}", fixtures::BUSYBOX);
    let build = |more: &[&str]| {
        let all = ["image", "build", path(&directory), "--build-arg", &base, "--build-arg", "TOKEN=t"];
        world.vm(&[&all[..], &SMALL, more].concat()).within(BOOT * 2).run()
    };
    build(&["--target", "base", "-t", "app"])
        .exits(0)
        .says("app:latest\n")
        .complains("FROM $BASE AS base")
        .complains("building base");
    assert!(world.names().is_empty(), "its VM is gone");
    let run = || world.vm(&["run", "--rm", "--image", "app", "--memory", "256M"]).run();
    run().exits(0).says(
        "base 1 2 t\n1000\n1001\nfirst\nlink\nsaid\nsecond\ntexts\na.txt\nb.txt\n4751 0 0 2\n640 12 34 1\n",
    );
    let shown = world.ask(&["image", "show", "app"]);
    assert_eq!(shown["config"]["labels"]["made.by"], "tests of base", "{shown}");
    assert_eq!(shown["config"]["exposed_ports"], json!(["80/tcp"]));
    world.vm(&["image", "history", "app"]).run().exits(0).tells("COPY run.sh");

    // The same once more is the same, and needs no VM.
    let vms = made(&world);
    build(&["--target", "base", "-t", "again"]).exits(0).says("again:latest\n").complains("done before");
    assert_eq!(made(&world), vms);
    assert_eq!(world.ask(&["image", "show", "again"])["digest"], shown["digest"]);

    // Others read it as we do, from an archive whose layers are not compressed: not all know Zstandard.
    let (file, bundle) = (world.directory().join("app"), world.directory().join("bundle"));
    world.vm(&["image", "export", "app", path(&file), "--format", "docker-archive"]).run().exits(0);
    let image = format!("{}:app", world.directory().join("copy").display());
    let (from, to) = (format!("docker-archive:{}", path(&file)), format!("oci:{image}"));
    world.tool("skopeo", &["copy", "--insecure-policy", &from, &to]).run().exits(0);
    world.tool("umoci", &["unpack", "--image", &image, path(&bundle)]).run().exits(0);
    let look = "cd \"$0\" && ls && stat -c '%a %u %g %h' first texts/a.txt && stat -c %Y said && readlink link && test ! -e deep";
    world
        .tool("sh", &["-c", look, path(&bundle.join("rootfs/srv/app"))])
        .run()
        .exits(0)
        .says("first\nlink\nsaid\nsecond\ntexts\n4751 0 0 2\n640 12 34 1\n981173106\nsaid\n");

    // A file that has changed is copied anew, and what was before that is kept. The last stage takes from the first.
    fs::write(directory.join("src/b.txt"), "new\n").expect("a file can be written");
    build(&["-t", "small"]).exits(0).says("small:latest\n").complains("done before");
    world.vm(&["run", "--rm", "--image", "small", "--memory", "256M"]).run().exits(0).says("new\na\n");

    for image in ["app", "again", "small"] {
        world.vm(&["image", "delete", image]).run().exits(0);
    }
    world.vm(&["image", "prune"]).run().exits(0).tells("freed");
    let left = fs::read_dir(world.dirs().state.join("content/blobs/sha256")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "layers of steps are gone");
    world.leaves_nothing();
}

/// Builds a Dockerfile of [`fixtures::BUSYBOX`], for which `BASE` stands in the text.
#[track_caller]
fn build(world: &World, directory: &Path, text: &str, tag: &str) -> Output {
    let text = text.replace("BASE", fixtures::BUSYBOX);
    fs::write(directory.join("Dockerfile"), text).expect("a file can be written");
    let all = [&["image", "build", path(directory), "-t", tag][..], &SMALL].concat();
    world.vm(&all).within(BOOT * 2).run()
}

/// What is in an image's layers, the lowest first, as `tar` lists it.
#[track_caller]
fn layers(world: &World, image: &str) -> Vec<Vec<String>> {
    let (file, top) = (world.directory().join("exported"), world.directory().join("unpacked"));
    world.vm(&["image", "export", image, path(&file), "--format", "docker-archive"]).run().exits(0);
    fs::create_dir_all(&top).expect("a directory can be made");
    world.tool("tar", &["-C", path(&top), "-xf", path(&file)]).run().exits(0);
    let manifest = fs::read(top.join("manifest.json")).expect("there is a list");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("it is JSON");
    let names = manifest[0]["Layers"].as_array().expect("it lists layers");
    let list = |name: &serde_json::Value| {
        let layer = top.join(name.as_str().expect("a name"));
        let listed = world.tool("tar", &["--numeric-owner", "-tvf", path(&layer)]).run().exits(0).text();
        listed.lines().map(str::to_owned).collect()
    };
    names.iter().map(list).collect()
}

const LEAVES: &str = r#"
FROM BASE
RUN (while :; do echo noise; sleep 0.01; done) & \
    (trap '' TERM; while :; do date >> /x; done) > /dev/null 2>&1 & \
    sleep 1000 > /dev/null 2>&1 & \
    until test -s /x; do sleep 0.01; done
RUN ! grep -lx sleep /proc/[0-9]*/comm && wc -c < /x > /size && echo old > /old
RUN test "$(wc -c < /x)" = "$(cat /size)" && ln /old /new
RUN true
CMD ["stat", "-c", "%h %i", "/old", "/new"]
"#;

#[test]
fn what_a_command_leaves_running_ends_with_its_step() {
    let world = World::new();
    let directory = directory(&world, &[("a", "")]);
    let built = build(&world, &directory, LEAVES, "x").exits(0);
    let built = built.complains("processes that it left running: ").complains("sleep");
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert_eq!(said.matches("note: ended").count(), 1, "the others have left nothing: {said}");

    // The file is in the layer of the step that wrote it, and in no later one; a link to a file from below brings that along.
    let layers = layers(&world, "x");
    let names = |layer: &[String]| {
        let name = |line: &String| line.split_whitespace().skip(5).collect::<Vec<_>>().join(" ");
        layer.iter().map(name).collect::<Vec<_>>()
    };
    let made: Vec<_> = layers[layers.len() - 3..].iter().map(|layer| names(layer)).collect();
    assert_eq!(made, [vec!["x"], vec!["old", "size"], vec!["new", "old link to new"]]);
    let said = world.vm(&["run", "--rm", "--image", "x", "--memory", "256M"]).run().exits(0).text();
    let lines: Vec<_> = said.lines().collect();
    assert!(lines.len() == 2 && lines[0] == lines[1] && lines[0].starts_with("2 "), "{said}");
    world.vm(&["image", "delete", "x"]).run().exits(0);
    world.vm(&["image", "prune"]).run().exits(0);
    world.leaves_nothing();
}

const COPIES: &str = r#"
FROM BASE AS made
RUN mkdir -p /out/sub /out/bin && echo tool > /out/bin/tool && ln /out/bin/tool /out/bin/same && \
    ln -s bin/tool /out/link && chown -Rh 7:8 /out && chmod 2751 /out/sub && chmod 4711 /out/bin/tool && chmod 700 /out
FROM BASE
RUN mkdir -p /app/old/deep /app/other && chown -R 5:6 /app && chmod 1777 /app && chmod 700 /app/old /app/other
COPY --chown=3:4 tree /app
COPY --from=made /out /kept
COPY --from=made --chown=1:2 --chmod=0750 /out /given/deep
COPY --from=made --chmod=640 /out/bin/tool /given/one
RUN stat -c '%n %a %u:%g %h' /app /app/old /app/old/deep /app/old/file /app/other /app/new && \
    stat -c '%n %a %u:%g %h' /kept /kept/sub /kept/bin/tool /kept/bin/same /kept/link && \
    stat -c '%n %a %u:%g %h' /given /given/deep /given/deep/sub /given/deep/bin/tool /given/deep/link /given/one
"#;

/// As BuildKit does it; checked with its sources, for its reference says less.
const COPIED: &str = "\
/app 1777 5:6 5
/app/old 750 3:4 3
/app/old/deep 755 5:6 2
/app/old/file 640 3:4 1
/app/other 700 5:6 2
/app/new 711 3:4 2
/kept 755 0:0 4
/kept/sub 2751 7:8 2
/kept/bin/tool 4711 7:8 2
/kept/bin/same 4711 7:8 2
/kept/link 777 7:8 1
/given 755 1:2 3
/given/deep 755 1:2 4
/given/deep/sub 750 1:2 2
/given/deep/bin/tool 750 1:2 2
/given/deep/link 777 1:2 1
/given/one 640 7:8 1
";

#[test]
fn copies_have_owners_and_modes_as_elsewhere() {
    let world = World::new();
    let directory = directory(&world, &[("tree/old/file", "file\n"), ("tree/new/x", "")]);
    for (name, mode) in [("tree", 0o700), ("tree/old", 0o750), ("tree/old/file", 0o640), ("tree/new", 0o711)]
    {
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(directory.join(name), mode).expect("a mode can be changed");
    }
    build(&world, &directory, COPIES, "x").exits(0).complains(COPIED);
    world.vm(&["image", "delete", "x"]).run().exits(0);
    world.vm(&["image", "prune"]).run().exits(0);
    world.leaves_nothing();
}

const WRITTEN: &str = r#"
FROM BASE
ARG NAME=you
COPY <<EOF /etc/greeting
"hello" $NAME, don't say \$NAME
EOF
COPY --chmod=750 --chown=1:2 run.txt <<'a' <<-b.txt /files/
$NAME
a
	# not indented
	b.txt
COPY --from=tools /tool /opt/
RUN <<EOF
cat /etc/greeting
cd /files && cat a b.txt && stat -c '%n %a %u:%g %s' *
EOF
USER 1000:1000
RUN cat - <<'one' <<two && id -u
$one
one
two is $NAME
two
RUN <<-EOF
	#!/bin/cat
	what runs this shows it
	EOF
CMD ["/opt/tool"]
"#;

#[test]
fn files_and_programs_are_written_in_the_dockerfile_and_copied_from_images() {
    let world = World::new();
    let directory =
        directory(&world, &[("run.txt", "1234"), ("tool", "#!/bin/sh\necho a tool of another image\n")]);
    build(&world, &directory, "FROM scratch\nCOPY --chmod=755 tool /tool\n", "tools").exits(0);
    build(&world, &directory, WRITTEN, "x")
        .exits(0)
        .complains("\"hello\" you, don't say $NAME\n$NAME\n# not indented\n")
        .complains("a 750 1:2 6\nb.txt 750 1:2 15\nrun.txt 750 1:2 4\n")
        .complains("two is you\n1000\n")
        .complains("#!/bin/cat\nwhat runs this shows it\n")
        .complains("RUN <<EOF (cat /etc/greeting…)");
    world
        .vm(&["run", "--rm", "--image", "x", "--memory", "256M"])
        .run()
        .exits(0)
        .says("a tool of another image\n");
    let digest = |name: &str| world.ask(&["image", "show", name])["digest"].clone();
    let layers = layers(&world, "x");
    assert!(layers.iter().flatten().all(|name| !name.contains("vm-build")), "{layers:?}");

    // A change of what is written here is one of its step, and of those behind it; else nothing is done twice.
    let vms = made(&world);
    build(&world, &directory, WRITTEN, "again").exits(0);
    assert_eq!((made(&world), digest("again")), (vms, digest("x")));
    let changed = WRITTEN.replace("say \\$NAME", "ask");
    build(&world, &directory, &changed, "changed").exits(0).complains("\"hello\" you, don't ask\n");
    for image in ["x", "again", "changed", "tools"] {
        world.vm(&["image", "delete", image]).run().exits(0);
    }
    world.vm(&["image", "prune"]).run().exits(0);
    world.leaves_nothing();
}

#[test]
fn a_build_that_fails_says_where_and_leaves_nothing() {
    let world = World::new();
    let directory = directory(&world, &[("a", "")]);
    let file = directory.join("Dockerfile");
    let build = |text: &str| {
        let text = text.replace("BASE", fixtures::BUSYBOX);
        fs::write(&file, text).expect("a file can be written");
        world.vm(&[&["image", "build", path(&directory), "-t", "x"][..], &SMALL].concat()).within(BOOT)
    };
    let outside = directory.join("none");
    world.vm(&["image", "build", path(&outside)]).within(SHORT).run().exits(3).complains("none");
    world.vm(&["image", "build", path(&directory)]).within(SHORT).run().exits(3).complains("Dockerfile");
    for (text, code, complaint) in [
        ("FROM BASE\n\nHEALTHCHECK NONE\n", 2, "line 3: HEALTHCHECK"),
        ("RUN x\n", 2, "line 1"),
        ("FROM scratch\nCOPY ../a /\n", 2, "outside"),
        ("FROM scratch\nCOPY b /\n", 3, "no b"),
        ("FROM scratch\nENV A=${B\n", 2, "line 2"),
        // Before anything is run.
        ("FROM BASE AS a\nRUN false\nFROM scratch\nCOPY --from=2 /x /\n", 2, "no stage 2"),
        ("FROM BASE\nRUN false\nCOPY --from=c /x /\nFROM scratch AS c\n", 2, "no stage c"),
        (
            "FROM BASE\nRUN false\nFROM scratch\nCOPY --from=localhost:1/c /x /\n",
            3,
            "COPY --from=localhost:1/c",
        ),
        ("FROM BASE\nRUN <<EOF\nfalse\n", 2, "no line EOF"),
        ("FROM BASE\nRUN false\nCOPY --chmod=+x a /\n", 2, "--chmod=+x"),
        ("FROM scratch\nEXPOSE http\n", 2, "80, 53/udp"),
    ] {
        build(text).run().exits(code).complains(complaint).complains("hint");
    }
    build("FROM BASE\nRUN echo before\nRUN echo sorry; exit 7\n")
        .run()
        .exits(1)
        .complains("line 3: RUN echo sorry; exit 7 failed with exit code 7")
        .complains("sorry");
    assert!(world.names().is_empty());

    // What was done before is kept; Ctrl-C ends the rest with its VM.
    let mut building = build("FROM BASE\nRUN echo before\nRUN echo waiting; sleep 1000\n").start();
    vm_tests::wait_until("the command runs", BOOT, || {
        let said = building.stderr_so_far();
        assert!(building.runs(), "{said}");
        said.contains("\nwaiting\n")
    });
    assert!(building.stderr_so_far().contains("done before"));
    building.signal(Signal::SIGINT);
    building.finish(BOOT).exits(130);
    assert!(world.names().is_empty());
    let listed = world.ask(&["image", "ls"]);
    let nameless = |image: &serde_json::Value| image["references"] == json!([]);
    assert!(!listed.as_array().expect("a list").iter().any(nameless), "{listed}");
    world.vm(&["image", "prune"]).run().exits(0);
    world.leaves_nothing();
}
