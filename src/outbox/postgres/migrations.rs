//! The list of migrations.

/// All migrations, the first with version 1. Never edited once released.
pub(super) const MIGRATIONS: [(&str, &str); 29] = [
    ("0001_event_outbox", include_str!("../../../migrations/postgres/0001_event_outbox.sql")),
    ("0002_event_processing_log", include_str!("../../../migrations/postgres/0002_event_processing_log.sql")),
    ("0003_event_dead_letter", include_str!("../../../migrations/postgres/0003_event_dead_letter.sql")),
    ("0004_event_history", include_str!("../../../migrations/postgres/0004_event_history.sql")),
    ("0005_wake_up", include_str!("../../../migrations/postgres/0005_wake_up.sql")),
    ("0006_operator_views", include_str!("../../../migrations/postgres/0006_operator_views.sql")),
    ("0007_claim_epoch", include_str!("../../../migrations/postgres/0007_claim_epoch.sql")),
    ("0008_crash_loops", include_str!("../../../migrations/postgres/0008_crash_loops.sql")),
    ("0009_moved_events", include_str!("../../../migrations/postgres/0009_moved_events.sql")),
    ("0010_cheaper_inserts", include_str!("../../../migrations/postgres/0010_cheaper_inserts.sql")),
    ("0011_older_relays", include_str!("../../../migrations/postgres/0011_older_relays.sql")),
    ("0012_pinned_functions", include_str!("../../../migrations/postgres/0012_pinned_functions.sql")),
    ("0013_blocked_keys", include_str!("../../../migrations/postgres/0013_blocked_keys.sql")),
    ("0014_emit_event_types", include_str!("../../../migrations/postgres/0014_emit_event_types.sql")),
    ("0015_ids_begin_anew", include_str!("../../../migrations/postgres/0015_ids_begin_anew.sql")),
    ("0016_row_trigger", include_str!("../../../migrations/postgres/0016_row_trigger.sql")),
    ("0017_format", include_str!("../../../migrations/postgres/0017_format.sql")),
    ("0018_several_configurations", include_str!("../../../migrations/postgres/0018_several_configurations.sql")),
    ("0019_owed", include_str!("../../../migrations/postgres/0019_owed.sql")),
    ("0020_redriven_formats", include_str!("../../../migrations/postgres/0020_redriven_formats.sql")),
    ("0021_header_spaces", include_str!("../../../migrations/postgres/0021_header_spaces.sql")),
    ("0022_operator_actions", include_str!("../../../migrations/postgres/0022_operator_actions.sql")),
    ("0023_operator_functions", include_str!("../../../migrations/postgres/0023_operator_functions.sql")),
    ("0024_status", include_str!("../../../migrations/postgres/0024_status.sql")),
    ("0025_plainer_comments", include_str!("../../../migrations/postgres/0025_plainer_comments.sql")),
    ("0026_waiting_events", include_str!("../../../migrations/postgres/0026_waiting_events.sql")),
    ("0027_time_indexes", include_str!("../../../migrations/postgres/0027_time_indexes.sql")),
    ("0028_pause", include_str!("../../../migrations/postgres/0028_pause.sql")),
    ("0029_pause_functions", include_str!("../../../migrations/postgres/0029_pause_functions.sql")),
];

/// The schema version this binary needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;
