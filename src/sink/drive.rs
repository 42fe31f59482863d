//! The request loop of a destination that takes several events in a request, or several requests at the same time.
//!
//! [`drive`] splits a batch into rounds of requests (see [`Rounds`]), sends each round, and judges the answers. A destination
//! says by [`Requests`] how large an event is, how a request is made and how it is sent.

use foldhash::{HashMap, HashMapExt};
use futures_util::future::join_all;
use std::time::Instant;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::rounds::{Limits, Rounds};

/// One publish call, as the request loop sees it. Events are referred to by their index in the batch.
pub trait Requests: Send + Sync {
    /// A request that is ready to be sent.
    type Request: Send;

    /// Returns the bytes of an event in a request. It is called once for each event.
    ///
    /// # Errors
    /// The event cannot be sent at all. The error becomes its outcome when the earlier events of its key have theirs.
    fn size(&mut self, index: usize) -> Result<usize, PublishError>;

    /// Returns the place that the event goes to. A request holds events of one place.
    fn place(&self, _index: usize) -> u16 {
        0
    }

    /// Makes the request of these events, which are ascending. The requests of a round are made one after the other, before any
    /// of them is sent.
    fn prepare(&mut self, members: &[usize]) -> Self::Request;

    /// Sends a request of so many bytes and waits for its answer, no longer than the deadline. The requests of a round are
    /// sent together.
    fn send(&self, request: &mut Self::Request, members: &[usize], bytes: usize)
    -> impl Future<Output = Answer> + Send;

    /// Is called with the requests of a round when all of its answers are recorded.
    fn after_round(
        &mut self,
        requests: Vec<Self::Request>,
        _rounds: &mut Rounds<'_>,
    ) -> impl Future<Output = ()> + Send {
        drop(requests);
        std::future::ready(())
    }
}

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// An outcome for each of its events, in order.
    Each(Vec<Outcome>),
    /// The request as a whole was refused, or its answer is unknown. The error is that of each of its events. If a request of
    /// several events was refused for its content ([`Fault::Event`]), none of them was published. They are sent again one by
    /// one, so that only the event that causes the error is charged.
    Whole(PublishError),
    /// Nothing was done. The events of the request are sent again in the next round.
    Again,
}

/// Publishes `events` by requests within `limits` and returns an outcome for each event, in order.
///
/// No round begins after `deadline`. After a failure that is not an event's own, the round is finished and nothing more is sent:
/// the next request would most likely fail too, and no event may overtake an event whose outcome is unknown.
pub async fn drive<R: Requests>(
    events: &[&Event],
    mut limits: Limits,
    deadline: Instant,
    requests: &mut R,
) -> Vec<Outcome> {
    limits.request_bytes = limits.request_bytes.min(usize::MAX / 2);
    let mut refusals = HashMap::new();
    let sizes: Vec<usize> = (0..events.len())
        .map(|index| {
            requests.size(index).unwrap_or_else(|error| {
                refusals.insert(index, error);
                // With this size it is alone in its request.
                limits.request_bytes + 1
            })
        })
        .collect();
    let mut rounds = Rounds::new(events, |index| requests.place(index));
    while Instant::now() < deadline {
        let round = rounds.next(limits, |index| sizes[index]);
        if round.is_empty() {
            break;
        }
        let mut sent = Vec::with_capacity(round.len());
        for members in round {
            if let Some(error) = refusals.remove(&members[0]) {
                rounds.answer(members[0], Outcome::Failed(error));
            } else {
                sent.push((requests.prepare(&members), members));
            }
        }
        let calls = sent.iter_mut().map(|(request, members)| {
            let bytes = members.iter().map(|&index| sizes[index]).sum();
            requests.send(request, members, bytes)
        });
        let answers = join_all(calls).await;
        let mut finished = Vec::with_capacity(sent.len());
        for (answer, (request, members)) in answers.into_iter().zip(sent) {
            if record(&mut rounds, &members, answer) == Next::OneByOne {
                limits.request_events = 1;
            }
            finished.push(request);
        }
        requests.after_round(finished, &mut rounds).await;
    }
    rounds.into_outcomes()
}

/// How the events without an answer are sent from now on.
#[derive(PartialEq, Eq)]
enum Next {
    AsBefore,
    OneByOne,
}

