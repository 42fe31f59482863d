//! Poison, dead letters, destinations that are down or slow, and operators who change the tables.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Line, assert_first_in_order, assert_logged_once, load, stop, until_empty};
use crate::binary::{Running, until};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::proxy::Proxy;
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::servers::{database, redis};
use crate::stream;

#[tokio::test]
async fn f54_what_no_route_takes_is_dead_lettered_before_anything_is_sent() {
    use outbox_relay::route::{Route, Router};
    let database = database().await;
    let mut connection = database.connect().await;
    for (name, key) in [("known", "k"), ("strange", "k"), ("known", "k")] {
        emit(&mut connection, name, key).await;
    }
    // The destination is down throughout, because it is not needed for the decision.
    let sink = ScriptedSink::new(|_| Act::Unreachable);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    let known = wildmatch::WildMatch::new("known");
    let route = Route { event_type: Some(known), source: None, headers: Default::default(), destinations: vec![0] };
    setup.router = Router::new(vec![route], 1);
    assert!(setup.drain().await.undelivered);
    let dead = "select concat_ws(' ', event_type, destination, error_code) from event_dead_letter";
    assert_eq!(column(&mut connection, dead).await, ["strange  unrouted"]);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and event_type = 'known'").await, 2);
}

#[tokio::test]
async fn f56_poison_in_hot_keys_delays_those_keys_and_no_others() {
    // A tenth of the events have one of ten hot keys. One in a hundred of those is always refused.
    let insert = "insert into event_outbox (event_type, aggregate_id)
                  select case when i % 1010 = 500 then 'poison' else 'a' end,
                         case when i % 10 = 0 then 'hot' || i / 10 % 10 else (i % 990)::text end
                  from generate_series(1, 20000) i";
    let drained = async |script: fn(&outbox_relay::event::Event) -> Act| {
        let database = database().await;
        sql(&mut database.connect().await, insert).await;
        let sink = ScriptedSink::new(script);
        let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
        (setup.policy.retry.base, setup.policy.retry.max_retries) = (Duration::from_secs(3600), 1);
        let begun = Instant::now();
        setup.drain().await;
        (database, sink, begun.elapsed())
    };
    let refuse = |event: &outbox_relay::event::Event| match event.event_type.as_str() {
        "poison" => Act::Refuse,
        _ => Act::Accept,
    };
    let (.., calm) = drained(|_| Act::Accept).await;
    let (database, sink, took) = drained(refuse).await;
    println!("F56: a drain of 20,000 took {took:?} beside 1 % of poison in ten hot keys, {calm:?} without");
    let mut connection = database.connect().await;
    assert_eq!(count(&mut connection, "event_outbox where aggregate_id not like 'hot%'").await, 0);
    let stuck = "select concat_ws(' ', aggregate_id, min(id), bool_or(id = min and event_type = 'poison' and attempts = 1))
                 from (select *, min(id) over (partition by aggregate_id) from event_outbox) o group by aggregate_id order by 1";
    let expected: Vec<String> = (0..10).map(|key| format!("hot{key} {} t", 500 + 1010 * key)).collect();
    assert_eq!(column(&mut connection, stuck).await, expected, "each hot key waits at its first poison");
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);

    // This makes everything due.
    sql(&mut connection, "update event_outbox set available_at = now()").await;
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.policy.retry.max_retries = 1;
    let running = setup.run();
    until_empty(&mut connection).await;
    running.stop().await;
    let arrived = sink.accepted().into_iter().map(|event| (event.aggregate_id.unwrap_or_default(), event.row.id));
    assert_eq!(assert_first_in_order(arrived), (19_980, 0));
    let log = "select concat_ws(' ', status, count(*)) from event_processing_log group by status order by 1";
    assert_eq!(column(&mut connection, log).await, ["dead_lettered 20", "failed 20", "published 19980"]);
    assert_eq!(count(&mut connection, "event_dead_letter where event_type = 'poison' and attempts = 2").await, 20);
}

