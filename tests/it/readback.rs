//! Reads back what a destination has stored.

use std::time::Duration;

use redis::{Connection, FromRedisValue};

use crate::servers::Server;

/// A client of Redis that shares no code with the relay's.
pub(crate) struct RedisClient(Connection);

/// An entry of a stream: its id, and its fields in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) fields: Vec<(String, String)>,
}

impl RedisClient {
    pub(crate) fn connect(server: &Server) -> Self {
        Self::open(server.url())
    }

    /// Connects to this port of this host.
    pub(crate) fn at(port: u16) -> Self {
        Self::open(&format!("redis://127.0.0.1:{port}"))
    }

    fn open(url: &str) -> Self {
        let connection = redis::Client::open(url).unwrap().get_connection().unwrap();
        // Longer than any answer takes, so that a test that waits for nothing ends.
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(connection)
    }

    /// Runs a command whose words are separated by blanks.
    #[track_caller]
    pub(crate) fn ask<T: FromRedisValue>(&mut self, command: &str) -> T {
        let mut words = command.split(' ');
        let mut cmd = redis::cmd(words.next().unwrap());
        words.for_each(|word| _ = cmd.arg(word));
        cmd.query(&mut self.0).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    #[track_caller]
    pub(crate) fn tell(&mut self, command: &str) {
        self.ask::<redis::Value>(command);
    }

    /// All entries of a stream.
    #[track_caller]
    pub(crate) fn entries(&mut self, stream: &str) -> Vec<Entry> {
        let entries: Vec<(String, Vec<(String, String)>)> = self.ask(&format!("XRANGE {stream} - +"));
        entries.into_iter().map(|(id, fields)| Entry { id, fields }).collect()
    }

    /// The `sequence` of every entry of a stream, in order.
    #[track_caller]
    pub(crate) fn sequences(&mut self, stream: &str) -> Vec<i64> {
        self.entries(stream).iter().map(|entry| entry.field("sequence").parse().unwrap()).collect()
    }

    /// Returns one number of `INFO`.
    #[track_caller]
    pub(crate) fn info(&mut self, name: &str) -> u64 {
        let info: String = self.ask("INFO");
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {info}")).parse().unwrap()
    }
}

impl Entry {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn field(&self, name: &str) -> &str {
        self.get(name).unwrap_or_else(|| panic!("no field {name} in {self:?}"))
    }
}

/// Receives every message on the channels whose names begin with its prefix.
pub(crate) struct Subscriber {
    connection: Connection,
    client: RedisClient,
    prefix: String,
}

impl Subscriber {
    pub(crate) fn new(server: &Server, prefix: &str) -> Self {
        let RedisClient(mut connection) = RedisClient::connect(server);
        connection
            .send_packed_command(&redis::cmd("PSUBSCRIBE").arg(format!("{prefix}*")).get_packed_command())
            .unwrap();
        connection.recv_response().unwrap();
        Self { connection, client: RedisClient::connect(server), prefix: prefix.into() }
    }

    /// Returns the messages since the last call, each with its channel. None that was published before this call is missing.
    pub(crate) fn messages(&mut self) -> Vec<(String, String)> {
        let last = format!("{}-last", self.prefix);
        self.client.tell(&format!("PUBLISH {last} x"));
        let mut messages = Vec::new();
        loop {
            let message = self.connection.recv_response().unwrap();
            let [_, _, channel, message]: [String; 4] = redis::from_redis_value(message).unwrap();
            if channel == last {
                return messages;
            }
            messages.push((channel, message));
        }
    }
}
