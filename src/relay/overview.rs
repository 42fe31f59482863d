//! All that others show of a relay: whether it is live and ready, and why not.

use std::fmt;
use std::time::Duration;

use crate::breaker::BreakerState;
use crate::outbox::pause::Pause;
use crate::outbox::{Outbox, Standing, Standstill};
use crate::relay::Relay;
use crate::relay::health::{Health, State, Status};

/// What a relay is and does at one moment.
#[derive(Debug, Clone)]
pub struct Overview {
    /// Whether it can do its work.
    pub condition: Condition,
    /// The reasons for that, as text for people; empty if all is well.
    pub reasons: Vec<String>,
    /// Why it is not live, as text for people: something in it hangs, and only a restart helps.
    pub hung: Option<String>,
    /// Its part among the relays of one database.
    pub standing: Standing,
    /// Whether its database can be used.
    pub store: Status,
    /// Its destinations, in the order of its configuration.
    pub destinations: Vec<DestinationOverview>,
    /// What operators have paused, as text for people.
    pub paused: Vec<String>,
    /// What keeps events from moving.
    pub standstills: Vec<Standstill>,
}

/// What a relay knows of one destination.
#[derive(Debug, Clone)]
pub struct DestinationOverview {
    /// The name, as in `destination` columns.
    pub name: String,
    /// Whether it takes events.
    pub status: Status,
    /// The state of its circuit breaker.
    pub breaker: BreakerState,
    /// How many events were sent to it and have no answer.
    pub in_flight: usize,
    /// The mean time from commit to publish in each of the last 14 minutes, as this relay published, the latest last. `None` for a
    /// minute without events.
    pub lag_by_minute: Vec<Option<Duration>>,
}

/// Whether a relay can do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It can.
    Ready,
    /// Some of its destinations take no events.
    Degraded,
    /// Its database cannot be used, or none of its destinations takes events.
    NotReady,
}

impl Condition {
    /// Returns whether the relay can do at least a part of its work.
    pub fn is_ready(self) -> bool {
        self != Self::NotReady
    }

    /// The word for it in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Degraded => "degraded",
            Self::NotReady => "not_ready",
        }
    }
}

impl Health {
    /// Sums up the health, with the reasons where something is wrong.
    pub fn condition(&self) -> (Condition, Vec<String>) {
        if self.store.state != State::Up {
            let reason = self.store.reason.clone().unwrap_or_else(|| "starting".to_owned());
            return (Condition::NotReady, vec![reason]);
        }
        let reasons: Vec<String> =
            self.destinations.iter().filter_map(|there| trouble(&there.name, &there.status)).collect();
        let condition = match reasons.len() {
            0 => Condition::Ready,
            down if down == self.destinations.len() => Condition::NotReady,
            _ => Condition::Degraded,
        };
        (condition, reasons)
    }
}

/// What is wrong with a destination, since when and why.
fn trouble(name: &str, status: &Status) -> Option<String> {
    let state = match status.state {
        State::Unknown | State::Up => return None,
        State::Down => "down",
        State::Misconfigured => "misconfigured",
    };
    let since = humantime::format_rfc3339_seconds(status.since);
    let reason = status.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    Some(format!("destination {name} is {state} since {since}{reason}"))
}

impl Overview {
    /// The sentence that a person wants to read first, and the reasons, in one line.
    pub fn sentence(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.hung.as_ref().map(|hung| format!("not live: {hung}")));
        let reasons = || self.reasons.join("; ");
        parts.push(match (self.condition, &self.standing) {
            (Condition::NotReady, _) if self.store.state == State::Up => {
                format!("not ready: no destination takes events: {}", reasons())
            }
            (Condition::NotReady, _) => format!("not ready: {}", reasons()),
            (condition, standing) => {
                let ready = match standing {
                    Standing::Works => "ready".to_owned(),
                    other => format!("ready, {other}"),
                };
                if condition == Condition::Degraded { format!("{ready}, degraded: {}", reasons()) } else { ready }
            }
        });
        parts.extend(self.paused.iter().cloned());
        // The line already has the reasons of the relay and of its destinations.
        let others = self.standstills.iter().filter(|there| !["not_ready", "destination_down"].contains(&there.cause));
        parts.extend(others.map(|standstill| standstill.text.clone()));
        parts.join("; ").replace('\n', " ")
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("at work"),
            Self::StandsBy { behind } => {
                write!(f, "standing by: {behind} works, and this relay takes over when that one ends")
            }
            Self::Superseded { left } if left.is_empty() => f.write_str(
                "superseded: another configuration routes new events, and this relay has nothing left to deliver",
            ),
            Self::Superseded { left } => write!(
                f,
                "superseded: another configuration routes new events, and this relay delivers only what is owed to {}",
                left.join(", ")
            ),
        }
    }
}

