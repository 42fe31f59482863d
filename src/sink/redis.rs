//! What both Redis sinks share: a connection that comes back by itself, commands run through one script that stops a
//! key at its first error, and the classification of Redis' errors.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, IntoConnectionInfo, RedisError, Script, Value};
use tokio::sync::Mutex;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::secret::Secret;
use crate::sink::rounds::{Limits, Rounds};

/// A chunk of 100 keeps Redis busy for well under a millisecond, and is what can be unknown after a cut connection.
const LIMITS: Limits = Limits { request_events: 100, request_bytes: 1 << 20, requests: 32 };

/// The attributes of an event that a script can pass on: Lua unpacks at most about 8,000 values at once.
const MAX_HEADERS: usize = 1000;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs each event's command. A pipeline of bare commands could invert a key: an error on one, success on the next.
///
/// ARGV: the number of shapes; for each the number of its words and the words, an empty one where a value goes; then for
/// each event the number of its key (0: none), its shape, and its values. Answers, for each event, the command's reply, `-`
/// and an error, or nothing where an earlier event of its key failed. Shapes, because what all events share, the names of
/// the fields above all, would else be most of what Redis parses: 13.8 against 9.5 us an event.
static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local shapes, at = {}, 2
for shape = 1, ARGV[1] do
  local words, slots = {}, {}
  for word = 1, ARGV[at] do
    words[word] = ARGV[at + word]
    if words[word] == '' then slots[#slots + 1] = word end
  end
  shapes[tostring(shape)] = { words, slots }
  at = at + ARGV[at] + 1
end
local replies, stopped, n, last = {}, {}, 0, #ARGV
while at < last do
  local key, shape = ARGV[at], shapes[ARGV[at + 1]]
  local words, slots = shape[1], shape[2]
  at = at + 1
  n = n + 1
  if stopped[key] then
    replies[n] = ''
  else
    for slot = 1, #slots do words[slots[slot]] = ARGV[at + slot] end
    local reply = redis.pcall(unpack(words))
    if type(reply) == 'table' then
      replies[n] = '-' .. (reply.err or 'ERR unexpected reply')
      if key ~= '0' then stopped[key] = true end
    else
      replies[n] = tostring(reply)
    end
  end
  at = at + #slots + 1
end
return replies",
    )
});

/// Where a Redis is. Secrets are read anew at each connection.
#[derive(Debug, Clone)]
pub enum RedisAddress {
    /// `redis://`, `rediss://` for TLS, or `redis+unix://`.
    Url(Secret),
    /// Spelled out.
    Parts {
        /// Host name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Database number.
        database: i64,
        /// ACL user; `None`: `default`.
        username: Option<String>,
        /// Its password.
        password: Option<Secret>,
    },
}

impl RedisAddress {
    /// Whether it can be read and used; nobody is asked whether it leads anywhere.
    ///
    /// # Errors
    /// Why not.
    pub fn validate(&self) -> Result<(), PublishError> {
        self.client().map(drop)
    }

    fn client(&self) -> Result<redis::Client, PublishError> {
        let unusable = |reason: String| PublishError::new(Fault::Misconfigured, "redis_address", reason);
        let read = |secret: &Secret| secret.read().map_err(|error| unusable(error.to_string()));
        let info = match self {
            Self::Url(url) => read(url)?.into_connection_info(),
            Self::Parts { host, port, database, username, password } => {
                let mut settings = redis::RedisConnectionInfo::default().set_db(*database);
                if let Some(username) = username {
                    settings = settings.set_username(username);
                }
                if let Some(password) = password {
                    settings = settings.set_password(read(password)?);
                }
                (host.clone(), *port).into_connection_info().map(|info| info.set_redis_settings(settings))
            }
        };
        info.and_then(redis::Client::open).map_err(|error| unusable(format!("the URL cannot be used: {error}")))
    }
}

/// One event's command, split into what others share and what is its own.
#[derive(Default)]
pub(super) struct Command {
    shape: Words,
    values: Words,
}

/// Words, one after the other in one buffer.
#[derive(Default, Clone, PartialEq, Eq, Hash)]
struct Words {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Words {
    fn push(&mut self, word: &[u8]) {
        self.bytes.extend_from_slice(word);
        self.ends.push(self.bytes.len());
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}

impl Command {
    /// A word that many events share, never empty: the command, the name of a field.
    pub(super) fn word(&mut self, word: impl AsRef<[u8]>) {
        self.shape.push(word.as_ref());
    }

    /// A word of this event's own.
    pub(super) fn value(&mut self, value: impl AsRef<[u8]>) {
        self.shape.push(b"");
        self.values.push(value.as_ref());
    }
}

/// How a kind of sink turns events into commands.
pub(super) trait Commands: Send + Sync {
    /// Writes the command that publishes `event`.
    fn write(&self, event: &Event, command: &mut Command);

