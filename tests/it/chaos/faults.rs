//! What goes wrong in a run, and when: all of it from the seed.

use std::time::Duration;

/// How many relays there are.
pub(super) const RELAYS: usize = 3;

/// Something that goes wrong, and what ends it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    KillRelay(usize),
    TerminateRelay(usize),
    FreezeRelay(usize),
    TerminateBackends,
    RestartPostgres,
    KillPostgres,
    KillRedis,
    RestartRedis,
    FreezeRedis,
    PauseClients(u64),
    FlushScripts,
    Network(Link, Network),
}

/// Between the relays and this.
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
    /// Its line in the scorecard.
    pub(super) fn name(self) -> &'static str {
        use {Link::*, Network::*};
        match self {
            Self::KillRelay(_) => "kill -9 of a relay",
            Self::TerminateRelay(_) => "SIGTERM and restart of a relay",
            Self::FreezeRelay(_) => "SIGSTOP of a relay",
            Self::TerminateBackends => "pg_terminate_backend",
            Self::RestartPostgres => "PostgreSQL restarted (fast)",
            Self::KillPostgres => "PostgreSQL killed",
            Self::KillRedis => "Redis killed",
            Self::RestartRedis => "Redis restarted",
            Self::FreezeRedis => "Redis frozen",
            Self::PauseClients(_) => "CLIENT PAUSE",
            Self::FlushScripts => "SCRIPT FLUSH",
            Self::Network(Postgres, Cut) => "connections to PostgreSQL cut",
            Self::Network(Postgres, Refuse) => "connections to PostgreSQL refused",
            Self::Network(Postgres, Stall) => "network to PostgreSQL stalled",
            Self::Network(Postgres, Delay(_)) => "network to PostgreSQL delayed",
            Self::Network(Postgres, Slow(_)) => "network to PostgreSQL slow",
            Self::Network(Postgres, DropAnswers(_)) => "answers to COMMIT dropped",
            Self::Network(Postgres, CutAfterBytes(_) | CutAfterReplies(_)) => "answers of PostgreSQL cut off",
            Self::Network(Redis, Cut) => "connections to Redis cut",
            Self::Network(Redis, Refuse) => "connections to Redis refused",
            Self::Network(Redis, Stall) => "network to Redis stalled",
            Self::Network(Redis, Delay(_)) => "network to Redis delayed",
            Self::Network(Redis, Slow(_)) => "network to Redis slow",
            Self::Network(Redis, DropAnswers(_)) => "answers of Redis dropped",
            Self::Network(Redis, CutAfterBytes(_)) => "answers of Redis cut off",
            Self::Network(Redis, CutAfterReplies(_)) => "connection cut between replies of Redis",
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

/// What goes wrong in a run of so long.
pub(super) fn plan(random: &mut fastrand::Rng, duration: Duration) -> Vec<Planned> {
    let mut planned = Vec::new();
    let mut at = Duration::from_millis(500);
    while at < duration {
        let (fault, most_ms) = fault(random);
        planned.push(Planned { at, lasts: Duration::from_millis(random.u64(0..=most_ms)), fault });
        at += Duration::from_millis(random.u64(50..1200));
    }
    planned
}

/// A fault, and how many milliseconds it lasts at most.
fn fault(random: &mut fastrand::Rng) -> (Fault, u64) {
    let relay = random.usize(0..RELAYS);
    let link = if random.bool() { Link::Postgres } else { Link::Redis };
    match random.u32(0..20) {
        0..3 => (Fault::KillRelay(relay), 500),
        3..5 => (Fault::TerminateRelay(relay), 300),
        // Now and then for longer than the server waits for a claim.
        5 => (Fault::FreezeRelay(relay), if random.u32(0..3) == 0 { 25_000 } else { 1500 }),
        6 => (Fault::TerminateBackends, 0),
        7 => (Fault::RestartPostgres, 0),
        8 => (Fault::KillPostgres, 500),
        9 => (Fault::KillRedis, 500),
        10 => (Fault::RestartRedis, 0),
        11 => (Fault::FreezeRedis, 2500),
        12 => (Fault::PauseClients(random.u64(100..2000)), 0),
        13 => (Fault::FlushScripts, 0),
        _ => {
            let (network, most_ms) = match random.u32(0..8) {
                0 => (Network::Cut, 0),
                1 => (Network::Refuse, 1000),
                2 => (Network::Stall, 3500),
                3 => (Network::Delay(random.u64(5..100)), 2000),
                4 => (Network::Slow(random.u64(10_000..200_000)), 2000),
                5 => (Network::DropAnswers(random.i64(1..4)), 1000),
                6 => (Network::CutAfterBytes(random.i64(1..20_000)), 1000),
                _ => (Network::CutAfterReplies(random.i64(1..40)), 1000),
            };
            (Fault::Network(link, network), most_ms)
        }
    }
}

/// What a relay does wrong by itself; none in half of the starts.
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
