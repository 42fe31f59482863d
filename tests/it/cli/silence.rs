//! Passwords and payloads are never printed, whatever fails and at every log level.

use std::fs::File;

use super::{STDOUT, file};
use crate::binary::{Finished, Running, finished, relay};
use crate::harness::sql;
use crate::servers::{Server, database, redis};

const PASSWORD: &str = "cAnary-pAssword";
const PAYLOAD: &str = "cAnary-pAyload";

const ALL: (&str, &str) = ("RELAY_LOG", "trace,sqlx=trace,redis=trace,hyper=trace,aws_sdk_eventbridge=trace");

fn assert_silent(finished: &Finished, what: &str, codes: &[i32]) {
    assert!(finished.code.is_some_and(|code| codes.contains(&code)), "{what}: {finished:?}");
    for said in [&finished.stdout, &finished.stderr] {
        assert!(!said.contains(PASSWORD) && !said.contains(PAYLOAD), "{what}:\n{said}");
    }
}

/// Runs the command, which must exit with one of these codes.
fn silent(args: &[&str], variables: &[(&str, &str)], codes: &[i32]) {
    let finished = finished(args, &[variables, &[ALL]].concat());
    assert_silent(&finished, &format!("{args:?} {variables:?}"), codes);
}

#[test]
fn no_database_password() {
    for url in [
        format!("postgres://u:{PASSWORD}@127.0.0.1:1/none"),
        format!("postgres://u:{PASSWORD}@nowhere.invalid/none"),
        format!("postgres://u:{PASSWORD}@127.0.0.1:port/none"),
        format!("postgres://u:{PASSWORD}@[::1/none"),
        format!("postgres://u:{PASSWORD} with blanks@127.0.0.1:1/none"),
        format!("postgres://u:{PASSWORD}%zz@127.0.0.1:1/none"),
        format!("postgres://u@127.0.0.1:1/none?password={PASSWORD}&sslmode=sometimes"),
        format!("postgres://u@127.0.0.1:1/none?sslpassword={PASSWORD}"),
        format!("postgres:///none?host=/nowhere&password={PASSWORD}"),
        format!("mysql://u:{PASSWORD}@127.0.0.1:1/none"),
        format!("host=127.0.0.1 password={PASSWORD}"),
        PASSWORD.to_owned(),
    ] {
        let variables = [("DATABASE_URL", url.as_str()), STDOUT];
        for args in [&["--once"][..], &["migrate"], &["emit", "a"], &["check"], &["check", "--json"]] {
            silent(args, &variables, &[1, 2]);
        }
        for args in [&["--help"][..], &["run", "--help"]] {
            silent(args, &[variables[0], ("REDIS_URL", &url), ("REDIS_PASSWORD", &url)], &[0]);
        }
        silent(&["--once"], &[variables[0], STDOUT, ("RELAY_LANE", "1")], &[2]);
        silent(&["--once"], &[variables[0], STDOUT, ("RELAY_LANES", "0")], &[2]);
        silent(&["--once"], &[variables[0], STDOUT, ("DATABASE_URL_FILE", "/nowhere")], &[2]);
        silent(&["--once", "--database-url", &url, "--lanes", "0"], &[STDOUT], &[2]);
    }
}

#[tokio::test]
async fn no_password_that_postgres_refused() {
    let database = database().await;
    let url = super::url_for(&database, "postgres", PASSWORD);
    for args in [&["--once"][..], &["migrate"], &["emit", "a"], &["check"]] {
        silent(args, &[("DATABASE_URL", &url), STDOUT], &[1]);
    }
}

