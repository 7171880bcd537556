//! Workspaces: what is asked before a VM is made for one.

use serde_json::{Value, json};
use vm_api::{ErrorKind, Problem};

use crate::{
    host::{Host, stderr},
    stub::{Answers, End, Stub},
};

/// The order of what was asked, without what follows an operation.
fn methods(stub: &Stub) -> Vec<String> {
    let names = stub.asked().into_iter().filter_map(|asked| Some(asked[0].as_str()?.to_owned()));
    names.filter(|name| !name.starts_with("operation.") && name != "closed").collect()
}

fn refused(message: &str, hint: &str) -> End {
    End::Problem(Problem::new(ErrorKind::InvalidArgument, message).hint(hint))
}

#[test]
fn what_keeps_a_workspace_out_is_told_before_there_is_a_vm() {
    let host = Host::new();
    let mut answers = Answers::default();
    let wrong = "/src/vm.toml, line 2: unknown field `command`";
    answers.ends.insert(("workspace.check", "*"), refused(wrong, "it may have one table"));
    let stub = Stub::new(&host, answers);
    std::fs::create_dir(host.path("src")).unwrap();
    let line = format!(
        "run {} --importer rsync --to /srv/x --user dev --export branch=work -- make",
        host.path("src").display()
    );
    let said = stderr(&host.run(&line), 125);
    assert!(said.contains(wrong) && said.contains("it may have one table"), "{said}");
    assert_eq!(methods(&stub), ["workspace.check"]);
    let asked = stub.asked_for("workspace.check")[0][1].clone();
    assert_eq!(asked[0]["path"], json!(host.path("src")));
    assert_eq!((&asked[0]["importer"], &asked[0]["to"]), (&json!("rsync"), &json!("/srv/x")));
    assert_eq!((&asked[0]["user"], &asked[0]["vm"]), (&json!("dev"), &Value::Null));
    assert_eq!(asked[1], json!({"how": "branch", "name": "work", "message": null}));
}

#[test]
fn a_workspace_that_fits_gets_its_vm_and_warnings_are_shown() {
    let host = Host::new();
    let mut answers = Answers::default();
    let plan = json!({
        "facts": facts(), "to": "/work/src", "user": null, "offers": [], "chosen": "copy/files", "why": "it fits best",
        "settings": null, "warnings": ["the branch work has commits"],
    });
    answers.ends.insert(("workspace.check", "*"), End::Result(plan));
    answers.ends.insert(("vm.create", "*"), refused("no image", "pull one"));
    let stub = Stub::new(&host, answers);
    std::fs::create_dir(host.path("src")).unwrap();
    let line = format!("run {} --export branch=work -- make", host.path("src").display());
    let said = stderr(&host.run(&line), 125);
    assert!(said.contains("warning: the branch work has commits") && said.contains("no image"), "{said}");
    assert_eq!(methods(&stub), ["workspace.check", "vm.create"]);
}

fn facts() -> Value {
    serde_json::to_value(vm_api::WorkspaceFacts::default()).unwrap()
}

#[test]
fn a_patch_that_could_not_be_written_is_told_before_anything_is_asked() {
    let host = Host::new();
    let stub = Stub::new(&host, Answers::default());
    std::fs::create_dir(host.path("src")).unwrap();
    let file = host.path("none/x.patch");
    let line = format!("run {} --export patch={} -- make", host.path("src").display(), file.display());
    let said = stderr(&host.run(&line), 125);
    assert!(said.contains(file.to_str().unwrap()) && said.contains("No such file"), "{said}");
    assert_eq!(methods(&stub), Vec::<String>::new());
}
