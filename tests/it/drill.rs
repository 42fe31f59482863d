//! The operator's drill: several things go wrong at once. `relay status` shows each within 10 s, health, metrics, page and log
//! tell the same, and one command each mends it, as `relay_operator`. At the end every event is accounted for, in order.

use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::binary::{Running, finished, relay};
use crate::harness::{column, count, eventually, sql};
use crate::observe::Served;
use crate::readback::RedisClient;
use crate::schema::roles::{apply, login};
use crate::servers::{Server, database};

/// How long an operator may have to wait until a cause is visible.
const WITHIN: Duration = Duration::from_secs(10);

/// Returns the status as `relay_operator` sees it, once `holds` is true of it.
#[track_caller]
fn until_status(url: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + WITHIN;
    loop {
        let shown = finished(&["status", "--json", "--keys"], &[("DATABASE_URL", url)]).exited(0);
        let status: Value = serde_json::from_str(&shown.stdout).unwrap();
        if holds(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "not within {WITHIN:?}: {what}; the status is {status:#}");
    }
}

/// Returns a part of the status of a destination.
fn part<'a>(status: &'a Value, destination: &str, name: &str) -> &'a Value {
    let mut destinations = status["destinations"].as_array().unwrap().iter();
    destinations.find(|there| there["name"] == destination).map_or(&Value::Null, |there| &there[name])
}

/// Inserts an event of this type for the order of this key.
async fn order(connection: &mut PgConnection, event_type: &str, key: &str) {
    sql(connection, format!("select emit_event('{event_type}', aggregate_type => 'order', aggregate_id => '{key}')"))
        .await;
}

