//! The verdicts on a batch: the deliveries of each of its events, together.

use std::time::Duration;

use crate::event::{Event, Verdict};

/// The destination of a row that is not routed yet or stands for all its destinations, and of a delivery that was decided
/// before routing.
pub const NO_DESTINATION: &str = "";

/// The verdict on one event at one destination.
#[derive(Debug)]
pub struct Delivery<'a> {
    /// The destination's name, or [`NO_DESTINATION`].
    pub destination: &'a str,
    /// The verdict, which is to be recorded.
    pub verdict: Verdict,
    /// How long the publish call took that included the event.
    pub duration: Duration,
}

/// The deliveries of a batch, grouped by event.
#[derive(Debug, Default)]
pub struct Deliveries<'a> {
    all: Vec<Delivery<'a>>,
    /// The events, each with the end of its deliveries in `all`.
    events: Vec<(&'a Event, usize)>,
}

impl<'a> Deliveries<'a> {
    /// Creates an empty value with room for one delivery of each of `events` events.
    pub fn with_capacity(events: usize) -> Self {
        Self { all: Vec::with_capacity(events), events: Vec::with_capacity(events) }
    }

    /// Begins the group of the next event. Each event is begun once.
    pub fn begin(&mut self, event: &'a Event) -> Group<'_, 'a> {
        self.events.push((event, self.all.len()));
        Group(self)
    }

    /// Each event with its deliveries, in the order in which they were begun. An event may have none.
    pub fn by_event(&self) -> impl Iterator<Item = (&'a Event, &[Delivery<'a>])> {
        let mut start = 0;
        self.events.iter().map(move |&(event, end)| (event, &self.all[std::mem::replace(&mut start, end)..end]))
    }

    /// The deliveries of all events.
    pub fn iter(&self) -> impl Iterator<Item = &Delivery<'a>> {
        self.all.iter()
    }
}

/// The deliveries of the event that was begun last.
pub struct Group<'d, 'a>(&'d mut Deliveries<'a>);

impl<'a> Group<'_, 'a> {
    /// Adds a delivery.
    pub fn push(&mut self, delivery: Delivery<'a>) {
        self.0.all.push(delivery);
        if let Some((_, end)) = self.0.events.last_mut() {
            *end = self.0.all.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;

    #[test]
    fn each_event_keeps_its_deliveries_and_one_may_have_none() {
        let events = [event(1), event(2), event(3)];
        let mut deliveries = Deliveries::default();
        let delivery =
            |destination| Delivery { destination, verdict: Verdict::Drop { reason: "" }, duration: Duration::ZERO };
        deliveries.begin(&events[0]).push(delivery("a"));
        let _ = deliveries.begin(&events[1]);
        let mut third = deliveries.begin(&events[2]);
        third.push(delivery("a"));
        third.push(delivery("b"));
        let groups = deliveries.by_event().map(|(event, group)| {
            (event.row.id, group.iter().map(|delivery| delivery.destination).collect::<Vec<_>>())
        });
        assert_eq!(groups.collect::<Vec<_>>(), [(1, vec!["a"]), (2, vec![]), (3, vec!["a", "b"])]);
    }
}
