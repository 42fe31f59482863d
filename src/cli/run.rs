//! `relay run` and `relay --once`.

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::cli::{UNDELIVERED, database, runtime};
use crate::config::ConfigError;
use crate::config::destinations::{ConfiguredDestination, destinations, longest_timeout};
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::http::address::HttpAddress;
use crate::http::board::Board;
use crate::http::page::{Identity, Shown};
use crate::http::server::Server;
use crate::outbox::database::WithOutbox;
use crate::outbox::operate::Feature;
use crate::outbox::{Outbox, OutboxConfig, OutboxError, Usage};
use crate::relay::{Endpoint, Overview, Readiness, Relay, RelayConfig};
use crate::route::Router;
use crate::shutdown;

/// How often the state is looked at for systemd, where its watchdog does not say how often.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Runs the relay. `has_http_address` says that somebody has set the address of the HTTP server.
pub(super) fn run(
    settings: &Settings,
    file: &ConfigFile,
    once: bool,
    has_http_address: bool,
) -> anyhow::Result<ExitCode> {
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
    let http = if once { None } else { bind(settings.http_addr, has_http_address)? };
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
    let identity = Identity { worker: outbox.worker.clone(), database: database.shown(), started: SystemTime::now() };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(usize::try_from(settings.lanes)? + 1);
    let runtime = runtime(threads)?;
    let ended: anyhow::Result<ExitCode> = runtime.block_on(async {
        let stop = shutdown::on_signal().context("cannot listen for signals")?;
        let sinks = open_all(destinations, settings).await?;
        let lost = if once { None } else { Some(stop_when_lost(&sinks, &stop)) };
        let http = http.map(|server| (server, identity, Board::new(database.operate())));
        let work = Work { sinks, router, settings: settings.relay(), once, stop, http };
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

/// Takes the port of the HTTP server. If nobody has set the address, the relay goes on without the server where it cannot.
fn bind(address: HttpAddress, is_set: bool) -> Result<Option<Server>, ConfigError> {
    let HttpAddress::On(address) = address else { return Ok(None) };
    match Server::bind(address) {
        Ok(server) => Ok(Some(server)),
        Err(error) if is_set => Err(ConfigError::Invalid {
            setting: "RELAY_HTTP_ADDR".to_owned(),
            reason: format!("cannot listen on {address}: {error}; choose another port, or off"),
        }),
        Err(error) => {
            tracing::warn!(
                %address,
                %error,
                "metrics and health are not served, because the relay cannot listen there; set RELAY_HTTP_ADDR to another \
                 address, or to off"
            );
            Ok(None)
        }
    }
}

/// Stops the relay when a destination can never be published to again. Returns the cell that then holds the reason.
pub(super) fn stop_when_lost(endpoints: &[Endpoint], stop: &CancellationToken) -> Arc<OnceLock<String>> {
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
    http: Option<(Server, Identity, Board)>,
}

impl WithOutbox for Work {
    type Output = anyhow::Result<ExitCode>;

    async fn run(self, outbox: impl Outbox) -> anyhow::Result<ExitCode> {
        let Self { sinks, router, settings, once, stop, http } = self;
        let relay = Relay::new(outbox, sinks, router, settings);
        if let Some((server, identity, board)) = http {
            tracing::info!(address = %server.address(), "metrics and health are served by HTTP");
            let shown = Shown { relay: Arc::clone(&relay), identity, board };
            server.serve(Arc::new(shown)).context("cannot start the thread of the HTTP server")?;
        }
        work(relay, once, stop).await
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
    let _told = Systemd::tell(&relay).context("cannot start the thread that tells systemd")?;
    let tally = relay.run(stop).await.map_err(explained)?;
    tracing::info!(published = tally.published, dead_lettered = tally.dead_lettered, "stopped");
    Ok(ExitCode::SUCCESS)
}

/// An error of the store as one line for people.
pub(super) fn explained(error: OutboxError) -> anyhow::Error {
    anyhow::anyhow!(error.explain())
}

/// The thread that tells systemd of the relay, until this value is dropped. It has a runtime of its own, so that it goes on if
/// something blocks the threads of the relay.
struct Systemd(CancellationToken);

impl Systemd {
    fn tell<O: Outbox>(relay: &Arc<Relay<O>>) -> std::io::Result<Self> {
        let (relay, ended) = (Arc::clone(relay), CancellationToken::new());
        let this = Self(ended.clone());
        if std::env::var_os("NOTIFY_SOCKET").is_some() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
            let tell = move || runtime.block_on(ended.run_until_cancelled_owned(tell_systemd(relay)));
            std::thread::Builder::new().name("systemd".to_owned()).spawn(tell)?;
        }
        Ok(this)
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Reports the state to systemd, and feeds its watchdog while the relay is live. Without systemd this has no effect.
async fn tell_systemd<O: Outbox>(relay: Arc<Relay<O>>) {
    let (mut health, mut standstills) = (relay.health(), relay.standstills());
    let mut watchdog = tokio::time::interval(sd_notify::watchdog_enabled().map_or(LOOK_INTERVAL, |limit| limit / 3));
    let has_watchdog = sd_notify::watchdog_enabled().is_some();
    let mut last = String::new();
    loop {
        let ready = health.borrow_and_update().readiness() == Readiness::Ready;
        standstills.borrow_and_update();
        let overview = relay.overview();
        let status = status(&overview);
        let mut told = Vec::new();
        if status != last {
            told.extend(ready.then_some(NotifyState::Ready));
            told.push(NotifyState::Status(&status));
        }
        if has_watchdog && overview.hung.is_none() {
            told.push(NotifyState::Watchdog);
        }
        if !told.is_empty()
            && let Err(error) = sd_notify::notify(&told)
        {
            tracing::debug!(%error, "systemd was not told");
        }
        last = status;
        let followed = tokio::select! {
            changed = health.changed() => changed,
            changed = standstills.changed() => changed,
            _ = watchdog.tick() => Ok(()),
        };
        if followed.is_err() {
            return;
        }
    }
}

/// One line for systemd, short enough for `systemctl status`.
fn status(overview: &Overview) -> String {
    const LONGEST: usize = 2000;
    let mut status = overview.sentence();
    status.truncate(status.floor_char_boundary(LONGEST));
    status
}
