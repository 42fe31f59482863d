//! Everything goes wrong at once, for a while; then it is calm, and what arrived is compared with what was promised.
//!
//! Three relays and a `--once` now and then, producers, PostgreSQL and Redis, and a proxy on each link of the relays. A
//! seed gives what goes wrong and when, what the producers do and where relays fail by themselves; it does not give what
//! runs at the same time by chance.
//!
//! `make chaos` runs [`a_long_run`] with SECONDS, SEED and SEEDS.

mod faults;
mod figures;
mod producers;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use faults::{Fault, Link, Network, Planned, RELAYS};
use outbox_relay::audit::Obligation;
use producers::Producers;
use serde_json::Value;

use crate::binary::{Finished, Running, finished, relay};
use crate::proxy::Proxy;
use crate::servers::{Database, Server, database_on};

const STREAM: &str = "chaos";

/// Servers with a proxy before each.
pub(crate) struct World {
    postgres: Mutex<Server>,
    redis: Mutex<Server>,
    database: Database,
    to_postgres: Proxy,
    to_redis: Proxy,
    /// For relays: by way of the proxies.
    database_url: String,
    redis_url: String,
    /// For everybody else.
    redis_direct: String,
    pub(crate) exactly_once: bool,
    batch: usize,
    timeout_ms: u64,
}

impl World {
    pub(crate) async fn new(exactly_once: bool) -> Self {
        let postgres = Server::start("postgres", &["--fast", "--set", "log_min_messages=panic"]);
        let redis = Server::start("redis", &["--set", "appendonly=yes", "--set", "appendfsync=always"]);
        let database = database_on(&postgres).await;
        let (to_postgres, to_redis) = (Proxy::to(postgres.port()), Proxy::to(redis.port()));
        Self {
            database_url: to_postgres.url(database.url(), postgres.port()),
            redis_url: to_redis.url(redis.url(), redis.port()),
            redis_direct: redis.url().to_owned(),
            postgres: Mutex::new(postgres),
            redis: Mutex::new(redis),
            database,
            to_postgres,
            to_redis,
            exactly_once,
            batch: 200,
            timeout_ms: 3000,
        }
    }

    /// A relay behind the proxies.
    fn relay(&self, args: &[&str], failpoints: &str) -> Running {
        self.relay_at(&self.database_url, &self.redis_url, args, failpoints)
    }

    fn relay_at(&self, database_url: &str, redis_url: &str, args: &[&str], failpoints: &str) -> Running {
        let mut command = relay(args, &[("DATABASE_URL", database_url), ("REDIS_URL", redis_url)]);
        command.envs(self.settings()).env("FAILPOINTS", failpoints);
        Running::start(command)
    }

    /// A relay with further settings, and another stream.
    fn relay_with(&self, variables: &[(&str, &str)], stream: &str) -> Running {
        let mut command = relay(&["run"], &[("DATABASE_URL", &self.database_url), ("REDIS_URL", &self.redis_url)]);
        command.envs(self.settings()).env("RELAY_REDIS_STREAM", stream).envs(variables.iter().copied());
        Running::start(command)
    }

    fn settings(&self) -> [(&'static str, String); 7] {
        [
            ("RELAY_REDIS_STREAM", STREAM.to_owned()),
            ("RELAY_REDIS_EXACTLY_ONCE", self.exactly_once.to_string()),
            ("EVENT_OUTBOX_BATCH_SIZE", self.batch.to_string()),
            ("EVENT_OUTBOX_POLLING_INTERVAL", "250".to_owned()),
            ("EVENT_DEFAULT_TIMEOUT", self.timeout_ms.to_string()),
            ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "200".to_owned()),
            ("RELAY_LOG", std::env::var("CHAOS_LOG").unwrap_or_else(|_| "warn".to_owned())),
        ]
    }

    /// Entries in the stream; `None` while Redis does not answer.
    fn length(&self) -> Option<u64> {
        let client = redis::Client::open(self.redis_direct.as_str()).unwrap();
        let mut connection = client.get_connection_with_timeout(Duration::from_millis(200)).ok()?;
        connection.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
        redis::cmd("XLEN").arg(STREAM).query(&mut connection).ok()
    }

    fn redis_command(&self, words: &[&str]) {
        let client = redis::Client::open(self.redis_direct.as_str()).unwrap();
        if let Ok(mut connection) = client.get_connection_with_timeout(Duration::from_millis(200)) {
            connection.set_read_timeout(Some(Duration::from_millis(500))).ok();
            // While it is frozen there is nobody to tell.
            redis::cmd(words[0]).arg(&words[1..]).exec(&mut connection).ok();
        }
    }

