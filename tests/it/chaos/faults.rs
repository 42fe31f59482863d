//! The faults of a run and their times. The seed decides both.

use std::time::Duration;

/// The number of relays.
pub(super) const RELAYS: usize = 3;

/// How long a relay may take to stop before it is killed.
pub(super) const KILLED_AFTER: Duration = Duration::from_secs(10);

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    KillRelay(usize),
    /// The relay, and the signal.
    StopRelay(usize, &'static str),
    FreezeRelay(usize),
    /// A relay whose destination hangs gets a signal to stop, and is killed later.
    StopHangingRelay,
    /// A relay with one more destination runs beside the others.
    OtherConfiguration,
    TerminateBackends,
    RestartPostgres,
    KillPostgres,
    Meddle(Meddling),
    KillRedis,
    RestartRedis,
    FreezeRedis,
    PauseClients(u64),
    FlushScripts,
    Network(Whose, Link, Network),
}

/// What another client does to the tables.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Meddling {
    SwallowDeletes,
    RowSecurity(&'static str),
    /// The table and the mode.
    Lock(&'static str, &'static str),
    HoldSnapshot,
    DropDays,
}

/// Whose connections a network fault concerns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Whose {
    All,
    /// Those of this relay.
    One(usize),
}

/// The server to which the connections lead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Link {
    Postgres,
    Redis,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Network {
    Cut,
    Refuse,
    Stall,
    Delay(u64),
    Slow(u64),
    DropAnswers(i64),
    CutAfterBytes(i64),
    CutAfterReplies(i64),
}

impl Fault {
    /// The fault's line in the scorecard.
    pub(super) fn name(self) -> &'static str {
        use Link::{Postgres, Redis};
        use Network::{Cut, CutAfterBytes, CutAfterReplies, Delay, DropAnswers, Refuse, Slow, Stall};
        use Whose::{All, One};
        match self {
            Self::KillRelay(_) => "kill -9 of a relay",
            Self::StopRelay(_, "HUP") => "SIGHUP and restart of a relay",
            Self::StopRelay(..) => "SIGTERM and restart of a relay",
            Self::FreezeRelay(_) => "SIGSTOP of a relay",
            Self::StopHangingRelay => "SIGTERM of a relay whose destination hangs, SIGKILL after 10 s",
            Self::OtherConfiguration => "a relay of another configuration beside the others",
            Self::TerminateBackends => "pg_terminate_backend",
            Self::RestartPostgres => "PostgreSQL restarted (fast)",
            Self::KillPostgres => "PostgreSQL killed",
            Self::Meddle(Meddling::SwallowDeletes) => "a trigger that swallows deletes",
            Self::Meddle(Meddling::RowSecurity(_)) => "row-level security on and off",
            Self::Meddle(Meddling::Lock(..)) => "a lock on a table",
            Self::Meddle(Meddling::HoldSnapshot) => "a snapshot held",
            Self::Meddle(Meddling::DropDays) => "the days of the processing log dropped",
            Self::KillRedis => "Redis killed",
            Self::RestartRedis => "Redis restarted",
            Self::FreezeRedis => "Redis frozen",
            Self::PauseClients(_) => "CLIENT PAUSE",
            Self::FlushScripts => "SCRIPT FLUSH",
            Self::Network(All, Postgres, Cut) => "connections to PostgreSQL cut",
            Self::Network(All, Postgres, Refuse) => "connections to PostgreSQL refused",
            Self::Network(All, Postgres, Stall) => "network to PostgreSQL stalled",
            Self::Network(All, Postgres, Delay(_)) => "network to PostgreSQL delayed",
            Self::Network(All, Postgres, Slow(_)) => "network to PostgreSQL slow",
            Self::Network(All, Postgres, DropAnswers(_)) => "answers to COMMIT dropped",
            Self::Network(All, Postgres, CutAfterBytes(_) | CutAfterReplies(_)) => "answers of PostgreSQL cut off",
            Self::Network(All, Redis, Cut) => "connections to Redis cut",
            Self::Network(All, Redis, Refuse) => "connections to Redis refused",
            Self::Network(All, Redis, Stall) => "network to Redis stalled",
            Self::Network(All, Redis, Delay(_)) => "network to Redis delayed",
            Self::Network(All, Redis, Slow(_)) => "network to Redis slow",
            Self::Network(All, Redis, DropAnswers(_)) => "answers of Redis dropped",
            Self::Network(All, Redis, CutAfterBytes(_)) => "answers of Redis cut off",
            Self::Network(All, Redis, CutAfterReplies(_)) => "connection cut between replies of Redis",
            Self::Network(One(_), Postgres, Cut | Refuse) => "one relay's connections to PostgreSQL cut or refused",
            Self::Network(One(_), Postgres, Stall) => "one relay's network to PostgreSQL stalled",
            Self::Network(One(_), Postgres, _) => "one relay's answers of PostgreSQL late or lost",
            Self::Network(One(_), Redis, Cut | Refuse) => "one relay's connections to Redis cut or refused",
            Self::Network(One(_), Redis, Stall) => "one relay's network to Redis stalled",
            Self::Network(One(_), Redis, _) => "one relay's answers of Redis late or lost",
        }
    }
}

/// When a fault begins, and how long it lasts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) at: Duration,
    pub(super) lasts: Duration,
    pub(super) fault: Fault,
}

