//! Destinations of `RELAY_DESTINATION_<NAME>`, and a destination's own retries, timeout and breaker.

use super::{NOWHERE, STDOUT, file};
use crate::binary::{Finished, finished};
use crate::harness::{column, count, sql};
use crate::servers::{database, redis};
use crate::stream;
use crate::support::unique;

const PASSWORD: &str = "cAnary";

fn refused(variables: &[(&str, &str)]) -> Finished {
    let refused = finished(&["--once"], &[&[NOWHERE], variables].concat()).exited(2);
    assert!(!format!("{refused:?}").contains(PASSWORD), "{refused:?}");
    refused
}

#[tokio::test]
async fn each_kind_is_set_up_by_one_url() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "select emit_event('paid', aggregate_id => '1')").await;
    let (stream, channel) = (unique("by-url"), unique("by-url"));
    let server = redis().url().strip_prefix("redis://").unwrap().trim_end_matches('/').to_owned();
    let (streamed, published) = (
        format!("redis+stream://{server}?stream={stream}%3A%7Bevent_type%7D&maxlen=10"),
        format!("redis+pubsub://{server}?channel={channel}&format=payload&timeout=5s&max_retries=0"),
    );
    let variables = [
        ("DATABASE_URL", database.url()),
        ("RELAY_DESTINATION_ORDERS", streamed.as_str()),
        ("RELAY_DESTINATION_LIVE_FEED", &published),
        ("RELAY_DESTINATION_OUT", "stdout://"),
    ];
    let check = finished(&["check"], &variables).exited(0).stdout;
    for name in ["orders", "live_feed", "out"] {
        assert!(check.contains(&format!("ok    destination {name}: ")), "{check}");
    }
    let done = finished(&["--once"], &variables).exited(0);
    assert_eq!(done.stdout.lines().count(), 1);
    let arrived = stream::entries(&mut stream::connect(redis().url()), &format!("{stream}:paid"));
    assert_eq!(arrived.len(), 1);
    let names = column(&mut connection, "select distinct destination from event_processing_log order by 1").await;
    assert_eq!(names, ["live_feed", "orders", "out"]);
}

#[tokio::test]
async fn a_url_in_a_file_is_read_and_none_is_shown() {
    let database = database().await;
    let url = file(&format!("redis+stream://:{PASSWORD}@127.0.0.1:1/0?stream=a\n"));
    let variables = [
        ("DATABASE_URL", database.url()),
        ("RELAY_DESTINATION_A_FILE", url.path().to_str().unwrap()),
        ("RELAY_LOG", "trace"),
    ];
    let check = finished(&["check"], &variables).exited(1);
    assert!(check.stdout.contains("FAIL  destination a: "), "{}", check.stdout);
    assert!(!format!("{check:?}").contains(PASSWORD));
    let url = format!("redis+stream://:{PASSWORD}@127.0.0.1:1/0?stream=a");
    let check = finished(&["check"], &[("DATABASE_URL", database.url()), ("RELAY_DESTINATION_A", &url)]).exited(1);
    assert!(check.stdout.contains("RELAY_DESTINATION_A "), "{}", check.stdout);
    assert!(!format!("{check:?}").contains(PASSWORD));
}

