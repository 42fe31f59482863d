//! Settles that the database swallows or refuses: nothing is published again and again, and the cause is named.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use outbox_relay::outbox::database::Database;
use outbox_relay::outbox::register::Configuration;
use outbox_relay::outbox::{CheckRequest, Usage};
use outbox_relay::secret::Secret;
use tokio_util::sync::CancellationToken;

use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::servers::{Server, database_on};
use crate::stores::{Postgres, Sqlite, Store};

/// A way in which an application can make the relay's writes get lost, how to undo it, and what the relay reports.
type Way = (&'static str, &'static str, &'static str);

const FUNCTIONS: &str = "
create function gives_new() returns trigger language plpgsql as $$ begin return new; end $$;
create function gives_null() returns trigger language plpgsql as $$ begin return null; end $$;
create function gives_old() returns trigger language plpgsql as $$ begin return old; end $$;
create function refuses() returns trigger language plpgsql as $$ begin raise exception 'not today'; end $$;";

const POSTGRES: [Way; 17] = [
    (
        "create trigger zz before insert or update or delete on event_outbox for each row execute function gives_new()",
        "drop trigger zz on event_outbox",
        "trigger zz on event_outbox",
    ),
    (
        "create trigger zz before delete on event_outbox for each row execute function gives_null()",
        "drop trigger zz on event_outbox",
        "trigger zz on event_outbox",
    ),
    (
        "create trigger zz before update on event_outbox for each row execute function gives_null()",
        "drop trigger zz on event_outbox",
        "the update on event_outbox has no effect",
    ),
    (
        "create trigger aa before update on event_outbox for each row execute function gives_old()",
        "drop trigger aa on event_outbox",
        "trigger aa on event_outbox",
    ),
    (
        "create trigger zz before insert on event_processing_log for each row execute function gives_null()",
        "drop trigger zz on event_processing_log",
        "trigger zz on event_processing_log",
    ),
    (
        "create trigger zz before insert on event_dead_letter for each row execute function gives_null()",
        "drop trigger zz on event_dead_letter",
        "trigger zz on event_dead_letter",
    ),
    (
        "create trigger zz before insert on event_history for each row execute function gives_null()",
        "drop trigger zz on event_history",
        "trigger zz on event_history",
    ),
    (
        "create rule zz as on delete to event_outbox do instead nothing",
        "drop rule zz on event_outbox",
        "rule zz on event_outbox",
    ),
    (
        "create rule zz as on update to event_outbox do instead nothing",
        "drop rule zz on event_outbox",
        "rule zz on event_outbox",
    ),
    (
        "create rule zz as on insert to event_processing_log do instead nothing",
        "drop rule zz on event_processing_log",
        "rule zz on event_processing_log",
    ),
    (
        "create rule zz as on insert to event_dead_letter do instead nothing",
        "drop rule zz on event_dead_letter",
        "rule zz on event_dead_letter",
    ),
    (
        "create trigger zz before delete on event_outbox execute function refuses()",
        "drop trigger zz on event_outbox",
        "not today",
    ),
    (
        "create trigger zz after update on event_outbox execute function refuses()",
        "drop trigger zz on event_outbox",
        "not today",
    ),
    (
        "create trigger zz after insert on event_processing_log for each row execute function refuses()",
        "drop trigger zz on event_processing_log",
        "not today",
    ),
    (
        "create trigger zz before delete on event_outbox for each row execute function gives_new();
         create trigger yy before insert on event_processing_log for each row execute function gives_null();
         create rule xx as on insert to event_dead_letter do instead nothing",
        "drop trigger zz on event_outbox; drop trigger yy on event_processing_log; drop rule xx on event_dead_letter",
        "rule xx on event_dead_letter, trigger yy on event_processing_log, trigger zz on event_outbox",
    ),
    (
        "create constraint trigger dd after delete on event_outbox deferrable initially deferred
         for each row execute function refuses()",
        "drop trigger dd on event_outbox",
        "trigger dd on event_outbox",
    ),
    (
        "create constraint trigger dd after insert on event_processing_log deferrable initially deferred
         for each row execute function refuses()",
        "drop trigger dd on event_processing_log",
        "trigger dd on event_processing_log",
    ),
];

const SQLITE: [Way; 8] = [
    (
        "create trigger zz before delete on event_outbox begin select raise(ignore); end",
        "drop trigger zz",
        "zz on event_outbox",
    ),
    (
        "create trigger zz before update on event_outbox begin select raise(ignore); end",
        "drop trigger zz",
        "a trigger swallows the update on event_outbox",
    ),
    (
        "create trigger zz before insert on event_processing_log begin select raise(ignore); end",
        "drop trigger zz",
        "a trigger swallows the insert on event_processing_log",
    ),
    (
        "create trigger zz before insert on event_dead_letter begin select raise(ignore); end",
        "drop trigger zz",
        "zz on event_dead_letter",
    ),
    (
        "create trigger zz before insert on event_history begin select raise(ignore); end",
        "drop trigger zz",
        "zz on event_history",
    ),
    (
        "create trigger zz before delete on event_outbox begin select raise(abort, 'not today'); end",
        "drop trigger zz",
        "not today",
    ),
    (
        "create trigger zz after update on event_outbox begin select raise(rollback, 'not today'); end",
        "drop trigger zz",
        "not today",
    ),
    (
        "create trigger zz before delete on event_outbox begin select raise(ignore); end;
         create trigger yy before insert on event_processing_log begin select raise(ignore); end",
        "drop trigger zz; drop trigger yy",
        "zz on event_outbox, yy on event_processing_log",
    ),
];

async fn prepared<S: Store>(functions: &str) -> (S, S::Connection) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, functions).await;
    (store, connection)
}

