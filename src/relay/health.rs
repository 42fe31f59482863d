//! The health of the store and of each destination: whether it can be used, since when, and why not.

use std::time::SystemTime;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

/// The health of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Whether events can be claimed and settled.
    pub store: Status,
    /// The destinations, in the order in which the relay was given them.
    pub destinations: Vec<DestinationHealth>,
}

/// The health of one destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationHealth {
    /// The name, as in `destination` columns.
    pub name: String,
    /// Whether it takes events.
    pub status: Status,
}

/// A state, and since when and why it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The state.
    pub state: State,
    /// When the state began, by this machine's clock.
    pub since: SystemTime,
    /// Why it cannot be used, as text for people: the last error. It never contains event data.
    pub reason: Option<String>,
}

/// Whether the store or a destination can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has not been used yet.
    Unknown,
    /// It can be used.
    Up,
    /// It cannot be used. The relay retries by itself.
    Down,
    /// It cannot be used, and a person must act, for example because a password is wrong. The relay retries by itself.
    Misconfigured,
}

/// Whether the relay can do its work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// It can do its work.
    Ready,
    /// It cannot do its work, and keeps retrying. The reason is text for people.
    NotReady(String),
}

impl Health {
    /// Returns whether the relay can work at all, with the reason if not: whether its store can be used. Events for a destination
    /// that is down wait there. [`Self::condition`] counts the destinations too.
    pub fn readiness(&self) -> Readiness {
        match self.store.state {
            State::Up => Readiness::Ready,
            _ => Readiness::NotReady(self.store.reason.clone().unwrap_or_else(|| "starting".to_owned())),
        }
    }
}

impl Status {
    fn unknown() -> Self {
        Self { state: State::Unknown, since: SystemTime::now(), reason: None }
    }

    /// Sets the state. Returns whether anything changed.
    fn change_to(&mut self, state: State, reason: Option<&str>) -> bool {
        if self.state == state && self.reason.as_deref() == reason {
            return false;
        }
        if self.state != state {
            (self.state, self.since) = (state, SystemTime::now());
        }
        self.reason = reason.map(str::to_owned);
        true
    }
}

/// The place where the parts of a relay record their health, and from which others follow it.
pub(super) struct HealthBoard {
    health: watch::Sender<Health>,
    /// The metric that says whether the relay is ready.
    ready: Gauge,
}

impl HealthBoard {
    /// Creates a board for these destinations, all in the state `Unknown`.
    pub(super) fn new(destinations: &[String], ready: Gauge) -> Self {
        let destination = |name: &String| DestinationHealth { name: name.clone(), status: Status::unknown() };
        let destinations = destinations.iter().map(destination).collect();
        Self { health: watch::Sender::new(Health { store: Status::unknown(), destinations }), ready }
    }

    /// Returns a receiver that follows the health.
    pub(super) fn follow(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Returns the present health.
    pub(super) fn now(&self) -> Health {
        self.health.borrow().clone()
    }

    fn change(&self, change: impl FnOnce(&mut Health) -> bool) -> bool {
        self.health.send_if_modified(|health| {
            let changed = change(health);
            if changed {
                self.ready.set(health.condition().0.is_ready().into());
            }
            changed
        })
    }

    /// Records the health of the store. Returns whether it is new.
    pub(super) fn store(&self, state: State, reason: Option<&str>) -> bool {
        self.change(|health| health.store.change_to(state, reason))
    }

    /// Records the health of the destination at this place.
    pub(super) fn destination(&self, place: usize, state: State, reason: Option<&str>) {
        self.change(|health| {
            let destination = health.destinations.get_mut(place);
            destination.is_some_and(|destination| destination.status.change_to(state, reason))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_keeps_its_beginning_while_its_reason_changes() {
        let board = HealthBoard::new(&["a".to_owned(), "b".to_owned()], Gauge::default());
        let mut health = board.follow();
        assert_eq!(health.borrow_and_update().readiness(), Readiness::NotReady("starting".to_owned()));
        board.destination(1, State::Down, Some("refused"));
        let since = health.borrow_and_update().destinations[1].status.since;
        board.destination(1, State::Down, Some("refused"));
        assert!(health.has_changed().is_ok_and(|changed| !changed), "nothing is new");
        board.destination(1, State::Down, Some("timed out"));
        let expected = Status { state: State::Down, since, reason: Some("timed out".to_owned()) };
        assert_eq!(health.borrow_and_update().destinations[1].status, expected);
        assert_eq!(health.borrow().destinations[0].status.state, State::Unknown);
    }

    #[test]
    fn a_relay_is_ready_while_its_store_can_be_used() {
        let board = HealthBoard::new(&["a".to_owned()], Gauge::default());
        board.destination(0, State::Misconfigured, Some("wrong password"));
        assert!(board.store(State::Up, None) && !board.store(State::Up, None));
        assert_eq!(board.follow().borrow().readiness(), Readiness::Ready);
        assert!(board.store(State::Down, Some("no connection")));
        assert_eq!(board.follow().borrow().readiness(), Readiness::NotReady("no connection".to_owned()));
    }
}
