//! `relay replay`, `relay tail` and `relay prune` on every store, as the built binary.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::{Finished, Running, finished, relay, until};
use crate::harness::{count, emit, sql};
use crate::stores::Store;

/// A store with a relay that keeps its history, and files as destinations.
struct Shop<S: Store> {
    store: S,
    connection: S::Connection,
    folder: TempDir,
    variables: Vec<(String, String)>,
}

impl<S: Store> Shop<S> {
    async fn new() -> Self {
        let store = S::new().await;
        let (connection, folder) = (store.connect().await, tempfile::tempdir().unwrap());
        let file = |name: &str| format!("file://{}/{name}.jsonl?fsync=false", folder.path().display());
        let variables = [
            ("DATABASE_URL", store.url().to_owned()),
            ("RELAY_DESTINATION_A", file("a")),
            ("RELAY_LOG", "warn".to_owned()),
            ("EVENT_HISTORY_ENABLED", "true".to_owned()),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value)).into();
        Self { store, connection, folder, variables }
    }

    fn variables(&self) -> Vec<(&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// Adds a destination that only replays go to.
    fn add_b(&mut self) {
        let file = format!("file://{}/b.jsonl?fsync=false", self.folder.path().display());
        self.variables.push(("RELAY_DESTINATION_B".to_owned(), file));
    }

    fn run(&self, args: &[&str], code: i32) -> Finished {
        finished(args, &self.variables()).exited(code)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.run(&[args, &["--json"]].concat(), 0).stdout).unwrap()
    }

    /// So many events of three keys are published.
    async fn publish(&mut self, events: usize) {
        for index in 0..events {
            let event_type = if index % 3 == 0 { "invoice.sent" } else { "order.created" };
            emit(&mut self.connection, event_type, ["x", "y", "z"][index / 2 % 3]).await;
        }
        self.run(&["--once"], 0);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.jsonl"))
    }

    /// What a destination has received.
    fn received(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn recorded(&mut self) -> (i64, i64, i64) {
        let connection = &mut self.connection;
        let (log, history) =
            (count(connection, "event_processing_log").await, count(connection, "event_history").await);
        (log, history, count(connection, "event_outbox").await)
    }
}

/// The sequences of each key, which must ascend.
fn in_order(events: &[Value]) {
    let mut last: HashMap<&str, u64> = HashMap::new();
    for event in events {
        let sequence: u64 = event["sequence"].as_str().unwrap().parse().unwrap();
        let before = last.insert(event["partitionkey"].as_str().unwrap(), sequence).unwrap_or(0);
        assert!(before < sequence, "{sequence} after {before}");
    }
}

pub(super) async fn a_replay_publishes_what_was_chosen_once_more_in_order_and_marked_and_is_recorded_nowhere<
    S: Store,
>() {
    let mut shop = Shop::<S>::new().await;
    shop.publish(60).await;
    let before = (shop.recorded().await, shop.received("a"));
    let dry = shop.json(&["replay", "--to", "a", "--type", "order.*", "--dry-run"]);
    assert_eq!((&dry["count"], &dry["dry_run"]), (&json!(40), &json!(true)));
    assert!(
        shop.run(&["replay", "--to", "a", "--dry-run"], 0)
            .stdout
            .starts_with("60 events would be published to a (file ")
    );
    assert_eq!((shop.recorded().await, shop.received("a")), before);

    let done = shop.json(&["replay", "--to", "a", "--type", "order.*"]);
    assert_eq!((&done["ended"], &done["published"], &done["refused"]), (&json!("done"), &json!(40), &json!(0)));
    assert_eq!(shop.recorded().await, before.0);
    let received = shop.received("a");
    let (first, replayed) = received.split_at(60);
    assert_eq!(first, before.1);
    assert_eq!(replayed.len(), 40);
    in_order(replayed);
    for event in replayed {
        let original = first.iter().find(|original| original["id"] == event["id"]).unwrap();
        assert!(original.get("replayed").is_none());
        let mut unmarked = event.clone();
        let mark = unmarked.as_object_mut().unwrap().remove("replayed").unwrap();
        assert!(mark.as_str().unwrap().ends_with('Z'), "{mark}");
        assert_eq!(&unmarked, original, "bytes and attributes are those of before");
    }

    shop.add_b();
    let of_key = shop.json(&["replay", "--to", "b", "--from", "a", "--key", "test:x"]);
    assert_eq!((of_key["published"].as_u64(), shop.received("b").len()), (Some(20), 20));
    let id = first[7]["id"].as_str().unwrap();
    let sequence = first[9]["sequence"].as_str().unwrap();
    let by_id = shop.json(&["replay", "--to", "b", "--from", "a", "--id", id, "--id", sequence]);
    assert_eq!(by_id["published"], 2);
    let last = shop.received("b").split_off(20);
    assert_eq!([&last[0]["id"], &last[1]["id"]], [&first[7]["id"], &first[9]["id"]]);
    assert_eq!(shop.json(&["replay", "--to", "a", "--since", "1h", "--dry-run"])["count"], 60);
    assert_eq!(shop.json(&["replay", "--to", "a", "--until", "1h", "--dry-run"])["count"], 0);

    let nothing = shop.run(&["replay", "--to", "b"], 0).stdout;
    assert!(nothing.starts_with("nothing to replay: ") && nothing.contains("published to a (--from)"), "{nothing}");
}

