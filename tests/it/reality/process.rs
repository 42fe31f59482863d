//! Signals, standard streams, and stopping while something hangs.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::binary::{Running, finished, relay, until};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Gate, ScriptedSink};
use crate::servers::{Database, Server, database, redis};
use crate::stores::{Postgres, Sqlite, Store};

/// Counts the relay's sessions that wait for a lock.
const WAITS_FOR_LOCK: &str =
    "pg_stat_activity where datname = current_database() and application_name = 'relay' and wait_event_type = 'Lock'";

/// Counts the partitions that are claimed by a lane.
const CLAIMED: &str = "pg_locks where locktype = 'advisory' and classid = 'event_outbox'::regclass and objid < 640
                       and objsubid = 2 and database = (select oid from pg_database where datname = current_database())";

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// `relay`, started by a shell that has run `setup` first.
fn relay_after(setup: &str, args: &[&str], variables: &[(&str, &str)]) -> Command {
    let relay = relay(args, variables);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{setup}; exec \"$0\" \"$@\"")]).arg(env!("CARGO_BIN_EXE_relay")).args(args);
    shell.env_clear().envs(relay.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.stdin(Stdio::null());
    shell
}

#[tokio::test]
async fn f88_sighup_stops_it_as_sigterm_does_unless_it_was_started_to_ignore_it() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url()), STDOUT];
    let mut running = Running::start(relay(&["run"], &variables));
    running.until_log("\"message\":\"ready\"");
    running.signal("HUP");
    running.finish().exited(0).says(&["stopping", "SIGHUP"]);

    // `nohup` does the same.
    let mut running = Running::start(relay_after("trap '' HUP", &["run"], &variables));
    running.until_log("\"message\":\"ready\"");
    running.signal("HUP");
    sql(&mut database.connect().await, "select emit_event('after')").await;
    eventually("it is published", async || running.output().contains("after")).await;
    running.signal("TERM");
    let finished = running.finish().exited(0);
    assert!(!finished.stderr.contains("SIGHUP"), "{}", finished.stderr);
}

/// A relay with one event in flight to a hanging Redis. Its other destination is standard output.
async fn hanging(database: &Database, redis: &mut Server, timeout: &str) -> Running {
    let url = redis.url().to_owned();
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", &url),
        STDOUT,
        ("EVENT_DEFAULT_TIMEOUT", "600000"),
        ("RELAY_SHUTDOWN_TIMEOUT", timeout),
    ];
    let running = Running::start(relay(&["run"], &variables));
    let mut connection = database.connect().await;
    sql(&mut connection, "select emit_event('before')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    redis.pause();
    sql(&mut connection, "select emit_event('held')").await;
    eventually("it is being published", async || count(&mut connection, CLAIMED).await > 0).await;
    eventually("the other destination has it", async || running.output().contains("held")).await;
    running
}

#[tokio::test]
async fn f89_a_destination_that_hangs_is_given_up_in_time_and_what_others_took_is_recorded() {
    let database = database().await;
    let mut connection = database.connect().await;
    let mut redis = Server::start("redis", &[]);
    let running = hanging(&database, &mut redis, "2s").await;
    running.signal("TERM");
    let ended = running.finish().exited(1);
    ended.says(&["given up 2 s after the signal", "1 events at destination redis", "RELAY_SHUTDOWN_TIMEOUT"]);
    let owed = "select concat_ws(' ', event_type, destination, attempts) from event_outbox";
    assert_eq!(column(&mut connection, owed).await, ["held redis 0"]);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

#[tokio::test]
async fn f89_a_settle_that_waits_for_a_lock_is_given_up_in_time() {
    let database = database().await;
    let (mut connection, mut holder) = (database.connect().await, database.connect().await);
    let mut redis = Server::start("redis", &[]);
    let running = hanging(&database, &mut redis, "2s").await;
    sql(&mut holder, "begin; lock table event_processing_log in access exclusive mode").await;
    redis.resume();
    eventually("the settle waits", async || count(&mut connection, WAITS_FOR_LOCK).await > 0).await;
    running.signal("TERM");
    running.finish().exited(1).says(&["given up 2 s after the signal", "the database did not record", "1 batches"]);
    sql(&mut holder, "rollback").await;
    assert_eq!(column(&mut connection, "select event_type from event_outbox").await, ["held"]);
}

#[tokio::test]
async fn f89_where_nothing_is_in_flight_the_end_comes_at_once_whatever_hangs() {
    let database = database().await;
    let (mut connection, mut holder) = (database.connect().await, database.connect().await);
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_SHUTDOWN_TIMEOUT", "1h"),
        ("RELAY_REDIS_STREAM", "reality:process"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "100"),
    ];
    // A claim waits for the lock. In the next relays, the start does.
    let mut running = Running::start(relay(&["run"], &variables));
    running.until_log("\"message\":\"ready\"");
    let lock = "begin; lock table event_outbox, event_processing_log in access exclusive mode";
    sql(&mut holder, lock).await;
    eventually("it waits", async || count(&mut connection, WAITS_FOR_LOCK).await > 0).await;
    running.signal("TERM");
    running.finish().exited(0).says(&["stopping"]);
    for (args, code) in [(&["run"][..], 0), (&["--once"], 3)] {
        // The server does not notice that the client that waited is gone.
        let now = column(&mut connection, "select clock_timestamp()::text").await.remove(0);
        let running = Running::start(relay(args, &variables));
        let waits = format!("{WAITS_FOR_LOCK} and backend_start > '{now}'");
        eventually("it waits", async || count(&mut connection, &waits).await > 0).await;
        running.signal("TERM");
        running.finish().exited(code).says(&["stopping"]);
    }
}