    async fn pending(&self) -> i64 {
        sqlx::query_scalar("select count(*) from event_outbox")
            .fetch_one(&mut self.database.connect().await)
            .await
            .unwrap()
    }

    /// `relay audit` with what was promised.
    pub(crate) fn audit(&self, obligations: &[Obligation]) -> Value {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for obligation in obligations {
            writeln!(file, "{}", serde_json::to_string(obligation).unwrap()).unwrap();
        }
        let path = file.path().to_str().unwrap();
        let variables =
            [("DATABASE_URL", self.database.url()), ("REDIS_URL", &self.redis_direct), ("RELAY_REDIS_STREAM", STREAM)];
        let audited: Finished = finished(&["audit", "--json", "--obligations", path], &variables);
        serde_json::from_str(&audited.stdout).unwrap_or_else(|_| panic!("no report: {}", audited.stderr))
    }

    /// Fails unless what arrived is what was promised. Returns the report.
    pub(crate) fn require_clean(&self, obligations: &[Obligation], seed: u64) -> Value {
        let report = self.audit(obligations);
        assert_eq!(report["counts"], serde_json::json!({}), "seed {seed}: {report:#}");
        assert_eq!(report["pending"], 0, "seed {seed}: {report:#}");
        assert_eq!(report["dead_letters"], 0, "seed {seed}: no event was at fault: {report:#}");
        if self.exactly_once {
            assert_eq!(report["repeats"], 0, "seed {seed}: {report:#}");
        }
        report
    }
}

/// One run.
struct Chaos {
    world: World,
    relays: Vec<Option<Running>>,
    /// Told to end.
    ending: Vec<Running>,
    frozen: [bool; RELAYS],
    redis_frozen: bool,
    random: fastrand::Rng,
    fired: BTreeMap<&'static str, u32>,
}

impl Chaos {
    fn start_relay(&mut self, index: usize) {
        let failpoints = faults::failpoints(&mut self.random);
        self.relays[index] = Some(self.world.relay(&["run"], failpoints));
        self.frozen[index] = false;
    }

    /// A relay that ended by itself, as failpoints make it, is started again as its process manager would.
    fn look_after_relays(&mut self) {
        for index in 0..RELAYS {
            if self.relays[index].as_mut().is_some_and(|relay| !relay.is_running()) {
                let ended = self.relays[index].take().unwrap().finish();
                assert!(ended.code != Some(2), "wrong configuration: {}", ended.stderr);
                *self.fired.entry("relays ended by a failpoint").or_default() += 1;
                self.start_relay(index);
            }
        }
    }

    fn begin(&mut self, fault: Fault) {
        *self.fired.entry(fault.name()).or_default() += 1;
        match fault {
            Fault::KillRelay(index) => drop(self.relays[index].take()), // which kills it
            Fault::TerminateRelay(index) => {
                if let Some(mut relay) = self.relays[index].take() {
                    if self.frozen[index] {
                        relay.signal("CONT");
                    }
                    if relay.is_running() {
                        relay.signal("TERM");
                    }
                    // It may have to wait for what is broken just now, and its successor need not wait for it.
                    self.ending.push(relay);
                }
            }
            Fault::FreezeRelay(index) => {
                if let Some(relay) = &mut self.relays[index]
                    && relay.is_running()
                {
                    relay.signal("STOP");
                    self.frozen[index] = true;
                }
            }
            Fault::TerminateBackends => terminate_backends(self.world.database.url()),
            Fault::RestartPostgres => self.world.postgres.lock().unwrap().restart_or_kill(),
            Fault::KillPostgres => self.world.postgres.lock().unwrap().kill(),
            Fault::KillRedis => {
                self.world.redis.lock().unwrap().kill();
                self.redis_frozen = false;
            }
            Fault::RestartRedis => {
                self.world.redis.lock().unwrap().restart_or_kill();
                self.redis_frozen = false;
            }
            Fault::FreezeRedis => {
                self.world.redis.lock().unwrap().pause();
                self.redis_frozen = true;
            }
            Fault::PauseClients(ms) => self.world.redis_command(&["CLIENT", "PAUSE", &ms.to_string()]),
            Fault::FlushScripts => self.world.redis_command(&["SCRIPT", "FLUSH"]),
            Fault::Network(link, network) => {
                let (proxy, answers_to) = match link {
                    Link::Postgres => (&self.world.to_postgres, "commit"),
                    Link::Redis => (&self.world.to_redis, "EVALSHA"),
                };
                match network {
                    Network::Cut => proxy.cut(),
                    Network::Refuse => proxy.refuse(true),
                    Network::Stall => proxy.stall(true),
                    Network::Delay(ms) => proxy.delay(Duration::from_millis(ms)),
                    Network::Slow(rate) => proxy.slow_to(rate),
                    Network::DropAnswers(count) => proxy.drop_answers(count, answers_to),
                    Network::CutAfterBytes(bytes) => proxy.cut_after_bytes(bytes),
                    Network::CutAfterReplies(replies) if link == Link::Redis => proxy.cut_after_replies(replies),
                    Network::CutAfterReplies(replies) => proxy.cut_after_bytes(replies * 100),
                }
            }
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::KillRelay(index) | Fault::TerminateRelay(index) if self.relays[index].is_none() => {
                self.start_relay(index);
            }
            Fault::FreezeRelay(index) => {
                if let Some(relay) = &mut self.relays[index]
                    && self.frozen[index]
                {
                    relay.signal("CONT");
                }
                self.frozen[index] = false;
            }
            Fault::KillPostgres => self.world.postgres.lock().unwrap().start_again(),
            Fault::KillRedis => self.world.redis.lock().unwrap().start_again(),
            Fault::FreezeRedis if self.redis_frozen => {
                self.world.redis.lock().unwrap().resume();
                self.redis_frozen = false;
            }
            Fault::Network(Link::Postgres, _) => self.world.to_postgres.heal(),
            Fault::Network(Link::Redis, _) => self.world.to_redis.heal(),
            _ => {}
        }
    }

