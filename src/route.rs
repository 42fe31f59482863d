//! Decides to which destinations an event goes. The decision is pure: no names are resolved, and nothing is sent.

use std::collections::BTreeMap;

use wildmatch::WildMatch;

use crate::event::Event;

/// One route: a filter, and the destinations of the events that pass it.
#[derive(Debug, Clone)]
pub struct Route {
    /// A glob over the event type: `*` matches any characters, `?` matches any one character. `None` matches every type.
    pub event_type: Option<WildMatch>,
    /// The exact `source` of the event. `None` matches every source.
    pub source: Option<String>,
    /// Headers that the event must have, with these values.
    pub headers: BTreeMap<String, String>,
    /// Indexes into the relay's destinations. If empty, the events are dropped on purpose.
    pub destinations: Vec<usize>,
}

impl Route {
    fn takes(&self, event: &Event) -> bool {
        self.event_type.as_ref().is_none_or(|glob| glob.matches(&event.event_type))
            && self.source.as_ref().is_none_or(|source| *source == event.source)
            && self.headers.iter().all(|(name, value)| event.headers.iter().any(|(n, v)| n == name && v == value))
    }
}

/// What becomes of an event that no route takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Unrouted {
    /// It becomes a dead letter with the code `unrouted`.
    DeadLetter,
    /// It is deleted, with a row in the processing log.
    Drop,
}

/// The destinations of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destinations {
    /// The destinations with these indexes, ascending.
    To(Vec<usize>),
    /// A route took the event and names no destination, so the event is dropped on purpose.
    Nowhere,
    /// No route took the event.
    Unrouted,
}

/// All routes. An event goes to every destination of every route that takes it. So a new route never takes events away from
/// another route.
#[derive(Debug, Clone)]
pub struct Router {
    routes: Vec<Route>,
    all: Vec<usize>,
}

impl Router {
    /// Creates a router over `destination_count` destinations. Without routes every event goes to each of them.
    pub fn new(routes: Vec<Route>, destination_count: usize) -> Self {
        Self { routes, all: (0..destination_count).collect() }
    }

    /// Each route in words, for people, and with everything that decides. `names`: those of the destinations.
    pub fn described(&self, names: &[String]) -> Vec<(String, String)> {
        let described = self.routes.iter().map(|route| {
            let mut to: Vec<&str> =
                route.destinations.iter().filter_map(|&to| names.get(to)).map(String::as_str).collect();
            to.sort_unstable();
            to.dedup();
            let glob = route.event_type.as_ref().map_or_else(|| "*".to_owned(), WildMatch::pattern);
            let headers: Vec<&str> = route.headers.keys().map(String::as_str).collect();
            let mut shown = format!("event_type {glob}");
            if let Some(source) = &route.source {
                shown.push_str(&format!(", source {source}"));
            }
            if !headers.is_empty() {
                shown.push_str(&format!(", headers {}", headers.join(" and ")));
            }
            let to = if to.is_empty() { "nowhere".to_owned() } else { to.join(" and ") };
            let shown = format!("[{shown} to {to}]");
            let exact = serde_json::json!([shown, route.headers]).to_string();
            (shown, exact)
        });
        described.collect()
    }

    /// Returns the places of the routes that take `event`.
    pub fn takers(&self, event: &Event) -> Vec<usize> {
        self.routes.iter().enumerate().filter(|(_, route)| route.takes(event)).map(|(place, _)| place).collect()
    }

    /// Returns whether the route at `place` leads to the destination with this index.
    pub fn leads_to(&self, place: usize, destination: usize) -> bool {
        self.routes.get(place).is_some_and(|route| route.destinations.contains(&destination))
    }

    /// Returns the destinations of `event`, regardless of what is already owed.
    pub fn route(&self, event: &Event) -> Destinations {
        if self.routes.is_empty() {
            return Destinations::To(self.all.clone());
        }
        let mut taken = false;
        let mut to = Vec::new();
        for route in self.routes.iter().filter(|route| route.takes(event)) {
            taken = true;
            to.extend(&route.destinations);
        }
        to.sort_unstable();
        to.dedup();
        match (taken, to.is_empty()) {
            (_, false) => Destinations::To(to),
            (true, true) => Destinations::Nowhere,
            (false, true) => Destinations::Unrouted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;

    fn route(event_type: &str, destinations: &[usize]) -> Route {
        Route {
            event_type: Some(WildMatch::new(event_type)),
            source: None,
            headers: BTreeMap::new(),
            destinations: destinations.to_vec(),
        }
    }

    #[test]
    fn without_routes_every_event_goes_to_each_destination() {
        assert_eq!(Router::new(vec![], 2).route(&event(1)), Destinations::To(vec![0, 1]));
    }

    #[test]
    fn an_event_goes_once_to_every_destination_of_every_route_that_takes_it() {
        let routes = vec![route("order.*", &[2, 0]), route("*.created", &[0, 1]), route("invoice.?", &[3])];
        let router = Router::new(routes, 4);
        let mut created = event(1);
        created.event_type = "order.created".into();
        assert_eq!(router.route(&created), Destinations::To(vec![0, 1, 2]));
        created.event_type = "orders.deleted".into();
        assert_eq!(router.route(&created), Destinations::Unrouted);
    }

    #[test]
    fn source_and_headers_must_equal() {
        let mut narrow = route("*", &[0]);
        narrow.source = Some("shop".into());
        narrow.headers.insert("tenant".into(), "acme".into());
        let router = Router::new(vec![narrow], 1);
        let mut acme = event(1);
        acme.source = "shop".into();
        acme.headers = vec![("tenant".into(), "acme".into()), ("x".into(), "y".into())];
        assert_eq!(router.route(&acme), Destinations::To(vec![0]));
        acme.headers[0].1 = "other".into();
        assert_eq!(router.route(&acme), Destinations::Unrouted);
        acme.headers[0].1 = "acme".into();
        acme.source = "shop2".into();
        assert_eq!(router.route(&acme), Destinations::Unrouted);
    }

    #[test]
    fn a_route_to_nowhere_is_not_the_same_as_no_route() {
        let router = Router::new(vec![route("debug.*", &[])], 1);
        let mut debug = event(1);
        debug.event_type = "debug.x".into();
        assert_eq!(router.route(&debug), Destinations::Nowhere);
    }
}
