//! Root filesystems and kernels: acquiring, checking, packing.
