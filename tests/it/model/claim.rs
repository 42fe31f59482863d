//! Two relays, two keys, three events: crashes, zombies, unknown outcomes, failing events, and a late commit with the lowest
//! id.

use stateright::{Checker, Model, Property};

use super::{Set, has, in_order, members};

/// Event 0 has key B and commits late. Events 1 and 2 have key A.
const LATE: u8 = 0;
const KEY_A: [u8; 2] = [1, 2];
const FAULTS: u8 = 3;

fn key(event: u8) -> u8 {
    u8::from(event == LATE)
}

/// The right protocol, and wrong variants of it.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Right,
    /// Takes the lock and reads in one statement, whose snapshot is older than the lock.
    OneStatement,
    /// Deletes all claimed rows up to the last delivered event, instead of each delivered row.
    SettleByHighestId,
    /// Continues with later events of a key after one has failed.
    ContinueKey,
}

struct Protocol {
    variant: Variant,
    /// Whether both keys have the same partition.
    together: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// The rows of the outbox.
    pending: Set,
    logged: Set,
    late_committed: bool,
    /// The relay that holds each partition.
    locks: [Option<u8>; 2],
    arrived: Vec<u8>,
    relays: [Relay; 2],
    faults: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Relay {
    Idle,
    /// Its statement has begun, and its snapshot contains these events.
    Snapshot(Set),
    Locked(u8),
    Publishing(Batch),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Batch {
    partition: u8,
    /// The events that are not published yet.
    left: Set,
    delivered: Set,
    /// Keys of which an event failed.
    stopped: [bool; 2],
    holds_lock: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    CommitLate,
    TakeSnapshot(u8),
    Lock(u8, u8),
    Read(u8),
    Deliver(u8),
    Refuse(u8),
    /// The answer is lost; the flag says whether the event arrived.
    LoseAnswer(u8, bool),
    Settle(u8),
    Crash(u8),
    LoseLock(u8),
}

impl Protocol {
    fn partition(&self, event: u8) -> u8 {
        if self.together { 0 } else { key(event) }
    }

    fn of_partition(&self, set: Set, partition: u8) -> Set {
        members(set).filter(|event| self.partition(*event) == partition).fold(0, |set, event| set | 1 << event)
    }

    /// The next event to publish.
    fn next(&self, batch: &Batch) -> Option<u8> {
        members(batch.left)
            .find(|event| self.variant == Variant::ContinueKey || !batch.stopped[usize::from(key(*event))])
    }

    fn batch(&self, partition: u8, visible: Set) -> Relay {
        let left = self.of_partition(visible, partition);
        Relay::Publishing(Batch { partition, left, delivered: 0, stopped: [false; 2], holds_lock: true })
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            pending: 0b110,
            logged: 0,
            late_committed: false,
            locks: [None; 2],
            arrived: Vec::new(),
            relays: [Relay::Idle, Relay::Idle],
            faults: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if !state.late_committed {
            actions.push(Action::CommitLate);
        }
        for index in 0..2 {
            let relay = &state.relays[usize::from(index)];
            if state.faults < FAULTS && *relay != Relay::Idle {
                actions.push(Action::Crash(index));
            }
            match relay {
                Relay::Idle if self.variant == Variant::OneStatement => actions.push(Action::TakeSnapshot(index)),
                Relay::Idle | Relay::Snapshot(_) => {
                    actions.extend([0, 1].map(|partition| Action::Lock(index, partition)));
                }
                Relay::Locked(_) => actions.push(Action::Read(index)),
                Relay::Publishing(batch) => {
                    if batch.holds_lock && state.faults < FAULTS {
                        actions.push(Action::LoseLock(index));
                    }
                    if self.next(batch).is_some() && state.arrived.len() < 7 {
                        actions.push(Action::Deliver(index));
                        if state.faults < FAULTS {
                            let lost = [true, false].map(|arrived| Action::LoseAnswer(index, arrived));
                            actions.extend(lost.into_iter().chain([Action::Refuse(index)]));
                        }
                    } else {
                        actions.push(Action::Settle(index));
                    }
                }
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        let publishing = |state: &mut State, index: u8, change: &mut dyn FnMut(&mut Batch, u8, &mut Vec<u8>)| {
            let State { relays, arrived, .. } = state;
            if let Relay::Publishing(batch) = &mut relays[usize::from(index)]
                && let Some(event) = self.next(batch)
            {
                batch.left &= !(1 << event);
                change(batch, event, arrived);
            }
        };
        match action {
            Action::CommitLate => {
                next.late_committed = true;
                next.pending |= 1 << LATE;
            }
            Action::TakeSnapshot(index) => next.relays[usize::from(index)] = Relay::Snapshot(state.pending),
            Action::Lock(index, partition) => {
                if state.locks[usize::from(partition)].is_some() || self.of_partition(state.pending, partition) == 0 {
                    return None;
                }
                next.locks[usize::from(partition)] = Some(index);
                next.relays[usize::from(index)] = match state.relays[usize::from(index)] {
                    Relay::Snapshot(visible) => self.batch(partition, visible),
                    _ => Relay::Locked(partition),
                };
            }
            Action::Read(index) => {
                let Relay::Locked(partition) = state.relays[usize::from(index)] else { return None };
                next.relays[usize::from(index)] = self.batch(partition, state.pending);
            }
            Action::Deliver(index) => publishing(&mut next, index, &mut |batch, event, arrived| {
                arrived.push(event);
                batch.delivered |= 1 << event;
            }),
            Action::Refuse(index) => {
                next.faults += 1;
                publishing(&mut next, index, &mut |batch, event, _| batch.stopped[usize::from(key(event))] = true);
            }
            Action::LoseAnswer(index, arrives) => {
                next.faults += 1;
                publishing(&mut next, index, &mut |batch, event, arrived| {
                    if arrives {
                        arrived.push(event);
                    }
                    batch.left = 0; // nothing more is sent in this call
                });
            }
            Action::Settle(index) => {
                let Relay::Publishing(batch) = &state.relays[usize::from(index)] else { return None };
                // A relay that lost the lock lost the transaction that settles.
                if batch.holds_lock {
                    let highest = members(batch.delivered).max();
                    let settled = match self.variant {
                        Variant::SettleByHighestId => highest.map_or(0, |highest| {
                            self.of_partition(state.pending, batch.partition) & ((2 << highest) - 1)
                        }),
                        _ => batch.delivered,
                    };
                    next.pending &= !settled;
                    next.logged |= settled;
                    next.locks[usize::from(batch.partition)] = None;
                }
                next.relays[usize::from(index)] = Relay::Idle;
            }
            Action::Crash(index) => {
                next.faults += 1;
                next.locks = state.locks.map(|holder| holder.filter(|holder| *holder != index));
                next.relays[usize::from(index)] = Relay::Idle;
            }
            Action::LoseLock(index) => {
                next.faults += 1;
                if let Relay::Publishing(batch) = &mut next.relays[usize::from(index)] {
                    batch.holds_lock = false;
                    next.locks[usize::from(batch.partition)] = None;
                }
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is lost", |_, state: &State| {
                (1..3)
                    .chain(state.late_committed.then_some(LATE))
                    .all(|event| has(state.pending, event) || state.arrived.contains(&event))
            }),
            Property::always("a key is in order", |_, state: &State| in_order(&state.arrived, &KEY_A)),
            Property::always("never in both tables", |_, state: &State| state.pending & state.logged == 0),
            Property::always("without a fault nothing is repeated", |_, state: &State| {
                state.faults > 0
                    || state.arrived.iter().enumerate().all(|(at, event)| !state.arrived[..at].contains(event))
            }),
            Property::sometimes("all is settled", |_, state: &State| state.logged == 0b111),
        ]
    }
}

#[test]
fn the_claim_protocol_keeps_its_promises() {
    for (together, states) in [(true, 10_000), (false, 10_000)] {
        let checker = Protocol { variant: Variant::Right, together }.checker().spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.unique_state_count() > states, "only {} states", checker.unique_state_count());
    }
}

/// Checks that a wrong variant violates this property.
fn breaks(variant: Variant, property: &'static str) {
    let checker = Protocol { variant, together: true }.checker().spawn_bfs().join();
    assert!(checker.discovery(property).is_some(), "{property} holds");
}

#[test]
fn claiming_in_one_statement_publishes_again_what_another_has_just_settled() {
    breaks(Variant::OneStatement, "without a fault nothing is repeated");
}

#[test]
fn settling_by_the_highest_id_loses_a_late_commit() {
    breaks(Variant::SettleByHighestId, "nothing is lost");
}

#[test]
fn going_on_with_a_key_after_an_error_breaks_its_order() {
    breaks(Variant::ContinueKey, "a key is in order");
}
