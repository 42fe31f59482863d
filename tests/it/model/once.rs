//! Exactly once into a stream: one partition, one stream, three events, and one more that commits late with the lowest id.
//! There are two relays, crashes, zombies, lost answers, marks that are lost or late, and an epoch that goes back.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::{Set, has, in_order, members};

const LATE: u8 = 0;
const KEY: [u8; 2] = [1, 2];
const FAULTS: u8 = 2;
const CLAIMS: u8 = 3;

#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Right,
    /// Drops a list that has no event of the batch.
    Overlap,
    /// A mark empties the list even if another claim owns it.
    MarkWithoutOwner,
    /// Takes over and drops all listed events, without asking which are still pending.
    TakeOverListed,
    /// Takes over what it asked about, even if something was added since.
    BeginWithoutLooking,
    /// Does not ask whether it still holds its claim, and treats its own batch as the pending events.
    BeginWithoutOutbox,
}

struct Protocol(Variant);

/// The claim that owns the state: its epoch, and a number that distinguishes claims of the same epoch.
type Owner = (u8, u8);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    pending: Set,
    late_committed: bool,
    holder: Option<u8>,
    epoch: u8,
    claims: u8,
    arrived: Vec<u8>,
    // The state in Redis.
    owner: Option<Owner>,
    chunks: Vec<Set>,
    carried: Set,
    /// Marks in flight: the owner, and the events that stay carried.
    marks: Vec<(Owner, Set)>,
    /// A chunk that has not arrived yet, and whose relay no longer waits for it.
    late: Option<(Owner, Set)>,
    relays: [Option<Claim>; 2],
    faults: u8,
    went_back: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Claim {
    owner: Owner,
    /// The events that are not published yet.
    left: Set,
    delivered: Set,
    holds_lock: bool,
    /// A chunk's answer was lost.
    unknown: bool,
    owned: bool,
    carried: Set,
    /// What the refusal of a chunk returned: owner, number of chunks, listed events.
    told: Option<(Owner, usize, Set)>,
    /// Whether it has asked the outbox which of these events are still pending.
    renewed: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    CommitLate,
    Claim(u8, u8),
    /// Sends so many events; the flag says whether the answer arrives.
    Chunk(u8, u8, bool),
    /// Sends so many events, and stops waiting before they arrive.
    GiveUp(u8, u8),
    /// The chunk that nobody waits for arrives.
    Arrive,
    Renew(u8),
    Begin(u8),
    Settle(u8),
    Mark(usize),
    LoseMark(usize),
    Crash(u8),
    LoseLock(u8),
    /// The database fails over to a server that is behind. No relay has a claim and nothing is in flight: an old claim could
    /// have a higher epoch than later ones, and epochs cannot fence that.
    GoBack,
}

impl Claim {
    fn new(owner: Owner, left: Set) -> Self {
        Self {
            owner,
            left,
            delivered: 0,
            holds_lock: true,
            unknown: false,
            owned: false,
            carried: 0,
            told: None,
            renewed: false,
        }
    }
}

fn set(events: &[u8]) -> Set {
    events.iter().fold(0, |set, event| set | 1 << event)
}

impl State {
    fn listed(&self) -> Set {
        self.chunks.iter().fold(self.carried, |all, chunk| all | chunk)
    }

