//! What the driver says to Firecracker, against Firecracker's own description of its API.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, sync::Arc, time::Duration};

use jsonschema::Validator;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
    sync::mpsc,
};
use vm_host::HostRunner;
use vm_types::{
    VmPaths,
    machine::{Drive, MachineSpec, Nic},
    shim::{ApiRequest, ShimSpec},
    vm::DiskLimits,
};
use vm_vmm::{FirecrackerDriver, Vmm, contract::tiny};

/// The description, in which an object has no fields but those it names: Firecracker refuses all others.
struct Api(Value);

impl Api {
    fn read() -> Self {
        let text = include_str!("data/firecracker-api.yaml");
        let mut api: Value = serde_yaml_ng::from_str(text).unwrap();
        for definition in api["definitions"].as_object_mut().unwrap().values_mut() {
            let definition = definition.as_object_mut().unwrap();
            if definition.contains_key("properties") && !definition.contains_key("additionalProperties") {
                definition.insert("additionalProperties".to_owned(), json!(false));
            }
        }
        Self(api)
    }

    /// The schema of what may be sent there.
    fn body_of(&self, method: &str, path: &str) -> Validator {
        let paths = self.0["paths"].as_object().unwrap();
        let described = paths.iter().find(|(template, _)| fits(template, path));
        let (_, described) = described.unwrap_or_else(|| panic!("there is no {path}"));
        let parameters = described[method.to_lowercase()]["parameters"].as_array();
        let parameters = parameters.unwrap_or_else(|| panic!("{path} takes no {method}"));
        let body = parameters.iter().find(|parameter| parameter["in"] == "body").unwrap();
        let schema = json!({"allOf": [body["schema"]], "definitions": self.0["definitions"]});
        // Swagger 2 is made of this draft.
        jsonschema::draft4::new(&schema).unwrap()
    }

    fn check(&self, request: &ApiRequest) {
        let schema = self.body_of(&request.method, &request.path);
        let faults: Vec<_> = schema.iter_errors(&request.body).map(|fault| fault.to_string()).collect();
        assert!(faults.is_empty(), "{} {} {}: {faults:?}", request.method, request.path, request.body);
    }
}

/// Whether a path is one of `/drives/{drive_id}`'s form.
fn fits(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template.iter().zip(path).all(|(part, given)| part.starts_with('{') || *part == given)
}

fn driver() -> FirecrackerDriver {
    let fake = Some(env!("CARGO_BIN_EXE_vm-fake-vmm").into());
    FirecrackerDriver::new(Arc::new(HostRunner), fake).whatever_the_cpu()
}

