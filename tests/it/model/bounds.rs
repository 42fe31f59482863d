//! One relay, one partition, and its bounds. Transactions draw an id early and commit late, one of them in two phases. An
//! event is moved into the partition with an old id. The ids are restarted.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::{Set, has, in_order};

/// Event 0 may commit after event 1, which has another key. Event 2 has the key of event 0 and begins after 0 is committed.
const LATE: u8 = 0;
const KEY_A: [u8; 2] = [0, 2];
const WRITERS: u8 = 4;
/// This event is scheduled at first and has the lowest id. Event 3 has its key and waits behind it.
const MOVED: u8 = 4;
const KEY_B: [u8; 2] = [4, 3];
/// The name of the late transaction after it is prepared.
const PREPARED: u8 = 5;
const BATCH: usize = 2;

/// The right protocol, and wrong variants of it.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Right,
    /// A bound is the last settled id, even if transactions with lower ids are in flight.
    LastId,
    /// Asks first for the transactions that are writing, and then for the last id drawn.
    WritersFirst,
    /// Knows transactions only by their names, and a prepared one has another name.
    PreparedIsGone,
    /// When an event was moved, the bounds are dropped, but the horizon is kept.
    KeepHorizon,
    /// Checks for moved events only when it takes the partition, not when it reads.
    ReadUnchecked,
    /// Moving an event raises the counter before it takes the lock.
    RaiseFirst,
    /// Truncating the table restarts the ids and does not raise the counter.
    RestartUntold,
}

