//! deploy/sql/roles.sql: each role has the rights that it needs, and no others.

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use tokio::sync::Mutex;

use super::{DEAD_LETTER, try_execute, value, values};
use crate::binary::{finished, relay};
use crate::harness::sql;
use crate::servers::{Database, database, redis};

const ROLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/sql/roles.sql");

/// Roles belong to the server, not to a database, so two tests must not create them at the same time.
static APPLYING: Mutex<()> = Mutex::const_new(());

/// The file without psql's own commands.
fn script() -> String {
    let script = std::fs::read_to_string(ROLES).unwrap();
    let is_sql = |line: &&str| !line.starts_with('\\') && !line.contains("relay.revoke_create = 'on'");
    script.lines().filter(is_sql).map(|line| format!("{line}\n")).collect()
}

/// Applies the file to the first schema of the connection's search path.
pub(crate) async fn apply(owner: &mut PgConnection) {
    let _alone = APPLYING.lock().await;
    sql(owner, script()).await;
}

/// Applies the file. Returns the superuser's connection.
async fn with_roles(database: &Database) -> PgConnection {
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    // The file recommends this for PostgreSQL before 15. It is the default of later versions.
    sql(&mut owner, "revoke create on schema public from public").await;
    owner
}

/// Creates a login that is a member of `role`. Returns its URL.
pub(crate) async fn login(database: &Database, owner: &mut PgConnection, role: &str) -> String {
    let (_, place) = database.url().rsplit_once('@').unwrap();
    let (_, name) = place.rsplit_once('/').unwrap();
    let user = format!("{name}_{role}");
    let _alone = APPLYING.lock().await;
    sql(owner, &format!("create role {user} login password 'known' in role {role}")).await;
    format!("postgres://{user}:known@{place}")
}

async fn denied(connection: &mut PgConnection, statements: &[&str]) {
    for statement in statements {
        let refused = try_execute(connection, statement).await.expect_err(statement);
        assert!(refused.starts_with("42501"), "{statement}: {refused}");
    }
}

#[tokio::test]
async fn the_script_may_be_applied_again() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    sql(&mut owner, "grant select on event_outbox to relay_app").await;
    let mut owner = with_roles(&database).await;
    assert!(!value::<bool>(&mut owner, "select has_table_privilege('relay_app', 'event_outbox', 'select')").await);
}

#[tokio::test]
async fn the_relay_needs_no_more_than_relay_worker() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let url = login(&database, &mut owner, "relay_worker").await;
    let stream = "roles:{event_type}";
    let wrong_type = "roles:poison";
    let mut redis_connection = redis::Client::open(redis().url()).unwrap().get_connection().unwrap();
    redis::cmd("SET").arg(wrong_type).arg("x").exec(&mut redis_connection).unwrap();
    sql(
        &mut owner,
        "select emit_event('fine', aggregate_id => n::text) from generate_series(1, 10) n;
         select emit_event('poison', aggregate_id => 'p'), emit_event('later', delay => '1 ms')",
    )
    .await;
    // Every table is written: published, retried, dead-lettered, kept in the history; days are created and dropped.
    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", stream),
        ("EVENT_HISTORY_ENABLED", "true"),
        ("EVENT_DEFAULT_MAX_RETRIES", "1"),
        ("EVENT_DEFAULT_BACKOFF_MS", "1"),
        ("RELAY_LOG", "warn"),
    ];
    let check = finished(&["check"], &variables).exited(0);
    assert!(check.stdout.contains("ok    privileges: all granted"), "{}", check.stdout);
    let mut said = String::new();
    while value::<bool>(&mut owner, "select exists (select from event_outbox)").await {
        said += &finished(&["--once"], &variables).stderr;
    }
    assert!(!said.contains("denied"), "{said}");
    let log: Vec<String> = values(
        &mut owner,
        "select concat_ws(' ', count(*), status) from event_processing_log group by status order by status",
    )
    .await;
    assert_eq!(log, ["1 dead_lettered", "1 failed", "11 published"]);
    assert_eq!(value::<i64>(&mut owner, "select count(*) from event_history").await, 11);
    assert_eq!(value::<i64>(&mut owner, "select count(*) from event_dead_letter").await, 1);
}