#[tokio::test]
async fn no_redis_password() {
    let database = database().await;
    let locked = Server::start("redis", &["--set", "requirepass=known"]);
    let place = format!("127.0.0.1:{}", locked.port());
    sql(&mut database.connect().await, "select emit_event('a')").await;
    let postgres = ("DATABASE_URL", database.url());
    let at_once = ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1");
    for url in [
        format!("redis://:{PASSWORD}@{place}"),
        format!("redis://u:{PASSWORD}@{place}/3"),
        format!("rediss://:{PASSWORD}@{place}"),
        format!("redis://:{PASSWORD}@127.0.0.1:1"),
        format!("redis://:{PASSWORD}@nowhere.invalid"),
        format!("redis://:{PASSWORD}@127.0.0.1:port"),
        format!("redis://:{PASSWORD}@127.0.0.1/zero"),
        format!("http://:{PASSWORD}@{place}"),
        PASSWORD.to_owned(),
    ] {
        let variables = [postgres, ("REDIS_URL", url.as_str()), at_once];
        silent(&["--once"], &variables, &[2, 3]);
        silent(&["check"], &variables, &[1, 2]);
        silent(&["--once"], &[variables[0], variables[1], ("REDIS_HOST", "both")], &[2]);
    }
    let port = locked.port().to_string();
    let parts = [postgres, ("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &port), ("REDIS_PASSWORD", PASSWORD), at_once];
    silent(&["--once"], &parts, &[3]);
    silent(&["check", "--json"], &parts, &[1]);
}

#[tokio::test]
async fn no_aws_secret() {
    let database = database().await;
    sql(&mut database.connect().await, "select emit_event('a')").await;
    let variables = [
        ("DATABASE_URL", database.url()),
        ("AWS_EVENTBRIDGE_BUS_NAME", "main"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "known"),
        ("AWS_SECRET_ACCESS_KEY", PASSWORD),
        ("AWS_SESSION_TOKEN", PASSWORD),
        ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1"),
    ];
    silent(&["--once"], &variables, &[3]);
    silent(&["check"], &variables, &[1]);
}

#[tokio::test]
async fn no_password_of_the_file() {
    for text in [
        format!("redis_url = \"redis://:{PASSWORD}@h\" x"),
        format!("redis_password = [\"{PASSWORD}\"]"),
        format!("redis_passwort = \"{PASSWORD}\""),
        format!("[destinations.a]\ntype = \"redis-stream\"\nurl = [\"redis://:{PASSWORD}@h\"]"),
        format!("[destinations.a]\ntype = \"redis-stream\"\nurl = \"http://:{PASSWORD}@h\""),
        format!("[destinations.a]\ntype = \"redis-stream\"\nurl = \"redis://:{PASSWORD}@127.0.0.1:1\"\nhost = \"h\""),
        format!("[destinations.a]\ntype = \"redis-stream\"\nhost = \"h\"\npassword = \"{PASSWORD}\""),
    ] {
        let file = file(&text);
        silent(&["--once"], &[super::NOWHERE, ("RELAY_CONFIG", file.path().to_str().unwrap())], &[2]);
    }
}

#[tokio::test]
async fn no_payload_and_no_header_of_an_event_however_it_fails() {
    let database = database().await;
    let mut connection = database.connect().await;
    let emit = format!(
        r#"delete from event_outbox;
           select emit_event('a', '{{"card": "{PAYLOAD}"}}', 'order', '1', headers => '{{"cookie": "{PAYLOAD}"}}')"#
    );
    redis::cmd("SET").arg("cli:silence:a").arg("x").exec(&mut crate::stream::connect(redis().url())).unwrap();
    let unrouted = file("stdout = true\n[[routes]]\nevent_type = \"b\"\ndestinations = [\"stdout\"]");
    let unrouted = ("RELAY_CONFIG", unrouted.path().to_str().unwrap());
    let up = ("REDIS_URL", redis().url());
    let small = ("EVENT_MAX_PAYLOAD_SIZE", "1");
    let cases: [(&[(&str, &str)], i32); 6] = [
        (&[up, ("EVENT_DEFAULT_MAX_RETRIES", "0"), ("RELAY_REDIS_STREAM", "cli:silence:{event_type}")], 3),
        (&[up, ("RELAY_REDIS_STREAM", "cli:silence:a")], 3),
        (&[("REDIS_URL", "redis://127.0.0.1:1")], 3),
        (&[up, small], 3),
        (&[unrouted], 3),
        (&[up, ("RELAY_REDIS_STREAM", "cli:silence"), ("EVENT_HISTORY_ENABLED", "true")], 0),
    ];
    let base = [("DATABASE_URL", database.url()), ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1")];
    for (variables, code) in cases {
        sql(&mut connection, &emit).await;
        let variables = [&base[..], variables].concat();
        silent(&["--once"], &variables, &[code]);
        silent(&["check"], &variables, &[0, 1]);
    }
    // The database refuses a row at the settle. The error's DETAIL quotes the row.
    let constraint = "alter table event_dead_letter add constraint no_card check (not payload ? 'card') not valid";
    sql(&mut connection, format!("{emit}; {constraint}")).await;
    silent(&["--once"], &[&base[..], &[up, small]].concat(), &[3]);
}

#[tokio::test]
async fn no_payload_that_emit_refuses() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url())];
    for payload in [
        format!("{{\"card\": \"{PAYLOAD}\""),
        PAYLOAD.to_owned(),
        format!("{{\"{PAYLOAD}\": 1e999999}}"),
        format!("\"{PAYLOAD}\\u0000\""),
    ] {
        silent(&["emit", "a", &payload], &variables, &[2]);
        let input = file(&payload);
        let mut command = relay(&["emit", "a", "-"], &[variables[0], ALL]);
        command.stdin(File::open(input.path()).unwrap());
        assert_silent(&Running::start(command).finish(), &payload, &[2]);
    }
}
