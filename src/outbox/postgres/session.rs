//! What a relay's connections and transactions are set to.

use std::time::Duration;

use crate::outbox::OutboxConfig;

/// How a transaction of a relay begins.
pub(super) fn begin(config: &OutboxConfig) -> String {
    // Each statement after the first must see what was committed before it: no higher isolation.
    let begin = "begin isolation level read committed";
    if !config.pooled {
        return begin.to_owned();
    }
    let local = |(name, value)| format!("pg_catalog.set_config('{name}', '{value}', true)");
    format!("{begin}; select {}", settings(config).map(local).join(", "))
}

/// What a relay's connection is set to; behind a transaction-pooling proxy, each of its transactions.
///
/// - The idle timeout ends the claim of a relay that stalled; it must outlast every publish.
/// - The server gives up before the client does: a connection that is dropped while it waits would wait on, and each attempt
///   would leave one more behind. A claim gives up a lock after seconds, and is repeated; a settle has longer, which
///   `take` sees to, because what is published already would be published again.
/// - Row-level security that applies to this role fails a statement, and does not hide rows from it.
/// - A queue's statistics are always stale. Each statement has one good plan, by its indexes; prepared once.
pub(super) fn settings(config: &OutboxConfig) -> [(&'static str, String); 10] {
    let idle = (config.publish_timeout + Duration::from_secs(15)).as_millis();
    [
        ("idle_in_transaction_session_timeout", idle.to_string()),
        ("lock_timeout", "5s".to_owned()),
        ("statement_timeout", "28s".to_owned()),
        ("row_security", "off".to_owned()),
        ("plan_cache_mode", "force_generic_plan".to_owned()),
        ("enable_seqscan", "off".to_owned()),
        ("enable_bitmapscan", "off".to_owned()),
        ("enable_hashjoin", "off".to_owned()),
        ("enable_mergejoin", "off".to_owned()),
        ("jit", "off".to_owned()),
    ]
}
