//! A role that may create objects in the schema defines better matches for what relay's statements call. No relay runs them.

use std::path::PathBuf;

use sqlx::PgConnection;

use crate::binary::{Running, finished, relay, until};
use crate::harness::{column, count, sql};
use crate::servers::{Database, empty_database, redis};
use crate::stores::Client;

/// The files with SQL that a relay or a migration runs.
fn sources() -> Vec<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("src/outbox/postgres.rs"), root.join("deploy/sql/roles.sql")];
    let mut folders = vec![root.join("src/outbox/postgres"), root.join("migrations/postgres")];
    while let Some(folder) = folders.pop() {
        let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let (inner, found): (Vec<_>, Vec<_>) = paths.partition(|path| path.is_dir());
        folders.extend(inner);
        files.extend(found);
    }
    files.sort();
    files
}

/// The names that `text` calls, each with the text before and after it.
fn calls(text: &str) -> Vec<(&str, &str, &str)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices('(')
        .filter_map(|(end, _)| {
            let before = text[..end].trim_end_matches('"');
            let start = before.rfind(|c| !is_name(c)).map_or(0, |at| at + 1);
            (start < before.len()).then(|| (&before[start..], &text[..start], &text[end + 1..]))
        })
        .collect()
}

/// The SQL in a file: the whole file without comments, or the string literals of a Rust file.
fn statements(file: &PathBuf) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap();
    let is_rust = file.extension().is_some_and(|extension| extension == "rs");
    let code: Vec<&str> =
        text.lines().map(|line| if is_rust { line } else { line.split("--").next().unwrap() }).collect();
    if !is_rust {
        return vec![code.join("\n")];
    }
    let code: Vec<&str> = code.into_iter().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n").replace("'\"'", "").replace("\\\"", "");
    let literals = code.split('"').skip(1).step_by(2);
    literals
        .filter(|text| ["select", "insert", "update", "delete"].iter().any(|word| text.contains(word)))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn f73_every_call_of_a_function_in_our_sql_names_its_schema() {
    let database = empty_database().await;
    let known = column(
        &mut database.connect().await,
        "select distinct proname::text from pg_proc where pronamespace = 'pg_catalog'::regnamespace",
    )
    .await;
    let mut unqualified = Vec::new();
    for file in sources() {
        for statement in statements(&file) {
            for (name, before, after) in calls(&statement) {
                // These are syntax, or the names of columns and of column lists.
                let syntax = ["extract", "range", "name", "text", "interval", "timestamp", "any", "array", "values"];
                let declared = before.ends_with("as ") || before.ends_with(") ") || before.ends_with("function ");
                // With several arguments it is syntax too, and always means PostgreSQL's own.
                let several =
                    name == "unnest" && after.split(')').next().is_some_and(|arguments| arguments.contains(','));
                if known.iter().any(|known| known == name)
                    && !before.ends_with(['.', '"'])
                    && !declared
                    && !several
                    && !syntax.contains(&name)
                {
                    let at = before.lines().last().unwrap_or_default();
                    unqualified.push(format!("{}: {at}{name}(", file.display()));
                }
            }
        }
    }
    assert!(unqualified.is_empty(), "{}", unqualified.join("\n"));
}

/// Defines functions and operators that match every call better than PostgreSQL's own, unless those match exactly. Their
/// owner is a role that may insert events and create objects in the schema `app`. A session that runs one raises
/// `attacker.trapped`, which no rollback undoes, and fails.
async fn set_traps(database: &Database, connection: &mut PgConnection) {
    let role = format!("mallory_{}", database.url().rsplit('/').next().unwrap());
    let mut names: Vec<String> = sources()
        .iter()
        .flat_map(|file| {
            let text = std::fs::read_to_string(file).unwrap();
            calls(&text).into_iter().map(|(name, ..)| format!("('{name}')")).collect::<Vec<_>>()
        })
        .collect();
    names.sort();
    names.dedup();
    sql(
        connection,
        format!(
            "create role {role};
             create schema app;
             grant usage, create on schema app to {role};
             create schema attacker authorization {role};
             create temp table called (name text);
             grant select on called to {role};
             insert into called values {};
             set role {role};
             create sequence attacker.trapped;
             grant usage on sequence attacker.trapped to public;
             grant usage on schema attacker to public",
            names.join(", ")
        ),
    )
    .await;
    sql(
        connection,
        r"do $traps$
        declare
            types text[] := '{text,integer,bigint,smallint,jsonb,name,oid,regclass,text[],timestamptz,interval,boolean,varchar,uuid,numeric,smallint[],bigint[],uuid[]}';
            body text := $$ language plpgsql as 'begin perform pg_catalog.nextval(''attacker.trapped''); raise exception ''a trap was run''; end' $$;
            f text; a text; b text; o text;
        begin
            for f in select distinct p.proname from pg_proc p join called c on c.name = p.proname
                     where p.pronamespace = 'pg_catalog'::regnamespace
            loop
                foreach a in array types || array['text, text, text', 'text, text, text, text', 'jsonb, text, text', 'text, integer, text'] loop
                    execute format('create function app.%I(%s) returns text %s', f, a, body);
                end loop;
                foreach a in array types loop
                    foreach b in array types[1:7] loop
                        execute format('create function app.%I(%s, %s) returns text %s', f, a, b, body);
                    end loop;
                end loop;
            end loop;
            foreach a in array types loop
                foreach b in array types loop
                    execute format('create function app.trap(%s, %s) returns boolean %s', a, b, body);
                    foreach o in array '{=,<>,<,>,<=,>=,+,-,*,/,%,||,~,&,|,<<,>>,#>,->,->>,?|,?,@>,~~,!~~,!~}'::text[] loop
                        if not exists (select from pg_operator where oprname = o and oprnamespace = 'pg_catalog'::regnamespace
                                       and oprleft = a::regtype and oprright = b::regtype) then
                            execute format('create operator app.%s (function = app.trap, leftarg = %s, rightarg = %s)', o, a, b);
                        end if;
                    end loop;
                end loop;
            end loop;
        end
        $traps$",
    )
    .await;
    sql(connection, "reset role").await;
}

