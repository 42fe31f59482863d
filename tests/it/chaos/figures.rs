//! Figures of the scorecard: each run provokes one fault many times, prints one line, and fails where a promise is broken.
//!
//! `make figures` runs all of them; FIGURE names one, PERCENT makes them shorter.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outbox_relay::audit::Obligation;

use super::{STREAM, World, parameter};
use crate::binary::{Running, relay};
use crate::harness::sql;
use crate::proxy::Proxy;
use crate::readback::Subscriber;
use crate::stub::EventBridgeStub;

fn scaled(count: u64) -> u64 {
    let percent = parameter("CHAOS_SCALE_PERCENT", 100);
    (count * percent / 100).max(3)
}

impl World {
    /// A backlog of events of 1,000 keys, and what it promises.
    async fn backlog(&self, count: u64) {
        sql(
            &mut self.database.connect().await,
            format!(
                "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 select 'f', 'f', (i % 1000)::text, jsonb_build_object('n', i, 'pad', repeat('x', 150))
                 from generate_series(1, {count}) i"
            ),
        )
        .await;
    }

    /// What the database promises of all that is in the outbox now.
    async fn promises(&self) -> Vec<Obligation> {
        let rows: Vec<(uuid::Uuid, Option<String>, i64, String)> = sqlx::query_as(
            "select event_id, aggregate_id, id, encode(sha256(convert_to(payload::text, 'UTF8')), 'hex') from event_outbox",
        )
        .fetch_all(&mut self.database.connect().await)
        .await
        .unwrap();
        let promise = |(event_id, key, sequence, sha256)| Obligation {
            event_id,
            key,
            sequence,
            sha256: Some(sha256),
            committed: Some(true),
        };
        rows.into_iter().map(promise).collect()
    }

    fn entries(&self) -> u64 {
        self.length().unwrap_or(0)
    }

    /// Waits for more than so many entries; how long it took.
    fn until_entries(&self, more_than: u64) -> Duration {
        let begun = Instant::now();
        while self.entries() <= more_than {
            assert!(begun.elapsed() < Duration::from_secs(120), "no more than {} entries", self.entries());
            std::thread::sleep(Duration::from_millis(2));
        }
        begun.elapsed()
    }

    fn drain_by(&self, relays: Vec<Running>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let begun = Instant::now();
        while runtime.block_on(self.pending()) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(900), "not drained");
            std::thread::sleep(Duration::from_millis(100));
        }
        for relay in relays {
            relay.signal("TERM");
            relay.finish().exited(0);
        }
    }
}

/// Runs blocking code beside the runtime.
async fn blocking<T: Send + 'static>(code: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(code).await.unwrap()
}

fn summary(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64();
    format!("p50 {:.2} s, p99 {:.2} s, longest {:.2} s", at(50), at(99), at(100))
}

