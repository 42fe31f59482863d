//! What `relay dead-letter` does with input that is wrong: one clear line, the right exit code, nothing half done.

use std::io::Write;
use std::process::Stdio;

use super::{dead_letter, dead_letters, on_each_store};
use crate::harness::{count, sql};
use crate::stores::Store;

async fn ids_that_cannot_be_done_are_refused_with_1_before_anything_is_done<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 5).await;
    sql(&mut connection, S::redrive("id = 1")).await;
    dead_letter(&store, &["discard", "--id", "5", "--reason", "x"]).exited(0);
    for (args, said) in [
        (&["show", "4711"][..], "there is no dead letter 4711"),
        (&["redrive", "--id", "2,4711"], "there is no dead letter 4711"),
        (&["discard", "--id", "2,4711", "--reason", "x"], "there is no dead letter 4711"),
        (&["purge", "--yes", "--id", "4711"], "there is no dead letter 4711"),
        (&["redrive", "--id", "2", "--id", "1"], "dead letter 1 has been redriven already"),
        (&["discard", "--id", "2,1", "--reason", "x"], "dead letter 1 has been redriven already"),
        (&["discard", "--id", "2,5", "--reason", "x"], "dead letter 5 has been discarded already"),
    ] {
        let refused = dead_letter(&store, args).exited(1);
        assert!(refused.complaint().contains(said), "{args:?}: {}", refused.stderr);
        assert_eq!(refused.stdout, "");
    }
    assert_eq!(count(&mut connection, "event_outbox").await, 1);
    assert_eq!(count(&mut connection, "event_dead_letter where redriven_at is null and discarded_at is null").await, 3);
}

async fn wrong_usage_ends_with_2<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 2).await;
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.json");
    std::fs::write(&broken, "{\"cAnary\": }").unwrap();
    let (broken, missing) = (broken.to_str().unwrap(), folder.path().join("missing.json"));
    let missing = missing.to_str().unwrap();
    for args in [
        &[][..],
        &["bogus"],
        &["show"],
        &["show", "x"],
        &["show", "0"],
        &["list", "--since", "yesterday"],
        &["list", "--limit", "0"],
        &["list", "--state", "gone"],
        &["redrive", "--id", "one"],
        &["redrive", "--rate", "0"],
        &["redrive", "--to", ""],
        &["redrive", "--payload", broken],
        &["redrive", "--payload", broken, "--id", "1"],
        &["redrive", "--payload", missing, "--id", "1"],
        &["discard"],
        &["discard", "--reason", "x"],
        &["discard", "--reason", " ", "--all"],
        &["purge"],
        &["purge", "--id", "1"],
    ] {
        let refused = dead_letter(&store, args).exited(2);
        assert_eq!(refused.stdout, "", "{args:?}");
        assert!(!refused.stderr.is_empty() && !refused.stderr.contains("cAnary"), "{args:?}: {}", refused.stderr);
    }
    let two = folder.path().join("good.json");
    std::fs::write(&two, "{}").unwrap();
    let refused = dead_letter(&store, &["redrive", "--id", "1,2", "--payload", two.to_str().unwrap()]).exited(2);
    assert!(refused.complaint().contains("one --id"), "{}", refused.stderr);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 2);
    assert_eq!(count(&mut connection, "event_operator_action").await, 0);
}

async fn an_error_in_the_middle_leaves_whole_batches_and_says_how_far_it_came<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 30).await;
    // The row of an application's own, which no redrive can be.
    let refuse =
        S::refuse("insert on event_outbox").replace("for each row", "for each row when (new.event_type = 'e21')");
    let refuse = refuse.replace("event_outbox begin", "event_outbox when new.event_type = 'e21' begin");
    sql(&mut connection, refuse).await;
    let failed = dead_letter(&store, &["redrive", "--rate", "50"]).exited(1);
    let said = failed.complaint();
    assert!(said.contains("redriven 20 of 30, then: ") && said.contains("run it again to go on"), "{said}");
    assert_eq!(count(&mut connection, "event_outbox").await, 20);
    assert_eq!(count(&mut connection, "event_dead_letter where redriven_at is not null").await, 20);
    sql(&mut connection, S::allow("event_outbox")).await;
    assert_eq!(dead_letter(&store, &["redrive"]).exited(0).stdout, "redriven 10 dead letters\n");
}

/// On a terminal, which `script` makes.
async fn a_purge_asks_first_and_who_declines_has_purged_nothing<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    dead_letters::<S>(&mut connection, 3).await;
    for (answer, code, left) in [("n", 1, 3), ("", 1, 3), ("y", 0, 0)] {
        let purge = format!("{} dead-letter purge --state open", env!("CARGO_BIN_EXE_relay"));
        let mut script = std::process::Command::new("script")
            .args(["-qec", &purge, "/dev/null"])
            .env("DATABASE_URL", store.url())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        script.stdin.take().unwrap().write_all(format!("{answer}\n").as_bytes()).unwrap();
        let ended = script.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stdout).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{said}");
        assert!(said.contains("would purge 3 dead letters") && said.contains("purge 3 for good? [y/N]"), "{said}");
        assert_eq!(said.contains("relay: nothing was purged"), code == 1, "{said}");
        assert_eq!(count(&mut connection, "event_dead_letter").await, left);
    }
}

on_each_store! {
    a_purge_asks_first_and_who_declines_has_purged_nothing
    ids_that_cannot_be_done_are_refused_with_1_before_anything_is_done
    wrong_usage_ends_with_2
    an_error_in_the_middle_leaves_whole_batches_and_says_how_far_it_came
}
