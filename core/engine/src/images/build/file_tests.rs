use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> Vec<(usize, Instruction)> {
    let file = File::parse(text).unwrap_or_else(|error| panic!("{error} in {text:?}"));
    file.steps.into_iter().map(|step| (step.line, step.instruction)).collect()
}

/// The only instruction behind a `FROM`.
fn one(text: &str) -> Instruction {
    parsed(&format!("FROM a\n{text}\n")).pop().unwrap().1
}

fn error(text: &str) -> FileError {
    File::parse(text).unwrap_err()
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn shell(text: &str) -> Command {
    Command::Shell(text.to_owned())
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[test]
fn a_whole_file_is_read_with_its_lines() {
    let text = "# a comment\n\nARG base=debian\nFROM ${base}:12 AS Build\n  run echo a && \\\n    # in between\n\n    echo b\\\n\
                c\nCMD [\"/run\", \"-v\"]\n";
    assert_eq!(
        parsed(text),
        [
            (3, Instruction::Arg(vec![("base".into(), Some("debian".into()))])),
            (4, Instruction::From { image: "${base}:12".into(), stage: Some("build".into()) }),
            (5, Instruction::Run(shell("echo a &&     echo bc"))),
            (10, Instruction::Cmd(Command::Exec(owned(&["/run", "-v"])))),
        ]
    );
    // As editors on other systems save it.
    assert_eq!(parsed("\u{feff}FROM a\r\nRUN b \\\r\n c\r\n")[1], (2, Instruction::Run(shell("b  c"))));
}

#[test]
fn the_escape_can_be_another() {
    let file = File::parse("# syntax=docker/dockerfile:1\n# escape=`\nFROM a\nRUN b `\nc\\\n").unwrap();
    assert_eq!((file.escape, &file.steps[1].instruction), ('`', &Instruction::Run(shell("b c\\"))));
    // Too late to mean anything.
    assert_eq!(File::parse("# note\n# escape=`\nFROM a\n").unwrap().escape, '\\');
    assert_eq!(error("#escape=x\nFROM a\n").line, 1);
}

#[test]
fn commands_are_for_a_shell_or_not() {
    assert_eq!(one("RUN [ -f x ] && y"), Instruction::Run(shell("[ -f x ] && y")));
    assert_eq!(one("RUN [\"a\", \"b c\"]"), Instruction::Run(Command::Exec(owned(&["a", "b c"]))));
    assert_eq!(one("ENTRYPOINT a  b"), Instruction::Entrypoint(shell("a  b")));
    assert_eq!(one("CMD []"), Instruction::Cmd(Command::Exec(Vec::new())));
    assert_eq!(one("SHELL [\"/bin/ash\", \"-ec\"]"), Instruction::Shell(owned(&["/bin/ash", "-ec"])));
}

#[test]
fn variables_and_labels_have_two_forms() {
    let two = vec![pair("A", "b"), pair("C", "\"d e\"")];
    assert_eq!(one("ENV A=b C=\"d e\""), Instruction::Env(two));
    assert_eq!(one("ENV A b  c"), Instruction::Env(vec![pair("A", "b  c")]));
    assert_eq!(one("LABEL a.b=c"), Instruction::Label(vec![pair("a.b", "c")]));
    let arguments = vec![("X".to_owned(), None), ("Y".to_owned(), Some("\"1 2\"".to_owned()))];
    assert_eq!(one("ARG X Y=\"1 2\""), Instruction::Arg(arguments));
}

#[test]
fn copies_have_sources_a_target_and_flags() {
    let wanted = Copy {
        from: Some("build".into()),
        chown: Some("a:b".into()),
        chmod: Some("0755".into()),
        sources: owned(&["x", "y*"]),
        to: "/z/".into(),
        ..Copy::default()
    };
    assert_eq!(one("COPY --from=build --chown=a:b --chmod=0755 --link x y* /z/"), Instruction::Copy(wanted));
    let wanted = Copy { sources: owned(&["a b"]), to: "c d".into(), ..Copy::default() };
    assert_eq!(one("COPY [\"a b\", \"c d\"]"), Instruction::Copy(wanted.clone()));
    assert_eq!(one("ADD [\"a b\", \"c d\"]"), Instruction::Copy(wanted));
}

#[test]
fn the_rest_is_read_too() {
    assert_eq!(one("EXPOSE 80 53/udp"), Instruction::Expose(owned(&["80", "53/udp"])));
    assert_eq!(one("VOLUME [\"/a\"]"), Instruction::Volume(owned(&["/a"])));
    assert_eq!(one("VOLUME /a /b"), Instruction::Volume(owned(&["/a", "/b"])));
    assert_eq!(one("STOPSIGNAL INT"), Instruction::StopSignal("INT".into()));
    assert_eq!(one("USER a:b"), Instruction::User("a:b".into()));
    assert_eq!(parse_one("WORKDIR /x y").unwrap(), Instruction::Workdir("/x y".into()));
}

#[test]
fn what_is_not_done_here_is_refused_by_its_line_with_a_hint() {
    for (line, text) in [
        (1, "RUN a"),
        (1, ""),
        (2, "# only\n# comments"),
        (2, "FROM a\nFORM b"),
        (3, "FROM a\n\nHEALTHCHECK NONE"),
        (2, "FROM a\nONBUILD RUN x"),
        (2, "FROM a\nRUN --mount=type=cache x"),
        (2, "FROM a\nRUN <<EOF\nx\n EOF"),
        (2, "FROM a\nCOPY <<../a /x\n../a"),
        (4, "FROM a\nCOPY <<a /x\na\nCOPY --from=b <<A c\nA"),
        (2, "FROM a\nCOPY <<A\nA"),
        (2, "FROM a\nCOPY x"),
        (2, "FROM a\nCOPY --parents x y"),
        (2, "FROM a\nADD https://example.org/x y"),
        (2, "FROM a\nADD x.tar.gz /"),
        (2, "FROM a\nENV A"),
        (2, "FROM a\nENV A=b C"),
        (2, "FROM a\nRUN"),
        (2, "FROM a\nRUN []"),
        (2, "FROM a\nSHELL sh"),
        (2, "FROM a\nLABEL a=\"b"),
        (2, "FROM a\nARG 'x y'"),
        (1, "FROM --platform=linux/s390x a"),
        (1, "FROM a AS 1"),
        (1, "FROM a b"),
    ] {
        let error = error(text);
        assert_eq!(error.line, line, "{text:?}: {error}");
        assert!(!error.hint.is_empty(), "{text:?}");
    }
    assert!(error("FROM a\nFORM b").message.contains("FORM"));
}

#[test]
fn the_hosts_own_platform_may_be_named() {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let (own, variant) = (format!("linux/{arch}"), format!("linux/{arch}/v2"));
    for platform in ["$BUILDPLATFORM", "${TARGETPLATFORM}", &own, &variant] {
        let from = Instruction::From { image: "a".into(), stage: Some("x".into()) };
        assert_eq!(parsed(&format!("FROM --platform={platform} a AS x")), [(1, from)], "{platform}");
    }
}

#[test]
fn quoted_words_and_shifts_are_no_here_documents() {
    for text in ["echo '<<EOF' \"a <<EOF\"", "grep -c \" <<x\" f", "echo $((1 << 3)) <<<x"] {
        assert_eq!(one(&format!("RUN {text}")), Instruction::Run(shell(text)));
    }
}

#[test]
fn here_documents_are_programs_input_and_files() {
    let lines = "  echo $A # no comment\n\n\techo b \\\n#c\n";
    assert_eq!(one(&format!("RUN <<EOF\n{lines}EOF")), Instruction::Run(shell(lines)));
    let script = "#!/bin/cat\nx\n".to_owned();
    assert_eq!(one("run <<-'EOF'\n\t#!/bin/cat\n\tx\n\tEOF"), Instruction::Run(Command::Script(script)));
    let whole = "cat <<A - 3<<-\"B\" && \\\n x\na\nA\n\tb\n\tB\nUSER b";
    let steps = parsed(&format!("FROM a\nRUN {whole}"));
    assert_eq!(steps[1], (2, Instruction::Run(shell("cat <<A - 3<<-\"B\" &&  x\na\nA\n\tb\nB\n"))));
    assert_eq!(steps[2], (8, Instruction::User("b".into())));

    let Instruction::Copy(copy) = one("COPY --chmod=755 x <<a.txt <<'b' /y/\na $A\na.txt\nb\n") else {
        panic!()
    };
    assert_eq!((copy.sources, copy.to.as_str()), (owned(&["x"]), "/y/"));
    let documents: Vec<_> = copy
        .documents
        .iter()
        .map(|document| (document.name.as_str(), document.text(), document.expands))
        .collect();
    assert_eq!(documents, [("a.txt", "a $A\n".to_owned(), true), ("b", String::new(), false)]);

    // What is told of it says how it begins.
    let file = File::parse("FROM a\nRUN <<EOF\n  make it\nEOF").unwrap();
    assert_eq!(file.steps[1].text, "RUN <<EOF (make it…)");
}

proptest! {
    #[test]
    fn no_file_makes_it_panic_and_errors_name_a_line_of_it(text in "(FROM a\n)?([A-Z]{2,6}|RUN|COPY|ENV|#)[ -~\n\\\\]{0,80}") {
        match File::parse(&text) {
            Ok(file) => prop_assert!(file.steps.windows(2).all(|pair| pair[0].line < pair[1].line)),
            Err(error) => prop_assert!((1..=text.lines().count().max(1)).contains(&error.line)),
        }
    }

    #[test]
    fn lines_can_be_broken_anywhere(command in "[a-z ]{2,30}", at in 1usize..20) {
        let at = at.min(command.len() - 1);
        let (before, after) = command.split_at(at);
        let whole = one(&format!("RUN x{command}."));
        prop_assert_eq!(one(&format!("RUN x{before}\\  \n# between\n{after}.")), whole);
    }
}
