# What can be done here. Every target installs what it needs (see .ci/setup), which takes no time where it is there.
#
#   make demo       build, then run a command in a VM
#   make test       format, lints, unit tests, end-to-end tests on real VMs; what .ci/run runs
#   make test-full  the same, with the longer tests
#   make test-nested  only what needs a whole host, which a VM is made for; VM_FIRECRACKER=file for that part, too
#   make e2e        only the end-to-end tests; T=name for some of them
#   make bench      what `vm run` costs above the bare VMM, and the daemon with 1,000 VMs
#   make fuzz       archives of layers that no tool would write, for FUZZ_SECONDS (600)
#   make lint       format and lints
#   make build      release binaries in target/dist/bin (what a bare make does)
#   make install    puts them into PREFIX (/usr/local); make uninstall removes them

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

# Administration tools are not on every user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
MUSL := $(shell uname -m)-unknown-linux-musl
GUEST := $(TARGET)/$(MUSL)/agent
DIST := $(TARGET)/dist/bin
# Demo and tests share one build: cargo's dev profile, with the dependencies optimised. The guest agent is always the
# small, optimised one, for its size is boot time.
DEV := $(TARGET)/dist/dev
BENCH := $(TARGET)/dist/bench
PREFIX ?= /usr/local
# Test binaries that are run in the nested host too; see tests/nested.
SUITES := $(TARGET)/suites

SUDO := $(if $(filter-out 0,$(shell id -u)),sudo --preserve-env,)
# VMs need root; cargo runs every test binary through this.
as_root := $(if $(SUDO),CARGO_TARGET_$(shell uname -m | tr a-z A-Z)_UNKNOWN_LINUX_GNU_RUNNER="$(SUDO)",)
# Signals as in a terminal: a background job of a shell ignores SIGINT, which all it starts would inherit.
test_env = VM_TEST_BIN="$(1)" VM_TEST_PROG="$(GUEST)/vm-test-prog" VM_TEST_PLUGINS="$(TARGET)/plugins/fixtures" VM_TEST_SUITES="$(SUITES)" $(as_root) env --default-signal
# $(call put,FILE,DIRECTORY): copies what has changed; a file that is in use is replaced, not written to.
put = cmp -s "$(1)" "$(2)/$(notdir $(1))" || install -D -m 755 -t "$(2)" "$(1)"

# The fake VMM and the failpoints are for tests; release builds do not have them.
workspace := --locked --workspace --features vmd/fake,vmd/failpoints,vm-vmm/fake

.PHONY: setup demo test test-plugins test-full test-nested suites e2e fuzz bench bench-disks bench-nested lint build install uninstall agent dev
# $(call plugins,DIRECTORY): the plugins that come with the daemon, which looks for them beside itself.
plugins = PLUGINS_TARGET="$(TARGET)/plugins" plugins/build "$(1)/plugins"

setup:
	@.ci/setup

agent: setup
	@cargo build --locked --profile agent --target $(MUSL) -p vm-agent -p vm-test-prog

dev: agent
	@cargo build $(workspace) --bins
	@for file in vm vmd vm-plugin-compile vm-fake-vmm; do $(call put,$(TARGET)/debug/$$file,$(DEV)); done
	@$(call put,$(GUEST)/vm-agent,$(DEV))
	@$(call plugins,$(DEV))
	@PLUGINS_TARGET="$(TARGET)/plugins" plugins/build "$(TARGET)/plugins/fixtures" --fixtures

build: agent
	@cargo build --locked --release -p vm-cli -p vmd
# In a call of its own: in one, cargo would give the daemon the compiler too.
	@cargo build --locked --release -p vm-plugin --bin vm-plugin-compile
	@for file in vm vmd vm-plugin-compile; do $(call put,$(TARGET)/release/$$file,$(DIST)); done
	@$(call put,$(GUEST)/vm-agent,$(DIST))
	@$(call plugins,$(DIST))

# What `make` has built, in one directory: the programs and plugins find each other by being side by side. Run by root, it builds nothing.
install:
	@[[ -x "$(DIST)/vmd" && -d "$(DIST)/plugins" ]] || { echo "install: there is no build in $(DIST); run make first" >&2; exit 1; }
