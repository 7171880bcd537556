//! Per-VM parent process: console, exit status, guest channel.
