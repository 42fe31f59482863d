//! Places at which tests make the relay fail. Without the feature `failpoints` none of them has an effect.
//!
//! The variable `FAILPOINTS` says what happens at which place, in the syntax of the crate [`fail`]:
//! `claimed=3%return(abort);acked=1*sleep(200)`. Besides `sleep`, `delay` and `panic` there are `return(abort)`, which ends
//! the process as a crash does, and `return`, an error.

/// An error that a test requested.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("failpoint {0}")]
pub(crate) struct FailpointError(&'static str);

/// Arms the failpoints that `FAILPOINTS` names, until the returned value is dropped.
#[cfg(feature = "failpoints")]
pub(crate) fn arm() -> fail::FailScenario<'static> {
    fail::FailScenario::setup()
}

/// Does what the test requested for the place `name`, if anything.
///
/// # Errors
/// The test requested `return` for this place.
pub(crate) fn failpoint(name: &'static str) -> Result<(), FailpointError> {
    fail::fail_point!(name, |action: Option<String>| match action.as_deref() {
        Some("abort") => std::process::abort(),
        _ => Err(FailpointError(name)),
    });
    let _ = name;
    Ok(())
}

/// Ends the process as a crash does if `crash_on_event=return(<event type>)` names the type of one of `events`.
pub(crate) fn crash_on(events: &[&crate::event::Event]) {
    fail::fail_point!("crash_on_event", |named: Option<String>| {
        if events.iter().any(|event| named.as_ref() == Some(&event.event_type)) {
            std::process::abort();
        }
    });
    let _ = events;
}

/// Panics if `panic_on_event=return(<event type>)` names the type of `event`.
pub(crate) fn panic_on(event: &crate::event::Event) {
    fail::fail_point!("panic_on_event", |named: Option<String>| {
        assert!(named.as_ref() != Some(&event.event_type), "a test asked for this panic");
    });
    let _ = event;
}

/// Ends the process like [`crash_on`], but 1.5 s later, for `crash_late_on_event=return(<event type>)`.
pub(crate) async fn crash_late_on(events: &[&crate::event::Event]) {
    #[cfg(feature = "failpoints")]
    {
        let named = (|| {
            fail::fail_point!("crash_late_on_event", |named: Option<String>| named);
            None
        })();
        if events.iter().any(|event| named.as_ref() == Some(&event.event_type)) {
            tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
            std::process::abort();
        }
    }
    let _ = events;
}

/// Ends the process if it has claimed more events than `crash_on_claim_of_more_than=return(<events>)` allows, as if it had run
/// out of memory.
pub(crate) fn crash_on_many(events: usize) {
    fail::fail_point!("crash_on_claim_of_more_than", |most: Option<String>| {
        if most.and_then(|most| most.parse().ok()).is_some_and(|most: usize| events > most) {
            std::process::abort();
        }
    });
    let _ = events;
}