/// Who takes part. With all of them in one scope there would be too many states.
#[derive(Clone, Copy, PartialEq)]
enum Scope {
    /// Transactions 0, 1 and 2.
    Late,
    /// Transactions 1 and 3, and an event that is moved.
    Moving,
    /// Transactions 1 and 3, and a truncate that restarts the ids.
    Restarting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Writer {
    Idle,
    /// It holds the table's lock.
    Locked,
    /// It has drawn its id.
    Drawn,
    Prepared,
    Committed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    writers: [Writer; WRITERS as usize],
    /// The id of each event.
    ids: [u8; 5],
    last_id: u8,
    move_locked: bool,
    move_raised: bool,
    moved: bool,
    restarted: bool,
    moves: u8,
    gone: Set,
    arrived: Vec<u8>,
    relay: Relay,
    phase: Phase,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Relay {
    moves: u8,
    bound: u8,
    horizon: Option<u8>,
    next: Option<(u8, Set)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    /// The first half of the horizon's question is answered.
    Asked {
        last_id: Option<u8>,
        writing: Option<Set>,
    },
    Taken,
    Publishing {
        batch: Vec<u8>,
        reached: Option<u8>,
    },
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Begin(u8),
    Draw(u8),
    Prepare,
    Commit(u8),
    LockToMove,
    Raise,
    CommitMove,
    /// Waits for everyone who holds a lock on the table, a claim included.
    Restart,
    Take {
        ask: bool,
    },
    Ask,
    Read,
    /// The partition is found empty.
    Empty,
    Settle,
}

struct Bounds {
    variant: Variant,
    scope: Scope,
}

impl State {
    /// The names of the transactions that hold the table's lock.
    fn writing(&self) -> Set {
        let writers =
            (0..WRITERS).filter(|writer| matches!(self.writers[usize::from(*writer)], Writer::Locked | Writer::Drawn));
        let prepared = (self.writers[usize::from(LATE)] == Writer::Prepared).then_some(PREPARED);
        let moving = (self.move_locked && !self.moved).then_some(MOVED);
        writers.chain(prepared).chain(moving).fold(0, |set, name| set | 1 << name)
    }

    fn id(&self, event: u8) -> u8 {
        self.ids[usize::from(event)]
    }

    /// The committed pending events, in order.
    fn pending(&self) -> Vec<u8> {
        let mut pending: Vec<u8> = (0..5)
            .filter(|event| match *event {
                MOVED => self.moved,
                writer => self.writers[usize::from(writer)] == Writer::Committed,
            })
            .filter(|event| !has(self.gone, *event))
            .collect();
        pending.sort_by_key(|event| self.id(*event));
        pending
    }
}

impl Bounds {
    fn forget(&self, state: &mut State) {
        let kept = self.variant == Variant::KeepHorizon;
        let Relay { horizon, next, .. } = state.relay.clone();
        state.relay =
            Relay { moves: state.moves, bound: 0, horizon: horizon.filter(|_| kept), next: next.filter(|_| kept) };
    }

    /// The same as `State::wrote` in the relay's `bounds.rs`.
    fn wrote(&self, relay: &mut Relay, last_id: u8, writing: Set) {
        let prepared = if self.variant == Variant::PreparedIsGone { 0 } else { 1 << PREPARED };
        match relay.next {
            Some((_, before)) if writing & (before | prepared) != 0 => {}
            before => {
                relay.horizon = before.map_or(relay.horizon, |(last_id, _)| Some(last_id));
                relay.next = Some((last_id, writing));
            }
        }
    }
}

impl Model for Bounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            writers: [Writer::Idle; 4],
            ids: [0, 0, 0, 0, 1],
            last_id: 1,
            move_locked: false,
            move_raised: false,
            moved: false,
            restarted: false,
            moves: 0,
            gone: 0,
            arrived: Vec::new(),
            relay: Relay::default(),
            phase: Phase::Idle,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for writer in if self.scope == Scope::Late { [0, 1, 2].as_slice() } else { &[1, 3] }.iter().copied() {
            let late = writer == LATE;
            match state.writers[usize::from(writer)] {
                Writer::Idle if writer == KEY_A[1] && state.writers[usize::from(LATE)] != Writer::Committed => {}
                Writer::Idle => actions.push(Action::Begin(writer)),
                Writer::Locked => actions.push(Action::Draw(writer)),
                Writer::Drawn => {
                    actions.push(Action::Commit(writer));
                    actions.extend(late.then_some(Action::Prepare));
                }
                Writer::Prepared => actions.push(Action::Commit(writer)),
                Writer::Committed => {}
            }
        }
        let raise_first = self.variant == Variant::RaiseFirst;
        if self.scope == Scope::Moving && !state.move_locked && (state.move_raised || !raise_first) {
            actions.push(Action::LockToMove);
        }
        if self.scope == Scope::Moving && !state.move_raised && (state.move_locked || raise_first) {
            actions.push(Action::Raise);
        }
        if state.move_locked && state.move_raised && !state.moved {
            actions.push(Action::CommitMove);
        }
        let restarts = self.scope == Scope::Restarting && !state.restarted;
        if restarts && state.phase == Phase::Idle && state.writing() == 0 {
            actions.push(Action::Restart);
        }
        actions.extend(match state.phase {
            Phase::Idle => vec![Action::Take { ask: true }, Action::Take { ask: false }],
            Phase::Asked { .. } => vec![Action::Ask],
            Phase::Taken => vec![Action::Read, Action::Empty],
            Phase::Publishing { .. } => vec![Action::Settle],
        });
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Begin(writer) => next.writers[usize::from(writer)] = Writer::Locked,
            Action::Draw(writer) => {
                next.last_id += 1;
                next.ids[usize::from(writer)] = next.last_id;
                next.writers[usize::from(writer)] = Writer::Drawn;
            }
            Action::Prepare => next.writers[usize::from(LATE)] = Writer::Prepared,
            Action::Commit(writer) => next.writers[usize::from(writer)] = Writer::Committed,
            Action::LockToMove => next.move_locked = true,
            Action::Raise => {
                next.move_raised = true;
                next.moves += 1;
            }
            Action::CommitMove => next.moved = true,
            Action::Restart => {
                let committed = state.pending().into_iter();
                next.gone = committed.fold(state.gone, |gone, event| gone | 1 << event);
                next.last_id = 0;
                next.restarted = true;
                next.moves += u8::from(self.variant != Variant::RestartUntold);
            }
            Action::Take { ask } => {
                next.phase = Phase::Taken;
                if state.relay.moves != state.moves {
                    self.forget(&mut next);
                } else if ask {
                    let writers_first = self.variant == Variant::WritersFirst;
                    next.phase = Phase::Asked {
                        last_id: (!writers_first).then_some(state.last_id),
                        writing: writers_first.then(|| state.writing()),
                    };
                }
            }
            Action::Ask => {
                let Phase::Asked { last_id, writing } = state.phase else { return None };
                let (last_id, writing) = (last_id.unwrap_or(state.last_id), writing.unwrap_or_else(|| state.writing()));
                self.wrote(&mut next.relay, last_id, writing);
                next.phase = Phase::Taken;
            }
            Action::Read => {
                if state.relay.moves != state.moves && self.variant != Variant::ReadUnchecked {
                    self.forget(&mut next);
                }
                let mut read = state.pending();
                read.retain(|event| state.id(*event) > next.relay.bound);
                read.truncate(BATCH);
                let last = read.last().map(|event| state.id(*event));
                let full = read.len() == BATCH;
                let mut batch = read.clone();
                batch.retain(|event| *event != KEY_B[1] || state.moved);
                let reached = match self.variant {
                    Variant::LastId => last,
                    _ => next
                        .relay
                        .horizon
                        .map(|horizon| last.filter(|_| full).map_or(horizon, |last| horizon.min(last - 1))),
                };
                let reached = reached.filter(|_| batch == read);
                next.phase = if batch.is_empty() { Phase::Idle } else { Phase::Publishing { batch, reached } };
            }
            Action::Empty => {
                if state.pending().iter().any(|event| state.id(*event) > state.relay.bound) {
                    return None;
                }
                next.relay.bound = state.relay.bound.max(state.relay.horizon.unwrap_or(0));
                next.phase = Phase::Idle;
            }
            Action::Settle => {
                let Phase::Publishing { batch, reached } = &state.phase else { return None };
                for event in batch {
                    next.arrived.push(*event);
                    next.gone |= 1 << event;
                }
                next.relay.bound = state.relay.bound.max(reached.unwrap_or(0));
                next.phase = Phase::Idle;
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is hidden", |_, state: &State| {
                state.phase != Phase::Idle
                    || state.relay.moves != state.moves
                    || state.pending().iter().all(|event| state.id(*event) > state.relay.bound)
            }),
            Property::always("keys are in order", |model: &Self, state: &State| {
                // Truncated events never arrive.
                model.scope == Scope::Restarting || in_order(&state.arrived, &KEY_A) && in_order(&state.arrived, &KEY_B)
            }),
            Property::sometimes("all is settled", |model: &Self, state: &State| {
                state.gone
                    == match model.scope {
                        Scope::Late => 0b111,
                        Scope::Moving => 0b1_1010,
                        Scope::Restarting => 0b1010,
                    }
            }),
            Property::sometimes("a bound passes by what is dead", |_, state: &State| {
                (0..5).any(|event| has(state.gone, event) && state.id(event) <= state.relay.bound)
            }),
        ]
    }
}

