//! Entry points for tests/fuzz. They are compiled for fuzzing only.

use super::RedisAddress;
use super::fault::call_error;
use super::publish::{ScriptAnswer, answer, outcome};
use crate::event::{Outcome, PublishError};

/// Returns the outcomes of a chunk of `count` events whose script Redis answers with these bytes. `None`: states must be
/// recovered first.
pub fn publish(bytes: &[u8], keys: &[String], count: usize, one_key: bool) -> Option<Vec<Outcome>> {
    let value = redis::parse_redis_value(bytes).and_then(|value| value.extract_error().map_err(Into::into));
    match value.map_err(call_error).and_then(|value| answer(value, keys, i64::MAX, count)) {
        Ok(ScriptAnswer::States(_)) => None,
        Ok(ScriptAnswer::Replies(replies)) => Some(replies.split('\n').map(|reply| outcome(reply, one_key)).collect()),
        Err(error) => Some(vec![Outcome::Failed(error); count]),
    }
}

/// Returns an address as `relay check` shows it.
///
/// # Errors
/// The address cannot be used. The error is the one that `relay check` shows.
pub fn shown(address: &RedisAddress) -> Result<String, PublishError> {
    address.target().map(|target| target.to_string())
}