#[tokio::test]
async fn f57_the_same_poison_over_and_over_stops_nobody_and_is_summed_up() {
    const POISON: i64 = 3000;
    let line = Line::new().await;
    let line = Line { stream: format!("{}:{{event_type}}", line.stream), ..line };
    let mut connection = line.connect().await;
    let mut to_redis = stream::connect(&line.redis_url);
    let name = |event_type: &str| line.stream.replace("{event_type}", event_type);
    redis::cmd("SET").arg(name("poison")).arg("no stream").exec(&mut to_redis).unwrap();
    let insert = format!(
        "insert into event_outbox (event_type, aggregate_id)
         select case i % 2 when 0 then 'poison' else 'a' end, (i % 200)::text from generate_series(1, 2 * {POISON}) i"
    );
    sql(&mut connection, insert).await;
    let running = line.start(&[("EVENT_DEFAULT_MAX_RETRIES", "0")]);
    until_empty(&mut connection).await;
    let told = running.log();
    stop(running);
    assert_eq!(stream::length(&mut to_redis, &name("a")), 3000);
    let summary = "select concat_ws(' ', event_type, event_count) from event_dead_letter_summary";
    assert_eq!(column(&mut connection, summary).await, [format!("poison {POISON}")]);
    let log = "select concat_ws(' ', status, count(*)) from event_processing_log group by status order by 1";
    assert_eq!(column(&mut connection, log).await, [format!("dead_lettered {POISON}"), format!("published {POISON}")]);
    let lines = told.lines().filter(|line| line.contains("event dead-lettered")).count();
    println!("F57: {POISON} dead letters, {lines} lines of the log");
    assert!(lines <= usize::try_from(POISON).unwrap(), "at most one line for each");
    assert!(!told.contains("breaker open"), "the destination is not paused");
}

#[tokio::test]
async fn f58_while_a_destination_is_down_each_relay_probes_it_with_a_few_events_and_resumes_without_a_stampede() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 3000, 3000).await;
    let down = ScriptedSink::new(|_| Act::Unreachable);
    let relays = [(); 2].map(|()| {
        let mut setup = Setup::new(&database, vec![("a", down.clone() as Arc<_>)]);
        setup.relay.batch_events = 500;
        setup.run()
    });
    let last = |calls: usize| down.sizes().iter().rev().take(calls).all(|size| *size <= 10);
    eventually("both breakers are open", async || down.calls() > 14 && last(4)).await;
    let before = down.calls();
    tokio::time::sleep(Duration::from_secs(2)).await; // the duration of the fault
    let sizes = down.sizes().split_off(before);
    println!("F58: in 2 s of an outage, with 200 ms between probes, 2 relays made calls with {sizes:?} events");
    assert!((2..=24).contains(&sizes.len()) && sizes.iter().all(|size| *size <= 10), "{sizes:?}");
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 3000);
    assert_eq!(count(&mut connection, "event_processing_log").await, 0);
    let before = down.calls();
    down.then(|_| Act::Accept);
    until_empty(&mut connection).await;
    for relay in relays {
        relay.stop().await;
    }
    assert_logged_once(&mut connection, 3000).await;
    assert_eq!(down.accepted().len(), 3000, "once each");
    // The first successful call was a probe. Whole batches followed.
    let sizes = down.sizes().split_off(before);
    assert!(sizes[0] <= 10, "{sizes:?}");
}

/// The resident memory of a process, in bytes.
fn resident(running: &Running) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}

#[tokio::test]
async fn f59_a_destination_slower_than_its_producers_bounds_memory_and_transactions() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    // 60 MB, which is more than the relay may hold.
    let large = "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 select 'a', 'k', (i % 100)::text, to_jsonb(repeat(md5(i::text), 62)) from generate_series(1, 30000) i";
    sql(&mut connection, large).await;
    let proxy = Proxy::to(redis().port());
    proxy.slow_to(10_000);
    let through = proxy.url(&line.redis_url, redis().port());
    let settings = [
        ("REDIS_URL", through.as_str()),
        ("EVENT_DEFAULT_TIMEOUT", "2000"),
        ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "500"),
    ];
    let running = line.start(&settings);
    let oldest = "select coalesce(max(extract(epoch from clock_timestamp() - xact_start) * 1000), 0)::bigint from pg_stat_activity
                  where application_name = 'relay' and datname = current_database()";
    let (since, mut longest, mut most) = (Instant::now(), 0, 0);
    while since.elapsed() < Duration::from_secs(12) {
        longest = longest.max(crate::stores::Client::number(&mut connection, oldest).await);
        most = most.max(resident(&running));
        tokio::time::sleep(Duration::from_millis(50)).await; // the interval between two looks
    }
    println!(
        "F59: at 10 kB/s at most {} MB in memory, the longest transaction {longest} ms with a timeout of 2000",
        most >> 20
    );
    assert!(most < 100 << 20, "{} MB, with three batches of at most 4 MB", most >> 20);
    assert!(longest < 2000 + 3000, "a transaction was open for {longest} ms");
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    assert_eq!(count(&mut connection, "event_outbox where attempts > 0").await, 0);
    proxy.heal();
    until_empty(&mut connection).await;
    stop(running);
    line.assert_delivered(30_000).await;
}

