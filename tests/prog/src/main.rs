//! The one program of a test image that has nothing else: no shell, no libraries, no users.

use std::{env, fs, io, process::ExitCode};

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("cat") => io::copy(&mut io::stdin(), &mut io::stdout()).map(|_| 0),
        Some("uname") => fs::read_to_string("/proc/sys/kernel/osrelease").map(|release| {
            print!("{release}");
            0
        }),
        Some("write") => {
            let (path, text) = (args.next().unwrap_or_default(), args.next().unwrap_or_default());
            fs::write(path, text).map(|()| 0)
        }
        Some("exit") => Ok(args.next().and_then(|code| code.parse().ok()).unwrap_or(0)),
        _ => {
            eprintln!("usage: prog cat | uname | write FILE TEXT | exit CODE");
            Ok(2)
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("prog: {error}");
            ExitCode::FAILURE
        }
    }
}
