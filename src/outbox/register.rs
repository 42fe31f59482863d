//! The register of relays decides which of several configurations routes.
//!
//! Each relay writes a row when it starts and deletes it when it ends. The configuration of the daemon that started last
//! routes: only relays with that configuration take events that are not routed yet. The others deliver events that are owed
//! to destinations which that configuration lacks. So an event that is committed after a relay has reported that it is ready
//! is never routed by an older configuration.
//!
//! - A counter beside the rows is raised after each change has been committed. A claim reads the counter in the statement
//!   that reads its events, and reads the rows if the counter has changed.
//! - While all relays have the same configuration, nothing else is written. While there are two configurations, each relay
//!   writes its time every few seconds.
//! - If a relay crashed, another relay deletes its row. A relay whose row was deleted by mistake writes it again with its old
//!   number, so that it does not supersede a newer relay.

mod pauses;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};

use crate::outbox::Standing;
use crate::outbox::error::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::status::Trouble;

/// How often a relay reads the register while there is one configuration.
const INTERVAL: Duration = Duration::from_secs(10);

/// How often a relay reads the register while there are several configurations.
const MIXED_INTERVAL: Duration = Duration::from_secs(1);

/// How often each relay writes its time while there are several configurations.
const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// A relay without a session that has not written its time for this long has ended.
const SILENCE: Duration = Duration::from_secs(15);

/// After this time a relay of the same configuration that has no session counts as ended.
const LONG_SILENCE: Duration = Duration::from_secs(3600);

/// How long a relay without a session has for writing its time once another configuration has come. Without a session, others
/// see only by this time that the relay is alive. It is longer than [`INTERVAL`] and [`BEAT_INTERVAL`] together.
const FIRST_BEAT: Duration = Duration::from_secs(20);

/// The largest number of names in a difference.
const NAMES: usize = 5;

/// Everything that decides where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The name of each destination, with its kind and its target, without addresses and secrets: two relays may reach one
    /// server by different addresses.
    pub destinations: BTreeMap<String, String>,
    /// The routes in words, without the values of headers, sorted.
    pub routes: Vec<String>,
    /// A hash that is the same for equal configurations.
    pub fingerprint: String,
}

impl Configuration {
    /// Each of `routes` has the text that is shown, and the text with everything that decides.
    pub fn new(destinations: BTreeMap<String, String>, mut routes: Vec<(String, String)>) -> Self {
        routes.sort();
        routes.dedup();
        let exact: Vec<&String> = routes.iter().map(|(_, exact)| exact).collect();
        let text = serde_json::json!([destinations, exact]).to_string();
        let hash = digest(&SHA256, text.as_bytes());
        let fingerprint = hash.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { destinations, routes: routes.into_iter().map(|(shown, _)| shown).collect(), fingerprint }
    }

    /// Describes how `other` differs.
    pub fn difference(&self, other: &Self) -> String {
        let mut parts = Vec::new();
        let mut add = |what: &str, names: Vec<String>| {
            if !names.is_empty() {
                let more = names.len().saturating_sub(NAMES);
                let listed = names[..names.len().min(NAMES)].join(", ");
                parts.push(if more > 0 {
                    format!("{what} {listed} and {more} more")
                } else {
                    format!("{what} {listed}")
                });
            }
        };
        let only = |of: &Self, than: &Self| -> Vec<String> {
            of.destinations.keys().filter(|name| !than.destinations.contains_key(*name)).cloned().collect()
        };
        add("destinations only here:", only(self, other));
        add("destinations only there:", only(other, self));
        let changed = self.destinations.iter().filter_map(|(name, here)| {
            let there = other.destinations.get(name).filter(|there| *there != here)?;
            Some(format!("{name} ({here} here, {there} there)"))
        });
        add("destinations that differ:", changed.collect());
        let routes = |of: &Self, than: &Self| -> Vec<String> {
            of.routes.iter().filter(|route| !than.routes.contains(route)).cloned().collect()
        };
        add("routes only here:", routes(self, other));
        add("routes only there:", routes(other, self));
        match (parts.is_empty(), self.fingerprint == other.fingerprint) {
            (false, _) => parts.join("; "),
            (true, false) => "the routes differ in the values of headers".to_owned(),
            (true, true) => "none".to_owned(),
        }
    }
}

