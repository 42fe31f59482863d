//! The HTTP server: its answers and its limits.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use super::{STDOUT, Served};
use crate::binary::{Running, finished, relay};
use crate::harness::{count, eventually, sql};
use crate::servers::database;

const NOWHERE: (&str, &str) = ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");

#[test]
fn each_path_answers_and_every_answer_is_kept_by_nobody_and_read_by_no_other_origin() {
    let relay = Served::start(&[NOWHERE, STDOUT]);
    let index = relay.get("/");
    assert_eq!(index.status, 200);
    for path in ["/livez", "/readyz", "/statusz", "/metrics"] {
        assert!(index.body.contains(path), "{index:?}");
    }
    let metrics = relay.get("/metrics?name[]=x");
    let open_metrics = "\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(metrics.status == 200 && metrics.head.contains(open_metrics), "{metrics:?}");
    assert!(metrics.body.ends_with("# EOF\n") && metrics.body.contains("outbox_relay_ready 0\n"), "{metrics:?}");
    let missing = relay.get("/nothing");
    assert!(missing.status == 404 && missing.body.contains("/readyz"), "{missing:?}");
    for answer in [index, metrics, missing, relay.get("/livez"), relay.get("/statusz")] {
        for header in [
            "cache-control: no-store",
            "x-content-type-options: nosniff",
            "content-security-policy: default-src 'none'",
            "referrer-policy: no-referrer",
            "cross-origin-resource-policy: same-origin",
            "connection: close",
        ] {
            assert!(answer.head.contains(&format!("\r\n{header}")), "{header} is missing in {answer:?}");
        }
        assert!(!answer.head.contains("access-control"), "{answer:?}");
    }
    let host = "Host: localhost\r\n\r\n";
    let head = relay.ask(&format!("HEAD /livez HTTP/1.1\r\n{host}"));
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"] {
        let refused = relay.ask(&format!("{method} /metrics HTTP/1.1\r\n{host}"));
        assert!(refused.status == 405 && refused.head.contains("\r\nallow: get, head\r\n"), "{refused:?}");
    }
    assert_eq!(relay.ask("GET /livez HTTP/1.0\r\n\r\n").status, 200, "HTTP/1.0 is answered too");
}

#[test]
fn on_loopback_a_foreign_host_is_refused() {
    let relay = Served::start(&[NOWHERE, STDOUT]);
    for host in ["localhost", "LOCALHOST:9464", "127.0.0.1", "[::1]:80"] {
        assert_eq!(relay.ask(&format!("GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n")).status, 200, "{host}");
    }
    for request in [
        "GET /statusz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /statusz HTTP/1.1\r\nHost: evil.example:9464\r\n\r\n",
        "GET /statusz HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n",
        "GET http://evil.example/statusz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /statusz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    ] {
        let refused = relay.ask(request);
        assert!(refused.status == 403 && refused.body.contains("localhost"), "{request}: {refused:?}");
    }
}

#[test]
fn a_port_in_use_ends_the_relay_if_it_was_set_and_only_warns_if_it_is_the_default() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refused = finished(&["run"], &[NOWHERE, STDOUT, ("RELAY_HTTP_ADDR", &address)]).exited(2);
    refused.says(&["RELAY_HTTP_ADDR", &address, "in use", "off"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("http_addr = {address:?}")).unwrap();
    finished(&["run", "--config", file.path().to_str().unwrap()], &[NOWHERE, STDOUT]).exited(2).says(&[&address]);
    finished(&["run", "--http-addr", &address], &[NOWHERE, STDOUT]).exited(2).says(&[&address]);
    for wrong in ["9464", "example.com:9464", "localhost", "127.0.0.1:66000", "yes"] {
        let refused = finished(&["run"], &[NOWHERE, STDOUT, ("RELAY_HTTP_ADDR", wrong)]).exited(2);
        refused.says(&["--http-addr", wrong, "0.0.0.0:9464"]);
    }
    // Another process may already use the default port.
    let _taken = TcpListener::bind("127.0.0.1:9464");
    let mut running = Running::start(relay(&["run"], &[NOWHERE, STDOUT]));
    running.until_log("metrics and health are not served");
    running.until_log("not ready; trying again");
    assert!(running.log().contains("RELAY_HTTP_ADDR"), "{}", running.log());
    let mut off = Running::start(relay(&["run"], &[NOWHERE, STDOUT, ("RELAY_HTTP_ADDR", "off")]));
    off.until_log("not ready; trying again");
    assert!(!off.log().contains("by HTTP"), "{}", off.log());
}

#[tokio::test]
async fn a_run_of_once_opens_no_port() {
    let database = database().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let done = finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT, ("RELAY_HTTP_ADDR", &address)]);
    assert!(!done.exited(0).stderr.contains("HTTP"));
}

#[tokio::test]
async fn clients_that_hang_flood_or_send_too_much_hold_up_neither_the_relay_nor_each_other() {
    let database = database().await;
    let mut connection = database.connect().await;
    let relay = Served::start(&[("DATABASE_URL", database.url()), STDOUT]);
    relay.until("/readyz", 200, "ready");
    let threads_before = threads(relay.running.id());

    // Scrapers that never read, and clients that send nothing.
    let mut silent: Vec<_> = (0..1000).map(|_| relay.connect()).collect();
    for stream in &mut silent[..200] {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").ok();
    }
    let begun = Instant::now();
    let live = relay.get("/livez");
    assert_eq!(live.status, 200);
    println!("1,000 connections are open: /livez took {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let files = std::fs::read_dir(format!("/proc/{}/fd", relay.running.id())).unwrap().count();
    assert!(files < 150, "{files} files are open");
    sql(&mut connection, "select emit_event('meanwhile')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    drop(silent);

    let megabyte = "x".repeat(1 << 20);
    let head = relay.ask(&format!("GET /livez HTTP/1.1\r\nHost: localhost\r\nX: {megabyte}\r\n\r\n"));
    assert_eq!(head.status, 431, "{head:?}");
    let length = megabyte.len();
    let body =
        relay.ask(&format!("POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{megabyte}"));
    assert_eq!(body.status, 405, "{body:?}");
    let large = relay.ask(&format!(
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{megabyte}{megabyte}{megabyte}",
        3 * length
    ));
    assert_eq!(large.status, 413, "{large:?}");
    for wrong in ["\r\n\r\n", "nonsense\r\n\r\n", "GET /livez HTTP/9.9\r\n\r\n", "\u{0}\u{1}\u{2}\r\n\r\n"] {
        relay.connect().write_all(wrong.as_bytes()).unwrap();
    }
    assert_eq!(relay.get("/livez").status, 200);
    // The log and the server have a thread each.
    assert!(threads(relay.running.id()) <= threads_before + 1, "the server started a thread for each connection");
    assert!(!relay.running.log().contains("panic"), "{}", relay.running.log());
}

fn threads(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/task")).unwrap().count()
}
