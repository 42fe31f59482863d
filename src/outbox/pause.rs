//! Destinations that an operator has paused. The pauses are rows of the store. A relay keeps a copy, and reads them anew when
//! the number that each claim reads shows that they have changed.

use wildmatch::WildMatch;

/// The glob that stands for all types.
const ALL: &str = "*";

/// One pause.
#[derive(Debug, Clone)]
pub struct Pause {
    /// The destination that is given no events.
    pub destination: String,
    /// The types that are held back: a glob, `*` for all.
    pub event_type: String,
    /// Who paused it.
    pub by: String,
    /// For how many seconds it was paused when this was read.
    pub seconds: f64,
    glob: WildMatch,
}

impl Pause {
    pub(super) fn new(destination: String, event_type: String, by: String, seconds: f64) -> Self {
        let glob = WildMatch::new(&event_type);
        Self { destination, event_type, by, seconds, glob }
    }

    /// Returns whether it holds back events of all types.
    pub fn is_whole(&self) -> bool {
        self.event_type == ALL
    }

    /// Describes the pause, for people.
    pub fn described(&self) -> String {
        let Self { destination, event_type, by, .. } = self;
        if self.is_whole() {
            format!("destination {destination} is paused by {by}: its events wait until `relay resume {destination}`")
        } else {
            format!(
                "destination {destination} is paused by {by} for the types {event_type}: these wait, and later events of their keys, \
                 until `relay resume {destination} --type '{event_type}'`"
            )
        }
    }
}

/// All pauses.
#[derive(Debug, Clone, Default)]
pub struct Pauses(Vec<Pause>);

impl Pauses {
    pub(super) fn new(pauses: Vec<Pause>) -> Self {
        Self(pauses)
    }

    /// The pauses, by destination.
    pub fn iter(&self) -> impl Iterator<Item = &Pause> {
        self.0.iter()
    }

    /// Returns whether nothing is paused.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether this destination is given no events at all.
    pub fn is_whole(&self, destination: &str) -> bool {
        self.0.iter().any(|pause| pause.destination == destination && pause.is_whole())
    }

    /// Returns whether events of this type are held back from this destination.
    pub fn holds(&self, destination: &str, event_type: &str) -> bool {
        self.0.iter().any(|pause| pause.destination == destination && pause.glob.matches(event_type))
    }

    /// Describes all pauses, for people. `None` if there is none.
    pub(super) fn described(&self) -> Option<String> {
        let all: Vec<String> = self.0.iter().map(Pause::described).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Returns the pauses that are not among `others`.
    pub(super) fn without<'a>(&'a self, others: &'a Self) -> impl Iterator<Item = &'a Pause> {
        let same =
            |one: &Pause, other: &Pause| one.destination == other.destination && one.event_type == other.event_type;
        self.0.iter().filter(move |one| !others.0.iter().any(|other| same(one, other)))
    }
}

/// What became of a request to pause or to resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PauseOutcome {
    /// It is so now.
    Done,
    /// It was paused already.
    Already,
    /// Nothing was changed, for this reason.
    Refused(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_holds_back_the_types_of_its_glob_at_its_destination() {
        let pause =
            |destination: &str, glob: &str| Pause::new(destination.to_owned(), glob.to_owned(), "me".to_owned(), 0.0);
        let pauses = Pauses::new(vec![pause("a", "*"), pause("b", "order.*")]);
        assert!(pauses.is_whole("a") && !pauses.is_whole("b") && !pauses.is_whole("c"));
        for (destination, event_type, held) in
            [("a", "x", true), ("b", "order.created", true), ("b", "invoice", false), ("c", "order.created", false)]
        {
            assert_eq!(pauses.holds(destination, event_type), held, "{destination} {event_type}");
        }
        let fewer = Pauses::new(vec![pause("a", "*")]);
        assert_eq!(pauses.without(&fewer).map(|pause| pause.destination.as_str()).collect::<Vec<_>>(), ["b"]);
        assert_eq!(fewer.without(&pauses).count(), 0);
    }
}
