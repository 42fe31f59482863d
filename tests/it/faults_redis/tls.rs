//! TLS with real certificates: of PostgreSQL, of a cluster, and of Sentinels with their master.

use crate::binary::{Finished, finished};
use crate::harness::{column, emit};
use crate::servers::{Database, Server, database, database_on, redis};
use crate::stream;
use crate::support::unique;

/// Runs `relay --once` to a Redis whose certificate `ca` has signed.
fn once(database: &Database, redis: &str, ca: &str) -> Finished {
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis),
        ("RELAY_REDIS_STREAM", "{event_type}"),
        ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1"),
        ("SSL_CERT_FILE", ca),
    ];
    finished(&["--once"], &variables)
}

async fn publishes_over_tls(kind: &str) {
    let server = Server::start(kind, &["--tls", "--set", "requirepass=s3cret"]);
    let database = database().await;
    let mut connection = database.connect().await;
    for name in ["one", "two", "three", "four"] {
        emit(&mut connection, name, "k").await;
    }
    let refused = once(&database, server.url(), server.other_ca()).exited(3).says(&["UnknownIssuer"]);
    assert!(!refused.stderr.contains("s3cret"), "{}", refused.stderr);
    once(&database, server.url(), server.ca()).exited(0);
    let log = "select concat_ws(' ', event_type, status, attempt) from event_processing_log order by outbox_id";
    let published = ["one published 1", "two published 1", "three published 1", "four published 1"];
    assert_eq!(column(&mut connection, log).await, published);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_published_to_over_tls() {
    publishes_over_tls("redis-cluster").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_and_their_master_are_reached_over_tls() {
    publishes_over_tls("redis-sentinel").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_read_over_tls_when_its_certificate_is_signed_by_whom_one_trusts() {
    let server = Server::start("postgres", &["--tls", "--fast", "--set", "listen_addresses=127.0.0.1,127.0.0.2"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    emit(&mut connection, "secured", "k").await;
    let name = unique("over-tls");
    let relay = |command: &[&str], host: &str, ca: &str| {
        let url = database.url().replace("127.0.0.1", host);
        let url = format!("{url}?sslmode=verify-full&sslrootcert={ca}");
        let variables = [
            ("DATABASE_URL", url.as_str()),
            ("REDIS_URL", redis().url()),
            ("RELAY_REDIS_STREAM", name.as_str()),
            ("RELAY_LOG", "error"),
        ];
        finished(command, &variables)
    };
    let refused = relay(&["--once"], "localhost", server.other_ca()).exited(1);
    let advice =
        "is the server's certificate signed by the authority in sslrootcert, and issued for the host in DATABASE_URL?";
    assert!(refused.complaint().ends_with(&format!("UnknownIssuer; {advice}")), "{}", refused.complaint());
    let checked = relay(&["check"], "localhost", server.other_ca()).exited(1);
    assert!(checked.stdout.contains("FAIL  database: "), "{}", checked.stdout);
    // The certificate is valid for localhost and 127.0.0.1 only, not for another address of this host.
    let misnamed = relay(&["--once"], "127.0.0.2", server.ca()).exited(1);
    assert!(
        misnamed.complaint().contains("127.0.0.2") && misnamed.complaint().ends_with(advice),
        "{}",
        misnamed.complaint()
    );
    relay(&["check"], "localhost", server.ca()).exited(0);
    relay(&["--once"], "localhost", server.ca()).exited(0);
    assert_eq!(stream::length(&mut stream::connect(redis().url()), &name), 1);
}