const USAGE: Usage = Usage { several_destinations: false, history: true };

/// The failed lines of `relay check`, as one text.
pub(super) async fn failures(store: &impl Store, usage: Usage) -> String {
    let database = Database::new(Secret::inline(store.url()), false).unwrap();
    let configuration = Configuration::new(BTreeMap::new(), Vec::new());
    let publish_timeout = Duration::from_secs(30);
    let request = CheckRequest {
        destinations: &["a".to_owned()],
        publish_timeout,
        usage,
        lanes: 1,
        configuration: &configuration,
    };
    let checks = database.operate().check(request).await;
    // The test's relay has another configuration than this check, which would fail for that.
    let others = checks.into_iter().filter(|check| check.subject != "configuration");
    others.filter_map(|check| check.result.err()).collect::<Vec<_>>().join("\n")
}

async fn nothing_is_published_where_nothing_is_recorded<S: Store>(functions: &str, ways: &[Way]) {
    let (store, mut connection) = prepared::<S>(functions).await;
    assert_eq!(failures(&store, USAGE).await, "");
    let sink = ScriptedSink::accepting();
    for (round, (how, undo, said)) in ways.iter().enumerate() {
        sql(&mut connection, how).await;
        let failures = failures(&store, USAGE).await;
        assert!(failures.contains(said), "{how}: check says {failures:?}");
        let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
        setup.outbox.usage = USAGE;
        let error = setup.relay().drain(CancellationToken::new()).await.unwrap_err().explain();
        assert!(error.contains(said) && error.contains("nothing is published"), "{how}: {error}");
        sql(&mut connection, undo).await;
        emit(&mut connection, &format!("e{round}"), "k").await;
        assert!(!Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered);
    }
    assert_eq!(sink.accepted().len(), ways.len());
    assert_eq!(count(&mut connection, "event_outbox").await, 0, "the rows of proofs were rolled back");
    assert_eq!(count(&mut connection, "event_processing_log").await, ways.len() as i64);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_nothing_is_published_where_nothing_is_recorded() {
    nothing_is_published_where_nothing_is_recorded::<Postgres>(FUNCTIONS, &POSTGRES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_nothing_is_published_where_sqlite_records_nothing() {
    nothing_is_published_where_nothing_is_recorded::<Sqlite>("", &SQLITE).await;
}

/// The cause appears while a relay runs, and disappears again.
async fn what_comes_while_it_works_costs_a_repeat_at_most<S: Store>(functions: &str, ways: &[Way], repeats: usize) {
    let (store, mut connection) = prepared::<S>(functions).await;
    let sink = ScriptedSink::accepting();
    let mut running = Setup::new(&store, vec![("a", sink.clone())]).run();
    for (round, (how, undo, said)) in ways.iter().enumerate() {
        let before = sink.accepted().len();
        sql(&mut connection, how).await;
        for index in 0..5 {
            emit(&mut connection, &format!("e{round}-{index}"), &format!("k{index}")).await;
        }
        running.until_not_ready(said).await;
        let stopped = sink.accepted().len();
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(500) {
            tokio::time::sleep(Duration::from_millis(20)).await; // the duration of the fault
        }
        assert!(sink.accepted().len() <= before + 5, "{how}: events were repeated");
        assert!(sink.accepted().len() <= stopped + 5, "{how}: the relay goes on publishing");
        sql(&mut connection, undo).await;
        eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
        running.until_ready().await;
        let arrived = sink.accepted().len() - before;
        assert!((5..=5 + repeats).contains(&arrived), "{how}: {arrived} entries for 5 events");
    }
    running.stop().await;
    assert_eq!(count(&mut connection, "event_processing_log").await, 5 * ways.len() as i64);
}

/// The ways that concern a settle of published events.
fn met(ways: &[Way]) -> Vec<Way> {
    let met = |how: &str| !["update", "dead_letter", "history"].iter().any(|other| how.contains(other));
    ways.iter().filter(|(how, ..)| met(how)).copied().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_what_comes_while_relays_work_costs_one_repeat_at_most() {
    what_comes_while_it_works_costs_a_repeat_at_most::<Postgres>(FUNCTIONS, &met(&POSTGRES), 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_what_comes_while_a_relay_works_on_sqlite_costs_no_repeat() {
    what_comes_while_it_works_costs_a_repeat_at_most::<Sqlite>("", &met(&SQLITE), 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_row_policies_that_keep_the_relay_from_deleting_are_named() {
    // The test has its own server, because roles belong to the server.
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    crate::schema::roles::apply(&mut connection).await;
    sql(
        &mut connection,
        "create role worker login password 'known' in role relay_worker;
         alter table event_outbox enable row level security;
         create policy everybody on event_outbox using (true);
         create policy no_delete on event_outbox as restrictive for delete using (false)",
    )
    .await;
    emit(&mut connection, "e", "k").await;
    let (_, place) = database.url().rsplit_once('@').unwrap();
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.url = Secret::inline(format!("postgres://worker:known@{place}"));
    let error = setup.relay().drain(CancellationToken::new()).await.unwrap_err().explain();
    let named = error.contains("row policy no_delete on event_outbox") || error.contains("row-level security");
    assert!(named, "{error}");
    assert_eq!(sink.calls(), 0);
}

/// An operator changes a row during its publish, so that it is stored elsewhere. What was published is settled nevertheless.
async fn a_row_that_was_changed_meanwhile_is_settled<S: Store>(act: Act) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..3 {
        emit(&mut connection, &format!("e{index}"), "").await;
    }
    let (sink, gate) = (ScriptedSink::new(move |_| act), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.policy.retry.max_retries = 0;
    let running = setup.run();
    gate.entered().await;
    sql(&mut connection, "update event_outbox set correlation_id = 'changed' where event_type = 'e1'").await;
    gate.open(1000);
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.sizes().iter().sum::<usize>(), 3);
    assert_eq!(count(&mut connection, "event_processing_log").await, 3);
    let dead = if act == Act::Refuse { 3 } else { 0 };
    assert_eq!(count(&mut connection, "event_dead_letter").await, dead);
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_a_row_that_an_operator_changes_during_a_publish_is_settled() {
    a_row_that_was_changed_meanwhile_is_settled::<Postgres>(Act::Accept).await;
    a_row_that_was_changed_meanwhile_is_settled::<Postgres>(Act::Refuse).await;
    a_row_that_was_changed_meanwhile_is_settled::<Sqlite>(Act::Accept).await;
    a_row_that_was_changed_meanwhile_is_settled::<Sqlite>(Act::Refuse).await;
}

/// Ways to refuse or swallow only the settle of events of type `bad`, and how to undo each.
const BAD_ON_POSTGRES: [(&str, &str); 8] = [
    (
        "create function no_bad() returns trigger language plpgsql as $$
         begin if old.event_type = 'bad' then raise exception 'bad is bad'; end if; return old; end $$;
         create trigger zz before delete on event_outbox for each row execute function no_bad()",
        "drop trigger zz on event_outbox",
    ),
    (
        "create trigger zz before delete on event_outbox for each row when (old.event_type = 'bad') execute function gives_null()",
        "drop trigger zz on event_outbox",
    ),
    (
        "create trigger zz before insert on event_processing_log for each row when (new.event_type = 'bad')
         execute function gives_null()",
        "drop trigger zz on event_processing_log",
    ),
    (
        "alter table event_processing_log add constraint no_bad check (event_type <> 'bad')",
        "alter table event_processing_log drop constraint no_bad",
    ),
    (
        "create unique index ux on event_outbox (event_id);
         create table app_note (event_id uuid references event_outbox (event_id));
         insert into app_note select event_id from event_outbox where event_type = 'bad'",
        "drop table app_note; drop index ux",
    ),
    (
        "create constraint trigger dd after delete on event_outbox deferrable initially deferred
         for each row when (old.event_type = 'bad') execute function refuses()",
        "drop trigger dd on event_outbox",
    ),
    (
        "create unique index ux on event_outbox (event_id);
         create table app_note (event_id uuid references event_outbox (event_id) deferrable initially deferred);
         insert into app_note select event_id from event_outbox where event_type = 'bad'",
        "drop table app_note; drop index ux",
    ),
    ("create index zz on event_processing_log ((1 / (case event_type when 'bad' then 0 else 1 end)))", "drop index zz"),
];

const BAD_ON_SQLITE: [(&str, &str); 4] = [
    (
        "create trigger zz before delete on event_outbox when old.event_type = 'bad' begin select raise(abort, 'bad is bad'); end",
        "drop trigger zz",
    ),
    (
        "create trigger zz before delete on event_outbox when old.event_type = 'bad' begin select raise(ignore); end",
        "drop trigger zz",
    ),
    (
        "create trigger zz after insert on event_processing_log when new.event_type = 'bad'
         begin select raise(rollback, 'bad is bad'); end",
        "drop trigger zz",
    ),
    (
        "create unique index zz on event_processing_log (event_type) where event_type = 'bad';
         insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
         values ('', 0, 'bad', '', 'published', 1, 0, '')",
        "drop index zz",
    ),
];

async fn one_event_that_cannot_be_settled_is_parked_and_the_others_are_settled<S: Store>(
    functions: &str,
    ways: &[(&str, &str)],
) {
    for (how, undo) in ways {
        let (store, mut connection) = prepared::<S>(functions).await;
        for index in 0..101 {
            let name = if index == 50 { "bad".to_owned() } else { format!("e{index}") };
            emit(&mut connection, &name, &format!("k{}", index % 10)).await;
        }
        sql(&mut connection, how).await;
        assert_eq!(failures(&store, USAGE).await, "", "{how}");
        let sink = ScriptedSink::accepting();
        let running = Setup::new(&store, vec![("a", sink.clone())]).run();
        eventually("all but one is settled", async || count(&mut connection, "event_outbox").await == 1).await;
        // Its key is not blocked.
        emit(&mut connection, "after", "k0").await;
        eventually("its key goes on", async || sink.names().last().is_some_and(|name| name == "after")).await;
        eventually("that is settled", async || count(&mut connection, "event_outbox").await == 1).await;
        assert_eq!(sink.accepted().len(), 102, "{how}: nothing is published again");
        let parked = "select concat_ws(' ', event_type, status, destination, last_error) from event_outbox";
        let parked = column(&mut connection, parked).await.join("");
        assert!(parked.starts_with("bad scheduled a settle_failed: delivered, which cannot be recorded: "), "{parked}");
        assert_eq!(count(&mut connection, "event_processing_log where event_type <> 'bad'").await, 101, "{how}");
        assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
        let stuck = failures(&store, USAGE).await;
        assert!(stuck.contains("parked until somebody acts: 1 events, and behind them by their keys 0"), "{stuck}");
        // An operator removes the cause and makes the event due.
        sql(&mut connection, undo).await;
        sql(&mut connection, format!("update event_outbox set available_at = {}", S::in_ms(-1000))).await;
        eventually("it is settled", async || count(&mut connection, "event_outbox").await == 0).await;
        running.stop().await;
        assert_eq!(sink.names().iter().filter(|name| *name == "bad").count(), 2, "{how}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_one_event_that_cannot_be_settled_is_parked_and_the_others_are_settled() {
    one_event_that_cannot_be_settled_is_parked_and_the_others_are_settled::<Postgres>(FUNCTIONS, &BAD_ON_POSTGRES)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_one_event_that_sqlite_does_not_settle_is_parked_and_the_others_are_settled() {
    one_event_that_cannot_be_settled_is_parked_and_the_others_are_settled::<Sqlite>("", &BAD_ON_SQLITE).await;
}

/// The event can be neither settled nor parked. The relay publishes nothing more and reports why.
async fn an_event_that_cannot_even_be_parked_stops_the_relay<S: Store>(functions: &str, how: &str, undo: &str) {
    let (store, mut connection) = prepared::<S>(functions).await;
    sql(&mut connection, how).await;
    for name in ["e1", "bad", "e2"] {
        emit(&mut connection, name, "").await;
    }
    let sink = ScriptedSink::accepting();
    let mut running = Setup::new(&store, vec![("a", sink.clone())]).run();
    running.until_not_ready("bad is bad").await;
    eventually("the others are settled", async || count(&mut connection, "event_outbox").await == 1).await;
    emit(&mut connection, "e3", "").await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(20)).await; // the duration of the fault
    }
    assert!(!sink.names().contains(&"e3".to_owned()));
    assert_eq!(sink.names().iter().filter(|name| *name == "bad").count(), 1);
    sql(&mut connection, undo).await;
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert!(sink.names().iter().filter(|name| *name == "bad").count() <= 2);
    assert_eq!(count(&mut connection, "event_processing_log").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_an_event_that_cannot_even_be_parked_stops_the_relay_on_sqlite() {
    an_event_that_cannot_even_be_parked_stops_the_relay::<Sqlite>(
        "",
        "create trigger zz before delete on event_outbox when old.event_type = 'bad' begin select raise(abort, 'bad is bad'); end;
         create trigger yy before update on event_outbox when old.event_type = 'bad' begin select raise(abort, 'bad is bad'); end",
        "drop trigger zz; drop trigger yy",
    )
    .await;
}
