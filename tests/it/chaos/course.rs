//! The course of a run: its relays, the faults that are inflicted on them, and the restart of relays that ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::faults::{self, Fault, Link, Network, Planned, RELAYS, Whose};
use super::scorecard::Scorecard;
use super::visitors::Visitors;
use super::{World, meddling, terminate_backends};
use crate::binary::Running;
use crate::proxy::Proxy;

/// The proxies through which one relay reaches its servers.
pub(super) struct Ways {
    pub(super) postgres: Proxy,
    pub(super) redis: Proxy,
}

pub(super) struct Course {
    pub(super) world: World,
    ways: Vec<Ways>,
    relays: Vec<Option<Running>>,
    /// The failpoints of each relay.
    failpoints: [&'static str; RELAYS],
    /// Relays that got a signal to stop.
    ending: Vec<Running>,
    frozen: [bool; RELAYS],
    redis_frozen: bool,
    random: fastrand::Rng,
    pub(super) visitors: Visitors,
    scorecard: Scorecard,
    /// Meddlers and visitors that are still running.
    beside: Vec<JoinHandle<()>>,
}

impl Course {
    /// Starts a run with three relays.
    pub(super) fn new(world: World, random: fastrand::Rng, visitors: Visitors, scorecard: Scorecard) -> Self {
        let mut course = Self {
            ways: (0..RELAYS).map(|_| visitors.ways()).collect(),
            world,
            relays: (0..RELAYS).map(|_| None).collect(),
            failpoints: [""; RELAYS],
            ending: Vec::new(),
            frozen: [false; RELAYS],
            redis_frozen: false,
            random,
            visitors,
            scorecard,
            beside: Vec::new(),
        };
        (0..RELAYS).for_each(|index| course.start_relay(index));
        course
    }

    fn start_relay(&mut self, index: usize) {
        let failpoints = faults::failpoints(&mut self.random);
        let relay = self.visitors.relay(&["run"], &self.ways[index], &[("FAILPOINTS", failpoints)]);
        self.relays[index] = Some(relay);
        self.failpoints[index] = failpoints;
        self.frozen[index] = false;
    }

    /// Restarts each relay that ended by itself, because of a failpoint for example, as a process manager would.
    fn look_after_relays(&mut self) {
        for index in 0..RELAYS {
            if self.relays[index].as_mut().is_some_and(|relay| !relay.is_running()) {
                let ended = self.relays[index].take().unwrap().finish();
                assert!(ended.code != Some(2), "wrong configuration: {}", ended.stderr);
                if self.failpoints[index].is_empty() {
                    self.scorecard.count("relays ended by themselves, without a failpoint");
                    println!(
                        "a relay ended with {:?}: {}",
                        ended.code,
                        ended.stderr.lines().last().unwrap_or_default()
                    );
                } else {
                    self.scorecard.count("relays ended by a failpoint");
                }
                self.start_relay(index);
            }
        }
    }

    fn begin(&mut self, fault: Fault, lasts: Duration) {
        if !matches!(fault, Fault::Meddle(_) | Fault::StopHangingRelay | Fault::OtherConfiguration) {
            self.scorecard.count(fault.name());
        }
        match fault {
            Fault::KillRelay(index) => drop(self.relays[index].take()), // dropping it kills it
            Fault::StopRelay(index, signal) => {
                if let Some(mut relay) = self.relays[index].take() {
                    if self.frozen[index] {
                        relay.signal("CONT");
                    }
                    if relay.is_running() {
                        relay.signal(signal);
                    }
                    // It may take long to stop, because a server is down. Its successor does not wait for it.
                    self.ending.push(relay);
                }
            }
            Fault::FreezeRelay(index) => {
                if let Some(relay) = &mut self.relays[index]
                    && relay.is_running()
                {
                    relay.signal("STOP");
                    self.frozen[index] = true;
                }
            }
            // The following faults start later or not at all, so they count themselves.
            Fault::StopHangingRelay => {
                let visitors = self.visitors.clone();
                self.beside.push(std::thread::spawn(move || visitors.stop_hanging_relay(fault.name())));
            }
            Fault::OtherConfiguration => {
                let visitors = self.visitors.clone();
                self.beside.push(std::thread::spawn(move || visitors.work_differently(lasts, fault.name())));
            }
            Fault::Meddle(meddling) => {
                let (url, scorecard) = (self.world.database.url().to_owned(), self.scorecard.clone());
                let meddle = move || meddling::meddle(&url, meddling, lasts, fault.name(), &scorecard);
                self.beside.push(std::thread::spawn(meddle));
            }
            Fault::TerminateBackends => terminate_backends(self.world.database.url()),
            Fault::RestartPostgres => {
                // A server that stops waits for clients that have connected and sent nothing, which can take longer than a
                // run.
                self.proxies(Whose::All, Link::Postgres).for_each(|proxy| proxy.stall(false));
                self.world.postgres.lock().unwrap().restart_or_kill();
            }
            Fault::KillPostgres => self.world.postgres.lock().unwrap().kill(),
            Fault::KillRedis => {
                self.world.redis.lock().unwrap().kill();
                self.redis_frozen = false;
            }
            Fault::RestartRedis => {
                self.world.redis.lock().unwrap().restart_or_kill();
                self.redis_frozen = false;
            }
            Fault::FreezeRedis => {
                self.world.redis.lock().unwrap().pause();
                self.redis_frozen = true;
            }
            Fault::PauseClients(ms) => self.world.redis_command(&["CLIENT", "PAUSE", &ms.to_string()]),
            Fault::FlushScripts => self.world.redis_command(&["SCRIPT", "FLUSH"]),
            Fault::Network(whose, link, network) => {
                self.proxies(whose, link).for_each(|proxy| disturb(proxy, link, network));
            }
        }
    }

