//! `relay routes`: where an event would go, and why. It needs no database, and connects to nothing.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::cli::emit::header;
use crate::cli::{print, runtime};
use crate::config::ConfigError;
use crate::config::destinations::destinations;
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::event::{Event, NewEvent, RowKey};
use crate::relay::Endpoint;
use crate::route::{Destinations, Router, Unrouted};
use crate::text::shown;

/// The longest name of a place or a route that is shown, in characters.
const MAX_SHOWN_CHARS: usize = 500;

#[derive(clap::Args)]
pub(super) struct RoutesArgs {
    /// The type of the event, as in order.created.
    #[arg(value_name = "TYPE")]
    event_type: String,
    /// The source that the event was emitted with; without it, the event has none.
    #[arg(long, default_value = "")]
    source: String,
    /// A header of the event; may be given several times.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Its ordering key, as in order:42, or 42 alone; names of streams and channels may hold its first half.
    #[arg(long)]
    key: Option<String>,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

/// Where an event goes.
#[derive(Serialize)]
struct Routing {
    event_type: String,
    /// `published`, `dropped` or `dead_lettered`.
    outcome: &'static str,
    /// The cause in words.
    why: String,
    /// The routes that take the event, by their places in the file, from 1.
    routes: Vec<Taker>,
    destinations: Vec<Place>,
}

#[derive(Serialize)]
struct Taker {
    number: usize,
    route: String,
}

#[derive(Serialize)]
struct Place {
    name: String,
    /// The kind of the destination and what it is configured with, without its address.
    target: String,
    /// The stream, the channel, the bus or the file. `None`: the destination has one place only.
    place: Option<String>,
    /// The routes that lead here, by their places in the file.
    routes: Vec<usize>,
}

pub(super) fn routes(settings: &Settings, file: &ConfigFile, args: &RoutesArgs) -> anyhow::Result<ExitCode> {
    let event = event(args)?;
    let (destinations, router) = destinations(settings, file)?;
    let endpoints = runtime(1)?.block_on(async {
        let mut endpoints = Vec::new();
        for destination in destinations {
            endpoints.push(destination.open(settings).await?);
        }
        Ok::<_, ConfigError>(endpoints)
    })?;
    let routing = routing(&event, &router, &endpoints, settings.unrouted);
    if args.json {
        print(&format!("{}\n", serde_json::to_string(&routing)?))?;
    } else {
        print(&text(&routing)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the event, if one like this can be emitted.
fn event(args: &RoutesArgs) -> Result<Event, ConfigError> {
    let (aggregate_type, aggregate_id) = match args.key.as_deref().map(|key| key.split_once(':').unwrap_or(("", key))) {
        Some((aggregate_type, aggregate_id)) => (Some(aggregate_type), Some(aggregate_id)),
        None => (None, None),
    };
    let mut emitted = NewEvent::from_json(args.event_type.as_str(), "{}").source(args.source.as_str());
    if let (Some(aggregate_type), Some(aggregate_id)) = (aggregate_type, aggregate_id) {
        emitted = emitted.key(aggregate_type, aggregate_id);
    }
    // Of two headers with one name, the last one counts, as in `relay emit`.
    let headers: BTreeMap<String, String> = args.headers.iter().cloned().collect();
    for (name, value) in &headers {
        emitted = emitted.header(name.as_str(), value.as_str());
    }
    emitted.validate().map_err(|error| ConfigError::Contradiction(error.to_string()))?;
    Ok(Event {
        row: RowKey { locator: 0, partition: 0, id: 0, destination: String::new() },
        event_id: Uuid::nil(),
        event_type: args.event_type.clone(),
        source: args.source.clone(),
        aggregate_type: aggregate_type.filter(|text| !text.is_empty()).map(str::to_owned),
        aggregate_id: aggregate_id.map(str::to_owned),
        payload: b"{}".to_vec(),
        headers: headers.into_iter().collect(),
        correlation_id: None,
        causation_id: None,
        schema_version: 1,
        created_at: OffsetDateTime::UNIX_EPOCH,
        attempts: 0,
    })
}

fn routing(event: &Event, router: &Router, endpoints: &[Endpoint], unrouted: Unrouted) -> Routing {
    let names: Vec<String> = endpoints.iter().map(|endpoint| endpoint.name.clone()).collect();
    let described = router.described(&names);
    let takers = router.takers(event);
    let to = match router.route(event) {
        Destinations::To(to) => to,
        Destinations::Nowhere | Destinations::Unrouted => Vec::new(),
    };
    let (outcome, why) = match router.route(event) {
        Destinations::To(_) if described.is_empty() => {
            ("published", "there are no routes, so every event goes to every destination".to_owned())
        }
        Destinations::To(_) => ("published", "the routes that take it lead there".to_owned()),
        Destinations::Nowhere => (
            "dropped",
            "a route takes it and leads nowhere: it is deleted on purpose, with a row in the log".to_owned(),
        ),
        Destinations::Unrouted => match unrouted {
            Unrouted::DeadLetter => (
                "dead_lettered",
                format!(
                    "none of the {} routes takes it: it becomes a dead letter with the code `unrouted` \
                     (RELAY_UNROUTED=dead-letter)",
                    described.len()
                ),
            ),
            Unrouted::Drop => (
                "dropped",
                format!(
                    "none of the {} routes takes it: it is deleted, with a row in the log (RELAY_UNROUTED=drop)",
                    described.len()
                ),
            ),
        },
    };
    let place = |index: usize| {
        let Endpoint { name, sink, .. } = &endpoints[index];
        let place = sink.place(event);
        Place {
            name: name.clone(),
            target: sink.target(),
            place: (!place.is_empty()).then_some(place),
            routes: takers.iter().filter(|&&route| router.leads_to(route, index)).map(|route| route + 1).collect(),
        }
    };
    Routing {
        event_type: event.event_type.clone(),
        outcome,
        why,
        routes: takers.iter().map(|&at| Taker { number: at + 1, route: described[at].0.clone() }).collect(),
        destinations: to.into_iter().map(place).collect(),
    }
}

fn text(routing: &Routing) -> Result<String, std::fmt::Error> {
    let shown = |text: &str| shown(text, MAX_SHOWN_CHARS);
    let mut text = format!(
        "{} is {}: {}\n",
        shown(&routing.event_type),
        match routing.outcome {
            "dead_lettered" => "dead-lettered",
            outcome => outcome,
        },
        routing.why
    );
    if !routing.routes.is_empty() {
        writeln!(text, "\nroutes that take it")?;
        for Taker { number, route } in &routing.routes {
            writeln!(text, "  {number}  {}", shown(route))?;
        }
    }
    if !routing.destinations.is_empty() {
        writeln!(text, "\ndestinations")?;
        let width = routing.destinations.iter().map(|place| place.name.chars().count()).max().unwrap_or_default();
        for Place { name, target, place, routes } in &routing.destinations {
            write!(text, "  {name:width$}  {}", shown(place.as_deref().unwrap_or(target)))?;
            if place.is_some() {
                write!(text, "  ({})", shown(target))?;
            }
            let numbers: Vec<String> = routes.iter().map(usize::to_string).collect();
            match numbers.len() {
                0 => writeln!(text)?,
                1 => writeln!(text, ", by route {}", numbers[0])?,
                _ => writeln!(text, ", by routes {}", numbers.join(", "))?,
            }
        }
    }
    Ok(text)
}
