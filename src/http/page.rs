//! What each path answers.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::breaker::BreakerState;
use crate::http::board::{self, Board};
use crate::outbox::{Outbox, Standing};
use crate::relay::health::{State, Status};
use crate::relay::{Overview, Relay};
use crate::stderr;

/// The content type of OpenMetrics, which Prometheus asks for since its version 2.5.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// The paths, for those who ask for another one.
const INDEX: &str = "\
/             a page for people: destinations, blocked keys, relays, what is in the way
/status.json  what that page shows
/livez        200 while the relay makes progress, 503 if something in it hangs and only a restart helps
/readyz       200 while it can do its work or a part of it, 503 otherwise; with the reasons
/statusz      all that this relay knows of itself, as JSON
/metrics      its figures, as Prometheus reads them

/livez and /readyz answer JSON to ?format=json or to `Accept: application/json`.
";

/// What the pages show.
pub(crate) trait Source: Send + Sync {
    /// The figures, as OpenMetrics text.
    fn metrics(&self) -> String;

    /// What the relay is and does now.
    fn overview(&self) -> Overview;

    /// What does not change while the relay runs.
    fn identity(&self) -> &Identity;

    /// What waits in the database, see [`Board::read`].
    fn board(&self) -> BoxFuture<'_, Value>;
}

/// What a relay is as long as it runs.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Host name and process id, as in the processing log.
    pub(crate) worker: String,
    /// The address of its database, without secrets.
    pub(crate) database: String,
    /// When it was started.
    pub(crate) started: SystemTime,
}

/// A relay whose pages are shown.
pub(crate) struct Shown<O: Outbox> {
    pub(crate) relay: Arc<Relay<O>>,
    pub(crate) identity: Identity,
    pub(crate) board: Board,
}

impl<O: Outbox> Source for Shown<O> {
    fn metrics(&self) -> String {
        let metrics = self.relay.metrics();
        metrics.set_log_lines_dropped(stderr::dropped());
        metrics.encode()
    }

    fn overview(&self) -> Overview {
        self.relay.overview()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn board(&self) -> BoxFuture<'_, Value> {
        Box::pin(self.board.read())
    }
}

/// The format of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Text for people.
    Text,
    /// JSON.
    Json,
}

/// An answer.
pub(crate) struct Page {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
    /// What a browser may load and run, if that is more than nothing.
    pub(crate) policy: Option<String>,
}

impl Page {
    fn new(status: StatusCode, content_type: &'static str, body: String) -> Self {
        Self { status, content_type, body, policy: None }
    }

    /// Creates an answer for people.
    pub(crate) fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self::new(status, TEXT, body.into())
    }

    fn json(status: StatusCode, body: &Value) -> Self {
        Self::new(status, JSON, format!("{body:#}\n"))
    }
}

/// Answers a request for `path`.
pub(crate) async fn page(path: &str, format: Format, source: &dyn Source) -> Page {
    match path {
        "/" => {
            let (html, policy) = board::html();
            Page { policy: Some(policy), ..Page::new(StatusCode::OK, HTML, html) }
        }
        "/status.json" => {
            let mut value = source.board().await;
            value["relay"] = overall(&source.overview(), source.identity());
            Page::json(StatusCode::OK, &value)
        }
        "/metrics" => Page::new(StatusCode::OK, OPEN_METRICS, source.metrics()),
        "/livez" => live(&source.overview(), format),
        "/readyz" => ready(&source.overview(), format),
        "/statusz" => Page::json(StatusCode::OK, &overall(&source.overview(), source.identity())),
        _ => Page::text(StatusCode::NOT_FOUND, format!("there is no such page; there are:\n{INDEX}")),
    }
}

fn code(well: bool) -> StatusCode {
    if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn live(overview: &Overview, format: Format) -> Page {
    let code = code(overview.hung.is_none());
    match (format, &overview.hung) {
        (Format::Json, hung) => Page::json(code, &json!({ "live": hung.is_none(), "reason": hung })),
        (Format::Text, None) => Page::text(code, "live\n"),
        (Format::Text, Some(hung)) => Page::text(code, format!("not live: {hung}\n")),
    }
}

fn ready(overview: &Overview, format: Format) -> Page {
    let code = code(overview.condition.is_ready());
    match format {
        Format::Json => Page::json(code, &readiness(overview)),
        Format::Text => Page::text(code, format!("{}\n", overview.sentence())),
    }
}

/// What `/readyz` says.
fn readiness(overview: &Overview) -> Value {
    json!({
        "ready": overview.condition.is_ready(),
        "state": overview.condition.word(),
        "sentence": overview.sentence(),
        "reasons": overview.reasons,
        "standing": standing(&overview.standing),
        "paused": overview.paused,
    })
}

fn standing(standing: &Standing) -> Value {
    let word = match standing {
        Standing::Works => "works",
        Standing::StandsBy { .. } => "stands_by",
        Standing::Superseded { .. } => "superseded",
    };
    json!({ "state": word, "text": standing.to_string() })
}

/// What `/statusz` says.
fn overall(overview: &Overview, identity: &Identity) -> Value {
    let destinations = overview.destinations.iter().map(|destination| {
        let mut value = usable(&destination.status);
        value["name"] = json!(destination.name);
        value["breaker"] = json!(match destination.breaker {
            BreakerState::Closed => "closed",
            BreakerState::Probing => "probing",
            BreakerState::Open => "open",
        });
        value["in_flight"] = json!(destination.in_flight);
        let lags = destination.lag_by_minute.iter().map(|lag| lag.map(|lag| lag.as_secs_f64()));
        value["lag_by_minute"] = lags.collect();
        value
    });
    let standstills = overview
        .standstills
        .iter()
        .map(|standstill| json!({ "cause": standstill.cause, "about": standstill.about, "text": standstill.text }));
    let mut value = readiness(overview);
    value["live"] = json!(overview.hung.is_none());
    value["hung"] = json!(overview.hung);
    value["version"] = json!(env!("CARGO_PKG_VERSION"));
    value["worker"] = json!(identity.worker);
    value["started"] = json!(time(identity.started));
    value["database"] = usable(&overview.store);
    value["database"]["address"] = json!(identity.database);
    value["destinations"] = destinations.collect();
    value["standstills"] = standstills.collect();
    value
}

/// Whether the database or a destination can be used.
fn usable(status: &Status) -> Value {
    let state = match status.state {
        State::Unknown => "unknown",
        State::Up => "up",
        State::Down => "down",
        State::Misconfigured => "misconfigured",
    };
    json!({ "state": state, "since": time(status.since), "reason": status.reason })
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