/// A relay is killed again and again while a backlog drains: `restart` says how one goes.
async fn killed(name: &'static str, exactly_once: bool, events: u64, kills: u64) {
    let world = World { batch: 1000, ..World::new(exactly_once).await };
    world.backlog(events).await;
    let promises = world.promises().await;
    let (kills_done, report) = blocking(move || {
        let mut relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        let mut random = fastrand::Rng::with_seed(7);
        let (mut done, each) = (0, events / (kills + 1));
        while done < kills {
            // Spread over the whole backlog.
            if world.entries() < done * each {
                std::thread::sleep(Duration::from_millis(random.u64(1..20)));
                continue;
            }
            let index = random.usize(0..3);
            relays[index] = world.relay(&["run"], ""); // the one before is killed as it is dropped
            done += 1;
        }
        world.drain_by(relays);
        (done, world.require_clean(&promises, 0))
    })
    .await;
    let repeats = report["repeats"].as_u64().unwrap();
    assert!(repeats <= kills_done * 1000, "more than a batch for each kill: {repeats}");
    println!(
        "{name}: {kills_done} kill -9 over three relays, {events} events, exactly once {exactly_once}: \
         lost 0, inversions 0, repeats {repeats}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s1_s2_kills() {
    killed("S1, S2", true, scaled(1_000_000), scaled(200)).await;
    killed("S2", false, scaled(200_000), scaled(40)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s4_restarts() {
    // Without exactly-once: a restart in good order repeats nothing by itself.
    let world = World { batch: 500, ..World::new(false).await };
    let (events, restarts) = (scaled(400_000), scaled(100));
    world.backlog(events).await;
    let promises = world.promises().await;
    let (times, report) = blocking(move || {
        let mut relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        let mut times = Vec::new();
        for number in 0..restarts {
            while world.entries() < number * (events / (restarts + 1)) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let next = world.relay(&["run"], "");
            let old = std::mem::replace(&mut relays[usize::try_from(number % 3).unwrap()], next);
            std::thread::sleep(Duration::from_millis(300)); // before it listens, a signal is just the end
            let begun = Instant::now();
            old.signal("TERM");
            old.finish().exited(0);
            times.push(begun.elapsed());
        }
        world.drain_by(relays);
        (times, world.require_clean(&promises, 0))
    })
    .await;
    assert_eq!(report["repeats"], 0);
    assert!(times.iter().all(|time| *time < Duration::from_secs(5)), "{}", summary(times));
    println!("S4: {restarts} SIGTERM restarts under load: repeats 0; exit {}", summary(times));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s5_postgres_restarts() {
    let world = World::new(true).await;
    let restarts = scaled(50);
    let producers = super::Producers::start(world.database.url(), 5, 2, 5);
    let (times, world) = blocking(move || {
        let relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        world.until_entries(10);
        let mut times = Vec::new();
        for number in 0..restarts {
            {
                let mut postgres = world.postgres.lock().unwrap();
                if number % 2 == 0 {
                    postgres.restart();
                } else {
                    postgres.kill();
                    postgres.start_again();
                }
            }
            // From here on it accepts connections.
            times.push(world.until_entries(world.entries()));
            std::thread::sleep(Duration::from_millis(200));
        }
        drop(relays);
        (times, world)
    })
    .await;
    let promises = producers.finish();
    let report = blocking(move || {
        world.drain_by(vec![world.relay(&["run"], "")]);
        world.require_clean(&promises, 0)
    })
    .await;
    assert!(times.iter().all(|time| *time <= Duration::from_secs(2)), "{}", summary(times));
    println!(
        "S5: {restarts} PostgreSQL restarts, fast and by kill: {} events, lost 0, repeats {}; first publish after it accepts: {}",
        report["events"],
        report["repeats"],
        summary(times)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s6_backends_terminated() {
    let mut rates = Vec::new();
    let seconds = scaled(180).max(10);
    for terminated in [false, true] {
        let world = World { batch: 1000, ..World::new(true).await };
        let duration = Duration::from_secs(if terminated { seconds } else { (seconds / 4).max(5) });
        let (rate, count, report) = blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
            let (begun, mut emitted, ended) = (Instant::now(), 0, AtomicBool::new(!terminated));
            let count = std::thread::scope(|scope| {
                let terminator = scope.spawn(|| {
                    let mut count = 0;
                    while !ended.load(Ordering::SeqCst) {
                        super::terminate_backends(world.database.url());
                        count += 1;
                        std::thread::sleep((Duration::from_millis(200) * count).saturating_sub(begun.elapsed()));
                    }
                    count
                });
                while begun.elapsed() < duration {
                    // There is always something to do.
                    if world.entries() + 30_000 > emitted {
                        runtime.block_on(world.backlog(20_000));
                        emitted += 20_000;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                ended.store(true, Ordering::SeqCst);
                terminator.join().unwrap()
            });
            let rate = world.entries() as f64 / begun.elapsed().as_secs_f64();
            world.drain_by(relays);
            let report = world.require_clean(&[], 0);
            assert_eq!(report["events"], emitted, "{report:#}");
            (rate, count, report)
        })
        .await;
        rates.push(rate);
        if terminated {
            println!(
                "S6: {count} backends terminated in {} s: {} events, lost 0, inversions 0, repeats {}; {:.0} events/s, {:.2} of the rate without",
                duration.as_secs(),
                report["events"],
                report["repeats"],
                rates[1],
                rates[1] / rates[0]
            );
        }
    }
    assert!(rates[1] >= rates[0] / 2.0, "{rates:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s7_takeover() {
    let world = World { timeout_ms: 2000, ..World::new(true).await };
    let times = scaled(40);
    let (killed, blackholed) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let emit = |count: u64| runtime.block_on(world.backlog(count));
        let mut killed = Vec::new();
        for _ in 0..times {
            // The owner holds its claim for as long as its failpoint sleeps.
            let owner = world.relay(&["run"], "before_publish=sleep(60000)");
            emit(1);
            until_claimed(&runtime, &world);
            let heir = world.relay(&["run"], "");
            std::thread::sleep(Duration::from_millis(300)); // it has found that there is nothing to take
            let before = world.entries();
            drop(owner); // kill -9
            killed.push(world.until_entries(before));
            heir.signal("TERM");
            heir.finish().exited(0);
        }
        // A host that vanishes: nothing closes its connection.
        let owner = world.relay(&["run"], "before_publish=sleep(60000)");
        emit(1);
        until_claimed(&runtime, &world);
        world.to_postgres.stall(true);
        owner.signal("STOP");
        let heir = world.relay_at(world.database.url(), &world.redis_direct, &["run"], "");
        let blackholed = world.until_entries(world.entries());
        drop((owner, heir));
        (killed, blackholed)
    })
    .await;
    assert!(blackholed < Duration::from_secs(20), "{blackholed:?}");
    let p99 = {
        let mut sorted = killed.clone();
        sorted.sort_unstable();
        sorted[(sorted.len() - 1) * 99 / 100]
    };
    println!(
        "S7: takeover after kill -9 of the owner: {}; of a host that vanished: {:.1} s",
        summary(killed),
        blackholed.as_secs_f64()
    );
    assert!(p99 < Duration::from_millis(500), "{p99:?}");
}

fn until_claimed(runtime: &tokio::runtime::Runtime, world: &World) {
    let claims = "select count(*) from pg_locks where locktype = 'advisory' and objid < 640
                  and database = (select oid from pg_database where datname = current_database())";
    let begun = Instant::now();
    let count = || -> i64 {
        runtime.block_on(async {
            sqlx::query_scalar(claims).fetch_one(&mut world.database.connect().await).await.unwrap()
        })
    };
    while count() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing was claimed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s8_answers_dropped() {
    let world = World { batch: 100, ..World::new(true).await };
    let wanted = scaled(2000);
    world.backlog(wanted * 60).await;
    let promises = world.promises().await;
    let (dropped, report) = blocking(move || {
        let relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        let begun = Instant::now();
        while world.to_redis.count() < wanted && begun.elapsed() < Duration::from_secs(900) {
            world.to_redis.drop_answers(1, "EVALSHA");
            std::thread::sleep(Duration::from_millis(5));
        }
        world.to_redis.heal();
        let dropped = world.to_redis.count();
        world.drain_by(relays);
        (dropped, world.require_clean(&promises, 0))
    })
    .await;
    println!("S8: {dropped} answers of Redis dropped after the fact: lost 0, extra entries {}", report["repeats"]);
    assert!(dropped >= wanted, "only {dropped}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s9_redis_restarts() {
    let world = World::new(true).await;
    let restarts = scaled(50);
    let producers = super::Producers::start(world.database.url(), 9, 2, 5);
    let (times, world) = blocking(move || {
        let relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        world.until_entries(10);
        let mut times = Vec::new();
        for _ in 0..restarts {
            {
                let mut redis = world.redis.lock().unwrap();
                redis.kill();
                redis.start_again();
            }
            times.push(world.until_entries(world.entries()));
            std::thread::sleep(Duration::from_millis(200));
        }
        drop(relays);
        (times, world)
    })
    .await;
    let promises = producers.finish();
    let report = blocking(move || {
        world.drain_by(vec![world.relay(&["run"], "")]);
        world.require_clean(&promises, 0)
    })
    .await;
    println!(
        "S9: {restarts} Redis kills and restarts (append-only file, always): {} events, lost 0, repeats {}; back {}",
        report["events"],
        report["repeats"],
        summary(times)
    );
}

fn id_in(event: &str) -> String {
    serde_json::from_str::<serde_json::Value>(event).unwrap()["id"].as_str().unwrap().to_owned()
}

fn assert_each_is_there(ids: Vec<String>, events: u64) {
    assert_eq!(HashSet::<String>::from_iter(ids).len(), usize::try_from(events).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s11_destinations_down() {
    let world = World::new(true).await;
    let seconds = scaled(600);
    let stub = EventBridgeStub::start().await;
    let (published, dead) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let port = stub.url().rsplit(':').next().unwrap().parse().unwrap();
        let to_eventbridge = Proxy::to(port);
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        let config = format!(
            "[destinations.stream]\ntype = \"redis-stream\"\nurl = \"{0}\"\nstream = \"{STREAM}\"\n
             [destinations.pubsub]\ntype = \"redis-pubsub\"\nurl = \"{0}\"\n
             [destinations.bus]\ntype = \"eventbridge\"\nbus = \"orders\"\nregion = \"eu-west-1\"\nendpoint_url = \"{1}\"\n",
            world.redis_url,
            to_eventbridge.url(stub.url(), port),
        );
        std::fs::write(file.path(), config).unwrap();
        let variables = [
            ("DATABASE_URL", world.database.url()),
            ("RELAY_CONFIG", file.path().to_str().unwrap()),
            ("AWS_ACCESS_KEY_ID", "k"),
            ("AWS_SECRET_ACCESS_KEY", "s"),
            ("EVENT_DEFAULT_TIMEOUT", "3000"),
            ("RELAY_LOG", "error"),
        ];
        let mut subscriber = Subscriber::new(&world.redis.lock().unwrap(), "");
        let running = Running::start(relay(&["run"], &variables));
        runtime.block_on(world.backlog(20));
        world.until_entries(10);
        // All three at the same time.
        for proxy in [&world.to_redis, &to_eventbridge] {
            proxy.refuse(true);
            proxy.cut();
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(seconds) {
            runtime.block_on(world.backlog(20));
            std::thread::sleep(Duration::from_secs(1));
        }
        world.to_redis.heal();
        to_eventbridge.heal();
        world.drain_by(vec![running]);
        let number = |query: &'static str| -> i64 {
            runtime.block_on(async {
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            })
        };
        let published = number("select count(*) from event_processing_log where status = 'published'");
        assert_eq!(number("select count(*) from event_processing_log where attempt > 1"), 0, "charged");
        let entries = world.entries();
        assert_eq!(u64::try_from(published).unwrap(), 3 * entries);
        let bus = stub.requests().concat().iter().map(|entry| id_in(entry["Detail"].as_str().unwrap())).collect();
        assert_each_is_there(bus, entries);
        assert_each_is_there(subscriber.messages().iter().map(|(_, message)| id_in(message)).collect(), entries);
        (published, number("select count(*) from event_dead_letter"))
    })
    .await;
    assert_eq!(dead, 0);
    println!(
        "S11: stream, Pub/Sub and EventBridge down for {seconds} s: {published} deliveries in all, dead-lettered 0, charged 0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s13_a_slow_destination() {
    let world = World { timeout_ms: 5000, batch: 1000, ..World::new(true).await };
    world.backlog(scaled(200_000)).await;
    let seconds = scaled(60);
    let (before, after, longest, published) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let running = world.relay(&["run"], "");
        world.until_entries(5000);
        let before = resident_mib(running.id());
        world.to_redis.slow_to(10_000);
        let (begun, entries, mut longest, mut after) = (Instant::now(), world.entries(), 0.0_f64, before);
        while begun.elapsed() < Duration::from_secs(seconds) {
            let open: Option<f64> = runtime.block_on(async {
                let query =
                    "select max(extract(epoch from clock_timestamp() - xact_start))::float8 from pg_stat_activity
                             where application_name = 'relay'";
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            });
            longest = longest.max(open.unwrap_or_default());
            after = after.max(resident_mib(running.id()));
            std::thread::sleep(Duration::from_millis(200));
        }
        (before, after, longest, world.entries() - entries)
    })
    .await;
    println!(
        "S13: destination at 10 kB/s for {seconds} s: {published} events, resident {before} MiB before, at most {after} MiB; \
         longest transaction {longest:.1} s with a publish timeout of 5 s"
    );
    assert!(after <= before + 16, "{before} MiB, then {after} MiB");
    assert!(longest < 7.0, "{longest} s");
}

fn resident_mib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s15_poison() {
    let events = scaled(200_000);
    let mut rates = [Vec::new(), Vec::new()];
    // In turn, because machines are not the same from minute to minute.
    for round in 0..6 {
        let poisoned = round % 2;
        let world = World { batch: 1000, ..World::new(true).await };
        sql(
            &mut world.database.connect().await,
            format!(
                "insert into event_outbox (event_type, aggregate_type, aggregate_id)
                 select '{STREAM}', 'f', (i % 1000)::text from generate_series(1, {events}) i;
                 insert into event_outbox (event_type, aggregate_type, aggregate_id)
                 select 'poison', 'p', (i % 10)::text from generate_series(1, {poisoned} * {events} / 100) i"
            ),
        )
        .await;
        let rate = blocking(move || {
            world.redis_command(&["SET", "poison", "no stream"]);
            let retries = [("EVENT_DEFAULT_MAX_RETRIES", "1"), ("EVENT_DEFAULT_BACKOFF_MS", "100")];
            let running = world.relay_with(&retries, "{event_type}");
            world.until_entries(0);
            let begun = Instant::now();
            while world.entries() < events {
                std::thread::sleep(Duration::from_millis(5));
            }
            let rate = events as f64 / begun.elapsed().as_secs_f64();
            world.drain_by(vec![running]);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let dead: i64 = runtime.block_on(async {
                let query = "select count(*) from event_dead_letter where event_type = 'poison'";
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            });
            assert_eq!(u64::try_from(dead).unwrap(), poisoned * events / 100, "each dead-lettered, once");
            rate
        })
        .await;
        rates[usize::try_from(poisoned).unwrap()].push(rate);
    }
    let median = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let [without, with] = rates.each_mut().map(median);
    println!(
        "S15: 1 % poison: {with:.0} healthy events/s, {:.2} of {without:.0} without; dead letters exact",
        with / without
    );
    assert!(with / without >= 0.95, "{rates:?}");
}
