//! What should be: VMs, images and kernels in SQLite.
