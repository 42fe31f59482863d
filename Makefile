PYTHON := target/venv/bin/python
# For `make chaos` and `make fuzz`; without SEED a fresh one, which is printed.
SECONDS ?= 60
SEEDS ?= 10
PERCENT ?= 100

.DEFAULT_GOAL := help
.PHONY: help build dist setup test test-upgrade lint fmt-check clippy doc features demo demo-servers chaos figures test-matrix fuzz fuzz-build bench bench-check bench-embedded bench-peers check-deploy clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the relay and the example shop, optimised: target/release
	cargo build --release --locked --bins --examples

dist: ## the relay as it is shipped: target/dist
	cargo build --profile dist --locked --bin relay

setup: ## installs what tests and demo need and this machine lacks
	@tests/setup

test: setup ## every test, against throwaway servers
	cargo test --locked --features failpoints

lint: fmt-check clippy doc ## formatting, clippy and documentation, without warnings

fmt-check:
	cargo fmt --check

clippy:
	cargo clippy --locked --all-targets --features failpoints -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features failpoints --document-private-items
	python3 tests/check_links.py

# Clippy rather than check: it refuses warnings without building the dependencies anew. The last line is for what a relay
# says that lacks a feature.
features: ## each Cargo feature alone, and the tests of the library as applications take it
	set -e; for feature in postgres sqlite relay redis eventbridge cli; do \
	    cargo clippy --locked --no-default-features --features $$feature -- -D warnings; done
	set -e; for store in postgres sqlite; do cargo test --locked --no-default-features --features $$store; done
	cargo test --locked --no-default-features --features cli --lib built_without

demo: ## the main job, shown on a throwaway SQLite file: no server, nothing to install
	cargo build --profile demo --locked --no-default-features --features sqlite,cli --bin relay
	python3 tests/demo.py

demo-servers: setup build ## the main job, shown on throwaway PostgreSQL, Redis and EventBridge
	python3 tests/demo_servers.py

chaos: setup ## random faults for a while, then what arrived against what was promised: SECONDS=60 SEEDS=10 SEED=
	CHAOS_SECONDS=$(SECONDS) CHAOS_SEEDS=$(SEEDS) CHAOS_SEED=$(SEED) \
	    cargo test --locked --features failpoints --test it -- chaos::a_long_run --ignored --nocapture

figures: setup ## the figures of src/guide/reliability.md, one fault after the other: FIGURE=s7 PERCENT=10
	CHAOS_SCALE_PERCENT=$(PERCENT) cargo test --locked --profile chaos --features failpoints --test it -- \
	    $(if $(FIGURE),::$(FIGURE)_,chaos::figures::) --ignored --nocapture --test-threads 1

test-upgrade: setup ## relays of before the present schema, which work through its migrations and after them
	cargo test --locked --features failpoints --test it -- reality::migration::relays_of_before --ignored --nocapture

test-matrix: setup test-upgrade ## store, sinks and a short chaos run on every supported version of PostgreSQL, Redis and Valkey
	python3 tests/matrix

fuzz-build: ## the fuzz targets, without running them
	@tests/setup fuzz
	tests/fuzz/run build

fuzz: ## what parses foreign bytes, each target for a while: SECONDS=60
	@tests/setup fuzz
	tests/fuzz/run $(SECONDS)

# What is shipped is what is measured.
bench bench-peers: export BENCH_RELAY = $(CURDIR)/target/dist/relay

bench: setup dist ## rates, latency and costs on PostgreSQL, for hours: SECTIONS="drain latency" OPTIONS="--short"
	$(PYTHON) tests/bench/run.py $(SECTIONS) $(OPTIONS)

bench-check: setup ## whether each benchmark finds what should arrive: small, not optimised, its times mean nothing
	cargo build --locked --features failpoints --bins
	BENCH_RELAY=$(CURDIR)/target/debug/relay $(PYTHON) tests/bench/run.py --short

bench-embedded: setup build ## the same from a SQLite file; latency, idle cost, and what the application's commits cost beside it
	python3 tests/bench/embedded.py

bench-peers: dist ## how fast a backlog drains beside what job queues and Debezium do with theirs
	@tests/setup peers
	python3 tests/bench/peers.py

check-deploy: ## whether the files of deploy/ are sound
	@tests/setup deploy
	$(PYTHON) tests/check_deploy.py

clean: ## removes target/, the virtual environment included
	cargo clean
