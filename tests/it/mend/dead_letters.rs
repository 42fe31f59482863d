//! `relay dead-letter` does what it says: in order, whole, written down.

use super::{all_die, audited, dead_letter, dead_letters, document, listed, on_each_store};
use crate::binary::{Running, drain, relay};
use crate::harness::{column, count, sql};
use crate::stores::Store;

/// The types of the events that a relay publishes now, in order.
fn published<S: Store>(store: &S) -> Vec<String> {
    drain(store.url()).iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
}

/// Fails unless the events of each key, whose types are `e` and a number, ascend.
fn assert_in_order(types: &[String]) {
    let numbers: Vec<i64> = types.iter().map(|name| name.trim_start_matches('e').parse().unwrap()).collect();
    for key in 0..5 {
        let of_key: Vec<i64> = numbers.iter().copied().filter(|number| number % 5 == key).collect();
        assert!(of_key.is_sorted(), "{of_key:?}");
    }
}

async fn filters_choose_alike_in_every_command<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 12).await;
    sql(&mut connection, "update event_dead_letter set error_code = 'WORSE' where id in (2, 3)").await;
    sql(&mut connection, format!("update event_dead_letter set first_failed_at = {}", S::in_ms(-86_400_000))).await;
    for id in 1..=4 {
        let long_ago = S::in_ms(-3 * 3_600_000 + 10 * id);
        sql(&mut connection, format!("update event_dead_letter set failed_at = {long_ago} where id = {id}")).await;
    }
    sql(&mut connection, "update event_dead_letter set destination = '' where id = 12").await;
    for (filter, ids) in [
        (&["--type", "e1?"][..], &[12_i64, 11, 10][..]),
        (&["--type", "E1*"], &[]),
        (&["--type", "e_"], &[]),
        (&["--key", "order:2"], &[12, 7, 2]),
        (&["--key", "2"], &[12, 7, 2]),
        (&["--key", "orders:2"], &[]),
        (&["--destination", ""], &[12]),
        (&["--destination", "stdout", "--type", "e1*"], &[11, 10, 1]),
        (&["--error", "WORSE"], &[3, 2]),
        (&["--error", "worse"], &[]),
        (&["--since", "2h", "--key", "2"], &[12, 7]),
        (&["--until", "2h"], &[4, 3, 2, 1]),
        (&["--until", "1999-01-01T00:00:00Z"], &[]),
        (&["--since", "1999-01-01T00:00:00+02:00", "--type", "e3"], &[3]),
        (&["--id", "3,5", "--id", "11"], &[11, 5, 3]),
        (&["--limit", "2"], &[12, 11]),
    ] {
        assert_eq!(listed(&store, filter), ids, "{filter:?}");
        if filter[0] == "--limit" {
            continue;
        }
        for command in [&["redrive"][..], &["discard", "--reason", "x"], &["purge", "--state", "open"]] {
            let dry = dead_letter(&store, &[command, filter, &["--dry-run"]].concat()).exited(0).stdout;
            let said = if ids.is_empty() {
                "no dead letter matches".to_owned()
            } else {
                format!(" {} dead letter", ids.len())
            };
            assert!(dry.contains(&said), "{command:?} {filter:?}: {dry}");
        }
    }
    assert_eq!(audited::<S>(&mut connection).await, [""; 0], "a dry run changes nothing");
    let groups = document(&store, &["list", "--summary"]);
    let groups = groups["groups"].as_array().unwrap();
    let told: Vec<_> =
        groups.iter().map(|group| (group["error_code"].as_str().unwrap(), group["count"].as_i64().unwrap())).collect();
    assert_eq!(told, [("BAD", 9), ("WORSE", 2), ("BAD", 1)]);
}

async fn a_redrive_of_many_publishes_in_order_and_is_written_down_once<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 2100).await;
    let dry = dead_letter(&store, &["redrive", "--dry-run", "--limit", "100"]).exited(0).stdout;
    assert!(dry.contains("would redrive 100 dead letters of these 2100\n"), "{dry}");
    let some = dead_letter(&store, &["redrive", "--limit", "100"]).exited(0).stdout;
    assert_eq!(some, "redriven 100 dead letters\n");
    let all = dead_letter(&store, &["redrive", "--destination", "stdout"]).exited(0).stdout;
    assert_eq!(all, "redriven 2000 dead letters\n");
    let published = published(&store);
    assert_eq!(published.len(), 2100);
    assert_in_order(&published);
    assert_eq!(
        audited::<S>(&mut connection).await,
        ["redrive 100 {} {}", r#"redrive 2000 {"destination":"stdout"} {}"#]
    );
    let named = "event_operator_action where done_by <> '' and begun_at <= done_at";
    assert_eq!(count(&mut connection, named).await, 2);
    let again = dead_letter(&store, &["redrive"]).exited(0).stdout;
    assert_eq!(again, "no dead letter matches; nothing to redrive\n");
}