    /// The proxies that a fault concerns. `--once` and visitors share one pair of proxies.
    fn proxies(&self, whose: Whose, link: Link) -> impl Iterator<Item = &Proxy> {
        let (ways, shared) = match whose {
            Whose::All => (&self.ways[..], true),
            Whose::One(index) => (&self.ways[index..=index], false),
        };
        let shared = shared.then_some((&self.world.to_postgres, &self.world.to_redis));
        ways.iter().map(|ways| (&ways.postgres, &ways.redis)).chain(shared).map(move |(postgres, redis)| match link {
            Link::Postgres => postgres,
            Link::Redis => redis,
        })
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::KillRelay(index) | Fault::StopRelay(index, _) if self.relays[index].is_none() => {
                self.start_relay(index);
            }
            Fault::FreezeRelay(index) => {
                if let Some(relay) = &mut self.relays[index]
                    && self.frozen[index]
                {
                    relay.signal("CONT");
                }
                self.frozen[index] = false;
            }
            Fault::KillPostgres => self.world.postgres.lock().unwrap().start_again(),
            Fault::KillRedis => self.world.redis.lock().unwrap().start_again(),
            Fault::FreezeRedis if self.redis_frozen => {
                self.world.redis.lock().unwrap().resume();
                self.redis_frozen = false;
            }
            Fault::Network(whose, link, _) => self.proxies(whose, link).for_each(Proxy::heal),
            _ => {}
        }
    }

    /// Begins and ends faults in the order of time. A fault that stops a server is ended before the next fault begins,
    /// because the next fault may stop the same server.
    pub(super) fn go_through(&mut self, planned: &[Planned]) {
        let cron = self.visitors.clone();
        let cron_ends = Arc::new(AtomicBool::new(false));
        let cron = std::thread::spawn({
            let cron_ends = Arc::clone(&cron_ends);
            move || cron.drain_now_and_then(&cron_ends)
        });
        let begun = Instant::now();
        let mut ends: Vec<(Duration, Fault)> = Vec::new();
        for &Planned { at, lasts, fault } in planned {
            while begun.elapsed() < at {
                self.end_due(&mut ends, begun.elapsed());
                self.look_after_relays();
                std::thread::sleep(Duration::from_millis(5));
            }
            self.begin(fault, lasts);
            if matches!(fault, Fault::KillPostgres | Fault::KillRedis) {
                std::thread::sleep(lasts);
                self.end(fault);
            } else {
                ends.push((begun.elapsed() + lasts, fault));
            }
        }
        self.end_due(&mut ends, Duration::MAX);
        // Meddlers and visitors take as long as they need. Meanwhile relays that end are restarted.
        while self.beside.iter().any(|other| !other.is_finished()) {
            self.look_after_relays();
            std::thread::sleep(Duration::from_millis(5));
        }
        self.beside.drain(..).for_each(|other| other.join().unwrap());
        cron_ends.store(true, Ordering::SeqCst);
        cron.join().unwrap();
    }

    /// Ends all relays, and starts others without faults. They have every destination that any relay of the run had.
    pub(super) fn calm(&mut self) -> Vec<Running> {
        self.relays.clear();
        for relay in std::mem::take(&mut self.ending) {
            let ended = relay.finish();
            // `None`: a failpoint ended it, or the signal came before it listened for signals.
            assert!(matches!(ended.code, Some(0) | None), "after a signal to stop: {:?} {}", ended.code, ended.stderr);
        }
        let all = [self.visitors.other_configuration()];
        (0..RELAYS).map(|_| self.visitors.shared(&["run"], &all)).collect()
    }

    fn end_due(&mut self, ends: &mut Vec<(Duration, Fault)>, now: Duration) {
        let (due, later) = ends.drain(..).partition(|(at, _)| *at <= now);
        *ends = later;
        let due: Vec<(Duration, Fault)> = due;
        due.into_iter().for_each(|(_, fault)| self.end(fault));
    }
}

fn disturb(proxy: &Proxy, link: Link, network: Network) {
    match network {
        Network::Cut => proxy.cut(),
        Network::Refuse => proxy.refuse(true),
        Network::Stall => proxy.stall(true),
        Network::Delay(ms) => proxy.delay(Duration::from_millis(ms)),
        Network::Slow(rate) => proxy.slow_to(rate),
        Network::DropAnswers(count) => {
            proxy.drop_answers(count, if link == Link::Postgres { "commit" } else { "EVALSHA" });
        }
        Network::CutAfterBytes(bytes) => proxy.cut_after_bytes(bytes),
        Network::CutAfterReplies(replies) if link == Link::Redis => proxy.cut_after_replies(replies),
        Network::CutAfterReplies(replies) => proxy.cut_after_bytes(replies * 100),
    }
}
