//! A row's physical place, `ctid`, by which a settle finds its rows.
//!
//! - This is the cheapest way, and the only one whose plan does not depend on statistics, which are stale for a queue: a join
//!   by key over a table that was last analyzed when it was empty scans all of it for each batch.
//! - The place is stable from claim to settle. The open transaction holds a lock on the table that keeps out whatever rewrites
//!   it, and only the holder of its partition updates a pending row.
//! - If an operator deletes or changes a row meanwhile, its place may be given to another. So every use compares the row's id
//!   as well.
//!
//! It travels as text, `(block,offset)`. For a type that it does not know, the driver asks the server in the middle of a
//! statement, which ends an unnamed statement.

/// Returns the locator of the row at `tid`.
pub(super) fn to_locator(tid: &str) -> Option<i64> {
    let (block, offset) = tid.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some(i64::from(block.parse::<u32>().ok()?) << 16 | i64::from(offset.parse::<u16>().ok()?))
}

/// Returns the place of the row with this locator.
pub(super) fn from_locator(locator: i64) -> String {
    format!("({},{})", locator >> 16, locator & 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_the_round_trip() {
        for tid in ["(0,1)", "(9067,226)", "(4294967295,65535)"] {
            assert_eq!(to_locator(tid).map(from_locator).as_deref(), Some(tid));
        }
        assert_eq!(to_locator("(1,2"), None);
        assert_eq!(to_locator("(1,-2)"), None);
    }
}