    /// The script that adds a chunk. Returns whether it added it.
    fn add(&mut self, variant: Variant, claim: &mut Claim, chunk: Set) -> bool {
        if self.owner != Some(claim.owner) {
            let older = self.owner.is_none_or(|owner| owner.0 < claim.owner.0);
            let empty = self.chunks.is_empty() && self.carried == 0;
            let forgets = match variant {
                Variant::Overlap => self.listed() & (claim.left | claim.delivered) == 0,
                Variant::TakeOverListed => true,
                _ => false,
            };
            if !older || !(empty || forgets) {
                claim.told = self.owner.map(|owner| (owner, self.chunks.len(), self.listed()));
                claim.renewed = false;
                return false;
            }
            (self.owner, self.carried) = (Some(claim.owner), 0);
            self.chunks.clear();
        }
        self.arrived.extend(members(chunk));
        self.chunks.push(chunk);
        true
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            pending: 0b110,
            late_committed: false,
            holder: None,
            epoch: 1,
            claims: 0,
            arrived: Vec::new(),
            owner: None,
            chunks: Vec::new(),
            carried: 0,
            marks: Vec::new(),
            late: None,
            relays: [None, None],
            faults: 0,
            went_back: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if !state.late_committed {
            actions.push(Action::CommitLate);
        }
        if !state.went_back && state.epoch > 1 && state.faults < FAULTS {
            actions.push(Action::GoBack);
        }
        for mark in 0..state.marks.len() {
            actions.extend([Action::Mark(mark), Action::LoseMark(mark)]);
        }
        if state.late.is_some() {
            actions.push(Action::Arrive);
        }
        for index in 0..2 {
            let Some(claim) = &state.relays[usize::from(index)] else {
                if state.holder.is_none() && state.pending != 0 && state.claims < CLAIMS {
                    actions.extend((1..=2).map(|limit| Action::Claim(index, limit)));
                }
                continue;
            };
            if state.faults < FAULTS {
                actions.push(Action::Crash(index));
                if claim.holds_lock {
                    actions.push(Action::LoseLock(index));
                }
            }
            if claim.told.is_some() {
                actions.push(if claim.renewed { Action::Begin(index) } else { Action::Renew(index) });
            } else if claim.left != 0 {
                for size in 1..=u8::try_from(claim.left.count_ones()).unwrap() {
                    actions.push(Action::Chunk(index, size, true));
                    if state.faults < FAULTS {
                        actions.extend([Action::Chunk(index, size, false), Action::GiveUp(index, size)]);
                    }
                }
            } else {
                actions.push(Action::Settle(index));
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::CommitLate => {
                next.late_committed = true;
                next.pending |= 1 << LATE;
            }
            Action::Claim(index, limit) => {
                let batch: Vec<u8> = members(state.pending).take(usize::from(limit)).collect();
                next.holder = Some(index);
                next.claims += 1;
                next.relays[usize::from(index)] = Some(Claim::new((state.epoch, next.claims), set(&batch)));
            }
            Action::Chunk(index, size, answered) => {
                let mut claim = next.relays[usize::from(index)].take()?;
                let chunk = set(&members(claim.left).take(usize::from(size)).collect::<Vec<_>>());
                let added = next.add(self.0, &mut claim, chunk);
                if !answered {
                    next.faults += 1;
                    claim.told = None;
                    claim.unknown = true;
                    claim.left = 0;
                } else if added {
                    claim.owned = true;
                    claim.left &= !chunk;
                    claim.delivered |= chunk;
                }
                next.relays[usize::from(index)] = Some(claim);
            }
            Action::GiveUp(index, size) => {
                next.faults += 1;
                let claim = next.relays[usize::from(index)].as_mut()?;
                let chunk = set(&members(claim.left).take(usize::from(size)).collect::<Vec<_>>());
                (claim.unknown, claim.left) = (true, 0);
                next.late = Some((claim.owner, chunk));
            }
            Action::Arrive => {
                let (owner, chunk) = next.late.take()?;
                let mut sender = Claim::new(owner, chunk);
                next.add(self.0, &mut sender, chunk);
            }
            Action::Renew(index) => {
                let claim = next.relays[usize::from(index)].as_mut()?;
                let (owner, _, listed) = claim.told?;
                if self.0 == Variant::BeginWithoutOutbox {
                    claim.owner.0 = claim.owner.0.max(owner.0) + 1;
                    claim.carried = listed & (claim.left | claim.delivered);
                    claim.renewed = true;
                } else if claim.holds_lock {
                    next.epoch = state.epoch.max(owner.0) + 1;
                    claim.owner.0 = next.epoch;
                    claim.carried = listed & state.pending;
                    claim.renewed = true;
                } else {
                    // The question fails because its transaction is gone, so nothing more is published.
                    (claim.told, claim.left) = (None, 0);
                }
            }
            Action::Begin(index) => {
                let mut claim = next.relays[usize::from(index)].take()?;
                let (owner, chunks, _) = claim.told.take()?;
                let unchanged = state.chunks.len() == chunks || self.0 == Variant::BeginWithoutLooking;
                if state.owner == Some(owner) && unchanged {
                    (next.owner, next.carried) = (Some(claim.owner), claim.carried);
                    next.chunks.clear();
                    claim.owned = true;
                    claim.delivered |= claim.left & claim.carried;
                    claim.left &= !claim.carried;
                }
                next.relays[usize::from(index)] = Some(claim);
            }
            Action::Settle(index) => {
                let claim = next.relays[usize::from(index)].take()?;
                if claim.holds_lock {
                    next.pending &= !claim.delivered;
                    next.epoch += u8::from(claim.delivered != 0);
                    next.holder = None;
                    if claim.owned && !claim.unknown {
                        next.marks.push((claim.owner, claim.carried & !claim.delivered));
                    }
                }
            }
            Action::Mark(mark) => {
                let (owner, carried) = next.marks.remove(mark);
                if state.owner == Some(owner) || self.0 == Variant::MarkWithoutOwner {
                    next.chunks.clear();
                    next.carried = carried;
                }
            }
            Action::LoseMark(mark) => drop(next.marks.remove(mark)),
            Action::Crash(index) => {
                next.faults += 1;
                next.holder = state.holder.filter(|holder| *holder != index);
                next.relays[usize::from(index)] = None;
            }
            Action::LoseLock(index) => {
                next.faults += 1;
                next.holder = None;
                next.relays[usize::from(index)].as_mut()?.holds_lock = false;
            }
            Action::GoBack => {
                next.faults += 1;
                next.went_back = true;
                next.epoch = 1;
                next.holder = None;
                next.relays = [None, None];
                next.late = None;
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing arrives twice", |_, state: &State| {
                state.arrived.iter().enumerate().all(|(at, event)| !state.arrived[..at].contains(event))
            }),
            Property::always("a key is in order", |_, state: &State| in_order(&state.arrived, &KEY)),
            Property::always("nothing is lost", |_, state: &State| {
                KEY.into_iter()
                    .chain(state.late_committed.then_some(LATE))
                    .all(|event| has(state.pending, event) || state.arrived.contains(&event))
            }),
            Property::sometimes("all is settled after a fault", |_, state: &State| {
                state.faults == FAULTS && state.late_committed && state.pending == 0
            }),
        ]
    }
}

#[test]
fn exactly_once_keeps_its_promise() {
    let checker = Protocol(Variant::Right).checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.unique_state_count() > 100_000, "only {} states", checker.unique_state_count());
}

fn breaks(variant: Variant) {
    const HARM: &str = "nothing arrives twice";
    let found = HasDiscoveries::AllOf([HARM].into());
    let checker = Protocol(variant).checker().threads(2).finish_when(found).spawn_bfs().join();
    assert!(checker.discovery(HARM).is_some());
}

#[test]
fn forgetting_a_list_that_the_batch_does_not_overlap_repeats() {
    breaks(Variant::Overlap);
}

#[test]
fn a_mark_that_does_not_ask_who_owns_the_list_repeats() {
    breaks(Variant::MarkWithoutOwner);
}

#[test]
fn taking_over_a_list_without_asking_the_outbox_repeats() {
    breaks(Variant::TakeOverListed);
}

#[test]
fn taking_over_what_has_changed_since_repeats() {
    breaks(Variant::BeginWithoutLooking);
}

#[test]
fn beginning_without_asking_the_outbox_repeats() {
    breaks(Variant::BeginWithoutOutbox);
}
