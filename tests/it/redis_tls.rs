//! Redis over TLS, with a certificate authority that only the test trusts.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use outbox_relay::event::Fault;
use outbox_relay::secret::Secret;
use outbox_relay::sink::Sink;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::{NewEvent, emit};

use crate::readback::RedisClient;
use crate::servers::{Server, database};
use crate::support::{assert_all_failed, error, event, publish};

/// A Redis that accepts only TLS. `ca.pem` signed its certificate.
pub(crate) struct TlsRedis {
    folder: tempfile::TempDir,
    server: Server,
    /// It connected without TLS before the server stopped accepting that.
    client: RedisClient,
}

impl TlsRedis {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let new_key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
        openssl(folder.path(), &new_key, "-subj /CN=test-ca -keyout ca.key -out ca.pem");
        let signed = "-subj /CN=localhost -CA ca.pem -CAkey ca.key -keyout redis.key -out redis.pem \
                      -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
        openssl(folder.path(), &new_key, signed);
        let path = |name: &str| folder.path().join(name).display().to_string();
        let server = Server::start("redis", &[]);
        let mut client = RedisClient::connect(&server);
        client.tell(&format!(
            "CONFIG SET tls-cert-file {} tls-key-file {} tls-ca-cert-file {} tls-auth-clients no",
            path("redis.pem"),
            path("redis.key"),
            path("ca.pem")
        ));
        client.tell("CONFIG SET port 0");
        client.tell(&format!("CONFIG SET tls-port {}", server.port()));
        Self { folder, server, client }
    }

    pub(crate) fn url(&self) -> String {
        format!("rediss://localhost:{}/0", self.server.port())
    }
}

fn openssl(folder: &Path, arguments: &[&str], more: &str) {
    let made = Command::new("openssl").current_dir(folder).args(arguments).args(more.split_whitespace()).output();
    let made = made.unwrap_or_else(|error| panic!("openssl cannot be run ({error}): run `make test`"));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[tokio::test]
async fn the_binary_publishes_over_tls_to_a_server_that_its_host_trusts() {
    let mut redis = TlsRedis::start();
    let database = database().await;
    emit(&mut database.connect().await, NewEvent::from_json("order.created", r#"{"n": 1}"#)).await.unwrap();
    let relay = |trusted: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_relay"))
            .arg("--once")
            .env_clear()
            .env("DATABASE_URL", database.url())
            .env("REDIS_URL", redis.url())
            .env("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1")
            .env("SSL_CERT_FILE", redis.folder.path().join(trusted))
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    // The host trusts only this certificate, which signed no other.
    let (code, log) = relay("redis.pem");
    assert_eq!(code, 3, "{log}");
    assert!(log.contains("UnknownIssuer"), "{log}");
    let (code, log) = relay("ca.pem");
    assert_eq!(code, 0, "{log}");
    assert_eq!(redis.client.sequences("events"), [1]);
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_is_the_destinations_fault_and_says_so() {
    rustls::crypto::ring::default_provider().install_default().ok(); // another test may have installed it
    let redis = TlsRedis::start();
    let address = RedisAddress::Url(Secret::inline(redis.url()));
    let sink = RedisStream::new(RedisStreamConfig {
        address,
        stream: "events".parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    });
    let outcomes = publish(&sink, &[event(1), event(2)]).await;
    assert_all_failed(&outcomes, Fault::Destination, "connect");
    assert!(error(&outcomes[0]).message.contains("UnknownIssuer"), "{}", error(&outcomes[0]));
    assert_eq!(sink.check().await.unwrap_err().fault, Fault::Destination);
}

#[tokio::test]
async fn a_server_without_tls_is_the_destinations_fault() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let url = crate::servers::redis().url().replace("redis:", "rediss:");
    let address = RedisAddress::Url(Secret::inline(url));
    let sink = RedisStream::new(RedisStreamConfig {
        address,
        stream: "events".parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    });
    assert_all_failed(&publish(&sink, &[event(1)]).await, Fault::Destination, "connect");
}
