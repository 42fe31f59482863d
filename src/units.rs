//! Times and sizes as people write them: `30s`, `5m`, `4MB`, `64KiB`.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, de};

/// A time with its unit, or a plain number of milliseconds.
///
/// # Errors
/// What would do.
pub(crate) fn milliseconds(text: &str, range: RangeInclusive<u64>) -> Result<Duration, String> {
    let text = text.trim();
    let time = match text.parse::<u64>() {
        Ok(number) => Some(Duration::from_millis(number)),
        Err(_) => humantime::parse_duration(text).ok(),
    };
    let shown = |ms: u64| shown(Duration::from_millis(ms));
    let fits = |time: &Duration| u64::try_from(time.as_millis()).is_ok_and(|ms| range.contains(&ms));
    time.filter(fits).ok_or_else(|| {
        format!(
            "a time from {} to {}, such as 500ms, 30s or 5m; a plain number is in milliseconds",
            shown(*range.start()),
            shown(*range.end())
        )
    })
}

/// A time that is always written with its unit, such as `7d`.
///
/// # Errors
/// What would do, with `example` as the example.
pub(crate) fn time(text: &str, range: RangeInclusive<Duration>, example: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text.trim()).ok().filter(|time| range.contains(time));
    time.ok_or_else(|| {
        format!("a time with its unit, such as {example}, from {} to {}", shown(*range.start()), shown(*range.end()))
    })
}

/// Writes a time as people do. Long ones are in days, because a year of humantime has 365.25 of them.
fn shown(time: Duration) -> String {
    const DAY: u64 = 24 * 60 * 60;
    match time.as_secs() {
        seconds if seconds > 30 * DAY && seconds % DAY == 0 => format!("{}d", seconds / DAY),
        _ => humantime::format_duration(time).to_string().replace(' ', ""),
    }
}

/// A size with its unit, or a plain number of bytes. `KB` is 1,000 bytes, `KiB` is 1,024.
///
/// # Errors
/// What would do.
pub(crate) fn bytes(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let size = text.trim().parse::<ByteSize>().ok().map(|size| size.as_u64());
    let shown = |bytes: u64| ByteSize::b(bytes).display().iec().to_string().replace(".0", "").replace(' ', "");
    size.filter(|size| range.contains(size)).ok_or_else(|| {
        format!(
            "a size from {} to {}, such as 64KiB or 4MB; a plain number is in bytes",
            shown(*range.start()),
            shown(*range.end())
        )
    })
}

/// A field of a destination that may be a number or a text: a plain number, or one with its unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Quantity(pub(crate) String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number, or a text with its unit")
            }

            fn visit_str<E>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity(text.to_owned()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_with_a_unit_or_in_milliseconds() {
        let hour = 1..=3_600_000;
        for (text, ms) in
            [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000), ("1500", 1500), (" 1s ", 1000)]
        {
            assert_eq!(milliseconds(text, hour.clone()), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "0", "-1", "2h", "1x", "ten", "1.5", "99999999999999999999"] {
            let error = milliseconds(text, hour.clone()).expect_err(text);
            assert_eq!(error, "a time from 1ms to 1h, such as 500ms, 30s or 5m; a plain number is in milliseconds");
        }
    }

    #[test]
    fn sizes_are_written_with_a_unit_or_in_bytes() {
        for (text, size) in
            [("4MB", 4_000_000), ("64KiB", 65_536), ("1 MiB", 1 << 20), ("1048576", 1 << 20), ("1.5KiB", 1536)]
        {
            assert_eq!(bytes(text, 1..=1 << 30), Ok(size), "{text}");
        }
        for text in ["", "0", "-1", "2GiB", "4 apples", "MB", "1e6", "1.5.2KB"] {
            let error = bytes(text, 1..=1 << 30).expect_err(text);
            assert_eq!(error, "a size from 1B to 1GiB, such as 64KiB or 4MB; a plain number is in bytes");
        }
    }
}
