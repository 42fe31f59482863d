//! What every store guarantees. Each test is written once and runs on every store.

pub(crate) mod bad_input;
mod blame;
mod crash;
mod destinations;
mod metrics;
mod order;
mod panics;
mod past;
mod rules;
mod time;
mod trouble;

use std::collections::HashMap;

use outbox_relay::event::Event;

/// Defines the tests of one store, grouped by the file that they are in.
macro_rules! contract {
    ($name:ident on $store:ident: $($file:ident::$test:ident)*) => {
        mod $name {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$file::$test::<crate::stores::$store>().await;
                }
            )*
        }
    };
    ($($file:ident: $($test:ident)*;)*) => {
        contract! { postgres on Postgres: $($($file::$test)*)* }
        contract! { sqlite on Sqlite: $($($file::$test)*)* }
        contract! { sqlite_rollback_journal on SqliteRollbackJournal: $($($file::$test)*)* }
    };
}

contract! {
    order:
        ten_thousand_keys_arrive_complete_in_order_and_once_through_three_relays
        a_thousand_events_of_one_key_arrive_in_order_in_small_batches
        a_key_waits_behind_its_failed_event_and_others_do_not
        urgent_events_are_claimed_first;
    trouble:
        a_poison_event_is_dead_lettered_after_its_retries_and_its_key_goes_on
        f58_an_outage_costs_time_and_never_attempts
        a_misconfigured_destination_pauses_at_the_first_failure_and_charges_nobody
        an_unknown_outcome_leaves_the_event_pending_and_repeats_it
        a_clock_that_was_set_back_during_retries_stalls_nobody;
    destinations:
        each_destination_is_settled_for_itself_and_redriven_for_itself
        events_go_on_to_one_destination_while_the_other_is_down_and_are_parked_for_it_in_order
        routes_choose_destinations_and_what_no_route_takes_is_said
        history_keeps_what_was_published_where;
    metrics:
        metrics_count_events_by_destination_verdict_and_code
        health_and_metrics_tell_of_a_destination_that_goes_down_and_comes_back;
    time:
        a_delayed_event_comes_when_it_is_due_and_holds_up_nobody
        a_sleeping_relay_is_woken_by_a_commit
        a_stop_settles_what_is_in_flight_and_claims_nothing_more;
    rules:
        what_breaks_a_rule_is_refused_under_the_rules_name
        a_plain_insert_is_enough
        an_event_is_part_of_its_transaction
        the_queries_of_the_documentation_work_as_written
        f60_a_redriven_dead_letter_is_the_same_event_owed_to_its_destination_only
        the_views_count_and_show_no_payload;
    bad_input:
        f29_a_payload_over_the_limit_is_dead_lettered_whole_and_one_at_the_limit_is_not
        a_thousand_levels_of_nesting_reach_redis_and_eventbridge
        a_bare_payload_that_is_no_object_is_dead_lettered_for_eventbridge_only
        an_event_type_has_128_characters_at_most
        headers_are_a_flat_map_of_strings_without_reserved_names
        a_key_may_be_long_or_empty
        a_thousand_events_of_one_key_and_ten_thousand_keys_arrive_in_order
        f54_an_event_without_a_route_is_dead_lettered_or_by_setting_dropped
        an_event_owed_to_a_destination_that_nobody_configured_waits_and_holds_up_nobody;
    crash:
        f05_dead_lettering_is_one_transaction_with_the_outbox
        f61_rows_deleted_by_an_operator_during_a_publish_are_no_trouble
        f02_a_relay_killed_in_the_middle_of_a_batch_repeats_that_batch_at_most_and_another_goes_on
        f06_twenty_restarts_under_load_repeat_nothing;
    blame:
        f64_a_key_that_a_destination_refuses_waits_uncharged_and_the_destination_is_not_paused
        f64_a_key_with_an_error_that_nobody_knows_waits_uncharged_and_the_destination_is_not_paused
        f64_a_key_whose_answers_are_lost_waits_uncharged_and_the_destination_is_not_paused
        f64_an_event_that_is_refused_alone_shortly_after_others_were_taken_pauses_nobody
        f64_a_blocked_event_waits_longer_each_time_and_a_restart_does_not_begin_anew
        f64_a_destination_that_refuses_everything_is_paused_although_a_key_was_blocked_before
        f65_a_call_from_before_a_pause_does_not_end_it;
    panics:
        f63_an_event_that_panics_its_destination_is_found_and_given_up_and_the_others_go_on
        f63_a_destination_that_panics_on_everything_costs_no_event_anything
        f63_a_call_that_never_ends_is_an_unknown_outcome
        f63_an_event_on_which_routing_panics_is_given_up_alone;
    past:
        a_replay_publishes_what_was_chosen_once_more_in_order_and_marked_and_is_recorded_nowhere
        a_replay_that_cannot_be_is_refused_in_one_line
        a_replay_that_is_stopped_says_how_it_goes_on_and_two_are_not_at_work_at_a_time
        a_replay_waits_for_a_destination_that_is_down_and_ends_for_one_that_is_set_up_wrongly
        a_tail_shows_what_is_recorded_from_now_on_or_since_and_ends_well
        a_prune_deletes_what_is_past_its_retention_and_says_before_what_it_would;
}

/// Selects the log as `type destination status attempt`, ordered by event and attempt.
const LOG: &str = "select concat_ws(' ', event_type, destination, status, attempt) from event_processing_log
                   order by outbox_id, destination, attempt";

#[track_caller]
pub(crate) fn assert_in_order_per_key(events: &[Event]) {
    let mut last: HashMap<_, i64> = HashMap::new();
    for event in events {
        let Some(key) = event.key() else { continue };
        let before = last.insert(key, event.row.id).unwrap_or(0);
        assert!(before < event.row.id, "{key}: {} came after {before}", event.row.id);
    }
}
