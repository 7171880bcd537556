//! What the product promises, shown on real VMs by the real programs. One module per topic; each test has a world of its own
//! (see [`vm_tests`]) and ends by checking that nothing is left of it.

mod bad_input;
mod bundles;
mod cp;
mod daemon;
mod ends;
mod fakes;
mod images;
mod images_build;
mod jail;
mod lifecycle;
mod limits;
mod network;
mod oci;
mod overlap;
mod plugins;
mod registry;
mod run;
mod session;
mod workspaces;
mod workspaces_broken;
mod workspaces_importers;
mod workspaces_package;
mod workspaces_run;
