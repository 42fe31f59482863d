//! Throwaway servers. tests/servers runs each one, and ends it when this process closes the pipe or exits.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use outbox_relay::secret::Secret;
use serde::Deserialize;
use sqlx::postgres::PgQueryResult;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{OnceCell, oneshot};

/// A server on a port of its own, or a group of them. Its methods block until the server has done what they ask for. If one
/// fails, it panics with the server's log. Dropping this value ends the server and removes its folder.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// `None` only while this value is dropped. Closing the pipe makes the supervisor end the server.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    info: Box<Info>,
}

#[derive(Debug, Deserialize)]
struct Info {
    kind: String,
    pid: u32,
    port: u16,
    ports: Vec<u16>,
    url: String,
    bin: String,
    ca: Option<String>,
    other_ca: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    ok: bool,
    pid: Option<u32>,
    error: Option<String>,
}

impl Server {
    /// Starts a server of this kind. tests/servers lists the kinds and options.
    pub(crate) fn start(kind: &str, options: &[&str]) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers");
        let mut child = Command::new("python3")
            .arg(script)
            .arg(kind)
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("python3 cannot be run ({error}): install it, then run `make test`"));
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let Ok(info) = serde_json::from_str(&line) else {
            let mut complaint = String::new();
            child.stderr.take().expect("standard error is a pipe").read_to_string(&mut complaint).unwrap();
            child.wait().unwrap();
            panic!("no {kind} for the tests: run `make test`, or `tests/setup` once\n{complaint}");
        };
        Self { child, stdin, stdout, info }
    }

    /// The URL for clients, with user and password.
    pub(crate) fn url(&self) -> &str {
        &self.info.url
    }

    /// Its port on 127.0.0.1, which stays the same after a restart.
    pub(crate) fn port(&self) -> u16 {
        self.info.port
    }

    /// The port of each node of a group.
    pub(crate) fn ports(&self) -> &[u16] {
        &self.info.ports
    }

    /// The certificate authority of a server with `--tls`, as a file.
    pub(crate) fn ca(&self) -> &str {
        self.info.ca.as_deref().expect("started with --tls")
    }

    /// A certificate authority that signed no certificate of the server, as a file.
    pub(crate) fn other_ca(&self) -> &str {
        self.info.other_ca.as_deref().expect("started with --tls")
    }

    /// A program that came with the server, or else Debian's: other versions of the matrix come without `psql`.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        let own = Path::new(&self.info.bin).join(name);
        let debian = || {
            let versions = std::fs::read_dir("/usr/lib/postgresql").unwrap().map(|entry| entry.unwrap().path());
            versions.map(|version| version.join("bin").join(name)).find(|path| path.exists())
        };
        if own.exists() { own } else { debian().unwrap_or(own) }
    }

    /// The process id of the server itself, not of the supervisor.
    pub(crate) fn pid(&self) -> u32 {
        self.info.pid
    }

    /// Stops it in an orderly way: it closes connections and keeps its data.
    pub(crate) fn stop(&mut self) {
        self.tell("stop");
    }

    /// Kills all its processes with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.tell("kill");
    }

    /// Starts it after [`Self::stop`] or [`Self::kill`], on the same port with the same data.
    pub(crate) fn start_again(&mut self) {
        self.tell("start");
    }

    /// Calls [`Self::stop`] and [`Self::start_again`].
    pub(crate) fn restart(&mut self) {
        self.tell("restart");
    }

    /// Restarts a server that may be too busy to stop in time. It is killed then, as a process manager does.
    pub(crate) fn restart_or_kill(&mut self) {
        if self.try_tell("restart").is_err() {
            self.tell("start");
        }
    }

    /// Freezes all its processes: connections stay open, and nothing answers.
    pub(crate) fn pause(&mut self) {
        self.tell("pause");
    }

    /// Ends a [`Self::pause`].
    pub(crate) fn resume(&mut self) {
        self.tell("resume");
    }

    /// As [`Self::kill`], for one node of a group.
    pub(crate) fn kill_node(&mut self, node: usize) {
        self.tell(&format!("kill {node}"));
    }

    /// As [`Self::start_again`], for one node of a group.
    pub(crate) fn start_node(&mut self, node: usize) {
        self.tell(&format!("start {node}"));
    }

    /// As [`Self::pause`], for one node of a group.
    pub(crate) fn pause_node(&mut self, node: usize) {
        self.tell(&format!("pause {node}"));
    }

    /// As [`Self::resume`], for one node of a group.
    pub(crate) fn resume_node(&mut self, node: usize) {
        self.tell(&format!("resume {node}"));
    }

    fn tell(&mut self, command: &str) {
        if let Err(error) = self.try_tell(command) {
            panic!("{command} {}: {error}", self.info.kind);
        }
    }

    fn try_tell(&mut self, command: &str) -> Result<(), String> {
        let stdin = self.stdin.as_mut().expect("open until dropped");
        writeln!(stdin, "{command}").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        let answer: Answer = serde_json::from_str(&line).unwrap_or_else(|_| {
            panic!("the supervisor of {} is gone: it answered {command:?} with {line:?}", self.info.kind)
        });
        self.info.pid = answer.pid.unwrap_or(self.info.pid);
        if answer.ok { Ok(()) } else { Err(answer.error.unwrap_or_default()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stdin = None;
        self.child.wait().ok();
    }
}

/// Starts a PgBouncer with two server connections before `server`, in transaction mode.
pub(crate) fn pgbouncer(server: &Server) -> Server {
    pgbouncer_with(server, &[])
}

/// As [`pgbouncer`], with more options.
pub(crate) fn pgbouncer_with(server: &Server, options: &[&str]) -> Server {
    Server::start("pgbouncer", &[&["--server", server.url()], options].concat())
}

/// The PostgreSQL that tests share. No test may stop it: a test that stops a server starts one of its own.
pub(crate) fn postgres() -> &'static Server {
    static POSTGRES: OnceLock<Server> = OnceLock::new();
    POSTGRES.get_or_init(|| Server::start("postgres", &["--fast"]))
}