#[test]
fn bounds_hide_nothing() {
    for (scope, states) in [(Scope::Late, 5_000), (Scope::Moving, 5_000), (Scope::Restarting, 500)] {
        let checker = Bounds { variant: Variant::Right, scope }.checker().spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.unique_state_count() > states, "only {} states", checker.unique_state_count());
    }
}

/// Checks that a wrong variant violates this property.
fn breaks(variant: Variant, scope: Scope, property: &'static str) {
    let checker = Bounds { variant, scope }.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    assert!(checker.discovery(property).is_some(), "{property} holds");
}

#[test]
fn a_bound_at_the_last_id_hides_a_late_commit() {
    breaks(Variant::LastId, Scope::Late, "nothing is hidden");
}

#[test]
fn whoever_draws_an_id_after_the_writers_were_asked_for_is_overlooked() {
    breaks(Variant::WritersFirst, Scope::Late, "nothing is hidden");
}

#[test]
fn a_prepared_transaction_has_another_name() {
    breaks(Variant::PreparedIsGone, Scope::Late, "nothing is hidden");
}

#[test]
fn a_horizon_from_before_a_move_hides_what_is_being_moved() {
    breaks(Variant::KeepHorizon, Scope::Moving, "nothing is hidden");
}

#[test]
fn an_event_moved_between_take_and_read_is_overtaken() {
    breaks(Variant::ReadUnchecked, Scope::Moving, "keys are in order");
}

#[test]
fn who_says_that_it_moves_an_event_before_it_locks_is_overlooked() {
    breaks(Variant::RaiseFirst, Scope::Moving, "nothing is hidden");
}

#[test]
fn ids_that_begin_anew_untold_are_hidden() {
    breaks(Variant::RestartUntold, Scope::Restarting, "nothing is hidden");
}