/// A stream for each type, so that one type can be refused; the settings are those of the URL.
fn streams(server: &Server, name: &str, settings: &str) -> String {
    format!("redis+stream://127.0.0.1:{}?stream={name}:%7Bevent_type%7D&{settings}", server.port())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_cause_is_seen_from_status_and_mended_by_one_command() {
    let (database, mut shop, mail) = (database().await, Server::start("redis", &[]), Server::start("redis", &[]));
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    let worker = login(&database, &mut owner, "relay_worker").await;
    let operator = login(&database, &mut owner, "relay_operator").await;
    let as_operator = [("DATABASE_URL", operator.as_str())];
    let mut redis = RedisClient::connect(&mail);
    redis.tell("SET mail:stuck text");
    redis.tell("SET audit:poison text");
    let (shop_url, mail_url, audit_url) = (
        streams(&shop, "shop", "breaker_threshold=1&breaker_recovery=1s"),
        streams(&mail, "mail", "max_retries=100&backoff=1h"),
        streams(&mail, "audit", "max_retries=0"),
    );
    let common = [
        ("DATABASE_URL", worker.as_str()),
        ("RELAY_DESTINATION_MAIL", mail_url.as_str()),
        ("RELAY_DESTINATION_AUDIT", audit_url.as_str()),
    ];

    // A destination is renamed while it is owed an event.
    let old = ("RELAY_DESTINATION_OLD", "redis+stream://127.0.0.1:1?stream=shop&breaker_threshold=1");
    let before = Running::start(relay(&["run"], &[&common[..], &[old, ("RELAY_HTTP_ADDR", "off")]].concat()));
    order(&mut owner, "renamed", "1").await;
    until_status(&operator, "the old name is owed an event", |status| part(status, "old", "pending")["count"] == 1);
    before.signal("TERM");
    before.finish().exited(0);

    // A relay hangs in the middle of a batch.
    let present = [&common[..], &[("RELAY_DESTINATION_SHOP", shop_url.as_str())]].concat();
    shop.pause();
    let hung = Running::start(relay(&["run"], &[&present[..], &[("RELAY_HTTP_ADDR", "off")]].concat()));
    order(&mut owner, "held", "2").await;
    until_status(&operator, "a relay has a batch", |status| status["relays"][0]["batches"] == 1);
    hung.signal("STOP");
    shop.resume();

    let served = Served::start(&present);
    for (event_type, key) in [("poison", "3"), ("stuck", "4"), ("later", "4"), ("later", "4")] {
        order(&mut owner, event_type, key).await;
    }
    shop.stop();
    order(&mut owner, "away", "5").await;
    let status = until_status(&operator, "every cause", |status| {
        part(status, "shop", "state") == "down"
            && part(status, "old", "state") == "not_configured"
            && part(status, "audit", "dead_letters")["count"] == 1
            && status["blocked_keys"].as_array().is_some_and(|keys| {
                keys.iter().any(|key| {
                    key["destination"] == "mail" && key["event_type"] == "stuck" && key["behind"]["count"] == 2
                })
            })
            && status["relays"].as_array().is_some_and(|relays| relays.iter().any(|relay| relay["batches"] == 1))
    });

    // Health, metrics, page and log tell the same.
    let ready = served.until("/readyz", 200, "destination shop is down");
    assert!(ready.body.contains("degraded"), "{ready:?}");
    served.until("/metrics", 200, "outbox_relay_breaker_state{destination=\"shop\"} 2");
    served.until("/metrics", 200, "verdict=\"dead_lettered\",code=\"WRONGTYPE\"} 1");
    let page = served.until("/status.json", 200, "\"not_configured\"").json();
    assert_eq!(part(&page["status"], "shop", "state"), "down", "{page}");
    assert_eq!(page["status"]["blocked_keys"][0]["event_type"], "stuck", "{page}");
    let log = served.running.log();
    for words in ["destination down, breaker open", "event dead-lettered", "it will be tried again"] {
        assert!(log.contains(words), "{words:?} is missing in {log}");
    }

    // The relay that hangs: its process id stands in the status.
    let relays = status["relays"].as_array().unwrap();
    let holder = relays.iter().find(|relay| relay["batches"] == 1).unwrap()["worker"].as_str().unwrap();
    assert_eq!(holder.rsplit(':').next().unwrap(), hung.id().to_string(), "{status:#}");
    hung.signal("KILL");
    // The destination that is down comes back by itself once its server does.
    shop.start_again();
    until_status(&operator, "shop is up", |status| part(status, "shop", "state") == "up");
    // The event that blocks its key, once its cause is mended.
    redis.tell("DEL mail:stuck");
    finished(&["retry-now", "--destination", "mail"], &as_operator).exited(0).says(&[]);
    until_status(&operator, "no key is blocked", |status| status["blocked_keys"].as_array().unwrap().is_empty());
    // The poison.
    redis.tell("DEL audit:poison");
    finished(&["dead-letter", "redrive", "--destination", "audit"], &as_operator).exited(0);
    // The renamed destination.
    finished(&["move-owed", "old", "shop"], &as_operator).exited(0);

    // A lock on the table, which the status names together with its cure.
    let mut locker = PgConnection::connect(&worker).await.unwrap();
    sql(&mut locker, "begin; lock table event_outbox in access exclusive mode").await;
    let status = until_status(&operator, "the lock", |status| {
        status["obstacles"].as_array().unwrap().iter().any(|obstacle| obstacle["cause"] == "table_locked")
    });
    let text = status["obstacles"][0]["text"].as_str().unwrap();
    let cure =
        text.split("select pg_catalog.pg_terminate_backend(").nth(1).unwrap_or_else(|| panic!("no cure in {text}"));
    let pid = cure.split(')').next().unwrap();
    sql(
        &mut owner,
        format!("grant pg_signal_backend to {}", operator.split("//").nth(1).unwrap().split(':').next().unwrap()),
    )
    .await;
    let mut hand = PgConnection::connect(&operator).await.unwrap();
    sql(&mut hand, format!("select pg_catalog.pg_terminate_backend({pid})")).await;

    eventually("nothing waits", async || count(&mut owner, "event_outbox").await == 0).await;
    served.until("/readyz", 200, "ready\n");
    // Every event was taken by each of its destinations once, as the log says; those of a key in order.
    let published =
        "select event_type || ' ' || destination from event_processing_log where status = 'published' order by 1";
    let published = column(&mut owner, published).await;
    let mut expected: Vec<String> = ["held", "poison", "stuck", "later", "later", "away"]
        .iter()
        .flat_map(|event_type| ["audit", "mail", "shop"].map(|destination| format!("{event_type} {destination}")))
        .chain(["renamed audit".to_owned(), "renamed mail".to_owned(), "renamed shop".to_owned()])
        .collect();
    expected.sort();
    assert_eq!(published, expected);
    for name in ["mail:later", "audit:later"] {
        let sequences = redis.sequences(name);
        assert!(sequences.len() == 2 && sequences[0] < sequences[1], "{name}: {sequences:?}");
    }
    let actions = column(&mut owner, "select action from event_operator_action order by id").await;
    assert_eq!(actions.len(), 3, "each remedy is written down: {actions:?}");
}
