//! Counts which faults happened in a run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::faults::kinds;

/// The counts, shared by all threads.
#[derive(Clone, Default)]
pub(super) struct Scorecard(Arc<Mutex<BTreeMap<&'static str, u64>>>);

impl Scorecard {
    /// Counts one more.
    pub(super) fn count(&self, name: &'static str) {
        *self.0.lock().unwrap().entry(name).or_default() += 1;
    }

    /// Prints the counts, and the faults that did not happen.
    pub(super) fn print(&self) {
        let counts = self.0.lock().unwrap();
        for (name, count) in &*counts {
            println!("{count:>6}  {name}");
        }
        for name in kinds().into_iter().filter(|name| !counts.contains_key(name)) {
            println!("{:>6}  {name}", "never");
        }
    }
}