#[test]
fn a_url_that_cannot_be_used_is_refused_with_the_reason_and_without_its_secrets() {
    let cases: [(String, &[&str]); 14] = [
        ("kafkaesque://h".to_owned(), &["no known scheme", "redis+stream", "eventbridge", "stdout"]),
        (format!("redis://:{PASSWORD}@h"), &["no known scheme"]),
        (format!(":{PASSWORD}@h"), &["no known scheme"]),
        (format!("redis+stream://:{PASSWORD}@h/0?steam=a"), &["unknown field `steam`"]),
        (format!("redis+stream://:{PASSWORD}@h/0?channel=a"), &["unknown field `channel`"]),
        (format!("redis+stream://:{PASSWORD}@h/0?maxlen=many"), &["invalid digit"]),
        (format!("redis+stream://:{PASSWORD}@h/0?stream=%7Btenant%7D"), &["stream", "unknown placeholder {tenant}"]),
        (format!("redis+stream://:{PASSWORD}@h/0?url=redis://x"), &["url"]),
        (format!("redis+stream://:pass?{PASSWORD}@h/0"), &["%3F"]),
        (format!("redis+stream://:{PASSWORD}@h/0?timeout=5"), &["timeout", "30s"]),
        (format!("redis+stream://:{PASSWORD}@h/0?timeout=5s&timeout_ms=5000"), &["both set"]),
        (format!("redis+stream://:{PASSWORD}@h/0?max_retries=1001"), &["max_retries", "0 to 1000"]),
        ("stdout://x".to_owned(), &["stdout://"]),
        ("file://events.jsonl".to_owned(), &["file:///path"]),
    ];
    for (url, parts) in cases {
        let refused = refused(&[("RELAY_DESTINATION_A", &url)]);
        assert!(refused.complaint().starts_with("RELAY_DESTINATION_A: "), "{}", refused.stderr);
        refused.says(parts);
    }
    refused(&[STDOUT, ("RELAY_DESTINATION_STDOUT", "stdout://")]).says(&[
        "two destinations \"stdout\"",
        "RELAY_STDOUT",
        "RELAY_DESTINATION_STDOUT",
    ]);
    refused(&[("RELAY_DESTINATION_A", "stdout://"), ("RELAY_DESTINATION_A_FILE", "/x")])
        .says(&["both RELAY_DESTINATION_A and"]);
    refused(&[("RELAY_DESTINATION_A_FILE", "/nowhere/url")]).says(&["RELAY_DESTINATION_A_FILE", "No such file"]);
    refused(&[STDOUT, ("RELAY_DESTINATION_", "stdout://")]).says(&["unknown variable RELAY_DESTINATION_"]);
    let in_file = file("[destinations.a]\ntype = \"stdout\"\n");
    let in_file = ("RELAY_CONFIG", in_file.path().to_str().unwrap());
    refused(&[in_file, ("RELAY_DESTINATION_A", "stdout://")]).says(&[
        "two destinations \"a\"",
        "RELAY_DESTINATION_A",
        "destinations.a",
    ]);
}

#[tokio::test]
async fn variables_that_kubernetes_sets_for_a_service_are_no_destinations() {
    let database = database().await;
    let variables = [
        ("DATABASE_URL", database.url()),
        STDOUT,
        ("RELAY_DESTINATION_PORT", "tcp://10.0.0.9:80"),
        ("RELAY_DESTINATION_SERVICE_HOST", "10.0.0.9"),
        ("RELAY_DESTINATION_PORT_80_TCP_ADDR", "10.0.0.9"),
    ];
    finished(&["--once"], &variables).exited(0);
}

#[tokio::test]
async fn each_destination_has_its_own_retries() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (at_once, later) = (unique("own:a"), unique("own:b"));
    let mut server = stream::connect(redis().url());
    for name in [&at_once, &later] {
        redis::cmd("SET").arg(format!("{name}:sick")).arg("x").exec(&mut server).unwrap();
    }
    // Both destinations refuse one event, and accept the other.
    sql(&mut connection, "select emit_event(t) from unnest(array['sick', 'fine']) t").await;
    let destination = |name: &str, stream: &str, more: &str| {
        format!(
            "[destinations.{name}]\ntype = \"redis-stream\"\nurl = \"{}\"\nstream = \"{stream}:{{event_type}}\"\n{more}\n",
            redis().url()
        )
    };
    let text =
        destination("a", &at_once, "max_retries = 0") + &destination("b", &later, "backoff = \"1h\"\nmax_retries = 9");
    let text = file(&text);
    let variables = [("DATABASE_URL", database.url()), ("RELAY_CONFIG", text.path().to_str().unwrap())];
    finished(&["--once"], &variables).exited(3);
    assert_eq!(column(&mut connection, "select destination from event_dead_letter").await, ["a"]);
    let waits = "event_outbox where destination = 'b' and available_at > clock_timestamp() + interval '20 minutes'";
    assert_eq!(count(&mut connection, waits).await, 1);
}

#[test]
fn a_field_of_every_destination_is_checked_in_the_file_too() {
    for (field, parts) in [
        ("backoff = \"soon\"", &["destinations.a.backoff", "30s"][..]),
        ("backoff = 5", &["destinations.a", "as in 30s"]),
        ("timeout_ms = 1", &["destinations.a.timeout", "from 10ms to 10m"]),
        ("breaker_threshold = 0", &["destinations.a.breaker_threshold", "1 to 1000"]),
        ("breaker_window = \"2days\"", &["destinations.a.breaker_window"]),
        ("breaker_recoveri = \"2s\"", &["`breaker_recoveri`"]),
    ] {
        let text = file(&format!("[destinations.a]\ntype = \"stdout\"\n{field}\n"));
        refused(&[("RELAY_CONFIG", text.path().to_str().unwrap())]).says(parts);
    }
}