#[tokio::test]
async fn relay_worker_has_no_more_than_the_relay_needs() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    sql(&mut owner, "create table orders (id bigint); create function secret() returns int language sql as 'select 1'")
        .await;
    let url = login(&database, &mut owner, "relay_worker").await;
    let mut worker = PgConnection::connect(&url).await.unwrap();
    let denials = [
        "create table mine ()",
        "create schema mine",
        "create index on event_outbox (event_type)",
        "truncate event_outbox",
        "select from orders",
        "select from event_processing_log",
        "select from event_dead_letter",
        "select from event_history",
        "select from event_outbox_lag",
        "delete from event_processing_log",
        "delete from event_dead_letter",
        "update event_dead_letter set redriven_at = now()",
        "select redrive_dead_letter(1)",
    ];
    denied(&mut worker, &denials).await;
    for statement in
        ["drop table event_outbox", "alter table event_outbox add x int", "drop function relay_schema_version"]
    {
        let refused = try_execute(&mut worker, statement).await.expect_err(statement);
        assert!(refused.contains("must be owner"), "{refused}");
    }
    // Its functions run with their owner's rights. The caller's search path must not lead them to other tables.
    sql(&mut worker, "create temporary table event_processing_log (x int); set search_path = pg_temp, public").await;
    assert!(value::<i32>(&mut worker, "select relay_add_days('event_processing_log', 8)").await >= 1);
}

#[tokio::test]
async fn relay_app_adds_events_and_sees_none_but_their_ids() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let url = login(&database, &mut owner, "relay_app").await;
    let mut app = PgConnection::connect(&url).await.unwrap();
    sql(&mut app, "insert into event_outbox (event_type, payload) values ('order.created', '{}')").await;
    sql(
        &mut app,
        r#"insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
               correlation_id, causation_id, schema_version, priority, available_at)
           values (gen_random_uuid(), 'a', 's', 't', 'i', '{}', '{"h": "v"}', 'r', 'c', 2, 9, now())"#,
    )
    .await;
    sql(&mut app, "select emit_event('order.created', delay => '1 hour', priority => 3)").await;
    let variables = [("DATABASE_URL", url.as_str())];
    finished(&["emit", "order.created", "--delay", "1h", "--header", "tenant=acme"], &variables).exited(0);
    // This is the insert of an ORM.
    sql(&mut app, "insert into event_outbox (event_type) values ('order.created') returning id, event_id").await;
    assert_eq!(value::<i64>(&mut owner, "select count(*) from event_outbox").await, 5);
    let denials = [
        "select * from event_outbox",
        "select event_type from event_outbox",
        "insert into event_outbox (event_type) values ('a') returning payload",
        "update event_outbox set event_type = 'b'",
        "delete from event_outbox",
        "truncate event_outbox",
        "insert into event_outbox (id, event_type) overriding system value values (1, 'a')",
        "insert into event_outbox (event_type, destination) values ('a', 'redis')",
        "insert into event_outbox (event_type, attempts) values ('a', 3)",
        "insert into event_outbox (event_type, created_at) values ('a', now())",
        "select from event_processing_log",
        "select from event_dead_letter",
        "select from event_history",
        "select from event_outbox_lag",
        "select from event_blocked_keys",
        "select from event_dead_letter_summary",
        "select redrive_dead_letter(1)",
        "select relay_add_days('event_history', 1)",
        "select relay_drop_days('event_history', '0')",
    ];
    denied(&mut app, &denials).await;
}

#[tokio::test]
async fn a_sleeping_relay_is_woken_by_relay_app() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let url = login(&database, &mut owner, "relay_app").await;
    let mut app = PgConnection::connect(&url).await.unwrap();
    let mut listener = sqlx::postgres::PgListener::connect(database.url()).await.unwrap();
    listener.listen("event_outbox").await.unwrap();
    sql(&mut owner, "select pg_advisory_lock('event_outbox'::regclass::oid::int, -1)").await;
    sql(&mut app, "insert into event_outbox (event_type) values ('a')").await;
    listener.recv().await.unwrap();
}

#[tokio::test]
async fn relay_operator_reads_everything_and_redrives() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    sql(&mut owner, DEAD_LETTER).await;
    let url = login(&database, &mut owner, "relay_operator").await;
    let mut operator = PgConnection::connect(&url).await.unwrap();
    for relation in [
        "event_outbox",
        "event_processing_log",
        "event_dead_letter",
        "event_history",
        "event_outbox_lag",
        "event_blocked_keys",
        "event_dead_letter_summary",
    ] {
        sql(&mut operator, &format!("select * from {relation}")).await;
    }
    sql(&mut operator, "select redrive_dead_letter(1)").await;
    assert_eq!(value::<i64>(&mut operator, "select count(*) from event_outbox").await, 1);
    let denials = [
        "insert into event_outbox (event_type) values ('a')",
        "update event_outbox set attempts = 0",
        "delete from event_outbox",
        "delete from event_dead_letter",
        "update event_dead_letter set redriven_at = null",
        "delete from event_processing_log",
        "select relay_drop_days('event_history', '0')",
        "create table mine ()",
    ];
    denied(&mut operator, &denials).await;
}

