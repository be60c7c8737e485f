# Everything that a developer calls. Each target says what it does; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: up demo env test test-faults help

# What comes after `--` runs with private servers around it; nothing of them is left afterwards.
DEVSTACK := cargo run --quiet --package devstack --

up: ## Start the whole stack in this checkout, until Ctrl-C
	@devstack/install
	@cargo build --workspace
	@exec $(DEVSTACK) up

demo: ## Play payloads/ through the running stack, or through one of its own, and check the score
	@devstack/install
	@cargo build --workspace
	@exec $(DEVSTACK) demo

env: ## Print the running stack's addresses as export lines for a shell
	@exec $(DEVSTACK) env

test: ## Run all tests but the slow fault suite
	@devstack/install
	cargo build --workspace
	exec $(DEVSTACK) run -- cargo test --workspace

test-faults: ## Run the fault suite: servers stopped and programs killed under load
	@devstack/install
	cargo build --workspace
	exec $(DEVSTACK) run -- cargo test --package devstack --test faults -- --ignored --nocapture --test-threads=1

help: ## List the targets
	@sed -n 's/^\([a-z-]*\): ## \(.*\)/\1\t\2/p' Makefile | expand -t 14