/// Plans the faults of a run of this duration. Faults are dealt from a shuffled deck, which is replaced when it is empty. So
/// a run of a minute has every kind of fault.
pub(super) fn plan(random: &mut fastrand::Rng, duration: Duration) -> Vec<Planned> {
    let (mut planned, mut deck) = (Vec::new(), Vec::new());
    let mut at = Duration::from_millis(500);
    while at < duration {
        if deck.is_empty() {
            deck = new_deck(random);
            random.shuffle(&mut deck);
        }
        let Some((fault, most_ms)) = deck.pop() else { break };
        // This fault would outlast the run, so it is left out.
        if fault == Fault::StopHangingRelay && at + KILLED_AFTER > duration {
            continue;
        }
        planned.push(Planned { at, lasts: Duration::from_millis(random.u64(most_ms / 4..=most_ms)), fault });
        at += Duration::from_millis(random.u64(50..1200));
    }
    planned
}

/// The name of every kind of fault.
pub(super) fn kinds() -> Vec<&'static str> {
    let mut random = fastrand::Rng::with_seed(1);
    // A deck draws some faults at random, so many decks are needed to see all.
    let mut kinds: Vec<_> = (0..50).flat_map(|_| new_deck(&mut random)).map(|(fault, _)| fault.name()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

/// Every kind of fault, frequent ones several times, each with its longest duration in milliseconds.
fn new_deck(random: &mut fastrand::Rng) -> Vec<(Fault, u64)> {
    let mut deck = Vec::new();
    for index in 0..RELAYS {
        deck.push((Fault::KillRelay(index), 500));
        deck.push((Fault::KillRelay(index), 500));
        deck.push((Fault::StopRelay(index, if index == 0 { "HUP" } else { "TERM" }), 300));
    }
    let mut relay = || random.usize(0..RELAYS);
    let others = [relay(), relay(), relay()];
    deck.push((Fault::StopRelay(others[0], "TERM"), 300));
    deck.push((Fault::FreezeRelay(others[1]), 1500));
    // Sometimes it lasts longer than the server allows for a claim's transaction.
    deck.push((Fault::FreezeRelay(others[2]), if random.bool() { 25_000 } else { 1500 }));
    deck.push((Fault::StopHangingRelay, 0));
    for _ in 0..2 {
        let table = ["event_outbox", "event_processing_log", "event_dead_letter"][random.usize(0..3)];
        deck.push((Fault::Meddle(Meddling::RowSecurity(table)), 3000));
        deck.push((Fault::Meddle(Meddling::SwallowDeletes), 4000));
        deck.push((Fault::Meddle(Meddling::DropDays), 0));
        deck.push((Fault::OtherConfiguration, 6000));
        deck.push((Fault::TerminateBackends, 0));
        deck.push((Fault::KillPostgres, 500));
        deck.push((Fault::KillRedis, 500));
    }
    // It can last longer than a claim waits for a lock.
    deck.push((Fault::Meddle(Meddling::Lock("event_outbox", "access exclusive")), 7000));
    let modes = [("event_outbox", "share row exclusive"), ("event_processing_log", "access exclusive")];
    let (table, mode) = modes[random.usize(0..2)];
    deck.push((Fault::Meddle(Meddling::Lock(table, mode)), 3000));
    deck.push((Fault::Meddle(Meddling::HoldSnapshot), 10_000));
    deck.push((Fault::RestartPostgres, 0));
    deck.push((Fault::RestartRedis, 0));
    deck.push((Fault::FreezeRedis, 2500));
    deck.push((Fault::PauseClients(random.u64(100..2000)), 0));
    deck.push((Fault::FlushScripts, 0));
    for link in [Link::Postgres, Link::Redis] {
        let networks: Vec<_> = (0..8).map(|which| network(which, random)).collect();
        deck.extend(networks.iter().map(|(network, most_ms)| (Fault::Network(Whose::All, link, *network), *most_ms)));
        for which in [random.usize(0..2), 2, random.usize(3..8)] {
            let (network, most_ms) = network(which, random);
            deck.push((Fault::Network(Whose::One(random.usize(0..RELAYS)), link, network), most_ms));
        }
    }
    deck
}

fn network(which: usize, random: &mut fastrand::Rng) -> (Network, u64) {
    match which {
        0 => (Network::Cut, 0),
        1 => (Network::Refuse, 1000),
        2 => (Network::Stall, 3500),
        3 => (Network::Delay(random.u64(5..100)), 2000),
        4 => (Network::Slow(random.u64(10_000..200_000)), 2000),
        5 => (Network::DropAnswers(random.i64(1..4)), 1000),
        6 => (Network::CutAfterBytes(random.i64(1..20_000)), 1000),
        _ => (Network::CutAfterReplies(random.i64(1..40)), 1000),
    }
}

/// The failpoints of one start of a relay. Half of the starts have none.
pub(super) fn failpoints(random: &mut fastrand::Rng) -> &'static str {
    const CHOICE: [&str; 10] = [
        "claimed=2%return(abort)",
        "before_publish=2%return(abort)",
        "acked=2%return(abort)",
        "before_commit=2%return(abort)",
        "committed=2%return(abort)",
        "acked=3%return",
        "before_commit=3%return",
        "committed=3%return",
        "before_publish=2%panic",
        "acked=5%sleep(150)",
    ];
    if random.bool() { "" } else { CHOICE[random.usize(0..CHOICE.len())] }
}
