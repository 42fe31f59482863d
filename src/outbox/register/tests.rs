//! Tests the protocol in memory: many random steps, in which relays start, end, crash, hang and lose their sessions.

use std::sync::Mutex as StdMutex;

use futures_util::FutureExt;

use super::*;

fn configuration(names: &[&str]) -> Arc<Configuration> {
    let destinations = names.iter().map(|name| ((*name).to_owned(), "kind".to_owned())).collect();
    Arc::new(Configuration::new(destinations, Vec::new()))
}

#[derive(Clone)]
struct Row {
    member: Member,
    hung: bool,
    session: bool,
    since: Duration,
    seen: Duration,
    looked: Duration,
}

/// A register with its own clock.
#[derive(Default)]
struct Memory {
    inner: StdMutex<(Vec<Row>, i64, Duration)>,
    /// How long an event that is not routed has been due.
    waiting: StdMutex<Duration>,
}

impl Memory {
    fn with<T>(&self, act: impl FnOnce(&mut (Vec<Row>, i64, Duration)) -> T) -> T {
        act(&mut self.inner.lock().expect("no test panics within"))
    }

    fn now(&self) -> Duration {
        self.with(|inner| inner.2)
    }

    fn pass(&self, time: Duration) {
        self.with(|inner| inner.2 += time);
    }

    fn lose_session(&self, id: i64) {
        self.with(|inner| inner.0.iter_mut().filter(|row| row.member.id == id).for_each(|row| row.session = false));
    }
}

impl Register for Memory {
    const ONE_WORKS: bool = false;

    async fn changes(&self) -> Result<i64, OutboxError> {
        Ok(self.with(|inner| inner.1))
    }

    async fn changed(&self) -> Result<(), OutboxError> {
        self.with(|inner| inner.1 += 1);
        Ok(())
    }

    async fn rows(&self) -> Result<Vec<Registration>, OutboxError> {
        Ok(self.with(|(rows, _, now)| {
            let registration = |row: &Row| Registration {
                id: row.member.id,
                worker: format!("relay:{}", row.member.id),
                version: "1".to_owned(),
                once: row.member.once,
                hung: row.hung,
                configuration: (*row.member.configuration).clone(),
                session: Some(row.session),
                age: *now - row.since,
                silent: *now - row.seen,
                idle: *now - row.looked,
                trouble: BTreeMap::new(),
            };
            rows.iter().map(registration).collect()
        }))
    }

    async fn pauses(&self) -> Result<Pauses, OutboxError> {
        Ok(Pauses::default())
    }

    async fn next_id(&self) -> Result<i64, OutboxError> {
        Ok(self.with(|inner| {
            inner.1 += 1;
            inner.1
        }))
    }

    async fn write(&self, member: &Member) -> Result<(), OutboxError> {
        self.with(|(rows, _, now)| {
            let since = rows.iter().find(|row| row.member.id == member.id).map_or(*now, |row| row.since);
            rows.retain(|row| row.member.id != member.id);
            rows.push(Row { member: member.clone(), hung: false, session: true, since, seen: *now, looked: *now });
        });
        Ok(())
    }

    async fn beat(&self, id: i64, idle: Duration) -> Result<(), OutboxError> {
        self.with(|(rows, _, now)| {
            for row in rows.iter_mut().filter(|row| row.member.id == id) {
                // A relay that writes has a session.
                (row.session, row.seen, row.looked) = (true, *now, now.saturating_sub(idle));
            }
        });
        Ok(())
    }

    async fn remove(&self, ids: &[i64]) -> Result<(), OutboxError> {
        self.with(|inner| inner.0.retain(|row| !ids.contains(&row.member.id)));
        Ok(())
    }

    async fn depose(&self, id: i64, patience: Duration) -> Result<bool, OutboxError> {
        if *self.waiting.lock().expect("no test panics within") <= patience {
            return Ok(false);
        }
        self.with(|inner| inner.0.iter_mut().filter(|row| row.member.id == id).for_each(|row| row.hung = true));
        Ok(true)
    }
}