impl Configuration {
    /// Checks that all relays at work have this configuration.
    pub(super) fn check(&self, rows: &[Registration]) -> Result<String, OutboxError> {
        let living = rows.iter().filter(|row| row.lives());
        let others = living.filter(|row| row.configuration.fingerprint != self.fingerprint);
        let differences: Vec<String> = others
            .map(|row| format!("{} has another configuration: {}", row.told(), self.difference(&row.configuration)))
            .collect();
        if differences.is_empty() {
            return Ok("no relay at work has another one".to_owned());
        }
        Err(OutboxError::Configuration { differences: differences.join("; ") })
    }
}

/// A row of the register.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The number of the start. Later starts have higher numbers.
    pub id: i64,
    /// Host name and process id.
    pub worker: String,
    /// The version of the program.
    pub version: String,
    /// The relay ends when nothing is due, and never supersedes a daemon.
    pub once: bool,
    /// Another relay has taken over, because this relay left due events unclaimed.
    pub hung: bool,
    /// The configuration of the relay.
    pub configuration: Configuration,
    /// Whether its session exists. `None` if it has none, as behind a pooler and on SQLite.
    pub session: Option<bool>,
    /// How long ago the relay registered.
    pub age: Duration,
    /// How long ago the relay wrote its time.
    pub silent: Duration,
    /// How long ago the relay last polled for events, according to what it has written.
    pub idle: Duration,
    /// The destinations that it finds down or misconfigured.
    pub trouble: BTreeMap<String, Trouble>,
}

impl Registration {
    /// Returns whether the relay is certainly at work.
    pub fn lives(&self) -> bool {
        self.session == Some(true) || self.silent < SILENCE
    }

    /// Returns whether the relay has certainly ended. `watched` is how long the relay that asks has been registered.
    fn is_dead(&self, watched: Duration) -> bool {
        !self.lives() && (self.session.is_some() || watched >= FIRST_BEAT)
    }

    /// Returns whether a relay that registers may delete this row. A relay whose row is deleted by mistake registers again,
    /// see [`Membership::look`].
    fn is_forgotten(&self, configuration: &Configuration) -> bool {
        match self.session {
            Some(lives) => !lives,
            None => self.silent >= LONG_SILENCE && self.configuration.fingerprint == configuration.fingerprint,
        }
    }

    fn told(&self) -> String {
        format!("relay {} (version {}, started {} ago)", self.worker, self.version, seconds(self.age))
    }
}

/// A time in whole seconds, for people.
fn seconds(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

/// The part of a relay in routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Its configuration routes.
    Routes,
    /// Another configuration routes. This relay delivers events that are owed to these destinations, which that configuration
    /// lacks.
    Superseded {
        /// Destinations that the routing configuration does not have.
        left: Arc<[String]>,
    },
}

/// Returns the row whose configuration routes: of daemons the row of the last start, of runs of `--once` the row of the
/// first.
pub(super) fn routing(rows: &[Registration]) -> Option<&Registration> {
    let daemons = || rows.iter().filter(|row| !row.once);
    daemons()
        .filter(|row| !row.hung)
        .max_by_key(|row| row.id)
        .or_else(|| daemons().max_by_key(|row| row.id))
        .or_else(|| rows.iter().min_by_key(|row| row.id))
}

fn role(rows: &[Registration], mine: &Configuration) -> Role {
    match routing(rows) {
        Some(row) if row.configuration.fingerprint != mine.fingerprint => {
            let theirs = &row.configuration.destinations;
            let left = mine.destinations.keys().filter(|name| !theirs.contains_key(*name)).cloned().collect();
            Role::Superseded { left }
        }
        _ => Role::Routes,
    }
}

/// The storage of the register. All its methods are called rarely.
pub(super) trait Register: Send + Sync {
    /// Whether only one relay works at a time, whatever the register contains.
    const ONE_WORKS: bool;

    /// The number of changes. It serves only for comparison.
    fn changes(&self) -> impl Future<Output = Result<i64, OutboxError>> + Send;

