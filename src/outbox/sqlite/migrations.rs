//! The list of migrations.

/// All migrations. The first has version 1. A migration is never edited once it is released.
pub(super) const MIGRATIONS: [(&str, &str); 16] = [
    ("0001_event_outbox", include_str!("../../../migrations/sqlite/0001_event_outbox.sql")),
    ("0002_event_processing_log", include_str!("../../../migrations/sqlite/0002_event_processing_log.sql")),
    ("0003_event_dead_letter", include_str!("../../../migrations/sqlite/0003_event_dead_letter.sql")),
    ("0004_event_history", include_str!("../../../migrations/sqlite/0004_event_history.sql")),
    ("0005_operator_views", include_str!("../../../migrations/sqlite/0005_operator_views.sql")),
    ("0006_claim_epoch", include_str!("../../../migrations/sqlite/0006_claim_epoch.sql")),
    ("0007_crash_loops", include_str!("../../../migrations/sqlite/0007_crash_loops.sql")),
    ("0008_older_relays", include_str!("../../../migrations/sqlite/0008_older_relays.sql")),
    ("0009_blocked_keys", include_str!("../../../migrations/sqlite/0009_blocked_keys.sql")),
    ("0010_bounds", include_str!("../../../migrations/sqlite/0010_bounds.sql")),
    ("0011_format", include_str!("../../../migrations/sqlite/0011_format.sql")),
    ("0012_several_configurations", include_str!("../../../migrations/sqlite/0012_several_configurations.sql")),
    ("0013_redriven_formats", include_str!("../../../migrations/sqlite/0013_redriven_formats.sql")),
    ("0014_operator_actions", include_str!("../../../migrations/sqlite/0014_operator_actions.sql")),
    ("0015_status", include_str!("../../../migrations/sqlite/0015_status.sql")),
    ("0016_pause", include_str!("../../../migrations/sqlite/0016_pause.sql")),
];

/// The schema version this binary needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_sets_the_version_of_its_place() {
        for (index, (name, sql)) in MIGRATIONS.iter().enumerate() {
            let version = format!("create view relay_schema_version as select {} as version", index + 1);
            assert!(sql.contains(&version), "{name} does not set version {}", index + 1);
            assert!(name.starts_with(&format!("{:04}_", index + 1)), "{name} stands at {}", index + 1);
        }
    }
}
