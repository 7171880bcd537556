//! Looks around with Rust's standard library, for wasm32-wasip2: what is there of a system?

use std::{
    env, fs,
    hash::{BuildHasher, RandomState},
    io::{self, Read},
    net::{TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use vm_plugin_sdk::{Context, Facts, Preflight, Report, Result, Vm, capability};

#[derive(Deserialize)]
struct Ambient {
    exits: bool,
    floods: bool,
}

impl Preflight for Ambient {
    fn run(&self, _: &Context, vm: &Vm, _: &Facts, report: &Report) -> Result {
        println!("looks around for {}", vm.name());
        eprint!("without an end of line");
        if self.exits {
            std::process::exit(3);
        }
        while self.floods {
            println!("{}", "x".repeat(1 << 16));
        }
        report.ok("environment", &format!("{:?}", env::vars().collect::<Vec<_>>()));
        report.ok("arguments", &format!("{:?}", env::args().collect::<Vec<_>>()));
        report.ok("input", &format!("{:?}", io::stdin().read(&mut [0; 8]).map_err(|error| error.kind())));
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        report.ok("time", &since.as_millis().to_string());
        let begin = Instant::now();
        thread::sleep(Duration::from_secs(3600));
        report.ok("slept", &begin.elapsed().as_secs().to_string());
        report.ok("chance", &RandomState::new().hash_one("x").to_string());
        for path in ["/etc/passwd", "plugin.toml", "."] {
            report.ok("files", &fs::read(path).map_or_else(|error| format!("no: {error}"), |_| path.to_owned()));
            report.ok("files", &fs::write(path, "").map_or_else(|error| format!("no: {error}"), |()| path.to_owned()));
        }
        let connected = TcpStream::connect("192.0.2.1:80");
        report.ok("network", &connected.map_or_else(|error| format!("no: {error}"), |_| "yes".to_owned()));
        let found = "localhost:80".to_socket_addrs();
        report.ok("network", &found.map_or_else(|error| format!("no: {error}"), |_| "yes".to_owned()));
        Ok(())
    }
}

capability!(Ambient: Preflight);