const PATIENCE: Duration = Duration::from_secs(45);

struct Relay {
    membership: Membership,
    configuration: Arc<Configuration>,
    /// The relay neither reads the register nor attends.
    stopped: bool,
    /// When the relay crashed.
    died: Option<Duration>,
}

struct World {
    register: Memory,
    relays: Vec<Relay>,
    begun: Instant,
}

/// Polls a future once. No future in these tests ever waits.
fn now_or_never<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nothing waits")
}

impl World {
    fn new() -> Self {
        Self { register: Memory::default(), relays: Vec::new(), begun: Instant::now() }
    }

    fn now(&self) -> Instant {
        self.begun + self.register.now()
    }

    fn start(&mut self, configuration: &Arc<Configuration>, once: bool) -> usize {
        let membership = Membership::default();
        now_or_never(membership.join(&self.register, configuration, once, self.now())).expect("it joins");
        self.relays.push(Relay { membership, configuration: Arc::clone(configuration), stopped: false, died: None });
        self.relays.len() - 1
    }

    fn id(&self, relay: usize) -> i64 {
        self.relays[relay].membership.member().expect("it is registered").id
    }

    /// Returns what a claim would find: whether this relay routes newly committed events.
    fn routes(&self, relay: usize) -> bool {
        let Relay { membership, stopped, .. } = &self.relays[relay];
        if *stopped {
            return false;
        }
        let changes = now_or_never(self.register.changes()).expect("it answers");
        let role = match membership.role_at(changes) {
            Some(role) => role,
            None => now_or_never(membership.look(&self.register, self.now())).expect("it looks"),
        };
        role == Role::Routes
    }

    fn attend(&self, relay: usize) {
        let Relay { membership, stopped, .. } = &self.relays[relay];
        if !*stopped {
            let attended = membership.attend(&self.register, Duration::ZERO, PATIENCE, self.now());
            now_or_never(attended).expect("it attends");
        }
    }

    /// Lets time pass. Every living relay attends as often as it is asked to.
    fn pass(&self, seconds: u64) {
        for _ in 0..seconds {
            self.register.pass(Duration::from_secs(1));
            (0..self.relays.len()).for_each(|relay| self.attend(relay));
        }
    }

    fn who_routes(&self) -> Vec<usize> {
        (0..self.relays.len()).filter(|&relay| self.routes(relay)).collect()
    }
}

#[test]
fn the_daemon_that_started_last_routes_with_all_of_its_configuration() {
    let (one, two) = (configuration(&["a"]), configuration(&["a", "b"]));
    let mut world = World::new();
    let old = world.start(&one, false);
    let new = world.start(&two, false);
    assert_eq!(world.who_routes(), [new]);
    let also_new = world.start(&two, false);
    assert_eq!(world.who_routes(), [new, also_new]);
    let back = world.start(&one, false);
    assert_eq!(world.who_routes(), [old, back]);
    let once = world.start(&two, true);
    assert_eq!(world.who_routes(), [old, back]);
    for gone in [old, back, new, also_new] {
        world.relays[gone].stopped = true;
        now_or_never(world.relays[gone].membership.leave(&world.register)).expect("it leaves");
    }
    assert_eq!(world.who_routes(), [once]);
}

#[test]
fn a_relay_that_hangs_loses_the_role_only_while_events_wait_and_has_it_again_when_it_goes_on() {
    let mut world = World::new();
    let old = world.start(&configuration(&["a"]), false);
    let new = world.start(&configuration(&["b"]), false);
    world.relays[new].stopped = true;
    world.pass(300);
    assert_eq!(world.who_routes(), Vec::<usize>::new(), "nothing waits, so nobody takes over");
    *world.register.waiting.lock().expect("no test panics within") = Duration::from_secs(60);
    world.pass(2);
    assert_eq!(world.who_routes(), [old]);
    world.relays[new].stopped = false;
    assert!(world.routes(new), "it looks again");
    assert_eq!(world.who_routes(), [new]);
}

