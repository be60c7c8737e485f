# Everything that a developer calls; `make help` lists it.
.DEFAULT_GOAL := help
.PHONY: up demo env test test-matrix test-faults test-containers test-helm packages test-packages dist release test-release schemathesis bench bench-history chaos help

# `run -- COMMAND` puts private servers around a command and leaves nothing of them. The binary and not
# `cargo run -p devstack`: for one package alone cargo builds the dependencies again, with fewer features.
TARGET := $(or $(CARGO_TARGET_DIR),target)
DEVSTACK := $(TARGET)/debug/devstack

# Other servers than this machine's, for every target that starts some: DEVSTACK_POSTGRES=18 DEVSTACK_RABBITMQ=4.3.
# crates/devstack/releases lists them.

# What users run, and the bench measures: built for release. The bench itself has a profile that is built faster.
PROGRAMS := person-api outbox-relay score-projector score-api

up: ## Start the whole stack in this checkout, until Ctrl-C
	@crates/devstack/install
	@cargo build --workspace
	@exec $(DEVSTACK) up

demo: ## Play payloads/ through the running stack, or through one of its own, and check the score
	@crates/devstack/install
	@cargo build --workspace
	@exec $(DEVSTACK) demo

env: ## Print the running stack's addresses as export lines for a shell
	@cargo build --quiet --workspace
	@exec $(DEVSTACK) env

test test-matrix test-faults schemathesis: export TMPDIR := $(shell crates/devstack/scratch)

# Tests wait for servers more than they compute, so there are more of them at a time than cores.
test: ## Run all tests but the slow fault suite; TEST_ARGS="--test relay"
	@crates/devstack/install tests
	cargo build --workspace
	exec env RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} $(DEVSTACK) run -- cargo test --workspace --no-fail-fast $(TEST_ARGS)

test-matrix: ## Run all tests on each release of both servers, an hour or more; MATRIX="17/4.0 18/4.3"
	@exec crates/devstack/matrix

test-faults: ## Run the fault suite: servers stopped and programs killed under load
	@crates/devstack/install tests
	cargo build --workspace
	cargo test --workspace --no-fail-fast --test faults -- --ignored --nocapture

test-containers: ## Run README's container line for real, with an engine and images of its own; needs root and Debian
	@exec deploy/containers/test

test-helm: ## Hold the Helm charts against Helm and the schemas of Kubernetes, without a cluster
	@crates/devstack/install tests
	cargo build --workspace
	@exec deploy/helm/check

packages: ## Build the relay's Debian and RPM packages, its archive for any Linux, and the schema as SQL
	@exec deploy/packages/build

test-packages: ## Install, use and remove the packages on clean Debian systems; needs root and Debian
	@exec deploy/packages/test

dist: ## Build all that a release has, of the commit that is checked out
	@exec deploy/release/artefacts

release: ## Make the release VERSION of main, and publish nothing; VERSION=0.2.0 RELEASE_ARGS=--dry-run
	@exec deploy/release/release $(RELEASE_ARGS) '$(VERSION)'

test-release: ## Make a release in a clone, without tests and optimisation, and look at all that it has
	@exec deploy/release/test

schemathesis: ## Hold the APIs against their documents, thousands of requests; SCHEMATHESIS_ARGS="--max-examples 1000"
	@crates/devstack/install tests
	cargo build --workspace
	exec $(DEVSTACK) schemathesis -- $(SCHEMATHESIS_ARGS)

# A release has no failpoints, which the package `chaos` turns on.
bench: ## Measure the system next to its ceilings, 15 minutes; writes docs/bench; BENCH_ARGS="--quick --json FILE"
	@crates/devstack/install
ifneq ($(findstring --quick,$(BENCH_ARGS)),)
	cargo build --workspace
	exec $(TARGET)/debug/bench $(BENCH_ARGS)
else
	cargo build --release --workspace --exclude chaos $(PROGRAMS:%=--bin %)
	cargo build --profile laboratory --workspace --bin bench --bin devstack
	DEVSTACK_PROGRAMS=$(abspath $(TARGET))/release exec $(TARGET)/laboratory/bench $(BENCH_ARGS)
endif

bench-history: ## Run every command on ten million events, an hour; writes docs/proof/history.md; BENCH_ARGS="--quick --events N"
	@crates/devstack/install
ifneq ($(findstring --quick,$(BENCH_ARGS)),)
	cargo build --workspace
	exec $(TARGET)/debug/bench history $(BENCH_ARGS)
else
	cargo build --release --workspace --exclude chaos $(PROGRAMS:%=--bin %)
	cargo build --profile laboratory --workspace --bin bench --bin devstack
	DEVSTACK_PROGRAMS=$(abspath $(TARGET))/release exec $(TARGET)/laboratory/bench history $(BENCH_ARGS)
endif

chaos: ## Let everything go wrong at once and judge, 5 minutes; CHAOS_ARGS="--seed N --minutes N --json FILE"
	@crates/devstack/install tests
	cargo build --workspace
	exec $(TARGET)/debug/chaos $(CHAOS_ARGS)

help: ## List the targets
	@sed -n 's/^\([a-z-]*\): ## \(.*\)/\1\t\2/p' Makefile | expand -t 17