/// The Redis that tests share; see [`postgres`].
pub(crate) fn redis() -> &'static Server {
    static REDIS: OnceLock<Server> = OnceLock::new();
    REDIS.get_or_init(|| Server::start("redis", &[]))
}

/// The moto that tests share; see [`postgres`].
pub(crate) fn moto() -> &'static Server {
    static MOTO: OnceLock<Server> = OnceLock::new();
    MOTO.get_or_init(|| Server::start("moto", &[]))
}

/// A database of its own with every migration applied. If it is on the shared server, dropping this value drops the database,
/// even while clients are connected.
#[derive(Debug)]
pub(crate) struct Database {
    name: String,
    url: String,
    shared: bool,
}

/// Creates a [`Database`] on the shared server.
pub(crate) async fn database() -> Database {
    static TEMPLATE: OnceCell<()> = OnceCell::const_new();
    TEMPLATE
        .get_or_init(|| async {
            administer("create database template_migrated").await;
            migrate(&url_of(postgres(), "template_migrated")).await;
            // A database that has connections cannot be copied.
            administer("alter database template_migrated with allow_connections false").await;
        })
        .await;
    let name = new_name();
    administer(&format!("create database {name} template template_migrated")).await;
    Database { url: url_of(postgres(), &name), name, shared: true }
}

/// Creates a [`Database`] without tables on the shared server.
pub(crate) async fn empty_database() -> Database {
    let name = new_name();
    administer(&format!("create database {name}")).await;
    Database { url: url_of(postgres(), &name), name, shared: true }
}

/// Creates a [`Database`] on a server of the test's own.
pub(crate) async fn database_on(server: &Server) -> Database {
    let database = database_on_unmigrated(server).await;
    migrate(&database.url).await;
    database
}

/// Creates a [`Database`] without tables on a server of the test's own.
pub(crate) async fn database_on_unmigrated(server: &Server) -> Database {
    let name = new_name();
    execute(server.url(), &format!("create database {name}")).await;
    Database { url: url_of(server, &name), name, shared: false }
}

impl Database {
    /// A database that the test created itself. Dropping this value does not drop the database.
    pub(crate) fn at(url: &str) -> Self {
        Self { name: String::new(), url: url.to_owned(), shared: false }
    }

