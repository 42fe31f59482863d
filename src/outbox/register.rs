//! The register of relays: which of several configurations routes.
//!
//! Each relay writes a row when it starts and deletes it when it ends. The configuration of the daemon that started last
//! routes: only relays of that configuration take events that are not routed yet. The others deliver what is owed to
//! destinations that it lacks. So an event that is committed after a relay said that it is ready is never routed by an
//! older configuration.
//!
//! - A counter beside the rows is raised after each change has been committed. A claim reads it in the statement that reads
//!   its events, and looks at the rows where it is not the counter that it knows.
//! - While all relays have the same configuration, nothing else is written. While there are two, each relay writes its time
//!   every few seconds.
//! - Where a relay crashed, another one deletes its row. A relay whose row was deleted by mistake writes it anew, with
//!   the number that it had, so that it does not supersede a newer one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};

use crate::outbox::error::OutboxError;

/// How often a relay looks at the register while there is one configuration.
const INTERVAL: Duration = Duration::from_secs(10);

/// The same while there are several.
const MIXED_INTERVAL: Duration = Duration::from_secs(1);

/// While there are several configurations, each relay writes its time so often.
const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// A relay without a session that has not written its time for so long has ended.
const SILENCE: Duration = Duration::from_secs(15);

/// After so long a relay of the same configuration that has no session is taken for one that has ended.
const LONG_SILENCE: Duration = Duration::from_secs(3600);

/// Where a relay has no session by which others know that it lives, this is how long it gets to write its time once another
/// configuration has come: longer than [`INTERVAL`] and [`BEAT_INTERVAL`] together.
const FIRST_BEAT: Duration = Duration::from_secs(20);

/// A difference lists no more names than this.
const NAMES: usize = 5;

/// What decides where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// Each destination's name, and what kind it is and what it publishes to, without addresses and secrets: two relays may
    /// reach one server by different ways.
    pub destinations: BTreeMap<String, String>,
    /// The routes in words, without the values of headers, sorted.
    pub routes: Vec<String>,
    /// The same for equal configurations.
    pub fingerprint: String,
}

impl Configuration {
    /// `routes`: each as it is shown, and with all that decides.
    pub fn new(destinations: BTreeMap<String, String>, mut routes: Vec<(String, String)>) -> Self {
        routes.sort();
        routes.dedup();
        let exact: Vec<&String> = routes.iter().map(|(_, exact)| exact).collect();
        let text = serde_json::json!([destinations, exact]).to_string();
        let hash = digest(&SHA256, text.as_bytes());
        let fingerprint = hash.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { destinations, routes: routes.into_iter().map(|(shown, _)| shown).collect(), fingerprint }
    }

    /// What `other` has otherwise, in words.
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
    /// Whether all relays at work have this configuration.
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
    /// A later start has a higher one.
    pub id: i64,
    /// Host name and process id.
    pub worker: String,
    /// The version of the program.
    pub version: String,
    /// It ends when nothing is due: it never supersedes a daemon.
    pub once: bool,
    /// Another relay has taken over, because this one left events that were due.
    pub hung: bool,
    /// What it publishes by.
    pub configuration: Configuration,
    /// Whether its session is there; `None`: it has none, as behind a pooler and on SQLite.
    pub session: Option<bool>,
    /// How long ago it registered.
    pub age: Duration,
    /// How long ago it wrote its time.
    pub silent: Duration,
    /// How long before now it last looked for events, as far as it has written that.
    pub idle: Duration,
}

impl Registration {
    /// Whether it is certainly at work.
    pub fn lives(&self) -> bool {
        self.session == Some(true) || self.silent < SILENCE
    }

    /// Whether it has certainly ended. `watched`: how long the relay that asks has been registered.
    fn is_dead(&self, watched: Duration) -> bool {
        !self.lives() && (self.session.is_some() || watched >= FIRST_BEAT)
    }