#[tokio::test]
async fn f28_a_check_names_each_grant_that_is_missing() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let url = login(&database, &mut owner, "relay_worker").await;
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true")];
    // By default every role may execute a function.
    sql(&mut owner, "revoke execute on function relay_schema_version from public").await;
    finished(&["check"], &variables).exited(0);
    for (privilege, object, named) in [
        ("select", "event_outbox", "select"),
        ("insert", "event_outbox", "insert"),
        ("update", "event_outbox", "update"),
        ("delete", "event_outbox", "delete"),
        ("insert", "event_processing_log", "insert on event_processing_log"),
        ("insert", "event_dead_letter", "insert on event_dead_letter"),
        ("insert", "event_history", "insert on event_history"),
        ("execute", "function relay_add_days", "execute on relay_add_days"),
        ("execute", "function relay_drop_days", "execute on relay_drop_days"),
        ("select", "sequence event_outbox_moves", "event_outbox_moves"),
        ("execute", "function relay_schema_version", "relay_schema_version"),
    ] {
        sql(&mut owner, &format!("revoke {privilege} on {object} from relay_worker")).await;
        let check = finished(&["check"], &variables).exited(1);
        let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].contains(named) && failed[0].contains("deploy/sql/roles.sql"), "{privilege}: {}", failed[0]);
        sql(&mut owner, &format!("grant {privilege} on {object} to relay_worker")).await;
    }
    sql(&mut owner, "revoke usage on schema public from public, relay_worker").await;
    let check = finished(&["check"], &variables).exited(1);
    assert!(check.stdout.contains("usage on schema"), "{}", check.stdout);
}

/// Runs the file with psql, as operators do.
#[tokio::test]
async fn the_right_to_create_is_told_and_taken_away_where_that_is_asked_for() {
    // The test has its own server, because roles belong to the server.
    let server = crate::servers::Server::start("postgres", &["--fast"]);
    let database = crate::servers::database_on(&server).await;
    let mut owner = database.connect().await;
    sql(
        &mut owner,
        "create role \"App 1\"; grant create on schema public to \"App 1\"; grant create on schema public to public",
    )
    .await;
    let psql = |more: &[&str]| {
        let mut command = std::process::Command::new(server.program("psql"));
        let told =
            command.args(["-v", "ON_ERROR_STOP=1", "-X"]).args(more).args(["-f", ROLES, database.url()]).output();
        let told = told.unwrap();
        let said = String::from_utf8(told.stderr).unwrap();
        assert!(told.status.success(), "{said}");
        said
    };
    let may_create = "select has_schema_privilege('App 1', 'public', 'create')
        or exists (select from pg_namespace n, aclexplode(n.nspacl) a
                   where n.nspname = 'public' and a.privilege_type = 'CREATE' and a.grantee = 0)";
    let said = psql(&[]);
    for who in ["public", "\"App 1\""] {
        assert!(said.contains(&format!("{who} may create objects in schema public; -v revoke_create=1")), "{said}");
    }
    assert!(value::<bool>(&mut owner, may_create).await);
    let said = psql(&["-v", "revoke_create=1"]);
    for who in ["public", "\"App 1\""] {
        assert!(said.contains(&format!("{who} may no longer create objects in schema public")), "{said}");
    }
    assert!(!value::<bool>(&mut owner, may_create).await);
    assert!(!psql(&[]).contains("may create"), "nobody is left");
}

