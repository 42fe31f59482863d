//! The settings of a relay's connections and transactions.

use std::time::Duration;

use crate::outbox::OutboxConfig;

/// Returns the statement that begins a transaction of a relay.
pub(super) fn begin(config: &OutboxConfig) -> String {
    // Each statement after the first must see what was committed before it: no higher isolation.
    let begin = "begin isolation level read committed";
    if !config.pooled {
        return begin.to_owned();
    }
    let local = |(name, value)| format!("pg_catalog.set_config('{name}', '{value}', true)");
    format!("{begin}; select {}", settings(config).map(local).join(", "))
}

/// Returns the settings of a relay's connection; behind a transaction-pooling proxy, those of each of its transactions.
///
/// - The idle timeout ends the claim of a relay that hangs; it must be longer than every publish.
/// - The server gives up before the client does. If a connection were dropped while its statement waits, the statement would
///   wait on, and each attempt would leave one more behind. A claim gives up a lock after seconds, and is repeated. A settle
///   has longer, see `take`, because what is published already would be published again.
/// - If row-level security applies to this role, it fails a statement, and does not hide rows from it.
/// - A queue's statistics are always stale. Each statement has one good plan, by its indexes, and is prepared once.
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