    /// Begins and ends faults in the order of time. Faults that stop a server last as long as they are planned with nothing
    /// else beginning: so it is there for the next that wants to stop it.
    fn go_through(&mut self, planned: &[Planned]) {
        let begun = Instant::now();
        let mut ends: Vec<(Duration, Fault)> = Vec::new();
        for &Planned { at, lasts, fault } in planned {
            while begun.elapsed() < at {
                self.end_due(&mut ends, begun.elapsed());
                self.look_after_relays();
                std::thread::sleep(Duration::from_millis(5));
            }
            self.begin(fault);
            if matches!(fault, Fault::KillPostgres | Fault::KillRedis) {
                std::thread::sleep(lasts);
                self.end(fault);
            } else {
                ends.push((begun.elapsed() + lasts, fault));
            }
        }
        self.end_due(&mut ends, Duration::MAX);
    }

    fn end_due(&mut self, ends: &mut Vec<(Duration, Fault)>, now: Duration) {
        let (due, later) = ends.drain(..).partition(|(at, _)| *at <= now);
        *ends = later;
        let due: Vec<(Duration, Fault)> = due;
        due.into_iter().for_each(|(_, fault)| self.end(fault));
    }
}

fn terminate_backends(url: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use sqlx::Connection;
        if let Ok(mut connection) = sqlx::PgConnection::connect(url).await {
            // One of them, as an impatient operator or a failing network does.
            let one = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'relay'
                       order by random() limit 1";
            sqlx::query(one).execute(&mut connection).await.ok();
        }
    });
}

