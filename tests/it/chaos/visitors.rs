//! Relays that run for a while: `--once` from cron, one that gets a signal to stop while its destination hangs, and one with
//! another configuration. Every relay of a run is started here.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::World;
use super::course::Ways;
use super::faults::KILLED_AFTER;
use super::producers::MAX_PAYLOAD;
use super::scorecard::Scorecard;
use crate::binary::{Running, relay};
use crate::proxy::Proxy;

/// The number of retries of an event.
pub(super) const RETRIES: i32 = 2;

/// The second destination of relays with the other configuration.
pub(super) const OTHER: &str = "other";

/// How long a visitor waits for a condition that faults may prevent.
const WAITS_FOR: Duration = Duration::from_secs(20);

/// Starts the visitors of a run.
#[derive(Clone)]
pub(super) struct Visitors {
    /// The URL without proxies, and the server's port.
    database: (String, u16),
    redis: (String, u16),
    /// The URL through the proxies that all visitors share.
    database_url: String,
    redis_url: String,
    settings: Vec<(&'static str, String)>,
    /// The file that adds the second destination.
    config: Arc<NamedTempFile>,
    scorecard: Scorecard,
}

impl Visitors {
    pub(super) fn of(world: &World, scorecard: Scorecard) -> Self {
        let mut config = NamedTempFile::with_suffix(".toml").unwrap();
        let (url, exactly_once) = (&world.redis_url, world.exactly_once);
        let table = format!("[destinations.{OTHER}]\ntype = \"redis-stream\"\nurl = \"{url}\"\nstream = \"{OTHER}\"\n");
        writeln!(config, "{table}exactly_once = {exactly_once}").unwrap();
        let mut settings = world.settings().to_vec();
        settings.retain(|(name, _)| *name != "RELAY_REDIS_STREAM");
        settings.extend([
            // The event's type chooses its stream. Redis refuses an event alone if its stream is no stream.
            ("RELAY_REDIS_STREAM", "{event_type}".to_owned()),
            ("EVENT_MAX_PAYLOAD_SIZE", MAX_PAYLOAD.to_string()),
            ("EVENT_DEFAULT_MAX_RETRIES", RETRIES.to_string()),
            ("EVENT_DEFAULT_BACKOFF_MS", "200".to_owned()),
        ]);
        let (postgres, redis) = (world.postgres.lock().unwrap().port(), world.redis.lock().unwrap().port());
        Self {
            database: (world.worker_direct.clone(), postgres),
            redis: (world.redis_direct.clone(), redis),
            database_url: world.database_url.clone(),
            redis_url: world.redis_url.clone(),
            settings,
            config: Arc::new(config),
            scorecard,
        }
    }

    /// Starts proxies for one relay.
    pub(super) fn ways(&self) -> Ways {
        Ways { postgres: Proxy::to(self.database.1), redis: Proxy::to(self.redis.1) }
    }

    /// Starts a relay through these proxies, with more settings.
    pub(super) fn relay(&self, args: &[&str], ways: &Ways, more: &[(&str, &str)]) -> Running {
        let database_url = ways.postgres.url(&self.database.0, self.database.1);
        let redis_url = ways.redis.url(&self.redis.0, self.redis.1);
        self.relay_at(args, &database_url, &redis_url, more)
    }

    /// Starts a relay through the shared proxies.
    pub(super) fn shared(&self, args: &[&str], more: &[(&str, &str)]) -> Running {
        self.relay_at(args, &self.database_url, &self.redis_url, more)
    }

    fn relay_at(&self, args: &[&str], database_url: &str, redis_url: &str, more: &[(&str, &str)]) -> Running {
        let mut command = relay(args, &[("DATABASE_URL", database_url), ("REDIS_URL", redis_url)]);
        command.envs(self.settings.iter().map(|(name, value)| (name, value))).envs(more.iter().copied());
        Running::start(command)
    }

    /// The setting that adds the second destination.
    pub(super) fn other_configuration(&self) -> (&'static str, &str) {
        ("RELAY_CONFIG", self.config.path().to_str().unwrap())
    }

    /// Runs `relay --once` every few seconds, until the end.
    pub(super) fn drain_now_and_then(&self, ends: &AtomicBool) {
        while !ends.load(Ordering::SeqCst) {
            let ended =
                self.shared(&["--once"], &[("EVENT_OUTBOX_BATCH_SIZE", "100"), ("RELAY_LOG", "error")]).finish();
            assert!(matches!(ended.code, Some(0 | 1 | 3)), "--once: {:?} {}", ended.code, ended.stderr);
            self.scorecard.count("runs of relay --once");
            std::thread::sleep(Duration::from_secs(2));
        }
    }

    /// Runs a relay whose destination hangs. It gets SIGTERM, and after [`KILLED_AFTER`] SIGKILL.
    pub(super) fn stop_hanging_relay(&self, name: &'static str) {
        // If other relays have taken all events, this relay has nothing in flight and stops at once. Then it is tried again.
        for _ in 0..5 {
            if self.is_killed_while_it_hangs() {
                return self.scorecard.count(name);
            }
        }
    }

    fn is_killed_while_it_hangs(&self) -> bool {
        let ways = self.ways();
        // The timeout is longer than the time until SIGKILL.
        let patient = [("EVENT_DEFAULT_TIMEOUT", "30000"), ("RELAY_LOG", "debug")];
        let mut hanging = self.relay(&["run"], &ways, &patient);
        // A connection that is still being made does not delay the stop, so the connection must be in use.
        wait_until(|| hanging.log().contains("batch settled"));
        ways.redis.stall(true);
        wait_until(|| ways.redis.held() > 0);
        // The held request may belong to a settled batch. The requests of the next claims hang too.
        std::thread::sleep(Duration::from_secs(1));
        hanging.signal("TERM");
        let told = Instant::now();
        while told.elapsed() < KILLED_AFTER && hanging.is_running() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let killed = hanging.is_running();
        drop(hanging); // dropping it kills it
        // What it had sent arrives now, after other relays have published the same events.
        ways.redis.heal();
        std::thread::sleep(Duration::from_millis(300));
        killed
    }

    /// Runs a relay with one more destination beside the others.
    pub(super) fn work_differently(&self, lasts: Duration, name: &'static str) {
        let ways = self.ways();
        let mut other = self.relay(&["run"], &ways, &[self.other_configuration(), ("RELAY_LOG", "info")]);
        wait_until(|| other.log().contains("\"message\":\"ready\""));
        if other.log().contains("\"message\":\"ready\"") {
            self.scorecard.count(name);
        }
        std::thread::sleep(lasts);
        if other.is_running() {
            other.signal("TERM");
        }
        let ended = other.finish();
        assert!(matches!(ended.code, Some(0) | None), "the other configuration: {:?} {}", ended.code, ended.stderr);
    }
}

/// Waits until the condition holds, at most [`WAITS_FOR`].
fn wait_until(mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() && begun.elapsed() < WAITS_FOR {
        std::thread::sleep(Duration::from_millis(20));
    }
}