#[test]
fn whatever_happens_no_older_configuration_routes_while_a_newer_relay_may_live() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let configurations = [configuration(&["a"]), configuration(&["a", "b"]), configuration(&["c"])];
        let mut world = World::new();
        for step in 0..200 {
            let living: Vec<usize> = (0..world.relays.len()).filter(|&relay| !world.relays[relay].stopped).collect();
            let one = (!living.is_empty()).then(|| living[random.usize(..living.len())]);
            match (random.u8(..12), one) {
                (0..=1, _) if living.len() < 5 => {
                    world.start(&configurations[random.usize(..3)], false);
                }
                // It ends normally.
                (2, Some(relay)) => {
                    world.relays[relay].stopped = true;
                    now_or_never(world.relays[relay].membership.leave(&world.register)).expect("it leaves");
                }
                // It crashes.
                (3, Some(relay)) => {
                    world.relays[relay].stopped = true;
                    world.relays[relay].died = Some(world.register.now());
                    world.register.lose_session(world.id(relay));
                }
                // Its session is lost, and it attends before others take it for ended.
                (4..=5, Some(relay)) => world.register.lose_session(world.id(relay)),
                // Rows are deleted from outside.
                (6, Some(relay)) => {
                    now_or_never(world.register.remove(&[world.id(relay)])).expect("deleted");
                    now_or_never(world.register.changed()).expect("told");
                    world.pass(1);
                }
                (7, Some(relay)) => world.attend(relay),
                _ => world.pass(random.u64(..20)),
            }
            // A relay that attends now has written its row, so that all relays know of each other.
            world.who_routes();
            // A relay that crashed just now may be alive as far as others know. Of several such relays some may be known to
            // have ended.
            let now = world.register.now();
            let lives = |relay: &usize| !world.relays[*relay].stopped;
            let newest = (0..world.relays.len()).filter(lives).max();
            let may_live = |relay: &usize| {
                let died = world.relays[*relay].died;
                Some(*relay) >= newest && died.is_some_and(|died| now - died <= SILENCE + Duration::from_secs(2))
            };
            let allowed: Vec<String> = newest
                .into_iter()
                .chain((0..world.relays.len()).filter(may_live))
                .map(|relay| world.relays[relay].configuration.fingerprint.clone())
                .collect();
            for relay in world.who_routes() {
                let fingerprint = &world.relays[relay].configuration.fingerprint;
                assert!(allowed.contains(fingerprint), "seed {seed}, step {step}: an older configuration routes");
            }
        }
        // Crashed relays are found out, and some relay routes.
        world.pass(60);
        let living = world.relays.iter().filter(|relay| !relay.stopped).count();
        assert!(living == 0 || !world.who_routes().is_empty(), "seed {seed}: nobody routes");
    }
}

#[test]
fn a_difference_is_told_in_words() {
    let route = |shown: &str, exact: &str| (shown.to_owned(), exact.to_owned());
    let destinations = |names: &[(&str, &str)]| -> BTreeMap<String, String> {
        names.iter().map(|(name, kind)| ((*name).to_owned(), (*kind).to_owned())).collect()
    };
    let here = Configuration::new(destinations(&[("a", "x"), ("b", "y")]), vec![route("[r to a]", "1")]);
    let there = Configuration::new(destinations(&[("b", "z"), ("c", "y")]), vec![route("[r to a]", "2")]);
    let told = "destinations only here: a; destinations only there: c; destinations that differ: b (y here, z there)";
    assert_eq!(here.difference(&there), told);
    let other = Configuration { fingerprint: "other".to_owned(), ..here.clone() };
    assert_eq!(here.difference(&other), "the routes differ in the values of headers");
    let many: Vec<(String, &str)> = (0..9).map(|index| (format!("d{index}"), "x")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
    let many = Configuration::new(destinations(&many), Vec::new());
    let none = Configuration::new(BTreeMap::new(), Vec::new());
    assert_eq!(many.difference(&none), "destinations only here: d0, d1, d2, d3, d4 and 4 more");
}
