//! Compiles one component, for tests and measurements; the daemon has a mode that does the same.

fn main() -> std::process::ExitCode {
    vm_plugin::compile_main()
}
