//! Times on the command line: a moment, or how long ago it was.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A time as people give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// So long before now.
    Ago(Duration),
    /// A time.
    At(OffsetDateTime),
}

impl Moment {
    /// Returns the time, to the millisecond, so that it can be shown and read again. `now` is by the database's clock.
    pub(super) fn at(self, now: OffsetDateTime) -> OffsetDateTime {
        let at = match self {
            Self::At(at) => at,
            // 1970 is as long ago as anybody can mean.
            Self::Ago(ago) => time::Duration::try_from(ago)
                .ok()
                .and_then(|ago| now.checked_sub(ago))
                .unwrap_or(OffsetDateTime::UNIX_EPOCH),
        };
        milliseconds(at)
    }
}

/// Reads a moment: `2026-11-29T12:00:00Z`, `2026-11-29 12:00:00` and `2026-11-29` in UTC, or `5m` and `7d` before now.
///
/// # Errors
/// How one is written.
pub(super) fn moment(text: &str) -> Result<Moment, String> {
    let text = text.trim();
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(Moment::Ago(ago));
    }
    let at = match text.len() {
        10 => humantime::parse_rfc3339_weak(&format!("{text} 00:00:00")),
        _ => humantime::parse_rfc3339_weak(text),
    };
    at.map(|at| Moment::At(at.into())).map_err(|_| {
        "a time is written 2026-11-29T12:00:00Z or 2026-11-29, in UTC, or 30m or 7d for so long ago".to_owned()
    })
}

/// Returns a moment without what is below a millisecond.
pub(super) fn milliseconds(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_millisecond(at.millisecond()).unwrap_or(at)
}

/// Returns a moment as [`moment`] reads it.
pub(super) fn shown(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_how_long_ago_it_was() {
        let at = |text: &str| moment(text).map(|moment| moment.at(OffsetDateTime::UNIX_EPOCH).unix_timestamp());
        assert_eq!(at("2026-01-01"), Ok(1_767_225_600));
        assert_eq!(at("2026-01-01 00:00:01"), Ok(1_767_225_601));
        assert_eq!(at("2026-01-01T00:00:01Z"), Ok(1_767_225_601));
        assert_eq!(at(" 1h "), Ok(-3600));
        assert_eq!(at("100000000y"), Ok(0));
        for text in ["", "yesterday", "2026-13-01", "12:00", "2026-01-01T00:00:00+05:00", "5 apples"] {
            assert!(moment(text).is_err_and(|reason| reason.contains("2026-11-29")), "{text}");
        }
    }
}