#[tokio::test]
async fn f76_a_member_that_does_not_inherit_and_a_login_that_acts_as_another_role_are_told_the_cure() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let name = name.to_owned();
    let url = login(&database, &mut owner, "relay_worker").await;
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true")];
    finished(&["check"], &variables).exited(0);
    let role = format!("{name}_relay_worker");
    sql(&mut owner, format!("alter role {role} noinherit")).await;
    let later: bool = value(&mut owner, "select current_setting('server_version_num')::int >= 160000").await;
    if later {
        sql(&mut owner, format!("grant relay_worker to {role} with inherit false")).await;
    }
    let told = finished(&["check"], &variables).exited(1).stdout;
    assert!(told.contains("is a member of relay_worker and does not inherit its rights"), "{told}");
    let [cure, later_cure] =
        [format!("alter role {role} inherit"), format!("grant relay_worker to {role} with inherit true")];
    assert!(told.contains(&cure) && told.contains(&later_cure), "{told}");
    let once = finished(&["--once"], &variables).exited(1).stderr;
    assert!(once.contains("`relay check` names it"), "{once}");
    sql(&mut owner, if later { later_cure } else { cure }).await;
    finished(&["check"], &variables).exited(0);

    sql(
        &mut owner,
        format!("create role {name}_other; grant {name}_other to {role}; alter role {role} set role = {name}_other"),
    )
    .await;
    let told = finished(&["check"], &variables).exited(1).stdout;
    assert!(told.contains(&format!("alter role {role} reset role")), "{told}");
    assert!(told.contains(&format!("(the login is {role}, its setting `role` is {name}_other)")), "{told}");
    sql(&mut owner, format!("alter role {role} reset role")).await;
    finished(&["check"], &variables).exited(0);
}

#[tokio::test]
async fn f76_a_limit_of_connections_below_what_a_relay_opens_is_told_with_the_cure() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let url = login(&database, &mut owner, "relay_worker").await;
    let role = format!("{}_relay_worker", database.url().rsplit_once('/').unwrap().1);
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true"), ("RELAY_LANES", "2")];
    sql(&mut owner, format!("alter role {role} connection limit 4")).await;
    let told = finished(&["check"], &variables).exited(1).stdout;
    let cure = format!("alter role {role} connection limit 5");
    assert!(told.contains(&cure), "{told}");
    sql(&mut owner, cure).await;
    finished(&["check"], &variables).exited(0);
    sql(&mut owner, "select emit_event('fine', aggregate_id => n::text) from generate_series(1, 2000) n").await;
    finished(&["--once"], &variables).exited(0);
}

#[tokio::test]
async fn an_operator_follows_and_replays_and_only_the_relay_prunes() {
    let database = database().await;
    let mut owner = with_roles(&database).await;
    let old = "create table event_processing_log_20200101 partition of event_processing_log
               for values from ('2020-01-01 00:00:00+00') to ('2020-01-02 00:00:00+00')";
    sql(&mut owner, format!("{old}; select emit_event('e', aggregate_id => n::text) from generate_series(1, 3) n"))
        .await;
    let history = ("EVENT_HISTORY_ENABLED", "true");
    finished(&["--once"], &[("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true"), history]).exited(0);
    sql(&mut owner, old).await;
    let operator = login(&database, &mut owner, "relay_operator").await;
    let worker = login(&database, &mut owner, "relay_worker").await;
    let application = login(&database, &mut owner, "relay_app").await;
    let run = |url: &str, args: &[&str], code: i32| {
        finished(args, &[("DATABASE_URL", url), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")]).exited(code)
    };
    let replayed = run(&operator, &["replay", "--to", "stdout"], 0);
    assert_eq!(replayed.stdout.lines().count(), 3, "the events alone are on standard output");
    assert!(replayed.stderr.starts_with("3 of 3 events published to stdout in "), "{}", replayed.stderr);
    let mut tail = relay(&["tail", "--since", "1h"], &[("DATABASE_URL", operator.as_str())]);
    let mut tail = tail.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(tail.stdout.take().unwrap()));
    assert!(lines.next().unwrap().unwrap().contains("  published "));
    tail.kill().unwrap();
    tail.wait().unwrap();

    let refused = run(&operator, &["prune"], 1);
    assert!(refused.complaint().contains("only the relay's own role may delete"), "{}", refused.stderr);
    let would = run(&operator, &["prune", "--dry-run"], 0).stdout;
    assert!(would.contains("the day event_processing_log_20200101, about 0 rows"), "{would}");
    let done = run(&worker, &["prune"], 0).stdout;
    assert!(done.contains("the day event_processing_log_20200101") && done.contains(" deleted\n"), "{done}");
    assert!(value::<bool>(&mut owner, "select to_regclass('event_processing_log_20200101') is null").await);
    for url in [&worker, &application] {
        for args in [&["tail"][..], &["replay", "--to", "stdout"]] {
            let refused = run(url, args, 1);
            assert_eq!(refused.stdout, "");
            assert!(
                refused.stderr.contains("relay_operator") || refused.stderr.contains("roles.sql"),
                "{}",
                refused.stderr
            );
        }
    }
}
