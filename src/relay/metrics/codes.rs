//! Bounds the number of error codes that have a label of their own.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// How many error codes of one destination have a label of their own, in the order in which they occur. All others count as
/// `other`: a destination chooses its codes, and each takes memory here and wherever metrics are stored.
const MAX_CODES: usize = 40;

/// The label for codes without a label of their own.
const OTHER: &str = "other";

/// The codes of each destination that have a label of their own.
#[derive(Debug, Clone, Default)]
pub(super) struct Codes(Arc<Mutex<HashMap<String, HashSet<String>>>>);

impl Codes {
    /// Returns the label for a code.
    pub(super) fn label(&self, destination: &str, code: &str) -> String {
        if code.is_empty() {
            return String::new();
        }
        let mut codes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = codes.entry(destination.to_owned()).or_default();
        if known.contains(code) || known.len() < MAX_CODES && known.insert(code.to_owned()) {
            code.to_owned()
        } else {
            OTHER.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_without_number_count_as_other() {
        let codes = Codes::default();
        let labels: HashSet<String> = (0..1000).map(|code| codes.label("a", &code.to_string())).collect();
        assert_eq!(labels.len(), MAX_CODES + 1);
        assert!(labels.contains(OTHER));
        assert_eq!(codes.label("a", "0"), "0", "one that is known stays so");
        assert_eq!(codes.label("b", "999"), "999", "another destination has codes of its own");
    }
}
