//! Relays that are killed, stopped or cut off.

use std::time::{Duration, Instant};

use super::{blocking, scaled, summary};
use crate::binary::Running;
use crate::chaos::World;

/// A relay is killed again and again while a backlog drains.
async fn killed(name: &'static str, exactly_once: bool, events: u64, kills: u64) {
    let world = World { batch: 1000, ..World::new(exactly_once).await };
    world.backlog(events).await;
    let promises = world.promises().await;
    let (kills_done, report) = blocking(move || {
        let mut relays: Vec<Running> = (0..3).map(|_| world.relay(&["run"], "")).collect();
        let mut random = fastrand::Rng::with_seed(7);
        let (mut done, each) = (0, events / (kills + 1));
        while done < kills {
            // The kills are spread over the whole backlog.
            if world.entries() < done * each {
                std::thread::sleep(Duration::from_millis(random.u64(1..20)));
                continue;
            }
            let index = random.usize(0..3);
            relays[index] = world.relay(&["run"], ""); // dropping the relay before it kills it
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
    // Without exactly-once: an orderly restart repeats nothing anyway.
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
            std::thread::sleep(Duration::from_millis(300)); // before it handles signals, a signal just ends it
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
async fn s7_takeover() {
    let world = World { timeout_ms: 2000, ..World::new(true).await };
    let times = scaled(40);
    let (killed, blackholed) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let emit = |count: u64| runtime.block_on(world.backlog(count));
        let mut killed = Vec::new();
        for _ in 0..times {
            // The owner holds its claim while its failpoint sleeps.
            let owner = world.relay(&["run"], "before_publish=sleep(60000)");
            emit(1);
            until_claimed(&runtime, &world);
            let heir = world.relay(&["run"], "");
            std::thread::sleep(Duration::from_millis(300)); // by now it has found nothing to claim
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
