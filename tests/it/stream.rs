//! Reads a Redis Stream in the same way as its consumers.

use std::collections::HashMap;

#[derive(Debug)]
pub(crate) struct Entry {
    /// The id that Redis gave it.
    pub(crate) id: String,
    /// The event's attributes, and `data`.
    pub(crate) fields: HashMap<String, String>,
}

impl Entry {
    /// The event's id in the outbox.
    pub(crate) fn sequence(&self) -> i64 {
        self.fields["sequence"].parse().unwrap()
    }
}

/// Opens a blocking connection.
pub(crate) fn connect(url: &str) -> redis::Connection {
    redis::Client::open(url).unwrap().get_connection().unwrap()
}

/// Returns the number of entries.
pub(crate) fn length(connection: &mut impl redis::ConnectionLike, stream: &str) -> usize {
    redis::cmd("XLEN").arg(stream).query(connection).unwrap()
}

/// Returns all entries, in order.
pub(crate) fn entries(connection: &mut impl redis::ConnectionLike, stream: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let from = entries.last().map_or("-".to_owned(), |last| format!("({}", last.id));
        let page: Vec<(String, HashMap<String, String>)> =
            redis::cmd("XRANGE").arg(&[stream, &from, "+", "COUNT", "5000"]).query(connection).unwrap();
        if page.is_empty() {
            return entries;
        }
        entries.extend(page.into_iter().map(|(id, fields)| Entry { id, fields }));
    }
}