pub(super) async fn a_replay_that_cannot_be_is_refused_in_one_line<S: Store>() {
    let mut shop = Shop::<S>::new().await;
    let refused = shop.run(&["replay", "--to", "a"], 1);
    assert!(refused.complaint().contains("EVENT_HISTORY_ENABLED=true"), "{}", refused.stderr);
    shop.publish(5).await;
    for (args, part) in [
        (&["--to", "nowhere"][..], "there is no destination \"nowhere\"; there are a"),
        (&["--to", "a", "--since", "1h", "--until", "2h"], "--since is not before --until"),
        (&["--to", "a", "--since", "yesterday"], "a time is written"),
        (&["--to", "a", "--rate", "fast"], "100/s"),
        (&["--to", "a", "--id", "x"], "an id is the UUID"),
        (&[], "--to"),
    ] {
        shop.run(&[&["replay"], args].concat(), 2).says(&[part]);
    }
    // Days that are gone: what is kept begins later.
    sql(&mut shop.connection, S::forget_history()).await;
    let gone = shop.run(&["replay", "--to", "a", "--since", "40d"], 1);
    assert!(gone.complaint().contains("event_history begins at "), "{}", gone.stderr);
    assert!(gone.complaint().contains("--since 20"), "{}", gone.stderr);
    assert_eq!(shop.received("a").len(), 5);
}

pub(super) async fn a_replay_that_is_stopped_says_how_it_goes_on_and_two_are_not_at_work_at_a_time<S: Store>() {
    let mut shop = Shop::<S>::new().await;
    shop.publish(40).await;
    let mut slow = Running::start(relay(&["replay", "--to", "a", "--rate", "20/s"], &shop.variables()));
    until("it publishes", || shop.received("a").len() > 44);
    let second = shop.run(&["replay", "--to", "a"], 1);
    assert!(second.complaint().contains("another replay of this database is at work"), "{}", second.stderr);
    shop.run(&["replay", "--to", "a", "--dry-run"], 0);
    assert!(slow.is_running());
    slow.signal("INT");
    let stopped = slow.finish().exited(130);
    assert!(stopped.stdout.contains(" of 40 events published to a in "), "{}", stopped.stdout);
    let (_, command) = stopped.complaint().rsplit_once(": relay ").unwrap();
    let args: Vec<&str> = command.split(' ').collect();
    assert!(command.starts_with("replay --to a --until ") && command.contains(" --rate 20/s --after "), "{command}");
    // At once, as there is no rate.
    let args: Vec<&str> = args.into_iter().filter(|arg| !["--rate", "20/s"].contains(arg)).collect();
    shop.run(&args, 0);
    let received = shop.received("a");
    let replayed = &received[40..];
    assert!((40..=41).contains(&replayed.len()), "{}", replayed.len());
    in_order(replayed);
}