struct Place {
    dir: tempfile::TempDir,
    paths: VmPaths,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths { run: dir.path().into(), state: dir.path().into() };
        std::fs::write(dir.path().join("kernel"), tiny::kernel_64()).unwrap();
        Self { dir, paths }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn the_description_tells_right_from_wrong() {
    let api = Api::read();
    let drive = api.body_of("PUT", "/drives/root");
    assert!(drive.is_valid(&json!({"drive_id": "root", "is_root_device": false})));
    assert!(!drive.is_valid(&json!({"is_root_device": false})), "it has to have an id");
    assert!(!drive.is_valid(&json!({"drive_id": 1, "is_root_device": false})), "which is a text");
    assert!(!drive.is_valid(&json!({"drive_id": "root", "is_root_device": false, "readonly": true})));
    assert!(!api.body_of("PATCH", "/vm").is_valid(&json!({"state": "Halted"})));
}

#[tokio::test]
async fn a_machine_is_told_as_the_api_wants_it() {
    let place = Place::new();
    let limits = DiskLimits { bytes_per_second: Some(1 << 20), operations_per_second: Some(100) };
    let drive =
        |serial: &str, read_only| Drive { serial: serial.to_owned(), path: "/d".into(), read_only, limits };
    let machine = MachineSpec {
        vm: "0123456789ab".parse().unwrap(),
        cpus: 2,
        memory_mib: 512,
        kernel: place.file("kernel"),
        initramfs: "/initramfs".into(),
        kernel_args: Vec::new(),
        drives: vec![drive("root", false), drive("p.my-data", true)],
        nics: vec![Nic { tap: "vt0".to_owned(), mac: "02:00:00:00:00:01".to_owned() }],
        vsock_cid: None,
    };
    let plan = driver().plan(&machine, &place.paths).await.unwrap();
    let (api, setup) = (Api::read(), plan.setup.unwrap());
    for request in &setup.requests {
        api.check(request);
    }
    let paths: Vec<_> = setup.requests.iter().map(|request| request.path.as_str()).collect();
    for part in
        ["/metrics", "/machine-config", "/boot-source", "/drives/root", "/vsock", "/entropy", "/actions"]
    {
        assert!(paths.contains(&part), "{part} is missing: {paths:?}");
    }
}

/// Takes every request, and lies about its drive.
async fn take_all(socket: &Path) -> mpsc::UnboundedReceiver<ApiRequest> {
    let listener = UnixListener::bind(socket).unwrap();
    let config =
        json!({"state": "Running", "drives": [{"drive_id": "root", "path_on_host": socket.with_file_name("../kernel")}]})
            .to_string();
    let (told, heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            let (mut head, mut line, mut length) = (String::new(), String::new(), 0);
            while stream.read_line(&mut line).await.unwrap() > 2 {
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                head.push_str(&line);
                line.clear();
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.unwrap();
            let mut words = head.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            let answer = match method.as_str() {
                "GET" => format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{config}", config.len()),
                _ => {
                    let body = serde_json::from_slice(&body).unwrap();
                    told.send(ApiRequest { method, path, body }).unwrap();
                    "HTTP/1.1 204 \r\n\r\n".to_owned()
                }
            };
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    heard
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn a_vmm_that_runs_is_asked_as_the_api_wants_it() {
    let place = Place::new();
    let disk = place.file("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    std::fs::create_dir(place.paths.vmm_dir()).unwrap();
    let mut heard = take_all(&place.paths.api_sock()).await;
    let machine: MachineSpec = serde_json::from_value(json!({
        "vm": "0123456789ab", "cpus": 1, "memory_mib": 64, "kernel": place.file("kernel"), "initramfs": "/i",
        "kernel_args": [], "nics": [], "drives": [{"serial": "root", "path": disk, "read_only": false}],
    }))
    .unwrap();
    let spec = ShimSpec {
        vm: machine.vm.clone(),
        run_dir: place.paths.run.clone(),
        state_dir: place.paths.state.clone(),
        launch: driver().plan(&machine, &place.paths).await.unwrap(),
        vmm: None,
        machine: Some(machine),
        console_log_bytes: 1 << 20,
        socket_group: None,
    };
    std::fs::write(place.paths.shim_spec(), serde_json::to_vec(&spec).unwrap()).unwrap();
    let kernel = std::fs::metadata(place.file("kernel")).unwrap().len();
    let (driver, paths) = (driver(), &place.paths);
    driver.wait_up(paths, Duration::from_secs(60)).await.unwrap();
    let pause = driver.require_pause().unwrap();
    pause.pause(paths).await.unwrap();
    pause.resume(paths).await.unwrap();
    assert!(!pause.is_paused(paths).await.unwrap());
    driver.require_power_button().unwrap().press(paths).await.unwrap();
    driver.require_resize().unwrap().grow_disk(paths, "root", 1024).await.unwrap();
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1024);
    assert_eq!(std::fs::metadata(place.file("kernel")).unwrap().len(), kernel, "whatever it says");
    let api = Api::read();
    let mut asked = Vec::new();
    while let Ok(request) = heard.try_recv() {
        api.check(&request);
        asked.push(format!("{} {}", request.method, request.path));
    }
    assert_eq!(asked, ["PATCH /vm", "PATCH /vm", "PUT /actions", "PATCH /drives/root"]);
}
