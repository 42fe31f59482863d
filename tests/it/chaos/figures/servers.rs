//! Servers that restart, connections that are cut, and answers that are lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{blocking, scaled, summary};
use crate::binary::Running;
use crate::chaos::producers::Producers;
use crate::chaos::{World, terminate_backends};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s5_postgres_restarts() {
    let world = World::new(true).await;
    let restarts = scaled(50);
    let producers = Producers::start(world.database.url(), 5, 2, 5, false);
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
            // From now on the server accepts connections.
            times.push(world.until_entries(world.entries()));
            std::thread::sleep(Duration::from_millis(200));
        }
        drop(relays);
        (times, world)
    })
    .await;
    let promises = producers.finish().obligations;
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
                        terminate_backends(world.database.url());
                        count += 1;
                        std::thread::sleep((Duration::from_millis(200) * count).saturating_sub(begun.elapsed()));
                    }
                    count
                });
                while begun.elapsed() < duration {
                    // The relays always have events to publish.
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
    let producers = Producers::start(world.database.url(), 9, 2, 5, false);
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
    let promises = producers.finish().obligations;
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
