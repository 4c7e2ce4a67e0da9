# The two commands: `make demo` shows what fastice does, `make test` checks all of it.

PREFIX ?= /usr/local
# How long make soak runs; SOAK_SEED=N repeats a round of it instead.
SOAK_SECONDS ?= 1800
SOAK_SEED ?=
CARGO ?= cargo
# TUNED=1: what `make tuned` builds.
TUNED ?=
BUILT = $(if $(TUNED),tuned,build)
PROGRAM = $(if $(TUNED),target/tuned/fastice,target/release/fastice)

.PHONY: help build demo test soak hw-test bench tuned fio-engine instructions accept-instructions install clean

help:
	@echo 'make demo      pins a fragmented file, serves it, writes and verifies, cleans up (root; 2 minutes)'
	@echo 'make test      formatting, lints, all tests, a real Linux host in a guest (root; up to 40 minutes)'
	@echo 'make soak      hostile operations against served files, in random order (root; SOAK_SECONDS, 30 minutes)'
	@echo 'make hw-test   our own driver by VFIO: every combination, kills, the bare-metal suite in a guest (root; some 15 minutes)'
	@echo 'make bench     driver, target over TCP, pins at scale, driver and target beside the kernel'"'"'s in a guest: bench/report.json, bench/REPORT.md'
	@echo 'make fio-engine  target/release/libfastice_fio.so: fio drives a target by our own host (bench/README.md)'
	@echo 'make instructions         the hot path costs no more instructions than recorded: part of make test'
	@echo 'make accept-instructions  records what it costs now: bench/instructions.json'
	@echo 'make build     target/release/fastice'
	@echo 'make tuned     target/tuned/fastice: built by a profile of the target at work, 18 % fewer instructions a read (10 minutes)'
	@echo 'make install   TUNED=1 for that one; binary, manual pages, completions, systemd units, a sample configuration under PREFIX ($(PREFIX))'

build:
	$(CARGO) build --release --locked

demo:
	@.ci/packages demo
	$(CARGO) build --release --locked
	target/release/fastice demo

test:
	@.ci/packages test
	@CARGO='$(CARGO)' .ci/test

# A round that fails tells how to repeat it.
soak:
	@.ci/packages test
	FASTICE_REQUIRE_LOOP=1 SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEED=$(SOAK_SEED) \
		$(CARGO) test --locked -p fastice --test matrix random_operations -- --nocapture

hw-test:
	@.ci/packages test
	$(CARGO) build --locked -p fastice
	FASTICE=$(CURDIR)/target/debug/fastice hw-tests/vfio-test.sh --long

bench:
	-@.ci/packages bench
	@CARGO='$(CARGO)' bench/run.sh

# Twice as long as a plain release build, and a minute of serving in between. `make install TUNED=1` installs it.
tuned:
	@CARGO='$(CARGO)' bench/tuned.sh

# As root it installs fio, gcc and dpkg-dev where they lack; the source of fio, for its headers, goes below target/.
fio-engine:
	@.ci/packages fio
	@CARGO='$(CARGO)' bench/fio-engine/build.sh

instructions:
	@.ci/packages count
	$(CARGO) build --profile counted --locked -p fastice-bench
	target/counted/fastice-bench guard

# On purpose: what is recorded is what make test holds the hot path to.
accept-instructions:
	@.ci/packages count
	$(CARGO) build --profile counted --locked -p fastice-bench
	target/counted/fastice-bench guard --accept

install: $(BUILT)
	install -D -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/sbin/fastice
	install -D -m 644 deploy/fastice.toml.example $(DESTDIR)$(PREFIX)/share/doc/fastice/fastice.toml.example
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	for unit in fastice.service fastice-device@.service; do \
		sed 's|/usr/local/|$(PREFIX)/|' deploy/$$unit > $(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit || exit 1; \
	done
	$(PROGRAM) man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	$(PROGRAM) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/fastice
	$(PROGRAM) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_fastice

clean:
	$(CARGO) clean
