//! Publishes events of the history once more, to one destination.
//!
//! They go to the sink directly, and not through the outbox. There they would wait in front of new events of their keys, and
//! would be logged and kept in the history like new ones. So the caller has the position, and nothing else remembers it.
//!
//! The events of a page are published in order. A key stops at its first failure, and a page ends when each of its events is
//! published or given up. An event that the destination refuses is tried as often as the destination's policy says. An outage
//! is waited for. The batch has no claim, so a destination that publishes each event of a claim exactly once takes these
//! events although it has had them before.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::event::{Event, Fault, Outcome, PublishError, Verdict};
use crate::relay::Endpoint;
use crate::relay::echo::cut_content;
use crate::retry::doubled;
use crate::sink::Batch;
use crate::sink::cloudevent::REPLAYED;

/// The pause after the first call that failed by the destination's fault. It doubles with each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often it is reported that the destination still fails.
const REMINDER_INTERVAL: Duration = Duration::from_secs(30);

/// How long past its deadline a call may last before it is abandoned.
const GRACE: Duration = Duration::from_secs(1);

/// How many calls a second a limited replay makes at most.
const CALLS_A_SECOND: f64 = 10.0;

/// Who is told of what happens.
pub trait Observer {
    /// This many events were published.
    fn published(&mut self, count: u64);

    /// An event was refused and given up.
    fn refused(&mut self, event: &Event, error: &PublishError);

    /// The destination fails, and the replay waits for it.
    fn waits(&mut self, error: &PublishError);
}

/// Why a page ended.
#[derive(Debug, PartialEq, Eq)]
pub enum PageEnd {
    /// Each of its events is published or given up.
    Done,
    /// The replay was stopped. All events with a sequence up to this one are done; of the later ones, some may be.
    Stopped(i64),
    /// The destination is configured wrongly, so waiting does not help. The number is that of [`Self::Stopped`].
    Misconfigured(i64, PublishError),
}

/// A replay to one destination.
pub struct Replay {
    endpoint: Endpoint,
    mark: String,
    /// The most events a second.
    rate: Option<f64>,
    /// When the rate allows the next call.
    next: Instant,
    stop: CancellationToken,
    failures: u32,
    reminded: Option<Instant>,
}

/// The events of a page that are not done.
struct Page<'a> {
    events: Vec<&'a Event>,
    /// The places of those that wait, ascending.
    waiting: Vec<usize>,
    attempts: HashMap<usize, i32>,
    /// When an event that was refused is tried again.
    not_before: HashMap<usize, Instant>,
}

impl Replay {
    /// Creates a replay that begins now. `rate` is the most events a second.
    pub fn new(endpoint: Endpoint, rate: Option<f64>, stop: CancellationToken) -> Self {
        let begun = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let mark = begun.format(&Rfc3339).unwrap_or_default();
        Self { endpoint, mark, rate, next: Instant::now(), stop, failures: 0, reminded: None }
    }

    /// Publishes the events, which are in the order of their sequences, and all that the history has of these sequences.
    pub async fn publish(&mut self, mut events: Vec<Event>, observer: &mut dyn Observer) -> PageEnd {
        for event in &mut events {
            event.headers.push((REPLAYED.to_owned(), self.mark.clone()));
        }
        let mut page = Page {
            events: events.iter().collect(),
            waiting: (0..events.len()).collect(),
            attempts: HashMap::new(),
            not_before: HashMap::new(),
        };
        while !page.waiting.is_empty() {
            if self.stop.is_cancelled() {
                return PageEnd::Stopped(page.position());
            }
            let (due, next) = page.due(Instant::now());
            if due.is_empty() {
                self.sleep_until(next.unwrap_or_else(Instant::now)).await;
                continue;
            }
            let due = self.within_rate(due).await;
            if due.is_empty() {
                continue; // stopped
            }
            let outcomes = self.call(&page, &due).await;
            if let Some(error) = self.judge(&mut page, &due, outcomes, observer).await {
                return PageEnd::Misconfigured(page.position(), error);
            }
        }
        PageEnd::Done
    }