async fn a_redriven_event_that_fails_again_shows_who_redrove_it_and_how_often<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 1).await;
    for id in ["1", "2"] {
        dead_letter(&store, &["redrive", "--id", id]).exited(0);
        all_die::<S>(&mut connection, "stdout", "AGAIN").await;
    }
    assert_eq!(listed(&store, &[]), [3]);
    assert_eq!(listed(&store, &["--state", "redriven"]), [2, 1]);
    let shown = document(&store, &["show", "3"]);
    assert_eq!((shown["state"].as_str(), shown["redrives"].as_i64()), (Some("open"), Some(2)));
    let others = shown["others"].as_array().unwrap();
    assert_eq!(others.len(), 2);
    for other in others {
        assert_eq!(other["event_id"], shown["event_id"]);
        assert!(other["redriven_at"].is_string() && other["redriven_by"].is_string(), "{other}");
    }
    let text = dead_letter(&store, &["list"]).exited(0).stdout;
    assert!(text.contains("redriven 2 times") && text.contains("AGAIN: it is refused"), "{text}");
    // Nothing of the content is shown unless it is asked for.
    let bare = dead_letter(&store, &["show", "3"]).exited(0).stdout;
    assert!(bare.contains("tenant") && !bare.contains("acme") && !bare.contains("secret"), "{bare}");
    let whole = dead_letter(&store, &["show", "3", "--payload"]).exited(0).stdout;
    assert!(whole.contains("acme") && whole.contains("secret"), "{whole}");
    assert_eq!(document(&store, &["show", "3", "--payload"])["payload"]["secret"], 1);
    assert_eq!(shown.get("payload"), None);
}

async fn one_is_redriven_with_a_corrected_payload_and_to_another_destination<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 3).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"right\": true}\n").unwrap();
    let payload = file.path().to_str().unwrap();
    dead_letter(&store, &["redrive", "--id", "2", "--payload", payload]).exited(0);
    dead_letter(&store, &["redrive", "--id", "3", "--to", "archive"]).exited(0);
    let rows = "select event_type || ' ' || destination || ' ' || cast(payload as text) from event_outbox order by id";
    let rows = column(&mut connection, rows).await;
    assert_eq!(rows, ["e2 stdout {\"right\": true}", "e3 archive {\"secret\": 1}"]);
    let kept = column(&mut connection, "select cast(payload as text) from event_dead_letter where id = 2").await;
    assert_eq!(kept, ["{\"secret\": 1}"], "what failed stays as it was");
    assert_eq!(
        audited::<S>(&mut connection).await,
        ["redrive 1 {\"id\":2} {\"payload\":\"corrected\"}", "redrive 1 {\"id\":3} {\"to\":\"archive\"}"]
    );
    assert_eq!(document(&store, &["show", "3"])["redriven_to"], "archive");
}

async fn discarded_ones_stay_with_the_reason_and_leave_the_summary<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 4).await;
    let said = dead_letter(&store, &["discard", "--type", "e[12]", "--reason", "x"]).exited(0).stdout;
    assert_eq!(said, "no dead letter matches; nothing to discard\n", "brackets are nothing special");
    dead_letter(&store, &["discard", "--id", "1,2", "--reason", "a test customer"]).exited(0);
    assert_eq!(listed(&store, &[]), [4, 3]);
    assert_eq!(listed(&store, &["--state", "discarded"]), [2, 1]);
    assert_eq!(count(&mut connection, "event_dead_letter_summary").await, 2);
    let shown = dead_letter(&store, &["show", "1"]).exited(0).stdout;
    assert!(shown.contains("a test customer"), "{shown}");
    // A redrive leaves them out, unless somebody names one.
    assert_eq!(dead_letter(&store, &["redrive"]).exited(0).stdout, "redriven 2 dead letters\n");
    assert_eq!(dead_letter(&store, &["redrive", "--id", "2"]).exited(0).stdout, "redriven 1 dead letter\n");
    let mut published = published(&store);
    published.sort_unstable();
    assert_eq!(published, ["e2", "e3", "e4"]);
    // Purge takes what somebody has dealt with.
    assert_eq!(
        dead_letter(&store, &["purge", "--yes", "--state", "redriven"]).exited(0).stdout,
        "purged 3 dead letters\n"
    );
    assert_eq!(
        dead_letter(&store, &["purge", "--yes", "--until", "1h"]).exited(0).stdout,
        "no dead letter matches; nothing to purge\n"
    );
    assert_eq!(dead_letter(&store, &["purge", "--yes"]).exited(0).stdout, "purged 1 dead letter\n");
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    let audited = audited::<S>(&mut connection).await;
    assert_eq!(audited[0], r#"discard 2 {"id":[1,2]} {"reason":"a test customer"}"#);
    assert_eq!(audited.len(), 5);
}