pub(super) async fn a_replay_waits_for_a_destination_that_is_down_and_ends_for_one_that_is_set_up_wrongly<S: Store>() {
    let mut shop = Shop::<S>::new().await;
    shop.publish(6).await;
    shop.variables.push(("RELAY_DESTINATION_DOWN".to_owned(), "redis+stream://127.0.0.1:1?stream=s".to_owned()));
    shop.variables.push(("RELAY_DESTINATION_WRONG".to_owned(), "file:///nowhere/at/all.jsonl".to_owned()));
    let mut waiting = Running::start(relay(&["replay", "--to", "down", "--from", "a"], &shop.variables()));
    waiting.until_log("down does not take events, and the replay waits for it");
    waiting.signal("TERM");
    waiting.finish().exited(143).says(&["stopped; to go on after sequence 0 ("]);
    let wrong = shop.run(&["replay", "--to", "wrong", "--from", "a"], 1);
    assert!(wrong.complaint().contains("the destination is configured wrongly"), "{}", wrong.stderr);
    assert!(wrong.stdout.starts_with("0 of 6 events published to wrong"), "{}", wrong.stdout);
}

pub(super) async fn a_tail_shows_what_is_recorded_from_now_on_or_since_and_ends_well<S: Store>() {
    let mut shop = Shop::<S>::new().await;
    shop.publish(6).await;
    let rows =
        |output: &str| -> Vec<Value> { output.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let from_now = Running::start(relay(&["tail", "--json"], &shop.variables()));
    let all = Running::start(relay(&["tail", "--json", "--since", "1h"], &shop.variables()));
    let text = Running::start(relay(&["tail", "--since", "1h", "--type", "order.*"], &shop.variables()));
    let of_key = Running::start(relay(&["tail", "--since", "1h", "--key", "test:y", "--json"], &shop.variables()));
    let failed = ["tail", "--since", "1h", "--status", "failed", "--destination", "a"];
    let failed = Running::start(relay(&failed, &shop.variables()));
    until("it shows what was", || all.output().lines().count() == 6);
    until("it shows what was of a type", || text.output().lines().count() == 4);
    until("it shows what was of a key", || of_key.output().lines().count() == 2);
    assert_eq!(from_now.output(), "");
    shop.publish(3).await;
    until("it shows what is new", || from_now.output().lines().count() == 3);
    until("it shows what is new", || all.output().lines().count() == 9);
    let (new, all_rows) = (rows(&from_now.output()), rows(&all.output()));
    assert_eq!(new, all_rows[6..]);
    assert_eq!(
        (&new[0]["status"], &new[0]["destination"], &new[0]["attempt"]),
        (&json!("published"), &json!("a"), &json!(1))
    );
    let line = text.output();
    assert!(line.contains("  published      a  order.created  sequence "), "{line}");
    for (running, signal, code) in
        [(from_now, "INT", 130), (all, "TERM", 143), (text, "INT", 130), (of_key, "INT", 130)]
    {
        running.signal(signal);
        running.finish().exited(code);
    }
    failed.signal("INT");
    assert_eq!(failed.finish().exited(130).stdout, "");

    // Its reader goes away.
    let mut piped = relay(&["tail", "--since", "1h"], &shop.variables());
    let mut piped = piped.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(piped.stdout.take());
    assert_eq!(piped.wait().unwrap().code(), Some(0));
}

pub(super) async fn a_prune_deletes_what_is_past_its_retention_and_says_before_what_it_would<S: Store>() {
    let mut shop = Shop::<S>::new().await;
    shop.publish(4).await;
    sql(&mut shop.connection, S::old_log()).await;
    let before = shop.recorded().await;
    let dry = shop.json(&["prune", "--dry-run"]);
    assert_eq!(dry["tables"][0]["table"], "event_processing_log");
    assert!(dry["tables"][0]["days"] != json!([]) || dry["tables"][0]["rows"] == 3, "{dry}");
    assert_eq!((&dry["tables"][1]["days"], &dry["tables"][1]["rows"]), (&json!([]), &json!(0)));
    let words = shop.run(&["prune", "--dry-run"], 0).stdout;
    assert!(words.contains(" would be deleted\nevent_history, kept for 30days: nothing is older\n"), "{words}");
    assert_eq!(shop.recorded().await, before);
    let done = shop.run(&["prune"], 0).stdout;
    assert!(done.starts_with("event_processing_log, kept for 7days: ") && done.contains(" deleted\n"), "{done}");
    assert_eq!(shop.recorded().await, (before.0 - 3, before.1, before.2));
    let again = shop.run(&["prune"], 0).stdout;
    assert!(again.starts_with("event_processing_log, kept for 7days: nothing is older\n"), "{again}");
    let _ = &shop.store;
}