    /// The key that the command writes to, where it writes to one.
    fn key<'a>(&'a self, event: &'a Event) -> Option<std::borrow::Cow<'a, str>>;

    /// Whether all events go to one key, so that a key of the wrong type concerns all of them.
    fn one_key(&self) -> bool;
}

/// A connection to one Redis, shared by all lanes.
pub(super) struct Redis {
    address: RedisAddress,
    timeout: Duration,
    connection: Mutex<Option<(u64, MultiplexedConnection)>>,
}

impl Redis {
    /// Nothing is connected yet. `timeout` bounds the wait for any one answer.
    pub(super) fn new(address: RedisAddress, timeout: Duration) -> Self {
        Self { address, timeout, connection: Mutex::new(None) }
    }

    /// The connection and its number, by which it can be given up.
    pub(super) async fn connection(&self) -> Result<(u64, MultiplexedConnection), PublishError> {
        let mut current = self.connection.lock().await;
        if let Some((number, connection)) = current.as_ref() {
            return Ok((*number, connection.clone()));
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(self.timeout));
        let connected = async {
            let mut connection = self
                .address
                .client()?
                .get_multiplexed_async_connection_with_config(&config)
                .await
                .map_err(connect_error)?;
            SCRIPT.prepare_invoke().load_async(&mut connection).await.map_err(connect_error)?;
            Ok((fastrand::u64(..), connection))
        }
        .await?;
        *current = Some(connected.clone());
        Ok(connected)
    }

    /// Gives a connection up, unless another lane has replaced it already.
    async fn give_up(&self, number: u64) {
        let mut current = self.connection.lock().await;
        if current.as_ref().is_some_and(|(current, _)| *current == number) {
            *current = None;
        }
    }

