//! Compares what arrived in a run with what was promised.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;

use redis::Commands;
use redis::streams::StreamRangeReply;
use serde_json::Value;
use uuid::Uuid;

use super::course::Course;
use super::producers::Promised;
use super::visitors::{OTHER, RETRIES};
use super::{POISON, meddling};
use crate::binary::finished;

impl Course {
    /// Fails the test unless healthy events are at their destination and poison is among the dead letters. Returns the
    /// report.
    pub(super) async fn require_promised(&self, promised: &Promised, seed: u64) -> Value {
        meddling::put_back(self.world.database.url()).await;
        self.require_dead_letters(promised, seed).await;
        let report = self.world.audit(&promised.obligations);
        self.require_clean_report(&report, seed);
        self.require_other_stream(promised, seed);
        report
    }

    /// No promise says which events a relay with the other configuration routes to its second stream. That stream and the log
    /// must agree, with one exception: an event that was published and not settled is routed again, perhaps by a relay
    /// without that destination.
    fn require_other_stream(&self, promised: &Promised, seed: u64) {
        let variables = [
            ("DATABASE_URL", self.world.database.url()),
            ("REDIS_URL", &self.world.redis_direct),
            self.visitors.other_configuration(),
        ];
        let audited = finished(&["audit", "--json", "--destination", OTHER], &variables);
        let mut report: Value =
            serde_json::from_str(&audited.stdout).unwrap_or_else(|_| panic!("no report: {}", audited.stderr));
        report["counts"].as_object_mut().unwrap().remove("ghost");
        self.require_clean_report(&report, seed);
        let committed: HashMap<Uuid, Option<bool>> =
            promised.obligations.iter().map(|promised| (promised.event_id, promised.committed)).collect();
        let client = redis::Client::open(self.world.redis_direct.as_str()).unwrap();
        let entries: StreamRangeReply = client.get_connection().unwrap().xrange_all(OTHER).unwrap();
        for entry in entries.ids {
            let id: Uuid = entry.get::<String>("id").unwrap().parse().unwrap();
            let known = committed.get(&id).is_some_and(|committed| *committed != Some(false));
            assert!(known, "seed {seed}: {id} arrived at the other destination, and was not committed");
        }
        line(&report["events"], "events at the destination of the other configuration");
    }

    fn require_clean_report(&self, report: &Value, seed: u64) {
        assert_eq!(report["counts"], serde_json::json!({}), "seed {seed}: {report:#}");
        assert_eq!(report["pending"], 0, "seed {seed}: {report:#}");
        if self.world.exactly_once {
            assert_eq!(report["repeats"], 0, "seed {seed}: {report:#}");
        }
    }

    async fn require_dead_letters(&self, promised: &Promised, seed: u64) {
        let mut connection = self.world.database.connect().await;
        let dead: Vec<(Uuid, String, i32, String)> =
            sqlx::query_as("select event_id, error_code, attempts, error from event_dead_letter")
                .fetch_all(&mut connection)
                .await
                .unwrap();
        let (mut times, mut codes) = (BTreeMap::new(), BTreeMap::new());
        for (event_id, code, attempts, error) in dead {
            let committed = promised.poison.get(&event_id);
            assert!(
                committed.is_some(),
                "seed {seed}: {event_id} was not at fault, and is a dead letter: {code}: {error}"
            );
            assert_ne!(committed, Some(&Some(false)), "seed {seed}: {event_id} was rolled back, and is a dead letter");
            let known = ["WRONGTYPE", "payload_too_large"].contains(&code.as_str());
            assert!(known, "seed {seed}: {event_id} is a dead letter for another reason: {code}: {error}");
            let charged = if code == "WRONGTYPE" { RETRIES + 1 } else { 1 };
            assert_eq!(attempts, charged, "seed {seed}: {event_id}, {code}");
            *codes.entry(code).or_insert(0) += 1;
            *times.entry(event_id).or_insert(0) += 1;
        }
        assert!(times.values().all(|times| *times == 1), "seed {seed}: dead-lettered more than once: {times:?}");
        for (event_id, committed) in &promised.poison {
            let lost = *committed == Some(true) && !times.contains_key(event_id);
            assert!(!lost, "seed {seed}: the poison event {event_id} was not dead-lettered");
        }
        // No event was charged for an outage.
        let charged =
            format!("select count(*) from event_processing_log where status = 'failed' and event_type <> '{POISON}'");
        assert_eq!(self.number(&charged).await, 0, "seed {seed}: healthy events were charged");
        // Later events that were published while poison waited. They are of other keys, because keys keep their order.
        let passed = self
            .number(
                "select count(*) from event_processing_log healthy where status = 'published' and destination = 'redis' and exists (
                     select from event_dead_letter poison
                     where error_code = 'WRONGTYPE' and poison.outbox_id < healthy.outbox_id
                       and healthy.processed_at between poison.first_failed_at and poison.failed_at)",
            )
            .await;
        assert!(passed > 0 || times.len() < 10, "seed {seed}: no later event was published while poison waited");
        for (code, count) in codes {
            line(&count, &format!("poison events dead-lettered: {code}"));
        }
        line(&passed, "events that went by while poison waited");
    }

    async fn number(&self, query: &str) -> i64 {
        let mut connection = self.world.database.connect().await;
        sqlx::query_scalar(sqlx::AssertSqlSafe(query.to_owned())).fetch_one(&mut connection).await.unwrap()
    }
}

fn line(count: &dyn Display, what: &str) {
    println!("{:>6}  {what}", count.to_string());
}