#[tokio::test]
async fn f90_a_lane_that_ends_in_trouble_leaves_the_callers_token_alone() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "a", "").await;
    let (gate, sink) = (Gate::new(), ScriptedSink::accepting());
    sink.hold_at(&gate);
    let (stop, relay) = (CancellationToken::new(), Setup::new(&database, vec![("a", sink)]).relay());
    let draining = tokio::spawn({
        let stop = stop.clone();
        async move { relay.drain(stop).await }
    });
    tokio::time::timeout(Duration::from_secs(60), gate.entered()).await.unwrap();
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid()";
    sql(&mut connection, terminate).await;
    gate.open(1);
    assert!(draining.await.unwrap().is_err(), "the settle cannot have succeeded");
    assert!(!stop.is_cancelled());
}

/// A pipe that is full until somebody reads it.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[b'.'; 64 << 10]).unwrap();
    (reader, writer)
}

/// Waits for the end of a process whose standard error nobody reads. Returns its exit code.
fn code(mut child: std::process::Child) -> Option<i32> {
    until("it ends", || child.try_wait().unwrap().is_some());
    child.wait().unwrap().code()
}

#[tokio::test]
async fn f88_a_standard_error_that_nobody_reads_holds_up_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (_unread, writer) = full_pipe();
    let start = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = relay(args, variables);
        command.stdout(Stdio::null()).stderr(writer.try_clone().unwrap()).spawn().unwrap()
    };
    let variables = [("DATABASE_URL", database.url()), STDOUT, ("RELAY_LOG", "debug")];
    // These are refused before logging starts.
    assert_eq!(code(start(&["--once"], &[STDOUT])), Some(2));
    assert_eq!(code(start(&["--bogus"], &[STDOUT])), Some(2));
    sql(&mut connection, "select emit_event('a')").await;
    assert_eq!(code(start(&["--once"], &variables)), Some(0));
    let running = start(&["run"], &variables);
    sql(&mut connection, "select emit_event('a')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    terminate(running.id());
    assert_eq!(code(running), Some(0));
    // A second signal ends it at once even then.
    let mut hangs = Server::start("redis", &[]);
    let url = hangs.url().to_owned();
    let running = start(&["run"], &[variables[0], ("REDIS_URL", &url), ("EVENT_DEFAULT_TIMEOUT", "600000")]);
    sql(&mut connection, "select emit_event('a')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    hangs.pause();
    sql(&mut connection, "select emit_event('held')").await;
    eventually("it is being published", async || count(&mut connection, CLAIMED).await > 0).await;
    terminate(running.id());
    tokio::time::sleep(Duration::from_millis(200)).await; // two signals at the same time would be one
    terminate(running.id());
    assert_eq!(code(running), Some(1));
}

fn terminate(process: u32) {
    assert!(Command::new("kill").args(["-TERM", &process.to_string()]).status().unwrap().success());
}

#[tokio::test]
async fn f88_lines_that_nobody_read_are_counted() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (mut reader, writer) = full_pipe();
    let variables =
        [("DATABASE_URL", database.url()), STDOUT, ("RELAY_LOG", "debug"), ("EVENT_OUTBOX_BATCH_SIZE", "1")];
    let mut command = relay(&["run"], &variables);
    let running = command.stdout(Stdio::null()).stderr(writer).spawn().unwrap();
    drop(command); // it holds the pipe's other end
    sql(&mut connection, "select emit_event('a') from generate_series(1, 2500)").await;
    eventually("all is published", async || count(&mut connection, "event_outbox").await == 0).await;
    let (say, said) = std::sync::mpsc::channel();
    let log = std::thread::spawn(move || {
        let mut log = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&log).contains("lines of this log were dropped") {
            match reader.read(&mut buffer).unwrap() {
                0 => panic!("the report is missing in: {}", String::from_utf8_lossy(&log)),
                count => log.extend_from_slice(&buffer[..count]),
            }
        }
        say.send(()).unwrap();
        reader.read_to_end(&mut log).unwrap();
    });
    said.recv_timeout(Duration::from_secs(60)).unwrap();
    terminate(running.id());
    assert_eq!(code(running), Some(0));
    log.join().unwrap();
}

