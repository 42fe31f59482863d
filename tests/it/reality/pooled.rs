//! A pooler that other clients use too, and its refusals.

use std::process::{Child, Command, Stdio};

use crate::binary::{Running, finished, relay};
use crate::harness::{count, emit, eventually};
use crate::servers::{Database, Server, database_on, pgbouncer_with};
use crate::stream;

/// pgbench beside the relay. Dropping this value ends it.
struct Neighbours(Child);

impl Neighbours {
    fn start(server: &Server, url: &str) -> Self {
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "select pg_sleep(0.001);\nbegin;\nselect 1;\ncommit;\n").unwrap();
        let child = Command::new(server.program("pgbench"))
            .args(["-n", "-c", "8", "-j", "1", "-T", "600", "-M", "extended", "-f"])
            .args([script.path().to_str().unwrap(), url])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The file must exist until the program has read it.
        std::thread::sleep(std::time::Duration::from_millis(500));
        Self(child)
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn through(pool: &Server, database: &Database) -> String {
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let (base, _) = pool.url().rsplit_once('/').unwrap();
    format!("{base}/{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn f74_beside_other_clients_of_a_pooler_every_command_works_every_time() {
    let server = Server::start("postgres", &["--fast"]);
    let redis = Server::start("redis", &[]);
    let database = database_on(&server).await;
    let pool = pgbouncer_with(&server, &["--set", "default_pool_size=5", "--set", "ignore_startup_parameters="]);
    let url = through(&pool, &database);
    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("RELAY_DATABASE_POOLED", "true"),
        ("REDIS_URL", redis.url()),
        ("RELAY_REDIS_STREAM", "pooled"),
    ];
    let neighbours = Neighbours::start(&server, &url);
    for round in 0..10 {
        finished(&["emit", "a", "--aggregate-id", "k"], &variables).exited(0);
        finished(&["migrate"], &variables).exited(0);
        finished(&["check"], &variables).exited(0);
        finished(&["--once"], &variables).exited(0);
        finished(&["audit"], &variables).exited(0);
        assert_eq!(stream::entries(&mut stream::connect(redis.url()), "pooled").len(), round + 1);
    }
    let daemon = Running::start(relay(&[], &variables));
    let mut connection = database.connect().await;
    for _ in 0..10 {
        emit(&mut connection, "a", "k").await;
        eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    daemon.signal("TERM");
    let ended = daemon.finish().exited(0);
    for level in ["ERROR", "prepared statement"] {
        assert!(!ended.stderr.contains(level), "{}", ended.stderr);
    }
    drop(neighbours);
}

#[tokio::test(flavor = "multi_thread")]
async fn f74_what_a_pooler_refuses_is_explained() {
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let stdout = ("RELAY_STDOUT", "true");
    let pool = pgbouncer_with(&server, &[]);
    let url = through(&pool, &database);
    finished(&["--once"], &[("DATABASE_URL", &url), stdout])
        .exited(1)
        .says(&["unsupported startup parameter", "RELAY_DATABASE_POOLED=true"]);
    let statement = pgbouncer_with(&server, &["--set", "pool_mode=statement"]);
    let url = through(&statement, &database);
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_DATABASE_POOLED", "true"), stdout];
    for command in ["--once", "migrate"] {
        finished(&[command], &variables).exited(1).says(&["pool_mode = transaction"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f77_behind_a_pool_of_one_connection_the_proof_of_locks_ends() {
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let pool = pgbouncer_with(&server, &["--set", "default_pool_size=1"]);
    let url = through(&pool, &database);
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_DATABASE_POOLED", "true"), ("RELAY_STDOUT", "true")];
    finished(&["check"], &variables).exited(0).says(&["not tried whether advisory locks exclude"]);
}
