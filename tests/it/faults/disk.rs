//! A PostgreSQL that is full, or that refuses writes while reads work.

use std::time::Duration;

use sqlx::PgConnection;

use super::postgres::{arrivals, publishing};
use super::{Line, assert_first_in_order, assert_logged_once, load, stop, until_empty};
use crate::harness::{Setup, count, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Server, database, database_on};
use crate::stores::Client;

#[tokio::test]
async fn f18_a_database_that_cannot_record_is_not_published_from_again_and_again() {
    // As with a full disk, every settle fails and every read works. A sequence counts the tries.
    const REFUSE: &str = "create sequence refusals;
        create function refuse() returns trigger language plpgsql as
        $$ begin perform nextval('refusals'); raise exception 'disk full' using errcode = '53100'; end $$;
        create trigger refuse before insert on event_processing_log for each row execute function refuse()";
    for calls in [0, 1] {
        let database = database().await;
        let mut connection = database.connect().await;
        load(&mut connection, 10, 1).await;
        let (sink, running) = if calls == 0 {
            // It refuses from the start: the relay's proof of writability fails before anything is published.
            sql(&mut connection, REFUSE).await;
            let sink = ScriptedSink::accepting();
            (sink.clone(), Setup::new(&database, vec![("a", sink)]).run())
        } else {
            // It refuses while events are published: the lane returns, and its proof fails.
            let (sink, gate, running) = publishing(&database, |_| {}).await;
            sql(&mut connection, REFUSE).await;
            gate.open(1000);
            (sink, running)
        };
        let tried = "select last_value from refusals";
        eventually("it tried again", async || connection.number(tried).await >= 5).await;
        assert_eq!(sink.calls(), calls, "events were published again although nothing could be recorded");
        assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 10);
        sql(&mut connection, "drop trigger refuse on event_processing_log").await;
        until_empty(&mut connection).await;
        running.stop().await;
        assert_eq!(assert_first_in_order(arrivals(&sink)), (10, 10 * calls));
        assert_logged_once(&mut connection, 10).await;
    }
}

#[tokio::test]
async fn f18_a_proof_that_fails_of_itself_leaves_none_of_its_rows() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    load(&mut connection, 10, 1).await;
    // The proof fails after it has inserted its own rows, and without an error of the database.
    let mut running = line.start(&[("FAILPOINTS", "proof_inserted=1*return")]);
    running.until_log("failpoint proof_inserted");
    until_empty(&mut connection).await;
    stop(running);
    assert_eq!(line.assert_delivered(10).await, 0, "repeats");
}

/// Limits the size of the files that new backends write, in bytes; `unlimited` removes the limit.
async fn limit_files(server: &Server, connection: &mut PgConnection, bytes: &str) {
    // The server's own user runs it: only root may do this to another user's process, and not in every container.
    let program = format!("prlimit --pid {} --fsize={bytes}:unlimited", server.pid());
    sql(connection, format!("copy (select 1) to program '{program}'")).await;
}

#[tokio::test]
async fn f18_a_log_that_cannot_grow_stops_the_publishing_until_it_can() {
    const LIMIT: i64 = 16 << 20; // a WAL segment's size, which must fit
    let server = Server::start("postgres", &["--fast", "--set", "autovacuum=off"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    // Fill the log until about a thousand more rows fit.
    let longest =
        "select max(pg_relation_size(inhrelid)) from pg_inherits where inhparent = 'event_processing_log'::regclass";
    let fill = "insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
                select gen_random_uuid(), 0, 'filler', 'a', 'published', 1, 0, repeat('x', 100) from generate_series(1, 2000)";
    while connection.number(longest).await < LIMIT - (450 << 10) {
        sql(&mut connection, fill).await;
    }
    load(&mut connection, 5000, 50).await;
    // The limit is half a page more, so that the last write is cut short, as on a full disk.
    limit_files(&server, &mut connection, &(LIMIT + 4096).to_string()).await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    (setup.relay.lanes, setup.relay.batch_events) = (1, 100);
    let mut running = setup.run();
    running.until_not_ready("could not extend file").await;
    let (calls, logged) = (sink.calls(), count(&mut connection, "event_processing_log where event_type = 'a'").await);
    assert!(logged > 0, "it was full from the start");
    tokio::time::sleep(Duration::from_secs(3)).await; // the duration of the fault
    let more = sink.calls() - calls;
    println!("F18: {logged} were recorded before the disk was full; {more} more publish calls while it was");
    assert!(more <= 1, "{more} more publish calls although nothing could be recorded");
    limit_files(&server, &mut connection, "unlimited").await;
    until_empty(&mut connection).await;
    running.stop().await;
    let (distinct, repeats) = assert_first_in_order(arrivals(&sink));
    assert_eq!(distinct, 5000);
    assert!(repeats <= 300, "{repeats} repeats");
    sql(&mut connection, "delete from event_processing_log where event_type = 'filler'").await;
    assert_logged_once(&mut connection, 5000).await;
}
