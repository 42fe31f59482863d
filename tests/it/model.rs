//! The protocols, checked exhaustively in a small scope: every order in which two relays, their faults and a late commit can
//! come. Each check is told apart from one that cannot fail by variants of the protocol that are known to be wrong.
//!
//! - `bounds`: leaving out the dead rows at the left of a partition.
//! - `claim`: claiming, publishing and settling.
//! - `once`: exactly once into a stream.

mod bounds;
mod claim;
mod once;

/// A set of events, by number.
type Set = u8;

fn has(set: Set, event: u8) -> bool {
    set & (1 << event) != 0
}

fn members(set: Set) -> impl Iterator<Item = u8> {
    (0..8).filter(move |event| has(set, *event))
}

/// Whether the first occurrences of `events` in what arrived are in this order.
fn in_order(arrived: &[u8], events: &[u8]) -> bool {
    let first = |event: &u8| arrived.iter().position(|other| other == event);
    let places: Vec<Option<usize>> = events.iter().map(first).collect();
    // One that has not arrived must not have a later one before it.
    places.windows(2).all(|pair| match (pair[0], pair[1]) {
        (Some(first), Some(second)) => first < second,
        (None, Some(_)) => false,
        _ => true,
    })
}