#[tokio::test]
async fn f73_nobody_runs_what_others_created_in_the_schema() {
    let database = empty_database().await;
    let mut connection = database.connect().await;
    set_traps(&database, &mut connection).await;
    let url = format!("{}?options=-csearch_path%3Dapp", database.url());
    let trapped =
        async |connection: &mut PgConnection| column(connection, "select is_called::text from attacker.trapped").await;

    // Migrations run in a schema that already has the traps.
    finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    sql(&mut connection, "set search_path = app").await;
    crate::schema::roles::apply(&mut connection).await;
    assert_eq!(trapped(&mut connection).await, ["false"], "migrate, and the roles");

    let (stream, poison) = ("hostile:{event_type}", "hostile:poison");
    ::redis::cmd("SET").arg(poison).arg("x").exec(&mut crate::stream::connect(redis().url())).unwrap();
    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", stream),
        ("RELAY_STDOUT", "true"),
        ("EVENT_HISTORY_ENABLED", "true"),
        ("RELAY_GHOST_BARRIER", "true"),
        ("EVENT_DEFAULT_MAX_RETRIES", "1"),
        ("EVENT_DEFAULT_BACKOFF_MS", "1"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "100"),
    ];
    sql(
        &mut connection,
        "set search_path = app; insert into event_relay_run (run_id, worker) values (gen_random_uuid(), 'x')",
    )
    .await;
    let mut running = Running::start(relay(&[], &variables));
    running.until_log("\"message\":\"ready\"");
    sql(
        &mut connection,
        r#"insert into event_outbox (event_type, aggregate_id, headers) select 'fine', '7', '{"a": "b"}' from generate_series(1, 20);
           select emit_event('fine', '{"n": 1}', aggregate_id => '7'), emit_event('poison', aggregate_id => '7'),
                  emit_event('fine', aggregate_id => '7'), emit_event('later', delay => '10 ms')"#,
    )
    .await;
    finished(&["emit", "fine", "{}", "--aggregate-id", "7"], &variables).exited(0);
    let dead = async |connection: &mut PgConnection| count(connection, "app.event_dead_letter").await;
    crate::harness::eventually("the poison is dead-lettered", async || dead(&mut connection).await == 1).await;
    crate::harness::eventually("the outbox is empty", async || count(&mut connection, "app.event_outbox").await == 0)
        .await;
    until("all are on standard output", || running.output().lines().count() >= 24);
    running.signal("TERM");
    let said = running.finish().exited(0).stderr;
    assert_eq!(trapped(&mut connection).await, ["false"], "{said}");

    let redriven = "select redrive_dead_letter(id)::text from event_dead_letter where redriven_at is null";
    assert_eq!(column(&mut connection, redriven).await.len(), 1);
    sql(
        &mut connection,
        "select relay_add_days('event_history', 9), relay_drop_days('event_history', '1 day'), relay_epoch_above(1)",
    )
    .await;
    sql(
        &mut connection,
        "select * from event_outbox_lag; select * from event_blocked_keys; select * from event_dead_letter_summary",
    )
    .await;
    let check = finished(&["check"], &variables);
    assert!(!check.stdout.contains("a trap"), "{}", check.stdout);
    for args in [&["--once"][..], &["audit"]] {
        let ended = finished(args, &variables);
        assert!(!ended.stderr.contains("a trap"), "{args:?}: {}", ended.stderr);
    }
    finished(&["migrate"], &variables).exited(0);
    assert_eq!(trapped(&mut connection).await, ["false"]);

    // The functions are created again, as after a renaming.
    sql(&mut connection, "alter schema app rename to shop").await;
    let url = format!("{}?options=-csearch_path%3Dshop", database.url());
    finished(&["migrate"], &[("DATABASE_URL", &url)]).exited(0);
    finished(&["--once"], &[("DATABASE_URL", &url), ("RELAY_STDOUT", "true")]);
    assert_eq!(trapped(&mut connection).await, ["false"]);

    // The traps work: a call without a schema runs one.
    sql(&mut connection, "set search_path = shop").await;
    assert!(connection.execute("select format('%s', 'a'::name)").await.is_err());
    assert_eq!(trapped(&mut connection).await, ["true"]);
}