async fn purge_keeps_what_is_open_unless_it_is_named<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 3).await;
    assert_eq!(dead_letter(&store, &["purge", "--yes"]).exited(0).stdout, "no dead letter matches; nothing to purge\n");
    assert_eq!(dead_letter(&store, &["purge", "--yes", "--id", "2"]).exited(0).stdout, "purged 1 dead letter\n");
    assert_eq!(dead_letter(&store, &["purge", "--yes", "--state", "open"]).exited(0).stdout, "purged 2 dead letters\n");
}

async fn ctrl_c_ends_a_redrive_between_two_batches_and_it_goes_on_where_it_is_run_again<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 40).await;
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let before = count(&mut connection, "event_outbox").await;
        let running =
            Running::start(relay(&["dead-letter", "redrive", "--rate", "5"], &[("DATABASE_URL", store.url())]));
        let begun = std::time::Instant::now();
        while count(&mut connection, "event_outbox").await < before + 3 {
            assert!(begun.elapsed() < crate::binary::PATIENCE, "{}", running.log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        running.signal(signal);
        let ended = running.finish().exited(code);
        assert!(ended.stdout.contains("then stopped; run it again to redrive the rest"), "{}", ended.stdout);
        let (owed, open) = (
            count(&mut connection, "event_outbox").await,
            count(&mut connection, "event_dead_letter where redriven_at is null").await,
        );
        assert!(owed < 40 && owed + open == 40, "{owed} and {open}");
    }
    dead_letter(&store, &["redrive"]).exited(0);
    let numbers: i64 = {
        let counts = column(&mut connection, "select cast(event_count as text) from event_operator_action").await;
        counts.iter().map(|count| count.parse::<i64>().unwrap()).sum()
    };
    assert_eq!(numbers, 40, "each is written down once");
    let published = published(&store);
    assert_eq!(published.len(), 40);
    assert_in_order(&published);
}

async fn a_reader_that_goes_away_and_a_narrow_terminal_do_no_harm<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 20).await;
    for args in [&["list"][..], &["list", "--json"], &["list", "--summary"], &["show", "3", "--payload"], &["redrive"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let command = relay(&[&["dead-letter"], args].concat(), &[("DATABASE_URL", store.url())]);
        let ended = Running::start_writing_to(command, writer).finish().exited(0);
        assert_eq!(ended.stderr, "", "{args:?}");
    }
    assert_eq!(count(&mut connection, "event_outbox").await, 20, "what was asked for is done");
    all_die::<S>(&mut connection, "stdout", "AN_ERROR_CODE_THAT_IS_LONGER_THAN_A_NARROW_TERMINAL").await;
    for args in [&["list"][..], &["list", "--summary"], &["show", "25"], &["redrive", "--dry-run"]] {
        let variables = [("DATABASE_URL", store.url()), ("COLUMNS", "40")];
        let said = crate::binary::finished(&[&["dead-letter"], args].concat(), &variables).exited(0).stdout;
        let widest = said.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= 40, "{args:?} is {widest} wide:\n{said}");
    }
}

on_each_store! {
    filters_choose_alike_in_every_command
    a_redrive_of_many_publishes_in_order_and_is_written_down_once
    a_redriven_event_that_fails_again_shows_who_redrove_it_and_how_often
    one_is_redriven_with_a_corrected_payload_and_to_another_destination
    discarded_ones_stay_with_the_reason_and_leave_the_summary
    purge_keeps_what_is_open_unless_it_is_named
    ctrl_c_ends_a_redrive_between_two_batches_and_it_goes_on_where_it_is_run_again
    a_reader_that_goes_away_and_a_narrow_terminal_do_no_harm
}