# Others have to get in, whatever the umask.
	@install -d -m 755 "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib/vmd"
	@install -m 755 -t "$(DESTDIR)$(PREFIX)/lib/vmd" $(addprefix $(DIST)/,vm vmd vm-agent vm-plugin-compile)
	@rm -rf "$(DESTDIR)$(PREFIX)/lib/vmd/plugins"
	@cp -r --no-preserve=ownership "$(DIST)/plugins" "$(DESTDIR)$(PREFIX)/lib/vmd/plugins"
	@chmod -R u=rwX,go=rX "$(DESTDIR)$(PREFIX)/lib/vmd"
	@ln -sf ../lib/vmd/vm ../lib/vmd/vmd "$(DESTDIR)$(PREFIX)/bin"

uninstall:
	@rm -rf "$(DESTDIR)$(PREFIX)/lib/vmd"
	@rm -f "$(DESTDIR)$(PREFIX)/bin/vm" "$(DESTDIR)$(PREFIX)/bin/vmd"

demo: dev
	@tests/demo.sh "$(DEV)"

lint: setup
	@cargo fmt --all --check
	@cargo clippy $(workspace) --all-targets -- -D warnings
	@for other in sdk plugins tests/importer; do (cd $$other && cargo fmt --all --check); done

# All of it in one call: cargo then compiles each dependency once, with the features that all crates together want.
test: lint dev test-plugins suites
	@$(call test_env,$(DEV)) cargo test $(workspace) --no-fail-fast

# What plugins decide, natively; that they load and plan what they should is tested in the real host, by plugins/tests.
test-plugins: setup
	@for other in sdk plugins tests/importer; do (cd $$other && cargo test --locked); done

test-full: lint dev test-plugins suites
	@$(call test_env,$(DEV)) cargo test $(workspace) --no-fail-fast -- --include-ignored

# Built as all tests are; cargo says where it has put them.
suites: setup
	@cargo test $(workspace) --no-run --message-format=json-render-diagnostics | tests/nested/collect "$(SUITES)" 'vm-disk.*' 'vm-vmm.*' vm-tests.e2e

test-nested: dev suites
	@$(call test_env,$(DEV)) cargo test $(workspace) --test nested -- --include-ignored $(T)

e2e: dev
	@$(call test_env,$(DEV)) cargo test $(workspace) --test e2e -- $(T)

# What breaks it is kept, and belongs into core/image/tests/corpus.
fuzz: setup
	@mkdir -p "$(TARGET)/fuzz"
	@VM_FUZZ_SECONDS="$(or $(FUZZ_SECONDS),600)" VM_FUZZ_OUT="$(TARGET)/fuzz" $(as_root) cargo test --locked --release -p vm-image --test image -- --ignored --nocapture fuzz_for_a_while

# What a disk costs by each backend, on filesystems of its own.
bench-disks: setup
	@$(as_root) cargo test --locked -p vm-disk --test contract -- costs --include-ignored --nocapture --test-threads=1

# The same in the nested host, which has device-mapper but is emulated.
bench-nested: dev suites
	@$(call test_env,$(DEV)) cargo test $(workspace) --test nested -- --include-ignored --nocapture costs

# The daemon with fakes is optimised as a release is, and kept apart from it. VM_BENCH_ONLY=scale|plugins need no
# real VM.
bench: build bench-disks bench-nested
	@cargo build --locked --release -p vmd -p vm-vmm -p vm-tests --features vmd/fake,vm-vmm/fake --bins
	@for file in vm vmd vm-plugin-compile vm-fake-vmm; do $(call put,$(TARGET)/release/$$file,$(BENCH)); done
	@cargo test --locked --release -p vm-plugin --test host -- --ignored --nocapture measure
	@$(as_root) cargo test --locked --release -p vm-image --test image -- --ignored --nocapture measure
	@$(call test_env,$(DIST)) VM_BENCH_FAKE_BIN="$(BENCH)" $(SUDO) "$(TARGET)/release/vm-bench" "$(TARGET)/bench.json"
