//! Compiles one component: stdin to stdout. The daemon, which has no compiler in it, runs this where a plugin is installed.

fn main() -> std::process::ExitCode {
    vm_plugin::compile_main()
}
