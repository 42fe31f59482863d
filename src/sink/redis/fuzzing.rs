//! Ways in for tests/fuzz; compiled for nothing else.

use super::RedisAddress;
use super::fault::call_error;
use super::publish::{ScriptAnswer, answer, outcome};
use crate::event::{Outcome, PublishError};

/// What becomes of a chunk of `count` events whose script is answered with these bytes. `None`: states are to be recovered first.
pub fn publish(bytes: &[u8], keys: &[String], count: usize, one_key: bool) -> Option<Vec<Outcome>> {
    let value = redis::parse_redis_value(bytes).and_then(|value| value.extract_error().map_err(Into::into));
    match value.map_err(call_error).and_then(|value| answer(value, keys, i64::MAX, count)) {
        Ok(ScriptAnswer::States(_)) => None,
        Ok(ScriptAnswer::Replies(replies)) => Some(replies.split('\n').map(|reply| outcome(reply, one_key)).collect()),
        Err(error) => Some(vec![Outcome::Failed(error); count]),
    }
}

/// An address as `relay check` shows it.
///
/// # Errors
/// It cannot be used; what is shown then.
pub fn shown(address: &RedisAddress) -> Result<String, PublishError> {
    address.target().map(|target| target.to_string())
}
