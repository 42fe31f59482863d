//! `relay run` and `relay --once`.

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::cli::{UNDELIVERED, database, runtime};
use crate::config::ConfigError;
use crate::config::destinations::{ConfiguredDestination, destinations, longest_timeout};
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::outbox::database::WithOutbox;
use crate::outbox::operate::Feature;
use crate::outbox::{Outbox, OutboxConfig, OutboxError, Standstill, Usage};
use crate::relay::{Endpoint, Readiness, Relay, RelayConfig};
use crate::route::Router;
use crate::shutdown;

pub(super) fn run(settings: &Settings, file: &ConfigFile, once: bool) -> anyhow::Result<ExitCode> {
    if !settings.enabled {
        tracing::info!("EVENT_SYSTEM_ENABLED is false: nothing is published");
        // If the process ended before this, systemd would take that for a failed start and restart it.
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            tracing::debug!(%error, "systemd was not told");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (destinations, router) = destinations(settings, file)?;
    if let Some(reason) = destinations.iter().find_map(ConfiguredDestination::obstacle) {
        return Err(ConfigError::Contradiction(reason.to_owned()).into());
    }
    let database = database(settings)?;
    if settings.ghost_barrier {
        let has_barrier = database.operate().require(Feature::GhostBarrier);
        has_barrier.map_err(|error| ConfigError::Contradiction(error.explain()))?;
    }
    let outbox = OutboxConfig {
        publish_timeout: longest_timeout(&destinations),
        log_retention: settings.log_retention,
        history_retention: settings.history_retention,
        usage: Usage { several_destinations: destinations.len() > 1, history: settings.history },
        ghost_barrier: settings.ghost_barrier,
        ..database.config()
    };
    let names: Vec<&str> = destinations.iter().map(|destination| destination.name.as_str()).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        store = database.shown(),
        lanes = settings.lanes,
        destinations = names.join(", "),
        worker = outbox.worker,
        "relay starts{}",
        if once { ": it publishes what is due, then ends" } else { "" }
    );
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(usize::try_from(settings.lanes)? + 1);
    let runtime = runtime(threads)?;
    let ended: anyhow::Result<ExitCode> = runtime.block_on(async {
        let stop = shutdown::on_signal().context("cannot listen for signals")?;
        let sinks = open_all(destinations, settings).await?;
        let lost = if once { None } else { Some(stop_when_lost(&sinks, &stop)) };
        let work = Work { sinks, router, settings: settings.relay(), once, stop };
        let code = database.with_outbox(outbox, work).await?;
        match lost.and_then(|lost| lost.get().cloned()) {
            Some(reason) => anyhow::bail!(reason),
            None => Ok(code),
        }
    });
    // Everything is settled. A write to a standard output that nobody reads never ends, so it is not waited for.
    runtime.shutdown_background();
    ended
}

/// Stops the relay when a destination can never be published to again. Returns the cell that then holds the reason.
fn stop_when_lost(endpoints: &[Endpoint], stop: &CancellationToken) -> Arc<OnceLock<String>> {
    let lost = Arc::new(OnceLock::new());
    for endpoint in endpoints {
        let (name, sink) = (endpoint.name.clone(), Arc::clone(&endpoint.sink));
        let (lost, stop) = (Arc::clone(&lost), stop.clone());
        tokio::spawn(async move {
            let reason = sink.ended().await;
            lost.get_or_init(|| format!("destination {name}: {reason}"));
            stop.cancel();
        });
    }
    lost
}

