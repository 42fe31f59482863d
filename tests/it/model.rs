//! Exhaustive checks of the protocols in a small scope: every order in which the steps of two relays, their faults and a late
//! commit can happen. To show that a check can fail, it is also run on variants of the protocol that are known to be wrong.
//!
//! - `bounds`: claims skip the dead rows at the low ids of a partition.
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

/// Whether the first copies of `events` arrived in this order.
fn in_order(arrived: &[u8], events: &[u8]) -> bool {
    let first = |event: &u8| arrived.iter().position(|other| other == event);
    let places: Vec<Option<usize>> = events.iter().map(first).collect();
    // If an event has not arrived, no later one may have arrived.
    places.windows(2).all(|pair| match (pair[0], pair[1]) {
        (Some(first), Some(second)) => first < second,
        (None, Some(_)) => false,
        _ => true,
    })
}