    /// Waits until the rate allows a call, and returns as many events as it allows. None: it was stopped.
    async fn within_rate(&mut self, mut due: Vec<usize>) -> Vec<usize> {
        let Some(rate) = self.rate else { return due };
        self.sleep_until(self.next).await;
        if self.stop.is_cancelled() {
            return Vec::new();
        }
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate is positive and not that high"
        )]
        let most = (rate / CALLS_A_SECOND).ceil().max(1.0) as usize;
        due.truncate(most);
        #[allow(clippy::cast_precision_loss, reason = "a batch has few events")]
        let takes = Duration::from_secs_f64(due.len() as f64 / rate);
        self.next = self.next.max(Instant::now()) + takes;
        due
    }

    async fn sleep_until(&self, at: Instant) {
        tokio::select! {
            () = tokio::time::sleep_until(at.into()) => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// Makes one call of the sink. It is not interrupted, so that the outcome of its events is known.
    async fn call(&self, page: &Page<'_>, due: &[usize]) -> Vec<Outcome> {
        let events: Vec<&Event> = due.iter().map(|&place| page.events[place]).collect();
        let deadline = Instant::now() + self.endpoint.policy.timeout;
        let batch = Batch::new(&events, deadline);
        let call = AssertUnwindSafe(async { self.endpoint.sink.publish(&batch).await.outcomes }).catch_unwind();
        let unknown = |code: &str, message: &str| {
            vec![Outcome::Failed(PublishError::new(Fault::Unknown, code, message)); events.len()]
        };
        let mut outcomes = match tokio::time::timeout_at((deadline + GRACE).into(), call).await {
            Ok(Ok(outcomes)) if outcomes.len() == events.len() => outcomes,
            Ok(Ok(_)) => unknown("answers_do_not_match", "the sink gave another number of answers"),
            Ok(Err(_)) => unknown("sink_panicked", "the code of this destination panicked"),
            Err(_) => unknown("no_answer", "the code of this destination did not end in time"),
        };
        cut_content(&events, &mut outcomes);
        outcomes
    }

    /// Takes the outcomes of a call in. Returns the error if the destination is configured wrongly.
    async fn judge(
        &mut self,
        page: &mut Page<'_>,
        due: &[usize],
        outcomes: Vec<Outcome>,
        observer: &mut dyn Observer,
    ) -> Option<PublishError> {
        let (mut published, mut trouble) = (0, None);
        let mut done = HashSet::new();
        for (&place, outcome) in due.iter().zip(outcomes) {
            if let Outcome::Failed(error) = &outcome
                && !error.fault.charges_event()
            {
                trouble = trouble.or(Some(error.clone()));
            }
            let attempts = page.attempts.get(&place).copied().unwrap_or_default();
            match self.endpoint.policy.retry.judge(outcome, attempts, fastrand::f64()) {
                Verdict::Published { .. } => {
                    published += 1;
                    done.insert(place);
                }
                Verdict::DeadLetter { error } => {
                    observer.refused(page.events[place], &error);
                    done.insert(place);
                }
                Verdict::Retry { delay, .. } => {
                    page.attempts.insert(place, attempts + 1);
                    page.not_before.insert(place, Instant::now() + delay);
                }
                Verdict::Block { .. } | Verdict::Drop { .. } | Verdict::Wait(_) => {}
            }
        }
        page.waiting.retain(|place| !done.contains(place));
        if published > 0 {
            observer.published(published);
            self.failures = 0;
        }
        let error = trouble?;
        if error.fault == Fault::Misconfigured {
            return Some(error);
        }
        if self.reminded.is_none_or(|at| at.elapsed() >= REMINDER_INTERVAL) {
            self.reminded = Some(Instant::now());
            observer.waits(&error);
        }
        self.sleep_until(Instant::now() + doubled(FIRST_PAUSE, self.failures, LONGEST_PAUSE)).await;
        self.failures = self.failures.saturating_add(1);
        None
    }
}

impl Page<'_> {
    /// Returns the places of the events that may be published now, and when the next one may be if that is later.
    fn due(&self, now: Instant) -> (Vec<usize>, Option<Instant>) {
        let mut held = HashSet::new();
        let (mut due, mut next): (Vec<usize>, Option<Instant>) = (Vec::new(), None);
        for &place in &self.waiting {
            let key = self.events[place].key();
            if key.is_some_and(|key| held.contains(&key)) {
                continue;
            }
            match self.not_before.get(&place) {
                Some(&at) if at > now => {
                    next = Some(next.map_or(at, |next| next.min(at)));
                    held.extend(key);
                }
                _ => due.push(place),
            }
        }
        (due, next)
    }

    /// Returns the sequence up to which everything is done.
    fn position(&self) -> i64 {
        match self.waiting.first() {
            Some(&place) => self.events[place].row.id - 1,
            None => self.events.last().map_or(0, |event| event.row.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;

    use super::*;
    use crate::event::testing::{event, keyed};
    use crate::relay::Policy;
    use crate::sink::{Published, Sink};

    type Answer = Box<dyn Fn(&Event) -> Outcome + Send>;

    /// Answers each call by a script, and notes what it was given.
    #[derive(Default)]
    struct Scripted {
        script: Mutex<Vec<Answer>>,
        calls: Mutex<Vec<Vec<i64>>>,
    }

    #[async_trait]
    impl Sink for Scripted {
        async fn publish(&self, batch: &Batch<'_>) -> Published {
            assert!(batch.claim.is_none(), "what a claim has published before is published again");
            let mut script = self.script.lock().expect("the test has not panicked");
            let answer = if script.is_empty() { None } else { Some(script.remove(0)) };
            let delivered = Outcome::Delivered { message_id: None };
            let outcome = |event: &&Event| answer.as_ref().map_or(delivered.clone(), |answer| answer(event));
            let ids = batch.events.iter().map(|event| event.row.id).collect();
            self.calls.lock().expect("the test has not panicked").push(ids);
            assert!(batch.events.iter().all(|event| event.headers.iter().any(|(name, _)| name == REPLAYED)));
            Published::of(batch.events.iter().map(outcome).collect())
        }

        async fn check(&self) -> Result<String, PublishError> {
            Ok(String::new())
        }
    }

    #[derive(Default)]
    struct Seen {
        published: u64,
        refused: Vec<i64>,
        waits: u32,
    }

    impl Observer for Seen {
        fn published(&mut self, count: u64) {
            self.published += count;
        }

        fn refused(&mut self, event: &Event, _: &PublishError) {
            self.refused.push(event.row.id);
        }

        fn waits(&mut self, _: &PublishError) {
            self.waits += 1;
        }
    }

    fn failed(fault: Fault) -> Outcome {
        Outcome::Failed(PublishError::new(fault, "code", "message"))
    }

    fn replay(sink: &Arc<Scripted>, rate: Option<f64>) -> (Replay, CancellationToken) {
        let (stop, mut policy) = (CancellationToken::new(), Policy::default());
        policy.retry.base = Duration::from_millis(1);
        let endpoint = Endpoint { name: "a".to_owned(), sink: Arc::<Scripted>::clone(sink), policy };
        (Replay::new(endpoint, rate, stop.clone()), stop)
    }

    #[tokio::test]
    async fn an_outage_is_waited_for_and_an_event_that_is_refused_is_given_up_after_its_retries() {
        let sink = Arc::new(Scripted::default());
        let poison = |event: &Event| match event.row.id {
            1 => failed(Fault::Event),
            3 => Outcome::Held,
            _ => Outcome::Delivered { message_id: None },
        };
        *sink.script.lock().expect("new") = vec![
            Box::new(|_| failed(Fault::Destination)),
            Box::new(poison),
            Box::new(poison),
            Box::new(poison),
            Box::new(poison),
        ];
        let (mut replay, _) = replay(&sink, None);
        let mut seen = Seen::default();
        let events = vec![keyed(1, "a"), keyed(2, "b"), keyed(3, "a")];
        assert_eq!(replay.publish(events, &mut seen).await, PageEnd::Done);
        assert_eq!((seen.published, seen.waits), (2, 1));
        assert_eq!(seen.refused, [1]);
        let calls = sink.calls.lock().expect("done").clone();
        assert_eq!(calls[..2], [vec![1, 2, 3], vec![1, 2, 3]]);
        assert_eq!(calls.last(), Some(&vec![3]), "the key goes on behind the event that was given up: {calls:?}");
    }

    #[tokio::test]
    async fn a_destination_that_is_set_up_wrongly_ends_it_with_its_position() {
        let sink = Arc::new(Scripted::default());
        *sink.script.lock().expect("new") = vec![Box::new(|event| match event.row.id {
            7 => Outcome::Delivered { message_id: None },
            _ => failed(Fault::Misconfigured),
        })];
        let (mut replay, _) = replay(&sink, None);
        let end = replay.publish(vec![event(7), event(9)], &mut Seen::default()).await;
        assert!(matches!(end, PageEnd::Misconfigured(8, _)), "{end:?}");
    }

    #[tokio::test]
    async fn a_rate_is_kept_and_a_stop_ends_the_wait_for_it() {
        let sink = Arc::new(Scripted::default());
        let (mut limited, _) = replay(&sink, Some(50.0));
        let (begun, mut seen) = (Instant::now(), Seen::default());
        assert_eq!(limited.publish((1..=20).map(event).collect(), &mut seen).await, PageEnd::Done);
        assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
        assert_eq!(sink.calls.lock().expect("done").len(), 4, "five at a time");
        let (mut slow, stop) = replay(&sink, Some(0.001));
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            stop.cancel();
        });
        let end = slow.publish((1..=3).map(event).collect(), &mut Seen::default()).await;
        assert_eq!(end, PageEnd::Stopped(1));
    }
}
