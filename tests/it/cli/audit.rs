//! `relay audit` on real servers: it finds each error that a test makes, and no others.

use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::binary::finished;
use crate::harness::sql;
use crate::servers::{Database, database, redis};
use crate::stream;

struct Shop {
    database: Database,
    connection: PgConnection,
    redis: redis::Connection,
    name: &'static str,
}

impl Shop {
    /// Publishes twenty events of four keys.
    async fn new(name: &'static str) -> Self {
        let database = database().await;
        let mut connection = database.connect().await;
        let events = "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                      select 'e', 't', (i % 4)::text, jsonb_build_object('n', i) from generate_series(1, 20) i";
        sql(&mut connection, events).await;
        let shop = Self { database, connection, redis: stream::connect(redis().url()), name };
        finished(&["--once"], &[shop.variables().as_slice(), &[("EVENT_HISTORY_ENABLED", "true")]].concat()).exited(0);
        shop
    }

    fn variables(&self) -> [(&str, &str); 3] {
        [("DATABASE_URL", self.database.url()), ("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", self.name)]
    }

    fn audit(&self, code: i32, more: &[&str]) -> Value {
        let audited = finished(&[&["audit", "--json"], more].concat(), &self.variables()).exited(code);
        serde_json::from_str(&audited.stdout).unwrap()
    }

    fn delete(&mut self, place: usize) {
        let entries = stream::entries(&mut self.redis, self.name);
        redis::cmd("XDEL").arg(self.name).arg(&entries[place].id).exec(&mut self.redis).unwrap();
    }

    /// Appends a copy of an entry with one field changed.
    fn add_again(&mut self, place: usize, field: &str, value: &str) {
        let entries = stream::entries(&mut self.redis, self.name);
        let mut fields = entries[place].fields.clone();
        fields.insert(field.to_owned(), value.to_owned());
        let mut add = redis::cmd("XADD");
        add.arg(self.name).arg("*");
        fields.iter().for_each(|(name, value)| {
            add.arg(name).arg(value);
        });
        add.exec(&mut self.redis).unwrap();
    }
}

#[tokio::test]
async fn what_is_well_is_clean_trimmed_or_not() {
    let mut shop = Shop::new("audit:clean").await;
    let report = shop.audit(0, &["--exactly-once"]);
    assert_eq!((&report["entries"], &report["counts"]), (&json!(20), &json!({})));
    redis::cmd("XTRIM").arg(shop.name).arg("MAXLEN").arg(7).exec(&mut shop.redis).unwrap();
    redis::cmd("XADD").arg(shop.name).arg("*").arg("theirs").arg(1).exec(&mut shop.redis).unwrap();
    let report = shop.audit(0, &[]);
    assert_eq!((&report["entries"], &report["foreign"], &report["counts"]), (&json!(7), &json!(1), &json!({})));
}

#[tokio::test]
async fn a_stream_that_publishes_exactly_once_takes_a_replay_and_the_audit_leaves_it_out() {
    let mut shop = Shop::new("audit:replay").await;
    let replayed = finished(&["replay", "--to", "redis", "--json"], &shop.variables()).exited(0);
    let replayed: Value = serde_json::from_str(&replayed.stdout).unwrap();
    assert_eq!((&replayed["published"], &replayed["refused"]), (&json!(20), &json!(0)));
    let entries = stream::entries(&mut shop.redis, shop.name);
    assert_eq!(entries.len(), 40);
    assert!(entries.iter().enumerate().all(|(place, entry)| entry.fields.contains_key("replayed") == (place >= 20)));
    // The notes beside the stream are as before: a relay goes on.
    sql(&mut shop.connection, "insert into event_outbox (event_type, aggregate_id) values ('e', '0')").await;
    finished(&["--once"], &shop.variables()).exited(0);
    let report = shop.audit(0, &["--exactly-once"]);
    assert_eq!((&report["entries"], &report["foreign"], &report["counts"]), (&json!(21), &json!(20), &json!({})));
}

#[tokio::test]
async fn a_loss_in_the_middle_at_the_end_and_of_everything_is_found() {
    let mut shop = Shop::new("audit:loss").await;
    shop.delete(10);
    assert_eq!(shop.audit(1, &[])["counts"], json!({ "lost": 1 }));
    shop.delete(18);
    assert_eq!(shop.audit(1, &[])["counts"], json!({ "lost": 2 }));
    redis::cmd("DEL").arg(shop.name).exec(&mut shop.redis).unwrap();
    assert_eq!(shop.audit(1, &[])["counts"], json!({ "lost": 20 }));
}

#[tokio::test]
async fn a_ghost_a_changed_byte_a_repeat_and_an_inversion_are_found() {
    let mut shop = Shop::new("audit:ghost").await;
    shop.add_again(3, "type", "e");
    assert_eq!(shop.audit(0, &[])["repeats"], 1);
    shop.audit(1, &["--exactly-once"]);
    shop.add_again(0, "id", "00000000-0000-4000-8000-000000000000");
    // Its sequence is that of an early event of its key, so it is also an inversion unless the order is ignored.
    assert_eq!(shop.audit(1, &["--any-order"])["counts"], json!({ "ghost": 1 }));
    assert_eq!(shop.audit(1, &[])["counts"]["inversion"], 1);

    let mut shop = Shop::new("audit:changed").await;
    sql(&mut shop.connection, "update event_history set payload = '{\"n\": 0}' where payload = '{\"n\": 5}'").await;
    assert_eq!(shop.audit(1, &[])["counts"], json!({ "changed": 1 }));
}

#[tokio::test]
async fn a_file_of_obligations_that_cannot_be_read_is_wrong_usage() {
    let shop = Shop::new("audit:usage").await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{}\n").unwrap();
    for path in [file.path().to_str().unwrap(), "/nowhere"] {
        let refused = finished(&["audit", "--obligations", path], &shop.variables()).exited(2);
        assert!(refused.complaint().contains("--obligations"), "{}", refused.stderr);
    }
}