    /// Records that there was a change. To be called after the change has been committed.
    fn changed(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Returns all rows.
    fn rows(&self) -> impl Future<Output = Result<Vec<Registration>, OutboxError>> + Send;

    /// Returns what operators have paused. The number of changes counts these changes too.
    fn pauses(&self) -> impl Future<Output = Result<Pauses, OutboxError>> + Send;

    /// Returns a number above all earlier numbers.
    fn next_id(&self) -> impl Future<Output = Result<i64, OutboxError>> + Send;

    /// Writes the row of `member`, again if it was deleted.
    fn write(&self, member: &Member) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Writes the present time for the relay `id`, and how long ago the relay polled for events.
    fn beat(&self, id: i64, idle: Duration) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes these rows.
    fn remove(&self, ids: &[i64]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Marks the relay `id` as hung and returns true if an event that is not routed has been due for longer than `patience`.
    fn depose(&self, id: i64, patience: Duration) -> impl Future<Output = Result<bool, OutboxError>> + Send;
}

/// The data that a relay registers about itself.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) id: i64,
    pub(super) configuration: Arc<Configuration>,
    pub(super) once: bool,
}

/// One relay's membership in the register.
#[derive(Debug, Clone, Default)]
pub(super) struct Membership {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    member: Option<Member>,
    since: Option<Instant>,
    /// The number of changes that `role` accounts for.
    known: Option<i64>,
    pauses: Arc<Pauses>,
    role: Option<Role>,
    superseded_since: Option<Instant>,
    /// There are rows of other configurations, whether their relays are alive or not.
    several: bool,
    /// Since when there are several configurations, and the difference to each other configuration.
    mixed: Option<(Instant, Vec<String>)>,
    beaten: Option<Instant>,
    /// The destinations that accepted events when they were last reported.
    ready: Vec<String>,
}

impl Membership {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn member(&self) -> Option<Member> {
        self.state().member.clone()
    }

    /// Returns the role at this number of changes, or `None` if the rows must be read. A relay that is not registered routes.
    pub(super) fn role_at(&self, changes: i64) -> Option<Role> {
        let state = self.state();
        match &state.member {
            None => Some(Role::Routes),
            Some(_) => state.role.clone().filter(|_| state.known == Some(changes)),
        }
    }

    /// Returns the last known role.
    pub(super) fn role(&self) -> Role {
        self.state().role.clone().unwrap_or(Role::Routes)
    }

    /// Returns the last known role, for people.
    pub(super) fn standing(&self) -> Standing {
        match self.role() {
            Role::Routes => Standing::Works,
            Role::Superseded { left } => Standing::Superseded { left: left.to_vec() },
        }
    }

    /// Records the destinations that accept events now.
    pub(super) fn set_ready(&self, destinations: &[&str]) {
        self.state().ready = destinations.iter().map(|name| (*name).to_owned()).collect();
    }

    /// Returns those of these destinations that accept events.
    pub(super) fn ready(&self, destinations: &[String]) -> Vec<String> {
        let state = self.state();
        destinations.iter().filter(|name| state.ready.contains(name)).cloned().collect()
    }

    /// Returns the differences to other configurations, if there have been any for at least `lasting`.
    pub(super) fn differences(&self, lasting: Duration) -> Vec<String> {
        match &self.state().mixed {
            Some((since, differences)) if since.elapsed() >= lasting => differences.clone(),
            _ => Vec::new(),
        }
    }

    /// Registers this relay, or registers it again.
    pub(super) async fn join(
        &self,
        register: &impl Register,
        configuration: &Arc<Configuration>,
        once: bool,
        now: Instant,
    ) -> Result<(), OutboxError> {
        let id = match self.member() {
            Some(member) => member.id,
            None => register.next_id().await?,
        };
        let member = Member { id, configuration: Arc::clone(configuration), once };
        let rows = register.rows().await?;
        let forgotten = rows.iter().filter(|row| row.id != id && row.is_forgotten(configuration));
        register.remove(&forgotten.map(|row| row.id).collect::<Vec<_>>()).await?;
        register.write(&member).await?;
        register.changed().await?;
        {
            let mut state = self.state();
            state.member = Some(member);
            state.since.get_or_insert(now);
        }
        self.look(register, now).await.map(drop)
    }

    /// Deletes this relay's row.
    pub(super) async fn leave(&self, register: &impl Register) -> Result<(), OutboxError> {
        let Some(member) = self.state().member.take() else { return Ok(()) };
        register.remove(&[member.id]).await?;
        register.changed().await
    }

    /// Reads the rows, writes this relay's row again if it is gone, and records the role.
    pub(super) async fn look(&self, register: &impl Register, now: Instant) -> Result<Role, OutboxError> {
        self.read(register, Duration::ZERO, now).await.map(|(role, _)| role)
    }

    async fn read<R: Register>(
        &self,
        register: &R,
        idle: Duration,
        now: Instant,
    ) -> Result<(Role, Vec<Registration>), OutboxError> {
        let Some(member) = self.member() else { return Ok((Role::Routes, Vec::new())) };
        // The counter is read before the rows, so that the rows include every change that it counts.
        let mut changes = register.changes().await?;
        let mut rows = register.rows().await?;
        // A relay that polls for events does not hang, or not any more.
        if !rows.iter().any(|row| row.id == member.id && (!row.hung || idle >= BEAT_INTERVAL)) {
            register.write(&member).await?;
            register.changed().await?;
            changes = register.changes().await?;
            rows = register.rows().await?;
        }
        // These too are read after the counter.
        self.learn_pauses(register.pauses().await?);
        Ok((self.learn::<R>(&member, changes, &rows, now), rows))
    }

