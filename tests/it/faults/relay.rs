//! Relays that crash, stall, stop or run side by side.

use std::time::{Duration, Instant};

use super::{CLAIMED, Line, load, stop, until_empty};
use crate::binary::until;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::proxy::Proxy;
use crate::scripted::{Gate, ScriptedSink};
use crate::servers::{Server, database, postgres, redis};
use crate::stream;

/// Counts transactions that have written a whole settle and wait for the relay to commit.
const SETTLING: &str = "pg_stat_activity where application_name = 'relay' and datname = current_database()
                        and state = 'idle in transaction' and query ilike '%insert into%event_processing_log%'";

#[tokio::test]
async fn f01_killed_between_claim_and_publish_another_takes_over_and_nothing_is_repeated() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let mut doomed = line.start(&[("FAILPOINTS", "before_publish=1*return(abort)")]);
    let mut others = [line.start(&[]), line.start(&[])];
    doomed.until_log("\"message\":\"ready\"");
    others.iter_mut().for_each(|other| other.until_log("\"message\":\"ready\""));
    let mut events = 0;
    while doomed.is_running() {
        load(&mut connection, 100, 10).await;
        events += 100;
        eventually("the relay crashed or the outbox is empty", async || {
            !doomed.is_running() || count(&mut connection, "event_outbox").await == 0
        })
        .await;
    }
    assert_eq!(doomed.finish().code, None, "SIGABRT");
    let died = Instant::now();
    until_empty(&mut connection).await;
    println!("F01: what it held was delivered within {:?} of its end", died.elapsed());
    others.into_iter().for_each(stop);
    assert_eq!(line.assert_delivered(events).await, 0, "repeats");
}

#[tokio::test]
async fn f03_killed_between_answer_and_settle_it_repeats_exactly_that_batch() {
    const BATCH: usize = 30;
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 100, 10).await;
    let batch = BATCH.to_string();
    let to_stdout = |more: &[(&str, &str)]| {
        let mut variables = vec![
            ("DATABASE_URL", database.url()),
            ("RELAY_STDOUT", "true"),
            ("RELAY_LANES", "1"),
            ("EVENT_OUTBOX_BATCH_SIZE", &batch),
        ];
        variables.extend(more);
        crate::binary::finished(&["--once"], &variables)
    };
    let killed = to_stdout(&[("FAILPOINTS", "acked=1*return(abort)")]);
    assert_eq!(killed.code, None, "SIGABRT");
    assert_eq!(count(&mut connection, "event_processing_log").await, 0);
    let heir = to_stdout(&[]).exited(0);
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let (first, second) = (lines(&killed.stdout), lines(&heir.stdout));
    assert!((1..=BATCH).contains(&first.len()), "{} of a batch", first.len());
    assert_eq!((second.len(), heir.stdout.lines().count()), (100, 100), "every event arrived exactly once");
    assert!(first.is_subset(&second), "the repeated bytes are the same");
    super::assert_logged_once(&mut connection, 100).await;
}

#[tokio::test]
async fn f03_into_a_stream_at_most_the_batch_that_was_answered_is_repeated() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    load(&mut connection, 1000, 20).await;
    let settings = [("EVENT_OUTBOX_BATCH_SIZE", "100"), ("FAILPOINTS", "acked=3*off->1*return(abort)")];
    assert_eq!(line.start(&settings).finish().code, None, "SIGABRT");
    assert!(
        count(&mut connection, "event_outbox").await > 0,
        "everything was published before, so this test proves nothing"
    );
    line.start_with(&["--once"], &[]).finish().exited(0);
    // Calls of other lanes may have been answered too.
    let repeats = line.assert_delivered(1000).await;
    assert!(repeats <= 3 * 100, "{repeats} repeats");
}

#[tokio::test]
async fn f04_a_commit_whose_answer_is_lost_is_found_out_by_reading_again() {
    let database = database().await;
    let mut connection = database.connect().await;
    let proxy = Proxy::to(postgres().port());
    load(&mut connection, 20, 3).await;
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.lanes = 1;
    setup.outbox.url = outbox_relay::secret::Secret::inline(proxy.url(database.url(), postgres().port()));
    let mut running = setup.run();
    gate.entered().await;
    // The next statement with this text is the settle's commit.
    proxy.drop_answers(1, "commit\0");
    gate.open(1000);
    running.until_not_ready("settle").await;
    assert_eq!(proxy.count(), 1);
    until_empty(&mut connection).await;
    emit(&mut connection, "next", "k").await;
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(sink.accepted().len(), 21, "the settle was committed, so nothing may be repeated");
    super::assert_logged_once(&mut connection, 21).await;
}