/// Watches the stream: the longest time without a new entry, while events are waiting.
struct Watcher {
    stop: Arc<AtomicBool>,
    longest_ms: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watcher {
    fn start(redis_direct: &str) -> Self {
        let (stop, longest_ms) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, longest, url) = (Arc::clone(&stop), Arc::clone(&longest_ms), redis_direct.to_owned());
        let thread = std::thread::spawn(move || {
            let client = redis::Client::open(url).unwrap();
            let (mut last, mut since) = (0, Instant::now());
            while !stopped.load(Ordering::SeqCst) {
                let length: Option<u64> =
                    client.get_connection_with_timeout(Duration::from_millis(100)).ok().and_then(|mut connection| {
                        connection.set_read_timeout(Some(Duration::from_millis(100))).ok()?;
                        redis::cmd("XLEN").arg(STREAM).query(&mut connection).ok()
                    });
                if length.is_some_and(|length| length != last) {
                    longest.fetch_max(u64::try_from(since.elapsed().as_millis()).unwrap(), Ordering::SeqCst);
                    (last, since) = (length.unwrap_or_default(), Instant::now());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, longest_ms, thread }
    }

    fn longest(self) -> Duration {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
        Duration::from_millis(self.longest_ms.load(Ordering::SeqCst))
    }
}

/// One seed; prints its scorecard.
async fn run(seed: u64, duration: Duration, exactly_once: bool) {
    println!("chaos: seed {seed}, {} s, exactly once: {exactly_once}", duration.as_secs());
    let world = World::new(exactly_once).await;
    let mut random = fastrand::Rng::with_seed(seed);
    let planned = faults::plan(&mut random, duration);
    let producers = Producers::start(world.database.url(), seed, 3, 20);
    let watcher = Watcher::start(&world.redis_direct);
    let mut chaos = Chaos {
        world,
        relays: (0..RELAYS).map(|_| None).collect(),
        ending: Vec::new(),
        frozen: [false; RELAYS],
        redis_frozen: false,
        random,
        fired: BTreeMap::new(),
    };
    (0..RELAYS).for_each(|index| chaos.start_relay(index));
    let cron_ends = Arc::new(AtomicBool::new(false));
    let (mut chaos, crons) = tokio::task::spawn_blocking(move || {
        let crons = std::thread::scope(|scope| {
            let cron = Cron::of(&chaos.world);
            let ends = Arc::clone(&cron_ends);
            let cron = scope.spawn(move || cron.run(&ends));
            chaos.go_through(&planned);
            cron_ends.store(true, Ordering::SeqCst);
            cron.join().unwrap()
        });
        (chaos, crons)
    })
    .await
    .unwrap();
    let obligations = producers.finish();
    // Calm: nothing fails any more, and all must arrive.
    let relays: Vec<Running> = tokio::task::block_in_place(|| {
        drop(std::mem::take(&mut chaos.relays));
        for relay in std::mem::take(&mut chaos.ending) {
            let ended = relay.finish();
            // By a failpoint, perhaps, or by the signal before it was listened for.
            assert!(matches!(ended.code, Some(0) | None), "after SIGTERM: {:?} {}", ended.code, ended.stderr);
        }
        (0..RELAYS).map(|_| chaos.world.relay(&["run"], "")).collect()
    });
    let calm = Instant::now();
    while chaos.world.pending().await > 0 {
        assert!(calm.elapsed() < Duration::from_secs(90), "seed {seed}: not drained in the calm");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let drained = calm.elapsed();
    for relay in relays {
        relay.signal("TERM");
        relay.finish().exited(0);
    }
    let longest = watcher.longest();
    let report = chaos.world.require_clean(&obligations, seed);
    assert!(report["events"].as_u64().unwrap() > 100, "seed {seed}: hardly anything happened: {report:#}");
    println!("{:>6}  runs of relay --once", crons);
    for (name, count) in &chaos.fired {
        println!("{count:>6}  {name}");
    }
    println!(
        "seed {seed}: {} events, lost 0, ghosts 0, inversions 0, changed 0, log true, repeats {}; \
         longest time without an entry {:.1} s, drained {:.1} s after the last fault",
        report["events"],
        report["repeats"],
        longest.as_secs_f64(),
        drained.as_secs_f64()
    );
}

/// A `relay --once` every few seconds.
struct Cron {
    database_url: String,
    redis_url: String,
    exactly_once: String,
}

impl Cron {
    fn of(world: &World) -> Self {
        let (database_url, redis_url) = (world.database_url.clone(), world.redis_url.clone());
        Self { database_url, redis_url, exactly_once: world.exactly_once.to_string() }
    }

    fn run(&self, ends: &AtomicBool) -> u32 {
        let mut runs = 0;
        while !ends.load(Ordering::SeqCst) {
            let variables = [
                ("DATABASE_URL", self.database_url.as_str()),
                ("REDIS_URL", &self.redis_url),
                ("RELAY_REDIS_STREAM", STREAM),
                ("RELAY_REDIS_EXACTLY_ONCE", &self.exactly_once),
                ("EVENT_OUTBOX_BATCH_SIZE", "100"),
                ("EVENT_DEFAULT_TIMEOUT", "3000"),
                ("RELAY_LOG", "error"),
            ];
            let ended = finished(&["--once"], &variables);
            assert!(matches!(ended.code, Some(0 | 1 | 3)), "--once: {:?} {}", ended.code, ended.stderr);
            runs += 1;
            std::thread::sleep(Duration::from_secs(2));
        }
        runs
    }
}

fn parameter(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_run_loses_nothing_and_repeats_nothing() {
    // The same faults each time, so that a failure can be repeated; `make chaos` takes new ones.
    for (seed, exactly_once) in [(14, true), (15, true), (16, false)] {
        run(seed, Duration::from_secs(parameter("CHAOS_SHORT_SECONDS", 35)), exactly_once).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "as long as one wants: `make chaos`"]
async fn a_long_run() {
    let first = parameter("CHAOS_SEED", fastrand::u64(1..1_000_000));
    let duration = Duration::from_secs(parameter("CHAOS_SECONDS", 60));
    for seed in first..first + parameter("CHAOS_SEEDS", 10) {
        run(seed, duration, parameter("CHAOS_EXACTLY_ONCE", 1) == 1).await;
    }
}