    fn learn<R: Register>(&self, member: &Member, changes: i64, rows: &[Registration], now: Instant) -> Role {
        let role = if R::ONE_WORKS { Role::Routes } else { role(rows, &member.configuration) };
        let others = rows.iter().filter(|row| {
            row.id != member.id && row.lives() && row.configuration.fingerprint != member.configuration.fingerprint
        });
        let differences: Vec<String> = others
            .map(|row| format!("{}: {}", row.told(), member.configuration.difference(&row.configuration)))
            .collect();
        let told = differences.join("; ");
        let mut state = self.state();
        let before = state.role.replace(role.clone());
        state.known = Some(changes);
        state.several = rows.iter().any(|row| row.configuration.fingerprint != member.configuration.fingerprint);
        state.superseded_since = match role {
            Role::Routes => None,
            Role::Superseded { .. } => state.superseded_since.or(Some(now)),
        };
        let first = !differences.is_empty() && state.mixed.is_none();
        state.mixed = (!differences.is_empty()).then(|| {
            let since = state.mixed.take().map_or(now, |(since, _)| since);
            (since, differences)
        });
        drop(state);
        match (&role, before) {
            (Role::Superseded { left }, None | Some(Role::Routes)) => tracing::warn!(
                difference = told,
                "another configuration routes new events; this relay delivers only what is owed to {}",
                if left.is_empty() { "no destination".to_owned() } else { left.join(", ") }
            ),
            (Role::Routes, Some(Role::Superseded { .. })) => {
                tracing::warn!("this relay's configuration routes new events again");
            }
            _ if first && R::ONE_WORKS => {
                tracing::warn!(difference = told, "a relay with another configuration uses this file");
            }
            _ if first => tracing::warn!(
                difference = told,
                "a relay with another configuration is at work; this relay's configuration routes new events"
            ),
            _ => {}
        }
        role
    }

    /// Does the periodic work: deletes the rows of ended relays, takes over from a relay that hangs, and writes the time
    /// while there are several configurations. `idle` is how long ago this relay polled for events; `patience` is how long
    /// the routing relay may leave due events unclaimed. Returns the time until the next call.
    pub(super) async fn attend(
        &self,
        register: &impl Register,
        idle: Duration,
        patience: Duration,
        now: Instant,
    ) -> Result<Duration, OutboxError> {
        let Some(member) = self.member() else { return Ok(INTERVAL) };
        let (known, several) = {
            let state = self.state();
            (state.known, state.several)
        };
        if known == Some(register.changes().await?) && !several {
            return Ok(INTERVAL);
        }
        let (_, rows) = self.read(register, idle, now).await?;
        let others = |row: &&Registration| row.configuration.fingerprint != member.configuration.fingerprint;
        if !rows.iter().any(|row| others(&row)) {
            return Ok(INTERVAL);
        }
        let watched = self.state().since.map_or(Duration::ZERO, |since| now.duration_since(since));
        let dead: Vec<i64> =
            rows.iter().filter(|row| row.id != member.id && row.is_dead(watched)).map(|row| row.id).collect();
        let hangs = routing(&rows).filter(others).filter(|row| !row.hung && !member.once && row.idle > patience);
        // The routing relay has had the time to write that it polls for events.
        let superseded = self.state().superseded_since.is_some_and(|since| now.duration_since(since) > patience);
        if !dead.is_empty() {
            register.remove(&dead).await?;
            register.changed().await?;
            self.read(register, idle, now).await?;
        } else if let Some(row) = hangs.filter(|_| superseded)
            && register.depose(row.id, patience).await?
        {
            tracing::warn!(
                worker = row.worker,
                "the relay that routes leaves events that are due; another configuration takes over"
            );
            register.changed().await?;
            self.read(register, idle, now).await?;
        }
        let due = self.state().beaten.is_none_or(|at| now.duration_since(at) >= BEAT_INTERVAL);
        if due {
            register.beat(member.id, idle).await?;
            self.state().beaten = Some(now);
        }
        Ok(MIXED_INTERVAL)
    }
}

#[cfg(test)]
mod tests;