#[tokio::test]
async fn f04_a_commit_that_never_arrived_is_found_out_by_reading_again() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let proxy = Proxy::to(postgres().port());
    let through = proxy.url(line.database.url(), postgres().port());
    let settings = [("DATABASE_URL", through.as_str()), ("FAILPOINTS", "before_commit=1*sleep(2000)")];
    let mut running = line.start(&settings);
    // The proof at the start runs the statements of a settle, so the failpoint must come after it.
    running.until_log("\"message\":\"ready\"");
    load(&mut connection, 20, 3).await;
    eventually("it has written, and not committed", async || count(&mut connection, SETTLING).await > 0).await;
    proxy.cut();
    running.until_log("cannot settle");
    until_empty(&mut connection).await;
    stop(running);
    assert!(line.assert_delivered(20).await <= 20, "repeats");
}

#[tokio::test]
async fn f05_killed_while_dead_lettering_the_event_is_in_exactly_one_table() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    sql(&mut connection, "select emit_event('poison', jsonb_build_object('a', repeat('x', 2000)), 'k', '1')").await;
    load(&mut connection, 10, 1).await;
    let rows = "select concat_ws(' ', (select count(*) from event_outbox), (select count(*) from event_dead_letter),
                                 (select count(*) from event_processing_log))";
    let settings = [("EVENT_MAX_PAYLOAD_SIZE", "1000"), ("FAILPOINTS", "dlq_inserted=1*return(abort)")];
    assert_eq!(line.start(&settings).finish().code, None, "SIGABRT");
    assert_eq!(column(&mut connection, rows).await, ["11 0 0"]);
    line.start_with(&["--once"], &settings[..1]).finish().exited(3).says(&["payload_too_large"]);
    assert_eq!(column(&mut connection, rows).await, ["0 1 11"]);
}

#[tokio::test]
async fn f07_a_relay_that_was_frozen_is_replaced_and_settles_nothing_when_it_thaws() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let mut hangs = Server::start("redis", &[]);
    let line = Line { redis_url: hangs.url().to_owned(), ..line };
    let settings = [("EVENT_DEFAULT_TIMEOUT", "1000"), ("RELAY_LANES", "1")];
    let mut zombie = line.start(&settings);
    zombie.until_log("\"message\":\"ready\"");
    // The relay has a connection to Redis, so what it sends next arrives.
    load(&mut connection, 1, 1).await;
    until_empty(&mut connection).await;
    hangs.pause();
    load(&mut connection, 50, 5).await;
    eventually("it holds a claim", async || count(&mut connection, CLAIMED).await > 0).await;
    zombie.signal("STOP");
    let frozen = Instant::now();
    hangs.resume();

    let mut heir = line.start(&settings);
    until_empty(&mut connection).await;
    println!("F07: taken over {:?} after it froze, by the server's timeout of 16 s", frozen.elapsed());
    zombie.signal("CONT");
    zombie.until_log("not ready; trying again");
    load(&mut connection, 50, 5).await;
    until_empty(&mut connection).await;
    assert!(heir.is_running());
    let worker = format!("event_processing_log where outbox_id between 2 and 51 and worker like '%:{}'", zombie.id());
    assert_eq!(count(&mut connection, &worker).await, 0, "settled by the zombie");
    stop(zombie);
    stop(heir);
    let repeats = line.assert_delivered(101).await;
    assert!(repeats <= 50, "{repeats} repeats");
}

#[tokio::test]
async fn f12_drains_in_a_loop_beside_a_relay_under_load_lose_and_repeat_nothing() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let batch = [("EVENT_OUTBOX_BATCH_SIZE", "50")];
    let mut daemon = line.start(&batch);
    daemon.until_log("\"message\":\"ready\"");
    let mut helped = 0;
    for _ in 0..8 {
        load(&mut connection, 5000, 20).await; // so many that the daemon needs longer than a drain takes to start
        // Cron may start two at a time.
        let drains = [line.start_with(&["--once"], &batch), line.start_with(&["--once"], &batch)];
        for drain in drains {
            let told = drain.finish().exited(0).stderr;
            helped += usize::from(!told.contains("\"published\":0"));
        }
    }
    until_empty(&mut connection).await;
    stop(daemon);
    assert!(helped > 0, "the daemon was always first, so this test proves nothing");
    assert_eq!(line.assert_delivered(40_000).await, 0, "repeats");
}

#[tokio::test]
async fn f06_what_was_claimed_and_not_published_at_a_stop_is_published_once_and_charged_to_nobody() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    load(&mut connection, 100, 10).await;
    let mut running = line.start(&[("FAILPOINTS", "before_publish=1*sleep(1000)")]);
    eventually("it holds a claim", async || count(&mut connection, CLAIMED).await > 0).await;
    let asked = Instant::now();
    running.signal("TERM");
    running.until_log("stopping");
    running.finish().exited(0);
    assert!(asked.elapsed() < Duration::from_secs(30), "it did not stop before its timeouts");
    let length = line.length();
    let logged = usize::try_from(count(&mut connection, "event_processing_log").await).unwrap();
    assert_eq!(length, logged, "what was published is settled");
    assert_eq!(count(&mut connection, "event_outbox where attempts > 0").await, 0);
    line.start_with(&["--once"], &[]).finish().exited(0);
    until("all is there", || stream::length(&mut stream::connect(redis().url()), &line.stream) == 100);
    assert_eq!(line.assert_delivered(100).await, 0, "repeats");
}
