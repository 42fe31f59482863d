PYTHON := target/venv/bin/python
# For `make chaos` and `make fuzz`. Without SEED, `make chaos` takes a random seed and prints it.
SECONDS ?= 60
SEEDS ?= 10
PERCENT ?= 100

.DEFAULT_GOAL := help
.PHONY: help build dist setup test test-upgrade lint fmt-check clippy doc features demo demo-servers chaos figures test-observe test-matrix fuzz fuzz-build bench bench-check bench-embedded bench-peers check-deploy clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the relay and the examples, optimised: target/release
	cargo build --release --locked --bins --examples

dist: ## build the relay in the profile for releases: target/dist
	cargo build --profile dist --locked --bin relay

setup: ## install what the tests and demonstrations need and this machine lacks
	@tests/setup

test: setup ## run all tests, with throwaway servers
	cargo test --locked --features failpoints

lint: fmt-check clippy doc ## check formatting, clippy's warnings and the documentation

fmt-check:
	cargo fmt --check

clippy:
	cargo clippy --locked --all-targets --features failpoints -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features failpoints --document-private-items
	python3 tests/check_links.py

# Clippy and not `cargo check`, because it refuses warnings without building the dependencies again. The last line tests the
# errors of a relay that was built without a feature.
features: ## check each Cargo feature alone, and test the library with the features that applications use
	set -e; for feature in postgres sqlite relay redis eventbridge cli; do \
	    cargo clippy --locked --no-default-features --features $$feature -- -D warnings; done
	set -e; for store in postgres sqlite; do cargo test --locked --no-default-features --features $$store; done
	cargo test --locked --no-default-features --features cli --lib built_without

demo: ## show the relay at work on a throwaway SQLite file: no server, nothing to install
	cargo build --profile demo --locked --no-default-features --features sqlite,cli --bin relay
	python3 tests/demo.py

demo-servers: setup build ## show the relay at work on throwaway PostgreSQL, Redis and EventBridge
	python3 tests/demo_servers.py

chaos: setup ## cause random faults, then compare what arrived with what was promised: SECONDS=60 SEEDS=10 SEED=
	CHAOS_SECONDS=$(SECONDS) CHAOS_SEEDS=$(SEEDS) CHAOS_SEED=$(SEED) \
	    cargo test --locked --features failpoints --test it -- chaos::a_long_run --ignored --nocapture

figures: setup ## measure the figures of src/guide/reliability.md, one fault after the other: FIGURE=s7 PERCENT=10
	CHAOS_SCALE_PERCENT=$(PERCENT) cargo test --locked --profile chaos --features failpoints --test it -- \
	    $(if $(FIGURE),::$(FIGURE)_,chaos::figures::) --ignored --nocapture --test-threads 1

test-observe: ## test dashboard, alerts and page with a real relay, Prometheus and Chromium
	@tests/setup observe
	cargo build --locked --features failpoints --bins
	$(PYTHON) tests/observe

test-upgrade: setup ## test that relays of an earlier version go on during and after the migrations
	cargo test --locked --features failpoints --test it -- reality::migration::relays_of_before --ignored --nocapture

test-matrix: setup test-upgrade ## test each supported version of PostgreSQL, Redis and Valkey: store, sinks, a short chaos run
	python3 tests/matrix

fuzz-build: ## build the fuzz targets without running them
	@tests/setup fuzz
	tests/fuzz/run build

fuzz: ## fuzz the parsers of foreign bytes, each target for SECONDS=60
	@tests/setup fuzz
	tests/fuzz/run $(SECONDS)

# The benchmarks measure the profile for releases.
bench bench-peers: export BENCH_RELAY = $(CURDIR)/target/dist/relay

bench: setup dist ## measure rates, latency and costs on PostgreSQL, which takes hours: SECTIONS="drain latency" OPTIONS="--short"
	$(PYTHON) tests/bench/run.py $(SECTIONS) $(OPTIONS)

bench-check: setup ## run each benchmark on few events to check that it works; its times mean nothing
	cargo build --locked --features failpoints --bins
	BENCH_RELAY=$(CURDIR)/target/debug/relay $(PYTHON) tests/bench/run.py --short

bench-embedded: setup build ## measure rates, latency and costs on a SQLite file, and the application's commits beside the relay
	python3 tests/bench/embedded.py

bench-peers: dist ## compare how fast a backlog drains with job queues and Debezium
	@tests/setup peers
	python3 tests/bench/peers.py

check-deploy: ## check the files of deploy/
	@tests/setup deploy
	$(PYTHON) tests/check_deploy.py

clean: ## remove target/ with the virtual environment
	cargo clean