/// Opens the destinations. Checks each in the background, so that a destination that hangs does not delay the work.
async fn open_all(destinations: Vec<ConfiguredDestination>, settings: &Settings) -> Result<Vec<Endpoint>, ConfigError> {
    let mut endpoints = Vec::new();
    for destination in destinations {
        let endpoint = destination.open(settings).await?;
        tokio::spawn({
            let (name, sink) = (endpoint.name.clone(), Arc::clone(&endpoint.sink));
            async move {
                match sink.check().await {
                    Ok(found) => tracing::info!(destination = name, found, "destination reached"),
                    // The destination may be up by the time there is an event for it.
                    Err(error) => {
                        tracing::warn!(destination = name, %error, "destination not reached yet")
                    }
                }
            }
        });
        endpoints.push(endpoint);
    }
    if settings.database_pooled {
        tracing::warn!(
            "RELAY_DATABASE_POOLED is true: producers cannot wake this relay, it polls every {} ms",
            settings.polling_interval.as_millis()
        );
    }
    Ok(endpoints)
}

/// The work of the relay, on any kind of store.
struct Work {
    sinks: Vec<Endpoint>,
    router: Router,
    settings: RelayConfig,
    once: bool,
    stop: CancellationToken,
}

impl WithOutbox for Work {
    type Output = anyhow::Result<ExitCode>;

    async fn run(self, outbox: impl Outbox) -> anyhow::Result<ExitCode> {
        let Self { sinks, router, settings, once, stop } = self;
        work(Relay::new(outbox, sinks, router, settings), once, stop).await
    }
}

async fn work<O: Outbox>(relay: Arc<Relay<O>>, once: bool, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    if once {
        let drained = relay.drain(stop).await.map_err(explained)?;
        if !drained.held_by.is_empty() {
            tracing::error!(
                published = drained.tally.published,
                held_by = drained.held_by.join("; "),
                "done, but for events that others hold and did not publish within the publish timeout"
            );
            return Ok(UNDELIVERED.into());
        }
        tracing::info!(
            published = drained.tally.published,
            retried = drained.tally.retried,
            dead_lettered = drained.tally.dead_lettered,
            undelivered = drained.undelivered,
            "done"
        );
        return Ok(if drained.undelivered { UNDELIVERED.into() } else { ExitCode::SUCCESS });
    }
    let watcher = tokio::spawn(tell_systemd(Arc::clone(&relay)));
    let tally = relay.run(stop).await.map_err(explained)?;
    watcher.abort();
    tracing::info!(published = tally.published, dead_lettered = tally.dead_lettered, "stopped");
    Ok(ExitCode::SUCCESS)
}

/// An error of the store as one line for people.
pub(super) fn explained(error: OutboxError) -> anyhow::Error {
    anyhow::anyhow!(error.explain())
}

/// Reports readiness and standstills to systemd. Without systemd this has no effect.
async fn tell_systemd<O: Outbox>(relay: Arc<Relay<O>>) {
    let (mut health, mut standstills) = (relay.health(), relay.standstills());
    loop {
        let readiness = health.borrow_and_update().readiness();
        let ready = readiness == Readiness::Ready;
        let status = status(&readiness, &standstills.borrow_and_update());
        let status = NotifyState::Status(&status);
        let told = if ready { sd_notify::notify(&[NotifyState::Ready, status]) } else { sd_notify::notify(&[status]) };
        if let Err(error) = told {
            tracing::debug!(%error, "systemd was not told");
        }
        let followed = tokio::select! {
            changed = health.changed() => changed,
            changed = standstills.changed() => changed,
        };
        if followed.is_err() {
            return;
        }
    }
}

/// One line for systemd, short enough for `systemctl status`.
fn status(readiness: &Readiness, standstills: &[Standstill]) -> String {
    const LONGEST: usize = 2000;
    let mut status = match readiness {
        Readiness::Ready => "ready".to_owned(),
        Readiness::NotReady(reason) => format!("not ready: {reason}"),
    };
    // The line already has the reason why the relay is not ready.
    for standstill in standstills.iter().filter(|standstill| standstill.cause != "not_ready") {
        status.push_str("; ");
        status.push_str(&standstill.text);
    }
    let mut status = status.replace('\n', " ");
    status.truncate(status.floor_char_boundary(LONGEST));
    status
}