    /// Publishes `events`; the whole of [`Sink::publish`](crate::sink::Sink::publish).
    pub(super) async fn publish(&self, events: &[&Event], deadline: Instant, commands: &dyn Commands) -> Vec<Outcome> {
        let mut rounds = Rounds::new(events);
        if Instant::now() >= deadline {
            return rounds.into_outcomes();
        }
        // Also the wait for a lane that is just connecting.
        let connected = tokio::time::timeout_at(deadline.into(), self.connection()).await;
        let in_time = |_| Err(PublishError::new(Fault::Destination, "connect", "no connection to Redis in time"));
        let (number, connection) = match connected.unwrap_or_else(in_time) {
            Ok(connected) => connected,
            Err(error) => return vec![Outcome::Failed(error); events.len()],
        };
        // As if it were oversize, an event that is not to be sent rides alone: its turn comes when the earlier events of
        // its key have their answers.
        let size = |index: usize| match refusal(events[index]) {
            Some(_) => LIMITS.request_bytes + 1,
            None => events[index].payload.len() + 512,
        };
        let mut lost = false;
        while Instant::now() < deadline {
            let chunks = rounds.next(LIMITS, size);
            if chunks.is_empty() {
                break;
            }
            let replies = join_all(chunks.iter().map(async |chunk| match refusal(events[chunk[0]]) {
                Some(error) => Err(error),
                None => run(connection.clone(), eval(events, chunk, commands), chunk.len(), deadline).await,
            }))
            .await;
            for (chunk, reply) in chunks.iter().zip(replies) {
                let outcomes = match reply {
                    Ok(replies) => replies.into_iter().map(|reply| outcome(reply, commands.one_key())).collect(),
                    Err(error) => vec![Outcome::Failed(error); chunk.len()],
                };
                for (&index, outcome) in chunk.iter().zip(outcomes) {
                    if let Outcome::Failed(error) = &outcome
                        && !error.fault.charges_event()
                    {
                        rounds.end();
                        lost |= wants_new_connection(error);
                    }
                    rounds.answer(index, outcome);
                }
            }
        }
        if lost {
            self.give_up(number).await;
        }
        rounds.into_outcomes()
    }
}

/// Why an event cannot be sent at all.
fn refusal(event: &Event) -> Option<PublishError> {
    let count = event.headers.len();
    (count > MAX_HEADERS).then(|| {
        let message = format!("the event has {count} headers, a Redis destination takes {MAX_HEADERS}");
        PublishError::new(Fault::Unfit, "too_many_headers", message)
    })
}

/// One chunk as a call of the script.
fn eval(events: &[&Event], chunk: &[usize], commands: &dyn Commands) -> Cmd {
    let keys: HashSet<_> = chunk.iter().filter_map(|&index| commands.key(events[index])).collect();
    let mut cmd = redis::cmd("EVALSHA");
    cmd.arg(SCRIPT.get_hash()).arg(keys.len());
    for key in &keys {
        cmd.arg(key.as_bytes());
    }
    let mut numbers = HashMap::new();
    let mut shapes: Vec<Words> = Vec::new();
    let mut command = Command::default();
    let mut arguments = Words::default();
    for &index in chunk {
        let event = events[index];
        let next = numbers.len() + 1;
        let number = event.key().map_or(0, |key| *numbers.entry(key).or_insert(next));
        command.shape.clear();
        command.values.clear();
        commands.write(event, &mut command);
        let shape = shapes.iter().position(|shape| *shape == command.shape).unwrap_or_else(|| {
            shapes.push(command.shape.clone());
            shapes.len() - 1
        });
        arguments.push(number.to_string().as_bytes());
        arguments.push((shape + 1).to_string().as_bytes());
        command.values.iter().for_each(|value| arguments.push(value));
    }
    cmd.arg(shapes.len());
    for shape in &shapes {
        cmd.arg(shape.ends.len());
        for word in shape.iter() {
            cmd.arg(word);
        }
    }
    for argument in arguments.iter() {
        cmd.arg(argument);
    }
    cmd
}

/// Runs one chunk and returns its events' replies.
async fn run(
    mut connection: MultiplexedConnection,
    command: Cmd,
    event_count: usize,
    deadline: Instant,
) -> Result<Vec<Vec<u8>>, PublishError> {
    let answer = async {
        match connection.send_packed_command(&command).await.and_then(Value::extract_error) {
            // The server forgot its scripts and ran nothing.
            Err(error) if error.code() == Some("NOSCRIPT") => {
                SCRIPT.prepare_invoke().load_async(&mut connection).await?;
                connection.send_packed_command(&command).await.and_then(Value::extract_error)
            }
            answer => answer,
        }
    };
    let value = match tokio::time::timeout_at(deadline.into(), answer).await {
        Ok(answer) => answer.map_err(call_error)?,
        Err(_) => return Err(PublishError::new(Fault::Unknown, "timeout", "no answer from Redis in time")),
    };
    match value {
        Value::Array(replies) if replies.len() == event_count => replies
            .into_iter()
            .map(|reply| match reply {
                Value::BulkString(reply) => Ok(reply),
                _ => Err(unexpected_reply()),
            })
            .collect(),
        _ => Err(unexpected_reply()),
    }
}

fn unexpected_reply() -> PublishError {
    PublishError::new(
        Fault::Unknown,
        "unexpected_reply",
        "Redis answered the script with something else than its replies",
    )
}

/// One event's own reply.
fn outcome(reply: Vec<u8>, one_key: bool) -> Outcome {
    let reply = String::from_utf8_lossy(&reply).into_owned();
    match reply.strip_prefix('-') {
        Some(error) => Outcome::Failed(server_error(error, one_key)),
        None if reply.is_empty() => Outcome::Held,
        None => Outcome::Delivered { message_id: Some(reply) },
    }
}

/// An error text of the server, as it stands behind the `-` of its protocol.
fn server_error(text: &str, one_key: bool) -> PublishError {
    let text = text.strip_prefix('-').unwrap_or(text);
    // An unknown command is answered with its arguments, which are the event.
    let text = text.split(", with args beginning with").next().unwrap_or(text);
    let (code, message) = text.split_once(' ').unwrap_or((text, ""));
    PublishError::new(classify(code, message, one_key), code, message)
}

/// Whose fault an error of the server is. Total: what nobody has classified pauses the destination.
fn classify(code: &str, message: &str, one_key: bool) -> Fault {
    match code {
        "NOAUTH" | "WRONGPASS" | "NOPERM" | "CROSSSLOT" => Fault::Misconfigured,
        "ERR"
            if [
                "unknown command",
                "Unknown Redis command called from script",
                "The user executing the script can't ", // NOPERM, in Redis up to 7.0
                "invalid DB index",
                "AUTH ",
                "DB index is out of range",
            ]
            .iter()
            .any(|start| message.starts_with(start)) =>
        {
            Fault::Misconfigured
        }
        // Where each event names its key, a key of the wrong type concerns those that name it, and no others.
        "WRONGTYPE" if !one_key => Fault::Event,
        "WRONGTYPE" => Fault::Misconfigured,
        // LOADING, READONLY, OOM, MISCONF, CLUSTERDOWN, MASTERDOWN, NOREPLICAS, TRYAGAIN, BUSY, MOVED, ASK, too many clients, ...
        _ => Fault::Destination,
    }
}

/// An error while connecting: nothing was sent.
fn connect_error(error: RedisError) -> PublishError {
    match error.kind() {
        ErrorKind::AuthenticationFailed => PublishError::new(Fault::Misconfigured, "WRONGPASS", error.to_string()),
        ErrorKind::InvalidClientConfig => PublishError::new(Fault::Misconfigured, "redis_address", error.to_string()),
        _ => match error.code() {
            Some(code) => server_error(&format!("{code} {}", error.detail().unwrap_or_default()), true),
            None => PublishError::new(Fault::Destination, "connect", error.to_string()),
        },
    }
}

/// An error of a call: the server's own, or a lost connection, after which nobody knows.
fn call_error(error: RedisError) -> PublishError {
    match error.code() {
        Some(code) => server_error(&format!("{code} {}", error.detail().unwrap_or_default()), true),
        None => PublishError::new(Fault::Unknown, "connection_lost", error.to_string()),
    }
}

/// After these the connection leads to the wrong place, or nowhere, or was opened with an outdated password.
fn wants_new_connection(error: &PublishError) -> bool {
    error.fault == Fault::Unknown
        || matches!(error.code.as_str(), "READONLY" | "NOAUTH" | "WRONGPASS" | "NOPERM" | "MASTERDOWN")
}

impl Redis {
    /// Connects, and tries the script with no event. Returns the server's address, without secrets.
    pub(super) async fn check(&self) -> Result<String, PublishError> {
        let (number, mut connection) = self.connection().await?;
        let mut probe = redis::cmd("EVALSHA");
        probe.arg(SCRIPT.get_hash()).arg(0).arg(0);
        let answer = connection.send_packed_command(&probe).await.and_then(Value::extract_error);
        if let Err(error) = answer {
            self.give_up(number).await;
            return Err(call_error(error));
        }
        let client = self.address.client()?;
        let info = client.get_connection_info();
        Ok(format!("{}, database {}", info.addr(), info.redis_settings().db()))
    }