    /// The URL, for relay and psql.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Opens a connection as superuser.
    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.shared {
            let (done, _) = oneshot::channel();
            administrator().send((format!("drop database {} with (force)", self.name), done)).ok();
        }
    }
}

type Job = (String, oneshot::Sender<Result<PgQueryResult, sqlx::Error>>);

/// The one connection that creates and drops databases on the shared server, one after the other. It has a thread with a
/// runtime of its own: a connection cannot outlive the runtime of the test that opened it, and opening a connection takes
/// longer than the statement.
fn administrator() -> &'static UnboundedSender<Job> {
    static ADMINISTRATOR: OnceLock<UnboundedSender<Job>> = OnceLock::new();
    ADMINISTRATOR.get_or_init(|| {
        let url = postgres().url();
        let (sender, mut jobs) = unbounded_channel::<Job>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect(url).await.unwrap();
                while let Some((statement, done)) = jobs.recv().await {
                    // A test that drops a database does not wait for the result.
                    done.send(sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await).ok();
                }
            });
        });
        sender
    })
}

async fn administer(statement: &str) {
    let (done, result) = oneshot::channel();
    administrator().send((statement.to_owned(), done)).unwrap();
    result.await.unwrap().unwrap();
}

fn new_name() -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    format!("test_{}", LAST.fetch_add(1, Ordering::Relaxed) + 1)
}

fn url_of(server: &Server, database: &str) -> String {
    let (base, _) = server.url().rsplit_once('/').expect("a database in the URL");
    format!("{base}/{database}")
}

async fn execute(url: &str, statement: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn migrate(url: &str) {
    outbox_relay::outbox::postgres::migrate::migrate(&Secret::inline(url)).await.unwrap();
}

mod tests {
    use std::net::TcpStream;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn every_database_is_migrated_and_nobody_elses() {
        let (one, other) = tokio::join!(database(), database());
        let mut connection = one.connect().await;
        sqlx::raw_sql("insert into event_outbox (event_type) values ('only.here')")
            .execute(&mut connection)
            .await
            .unwrap();
        let seen: i64 = sqlx::query_scalar("select count(*) from event_outbox")
            .fetch_one(&mut other.connect().await)
            .await
            .unwrap();
        assert_eq!(seen, 0);

        let name = one.name.clone();
        drop(one);
        let later = database().await;
        let left: i64 = sqlx::query_scalar("select count(*) from pg_database where datname = $1")
            .bind(name)
            .fetch_one(&mut later.connect().await)
            .await
            .unwrap();
        assert_eq!(left, 0, "dropped although `connection` was open");
    }

    #[tokio::test]
    async fn a_killed_postgres_comes_back_on_its_port_with_its_data() {
        let mut server = Server::start("postgres", &["--set", "max_connections=20"]);
        let database = database_on(&server).await;
        let pid = server.pid();
        execute(database.url(), "insert into event_outbox (event_type) values ('kept')").await;
        server.kill();
        PgConnection::connect(database.url()).await.unwrap_err();
        server.start_again();
        let kept: i64 = sqlx::query_scalar("select count(*) from event_outbox")
            .fetch_one(&mut database.connect().await)
            .await
            .unwrap();
        assert_eq!(kept, 1);
        assert_ne!(server.pid(), pid);
    }

    #[test]
    fn a_paused_redis_accepts_connections_and_does_not_answer() {
        let mut server = Server::start("redis", &[]);
        server.restart();
        server.pause();
        let mut connection = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        connection.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        connection.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        connection.read_exact(&mut answer).unwrap_err();
        server.resume();
        connection.set_read_timeout(None).unwrap();
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");

        server.stop();
        TcpStream::connect(("127.0.0.1", server.port())).unwrap_err();
    }

    #[test]
    fn the_shared_servers_are_up() {
        for server in [postgres(), redis(), moto()] {
            TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        }
    }

    #[test]
    fn a_server_that_cannot_start_says_what_to_run() {
        let refused = std::panic::catch_unwind(|| Server::start("redis", &["--bin", "/nowhere"])).unwrap_err();
        let text = refused.downcast::<String>().unwrap();
        assert!(text.contains("run `make test`, or `tests/setup` once"), "{text}");
        assert!(text.contains("--bin /nowhere"), "{text}");
    }
}