#[tokio::test]
async fn f88_a_daemon_whose_reader_is_gone_says_so_and_loses_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (reader, writer) = std::io::pipe().unwrap();
    let mut running = Running::start_writing_to(relay(&["run"], &[("DATABASE_URL", database.url()), STDOUT]), writer);
    running.until_log("\"message\":\"ready\"");
    drop(reader);
    sql(&mut connection, "select emit_event('a')").await;
    running.finish().exited(1).says(&["destination stdout: the reader of standard output has gone"]);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 1);
}

#[tokio::test]
async fn f88_a_standard_output_that_leads_nowhere_takes_no_event() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "select emit_event('a')").await;
    let variables = [("DATABASE_URL", database.url()), STDOUT];
    let run = |setup: &str, args: &[&str]| Running::start(relay_after(setup, args, &variables)).finish();
    for (setup, reason) in [("exec >&-", "standard output is closed"), ("exec 1</dev/zero", "open for reading only")] {
        for args in [&["--once"][..], &["run"]] {
            assert!(run(setup, args).exited(2).complaint().contains(reason), "{setup}");
        }
    }
    run("exec >/dev/full", &["--once"]).exited(3).says(&["No space left on device"]);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 1);
    run("exec >/dev/full", &["check"]).exited(1).says(&["cannot write to standard output"]);
    // The relay works in each of these set-ups.
    run("exec 2>&-", &["--once"]).exited(0);
    for setup in ["exec <&-", "exec >/dev/null", "exec <&- 2>&-"] {
        sql(&mut connection, "select emit_event('a')").await;
        run(setup, &["--once"]).exited(0);
    }
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    finished(&["check"], &variables).exited(0);
}

/// The largest size that a written file may have.
const FILE_LIMIT: u64 = 64 << 20;

async fn a_file_at_the_limit_of_its_size_is_the_destinations_fault<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "healthy", "k").await;
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("full");
    let url = format!("file://{}", full.display());
    for destination in [STDOUT, ("RELAY_DESTINATION_STDOUT", url.as_str())] {
        std::fs::File::create(&full).unwrap().set_len(FILE_LIMIT).unwrap();
        let setup = format!("prlimit --pid=$$ --fsize={FILE_LIMIT}; exec >>'{}'", full.display());
        let run = |setup: &str, args: &[&str]| {
            Running::start(relay_after(setup, args, &[("DATABASE_URL", store.url()), destination])).finish()
        };
        // An event that crashed the relay three times would be given up, so this runs four times.
        for _ in 0..4 {
            run(&setup, &["--once"]).exited(3).says(&["File too large"]);
        }
        if destination == STDOUT {
            run(&setup, &["check"]).exited(1).says(&["cannot write to standard output: File too large"]);
        }
        assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 1);
        assert_eq!(std::fs::metadata(&full).unwrap().len(), FILE_LIMIT);
    }
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    finished(&["--once"], &[("DATABASE_URL", store.url()), STDOUT]).exited(0);
}

#[tokio::test]
async fn f10_a_standard_output_or_file_at_the_limit_of_its_size_kills_no_relay_and_charges_no_event() {
    a_file_at_the_limit_of_its_size_is_the_destinations_fault::<Postgres>().await;
    a_file_at_the_limit_of_its_size_is_the_destinations_fault::<Sqlite>().await;
}

#[tokio::test]
async fn f10_a_log_at_the_limit_of_its_size_holds_up_nothing() {
    let database = database().await;
    sql(&mut database.connect().await, "select emit_event('a')").await;
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    std::fs::File::create(&log).unwrap().set_len(FILE_LIMIT).unwrap();
    let setup = format!("prlimit --pid=$$ --fsize={FILE_LIMIT}; exec 2>>'{}'", log.display());
    let run = |args: &[&str], setting| {
        Running::start(relay_after(&setup, args, &[("DATABASE_URL", database.url()), setting])).finish()
    };
    assert_eq!(run(&["--once"], STDOUT).exited(0).stdout.lines().count(), 1);
    // The same holds if there is only an error to write.
    run(&["--once"], ("RELAY_LANES", "many")).exited(2);
}

#[tokio::test]
async fn f06_an_end_of_cpu_time_stops_it_as_sigterm_does() {
    let database = database().await;
    let mut running = Running::start(relay(&["run"], &[("DATABASE_URL", database.url()), STDOUT]));
    running.until_log("\"message\":\"ready\"");
    running.signal("XCPU");
    running.finish().exited(0).says(&["stopping", "SIGXCPU"]);
}