    /// The type of a key, as Redis names it; `none` where there is no such key.
    pub(super) async fn key_type(&self, key: &str) -> Result<String, PublishError> {
        let (_, mut connection) = self.connection().await?;
        redis::cmd("TYPE").arg(key).query_async(&mut connection).await.map_err(call_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_class() {
        let table = [
            ("LOADING Redis is loading the dataset in memory", Fault::Destination),
            ("READONLY You can't write against a read only replica.", Fault::Destination),
            ("OOM command not allowed when used memory > 'maxmemory'.", Fault::Destination),
            ("-OOM command not allowed when used memory > 'maxmemory'.", Fault::Destination),
            ("MISCONF Redis is configured to save RDB snapshots", Fault::Destination),
            ("CLUSTERDOWN The cluster is down", Fault::Destination),
            ("MASTERDOWN Link with MASTER is down", Fault::Destination),
            ("NOREPLICAS Not enough good replicas to write.", Fault::Destination),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Fault::Destination),
            ("BUSY Redis is busy running a script.", Fault::Destination),
            ("ERR max number of clients reached", Fault::Destination),
            ("SOMETHING nobody has seen", Fault::Destination),
            ("NOAUTH Authentication required.", Fault::Misconfigured),
            ("WRONGPASS invalid username-password pair or user is disabled.", Fault::Misconfigured),
            ("NOPERM this user has no permissions to run the 'xadd' command", Fault::Misconfigured),
            ("CROSSSLOT Keys in request don't hash to the same slot", Fault::Misconfigured),
            ("ERR The user executing the script can't run this command or subcommand", Fault::Misconfigured),
            ("ERR unknown command 'XADD', with args beginning with: 'events' 'secret'", Fault::Misconfigured),
            ("ERR Unknown Redis command called from script", Fault::Misconfigured),
            ("ERR DB index is out of range", Fault::Misconfigured),
            ("ERR AUTH <password> called without any password configured", Fault::Misconfigured),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Fault::Misconfigured),
        ];
        for (text, fault) in table {
            assert_eq!(server_error(text, true).fault, fault, "{text}");
        }
        assert_eq!(server_error("WRONGTYPE Operation", false).fault, Fault::Event);
    }

    #[test]
    fn an_unknown_command_is_not_quoted_with_its_arguments() {
        let error = server_error("ERR unknown command 'XADD', with args beginning with: 'events' 'secret'", true);
        assert_eq!(error.to_string(), "ERR: unknown command 'XADD'");
    }

    #[test]
    fn an_event_is_delivered_only_by_its_own_reply() {
        assert_eq!(
            outcome(b"1700000000000-0".to_vec(), true),
            Outcome::Delivered { message_id: Some("1700000000000-0".into()) }
        );
        assert_eq!(outcome(b"".to_vec(), true), Outcome::Held);
        assert!(matches!(outcome(b"-OOM no".to_vec(), true), Outcome::Failed(_)));
    }
}