fn record(rounds: &mut Rounds<'_>, members: &[usize], answer: Answer) -> Next {
    match answer {
        Answer::Each(outcomes) if outcomes.len() == members.len() => {
            for (&index, outcome) in members.iter().zip(outcomes) {
                rounds.answer(index, outcome);
            }
        }
        Answer::Each(outcomes) => {
            let message = format!("{} events were sent, and {} answers came back", members.len(), outcomes.len());
            let error = PublishError::new(Fault::Unknown, "wrong_answer_count", message);
            return record(rounds, members, Answer::Whole(error));
        }
        Answer::Whole(error) if error.fault == Fault::Event && members.len() > 1 => return Next::OneByOne,
        Answer::Whole(error) => {
            for &index in members {
                rounds.answer(index, Outcome::Failed(error.clone()));
            }
        }
        Answer::Again => {}
    }
    Next::AsBefore
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::event::testing::keyed;

    const LIMITS: Limits = Limits { request_events: 3, request_key_events: 3, request_bytes: 100, requests: 2 };

    /// Answers each request by the next entry of a list. When the list is empty, every event is delivered.
    #[derive(Default)]
    struct Scripted {
        unfit: Vec<usize>,
        answers: Mutex<VecDeque<Answer>>,
        sent: Mutex<Vec<Vec<usize>>>,
    }

    impl Requests for Scripted {
        type Request = ();

        fn size(&mut self, index: usize) -> Result<usize, PublishError> {
            if self.unfit.contains(&index) { Err(error(Fault::Unfit)) } else { Ok(10) }
        }

        fn prepare(&mut self, _: &[usize]) {}

        async fn send(&self, (): &mut (), members: &[usize], bytes: usize) -> Answer {
            assert_eq!(bytes, 10 * members.len());
            self.sent.lock().expect("no panic").push(members.to_vec());
            let scripted = self.answers.lock().expect("no panic").pop_front();
            scripted.unwrap_or_else(|| Answer::Each(vec![Outcome::Delivered { message_id: None }; members.len()]))
        }
    }

    fn error(fault: Fault) -> PublishError {
        PublishError::new(fault, "X", "")
    }

    /// Returns the requests that were sent for the keys, and each event's outcome as one letter: `d`elivered, `f`ailed, `h`eld.
    async fn driven(keys: &str, limits: Limits, mut requests: Scripted) -> (Vec<Vec<usize>>, String) {
        let events: Vec<Event> = keys.chars().map(|key| keyed(1, &key.to_string())).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let outcomes = drive(&refs, limits, Instant::now() + Duration::from_secs(60), &mut requests).await;
        let letter = |outcome: &Outcome| match outcome {
            Outcome::Delivered { .. } => 'd',
            Outcome::Failed(_) => 'f',
            Outcome::Held => 'h',
        };
        (requests.sent.into_inner().expect("no panic"), outcomes.iter().map(letter).collect())
    }

    #[tokio::test]
    async fn rounds_follow_until_every_event_has_its_answer() {
        let (sent, outcomes) = driven("aaaab", LIMITS, Scripted::default()).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 1, 2], vec![4], vec![3]], "ddddd"));
    }

    #[tokio::test]
    async fn one_event_of_a_key_in_a_request_keeps_the_others_for_later_rounds() {
        let limits = Limits { request_key_events: 1, ..LIMITS };
        let (sent, outcomes) = driven("aabbc", limits, Scripted::default()).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 2, 4], vec![1, 3]], "ddddd"));
        let failing = Answer::Each(vec![
            Outcome::Failed(error(Fault::Event)),
            Outcome::Delivered { message_id: None },
            Outcome::Held,
        ]);
        let scripted = Scripted { answers: Mutex::new([failing].into()), ..Scripted::default() };
        let (sent, outcomes) = driven("aabbcc", limits, scripted).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 2, 4], vec![3]], "fhddhh"));
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_sent_is_answered_in_its_turn() {
        let scripted = Scripted { unfit: vec![1], ..Scripted::default() };
        let (sent, outcomes) = driven("aaab", LIMITS, scripted).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 3]], "dfhd"));
    }

    #[tokio::test]
    async fn a_request_that_is_refused_for_its_content_is_sent_one_by_one() {
        let answers = [Answer::Whole(error(Fault::Event)), Answer::Whole(error(Fault::Event))];
        let scripted = Scripted { answers: Mutex::new(answers.into()), ..Scripted::default() };
        let (sent, outcomes) = driven("abc", LIMITS, scripted).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 1, 2], vec![0], vec![1], vec![2]], "fdd"));
    }

    #[tokio::test]
    async fn any_other_failure_ends_the_call_after_its_round() {
        for answer in [Answer::Whole(error(Fault::Destination)), Answer::Each(vec![Outcome::Held])] {
            let scripted = Scripted { answers: Mutex::new([answer].into()), ..Scripted::default() };
            let (sent, outcomes) = driven("aaaab", LIMITS, scripted).await;
            assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 1, 2], vec![4]], "fffhd"));
        }
    }

    #[tokio::test]
    async fn what_was_not_done_is_sent_again() {
        let scripted = Scripted { answers: Mutex::new([Answer::Again].into()), ..Scripted::default() };
        let (sent, outcomes) = driven("ab", LIMITS, scripted).await;
        assert_eq!((sent, outcomes.as_str()), (vec![vec![0, 1], vec![0, 1]], "dd"));
    }
}