#[tokio::test]
async fn f60_a_redrive_among_newer_events_of_its_key_is_marked_keeps_its_number_and_holds_up_nobody() {
    let database = database().await;
    let mut connection = database.connect().await;
    let sink = ScriptedSink::new(|event| if event.event_type == "old" { Act::Refuse } else { Act::Accept });
    let setup = || {
        let mut setup = Setup::new(&database, vec![("a", sink.clone() as Arc<_>)]);
        setup.policy.retry.max_retries = 0;
        setup
    };
    for name in ["old", "new1", "new2"] {
        emit(&mut connection, name, "k").await;
    }
    setup().drain().await;
    assert_eq!(sink.names(), ["new1", "new2"]);
    sink.then(|_| Act::Accept);
    sql(&mut connection, "select redrive_dead_letter(id) from event_dead_letter").await;
    emit(&mut connection, "new3", "k").await;
    setup().drain().await;
    // It arrives late, because an operator redrove it. Its `sequence` is the old one, so consumers can see that.
    assert_eq!(sink.names(), ["new1", "new2", "old", "new3"]);
    let ids: Vec<i64> = sink.accepted().iter().map(|event| event.row.id).collect();
    assert_eq!(ids, [2, 3, 1, 4]);
    let trace =
        "select concat_ws(' ', status, attempt) from event_processing_log where outbox_id = 1 order by processed_at";
    assert_eq!(column(&mut connection, trace).await, ["dead_lettered 1", "published 1"]);
    assert_eq!(count(&mut connection, "event_dead_letter where redriven_at is not null").await, 1);
}

#[tokio::test]
async fn f61_a_truncate_during_a_publish_is_reported_and_the_relay_goes_on() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let mut running = line.start(&[("FAILPOINTS", "acked=1*sleep(1500)")]);
    running.until_log("\"message\":\"ready\"");
    load(&mut connection, 100, 10).await;
    until("they are published", || line.length() == 100);
    sql(&mut connection, "delete from event_outbox where id % 2 = 0").await;
    running.until_log("someone else deleted rows of event_outbox while they were being published");
    assert!(running.log().contains("\"expected\":100") && running.log().contains("\"gone\":50"), "{}", running.log());
    assert_eq!(
        count(&mut connection, "event_processing_log").await,
        50,
        "the events that still have a row are recorded"
    );
    // A truncate waits for the claim and removes what was inserted meanwhile. Then everything goes on.
    load(&mut connection, 100, 10).await;
    sql(&mut connection, "truncate event_outbox").await;
    load(&mut connection, 100, 10).await;
    until_empty(&mut connection).await;
    assert!(running.is_running());
    stop(running);
    let last = count(&mut connection, "event_processing_log where outbox_id > 200").await;
    assert_eq!(last, 100, "what came after it");
}

#[tokio::test]
async fn f61_rows_put_back_and_changed_during_a_publish_are_published_as_they_are_then() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 5, 1).await;
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    gate.entered().await;
    // What was published of a changed row is not its present content, so the row must be published again.
    sql(&mut connection, r#"update event_outbox set payload = '"changed"' where id = 3"#).await;
    gate.open(1000);
    until_empty(&mut connection).await;
    running.stop().await;
    let payloads: Vec<String> =
        sink.accepted().into_iter().map(|event| String::from_utf8(event.payload).unwrap()).collect();
    assert_eq!(payloads, ["1", "2", "3", "4", "5", "\"changed\""]);
    assert_logged_once(&mut connection, 5).await;
}