impl<O: Outbox> Relay<O> {
    /// Returns what the relay is and does now. It asks the store nothing.
    pub fn overview(&self) -> Overview {
        let health = self.health.now();
        let (condition, reasons) = health.condition();
        let destinations =
            self.destinations.iter().zip(health.destinations).map(|(destination, health)| DestinationOverview {
                name: health.name,
                status: health.status,
                breaker: destination.state(),
                in_flight: destination.count_unanswered(),
                lag_by_minute: destination.lag_by_minute(),
            });
        Overview {
            condition,
            reasons,
            hung: self.pulses.hung(),
            standing: self.outbox.standing(),
            paused: self.outbox.pauses().iter().map(Pause::described).collect(),
            store: health.store,
            destinations: destinations.collect(),
            standstills: self.standstills.shown().borrow().clone(),
        }
    }

    /// Returns what hangs, as text for people, or `None` if the relay makes progress. A restart helps against nothing else.
    pub fn hung(&self) -> Option<String> {
        self.pulses.hung()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::relay::health::DestinationHealth;

    fn health(store: State, destinations: &[State]) -> Health {
        let status = |state| Status { state, since: SystemTime::UNIX_EPOCH, reason: Some("why".to_owned()) };
        let destination =
            |(name, state): (char, &State)| DestinationHealth { name: name.into(), status: status(*state) };
        Health { store: status(store), destinations: ('a'..).zip(destinations).map(destination).collect() }
    }

    #[test]
    fn a_relay_is_ready_while_its_store_and_one_destination_can_be_used() {
        use Condition::{Degraded, NotReady, Ready};
        for (store, destinations, condition) in [
            (State::Up, &[State::Up, State::Unknown][..], Ready),
            (State::Up, &[State::Up, State::Down], Degraded),
            (State::Up, &[State::Misconfigured, State::Unknown], Degraded),
            (State::Up, &[State::Misconfigured, State::Down], NotReady),
            (State::Up, &[State::Misconfigured], NotReady),
            (State::Down, &[State::Up], NotReady),
            (State::Unknown, &[State::Unknown], NotReady),
        ] {
            assert_eq!(health(store, destinations).condition().0, condition, "{store:?} {destinations:?}");
        }
        let (_, reasons) = health(State::Up, &[State::Down, State::Up]).condition();
        assert_eq!(reasons, ["destination a is down since 1970-01-01T00:00:00Z (why)"]);
    }

    #[test]
    fn the_sentence_says_what_matters_first() {
        let overview = |store, destinations: &[State], standing| {
            let health = health(store, destinations);
            let (condition, reasons) = health.condition();
            let (store, destinations, hung) = (health.store, Vec::new(), None);
            let (paused, standstills) = (Vec::new(), Vec::new());
            Overview { condition, reasons, hung, standing, store, destinations, paused, standstills }
        };
        let well = overview(State::Up, &[State::Up], Standing::Works);
        assert_eq!(well.sentence(), "ready");
        let hung = Overview { hung: Some("lane 1 hangs".to_owned()), ..well.clone() };
        assert_eq!(hung.sentence(), "not live: lane 1 hangs; ready");
        let paused = Overview { paused: vec!["destination a is paused".to_owned()], ..well.clone() };
        assert_eq!(paused.sentence(), "ready; destination a is paused");
        let locked = Overview { standstills: vec![Standstill::new("table_locked", "a lock")], ..well };
        assert_eq!(locked.sentence(), "ready; a lock");
        let standing = Standing::StandsBy { behind: "relay b".to_owned() };
        let says = overview(State::Up, &[State::Up], standing).sentence();
        assert!(says.starts_with("ready, standing by: relay b works"), "{says}");
        let says = overview(State::Up, &[State::Down, State::Up], Standing::Works).sentence();
        assert!(says.starts_with("ready, degraded: destination a is down since "), "{says}");
        let says = overview(State::Up, &[State::Down], Standing::Works).sentence();
        assert!(says.starts_with("not ready: no destination takes events: destination a is down"), "{says}");
        assert_eq!(overview(State::Down, &[State::Down], Standing::Works).sentence(), "not ready: why");
    }
}