    /// Whether who registers may delete it. Whoever is deleted by mistake registers anew, see [`Membership::look`].
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

/// So many seconds, minutes or hours.
fn seconds(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

/// What a relay may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Its configuration routes.
    Routes,
    /// Another one does; this relay delivers what is owed to these destinations, which that one lacks.
    Superseded {
        /// Destinations that the routing configuration does not have.
        left: Arc<[String]>,
    },
}

/// The row whose configuration routes: of daemons the one that started last; of runs of `--once` the first.
fn routing(rows: &[Registration]) -> Option<&Registration> {
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

/// Where the rows are kept. All of it is rare.
pub(super) trait Register: Send + Sync {
    /// Whether one relay works at a time, whatever the register says.
    const ONE_WORKS: bool;

    /// The number of changes; only to be compared.
    fn changes(&self) -> impl Future<Output = Result<i64, OutboxError>> + Send;

    /// Says that there was a change. To be called after it has been committed.
    fn changed(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// All rows.
    fn rows(&self) -> impl Future<Output = Result<Vec<Registration>, OutboxError>> + Send;

    /// A number above all that were drawn before.
    fn next_id(&self) -> impl Future<Output = Result<i64, OutboxError>> + Send;

    /// Writes the row of `member`, or writes it anew.
    fn write(&self, member: &Member) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Writes the time, and how long ago the relay `id` looked for events.
    fn beat(&self, id: i64, idle: Duration) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes these rows.
    fn remove(&self, ids: &[i64]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Marks the relay `id` as hung, and returns true, if an event that is not routed has been due for longer than `patience`.
    fn depose(&self, id: i64, patience: Duration) -> impl Future<Output = Result<bool, OutboxError>> + Send;
}

/// A relay as it registers itself.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) id: i64,
    pub(super) configuration: Arc<Configuration>,
    pub(super) once: bool,
}

/// One relay's part in the register.
#[derive(Debug, Clone, Default)]
pub(super) struct Membership {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    member: Option<Member>,
    since: Option<Instant>,
    /// The changes that `role` takes into account.
    known: Option<i64>,
    role: Option<Role>,
    superseded_since: Option<Instant>,
    /// There are rows of other configurations, whoever lives.
    several: bool,
    /// Since when there are several configurations, and the difference to each other one.
    mixed: Option<(Instant, Vec<String>)>,
    beaten: Option<Instant>,
    /// The destinations that would take events when somebody last said so.
    ready: Vec<String>,
}

impl Membership {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn member(&self) -> Option<Member> {
        self.state().member.clone()
    }

    /// The role at this number of changes; `None`: the rows must be looked at. Whoever is not registered routes.
    pub(super) fn role_at(&self, changes: i64) -> Option<Role> {
        let state = self.state();
        match &state.member {
            None => Some(Role::Routes),
            Some(_) => state.role.clone().filter(|_| state.known == Some(changes)),
        }
    }

    /// The last role that is known.
    pub(super) fn role(&self) -> Role {
        self.state().role.clone().unwrap_or(Role::Routes)
    }

    /// Takes note of the destinations that would take events now.
    pub(super) fn set_ready(&self, destinations: &[&str]) {
        self.state().ready = destinations.iter().map(|name| (*name).to_owned()).collect();
    }

    /// Of these destinations those that would take events.
    pub(super) fn ready(&self, destinations: &[String]) -> Vec<String> {
        let state = self.state();
        destinations.iter().filter(|name| state.ready.contains(name)).cloned().collect()
    }

    /// What other configurations there are, if there have been some for so long.
    pub(super) fn differences(&self, lasting: Duration) -> Vec<String> {
        match &self.state().mixed {
            Some((since, differences)) if since.elapsed() >= lasting => differences.clone(),
            _ => Vec::new(),
        }
    }

    /// Registers this relay, or registers it once more.
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

    /// Looks at the rows, writes this relay's anew where it is gone, and takes note of the role.
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
        // Read before the rows: whatever this number counts, they have.
        let mut changes = register.changes().await?;
        let mut rows = register.rows().await?;
        // A relay that looks for events does not hang, or no longer.
        if !rows.iter().any(|row| row.id == member.id && (!row.hung || idle >= BEAT_INTERVAL)) {
            register.write(&member).await?;
            register.changed().await?;
            changes = register.changes().await?;
            rows = register.rows().await?;
        }
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

    /// Looks at the register from time to time: deletes the dead, takes over from a relay that hangs, and writes the time
    /// while there are several configurations. `idle` is how long ago this relay looked for events; `patience` how long the
    /// one that routes may leave some. Returns when to do it next.
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
        // It has had the time to say that it looks for events.
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
