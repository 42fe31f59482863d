//! What a relay shows of itself by HTTP and to systemd: metrics, health and state.

mod health;
mod metrics;
mod page;
mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::binary::{Running, relay, until};

/// A server on a free port.
const HTTP: (&str, &str) = ("RELAY_HTTP_ADDR", "127.0.0.1:0");

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// An answer of the server.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The status line and the headers, in lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert!(self.head.contains("\r\ncontent-type: application/json\r\n"), "{self:?}");
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A relay that serves HTTP.
pub(crate) struct Served {
    pub(crate) running: Running,
    address: String,
}

impl Served {
    /// Starts a relay with these variables.
    #[track_caller]
    pub(crate) fn start(variables: &[(&str, &str)]) -> Self {
        let mut running = Running::start(relay(&["run"], &[variables, &[HTTP]].concat()));
        let before = "\"message\":\"metrics and health are served by HTTP\",\"address\":\"";
        running.until_log(before);
        let log = running.log();
        let (_, rest) = log.split_once(before).unwrap();
        let address = rest.split('"').next().unwrap().to_owned();
        Self { running, address }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request as it stands here.
    #[track_caller]
    pub(crate) fn ask(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        // The server may answer, and close, before it has read all.
        stream.write_all(request.as_bytes()).ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: format!("{}\r\n", head.to_lowercase()), body: body.to_owned() }
    }

    /// Asks for a path, as a program does that knows the address.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address))
    }

    /// Waits until a path is answered with this status, and with this part.
    #[track_caller]
    pub(crate) fn until(&self, path: &str, status: u16, part: &str) -> Answer {
        let mut last = self.get(path);
        until(&format!("{path} is {status} and says {part:?}; last {last:?}"), || {
            last = self.get(path);
            last.status == status && last.body.contains(part)
        });
        last
    }
}
