//! A status as text. A wide terminal gets tables, a narrow one gets a few short lines for each thing.

use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use crate::outbox::status::{
    BlockedKey, Count, DestinationStatus, MINUTES, MOST_COUNTED, MOST_KEYS, RelayStatus, State, Status, Unrouted,
};
use crate::text::shown;

/// Below this width there are no tables, in columns.
const NARROW: usize = 80;

/// Below this width the table of destinations has no sparklines, in columns.
const WIDE: usize = 98;

/// The longest name, key or error in a table or a line, in characters.
const MAX_NAME_CHARS: usize = 60;
const MAX_TEXT_CHARS: usize = 1000;

/// The bars of a sparkline, the lowest first.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Returns the status as text of `width` columns.
pub(super) fn text(status: &Status, width: usize, keys: bool) -> String {
    let mut page = Page { text: String::new(), width };
    page.line(&status.at);
    page.line("");
    if status.destinations.is_empty() {
        page.line("no destination: no relay has registered, and nothing is owed to any");
    } else {
        page.destinations(&status.destinations);
    }
    page.line("");
    page.line(&unrouted(&status.unrouted));
    for destination in status.destinations.iter().filter(|destination| destination.reason.is_some()) {
        let reason = destination.reason.as_deref().unwrap_or_default();
        let (name, state) = (shown(&destination.name, MAX_NAME_CHARS), state(destination));
        page.line(&format!("{name} is {state}: {}", shown(reason, MAX_TEXT_CHARS)));
    }
    for pause in status.destinations.iter().flat_map(|destination| &destination.pauses) {
        page.line(&shown(&pause.text, MAX_TEXT_CHARS));
    }
    for destination in status.destinations.iter().filter(|destination| destination.parked.count > 0) {
        let (name, parked) = (shown(&destination.name, MAX_NAME_CHARS), count(destination.parked));
        page.line(&format!("{name}: {parked} events are parked until a person acts"));
    }
    if keys {
        page.line("");
        page.keys(&status.blocked_keys);
    }
    page.line("");
    page.relays(&status.relays);
    if !status.obstacles.is_empty() {
        page.line("");
        page.line("in the way:");
        for obstacle in &status.obstacles {
            page.line(&format!("- {}: {}", obstacle.cause, shown(&obstacle.text, MAX_TEXT_CHARS)));
        }
    }
    for unread in &status.unread {
        page.line(&format!("not read: {}", shown(unread, MAX_TEXT_CHARS)));
    }
    page.text
}

struct Page {
    text: String,
    width: usize,
}

impl Page {
    /// Adds a line, wrapped between words.
    fn line(&mut self, line: &str) {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        self.text.push_str(&" ".repeat(indent));
        let mut used = indent;
        for (place, word) in text.split(' ').enumerate() {
            let length = word.chars().count();
            if place > 0 && used + 1 + length > self.width {
                self.text.push_str("\n  ");
                used = 2;
            } else if place > 0 {
                self.text.push(' ');
                used += 1;
            }
            // A word that is longer than a line is broken.
            for c in word.chars() {
                if used >= self.width {
                    self.text.push_str("\n  ");
                    used = 2;
                }
                self.text.push(c);
                used += 1;
            }
        }
        self.text.push('\n');
    }

    fn is_narrow(&self) -> bool {
        self.width < NARROW
    }

    /// Adds a table. The columns of `right` are numbers.
    fn table(&mut self, header: Vec<&str>, rows: Vec<Vec<String>>, right: std::ops::Range<usize>) {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(u16::try_from(self.width).unwrap_or(u16::MAX));
        table.set_header(header).add_rows(rows);
        for (place, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if right.contains(&place) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for line in table.lines() {
            self.text.push_str(line.trim_end());
            self.text.push('\n');
        }
    }

    fn destinations(&mut self, destinations: &[DestinationStatus]) {
        if self.is_narrow() {
            for destination in destinations {
                let DestinationStatus { name, retrying, waiting_behind, dead_letters, .. } = destination;
                self.line(&format!("{}: {}", shown(name, MAX_NAME_CHARS), state(destination)));
                self.line(&format!("  due {}, oldest {}", count(destination.pending), oldest(destination)));
                self.line(&format!("  retrying {}, behind {}", count(*retrying), count(*waiting_behind)));
                self.line(&format!("  dead letters (24 h) {}", count(*dead_letters)));
                let (rate, bars) = (rate(destination), sparkline(&destination.published_by_minute));
                self.line(&format!("  {rate}/s {bars}"));
            }
            return;
        }
        let wide = self.width >= WIDE;
        let rows = destinations.iter().map(|destination| {
            let mut row = vec![
                shown(&destination.name, MAX_NAME_CHARS),
                state(destination),
                oldest(destination),
                count(destination.pending),
                count(destination.retrying),
                count(destination.waiting_behind),
                count(destination.dead_letters),
                rate(destination),
            ];
            if wide {
                row.push(sparkline(&destination.published_by_minute));
            }
            row
        });
        let mut header = vec!["DESTINATION", "STATE", "OLDEST", "DUE", "RETRY", "BEHIND", "DEAD", "PER S"];
        if wide {
            header.push("LAST 15 MINUTES");
        }
        self.table(header, rows.collect(), 2..8);
    }

    fn keys(&mut self, keys: &[BlockedKey]) {
        if keys.is_empty() {
            self.line("no key is blocked");
            return;
        }
        let more = if keys.len() >= MOST_KEYS { format!(", the first {MOST_KEYS}") } else { String::new() };
        self.line(&format!("events that failed and are tried again, with what waits behind them by their keys{more}:"));
        for key in keys {
            let name = match &key.aggregate_id {
                Some(id) => {
                    let kind = key.aggregate_type.as_deref().unwrap_or_default();
                    let kind = if kind.is_empty() { String::new() } else { shown(kind, MAX_NAME_CHARS) + " " };
                    format!("key {kind}{}", shown(id, MAX_NAME_CHARS))
                }
                None => "no key".to_owned(),
            };
            let since = key.blocked_seconds.map_or_else(|| "an unknown time".to_owned(), span);
            let next = match key.next_attempt_seconds {
                Some(seconds) if seconds < 1.0 => "next try now".to_owned(),
                Some(seconds) => format!("next try in {}", span(seconds)),
                None => "next try when a person acts".to_owned(),
            };
            self.line(&format!(
                "- {} at {}: event {} ({}), failing for {since}, attempts {}, {next}, behind it {}: {}",
                name,
                shown(&key.destination, MAX_NAME_CHARS),
                key.outbox_id,
                shown(&key.event_type, MAX_NAME_CHARS),
                key.attempts,
                count(key.behind),
                shown(&key.error, MAX_TEXT_CHARS),
            ));
        }
    }

    fn relays(&mut self, relays: &[RelayStatus]) {
        if relays.is_empty() {
            self.line("no relay is at work");
            return;
        }
        if self.is_narrow() {
            for relay in relays {
                self.line(&format!("relay {} {}", shown(&relay.worker, MAX_NAME_CHARS), shown(&relay.version, 20)));
                self.line(&format!("  {}, for {}", life(relay), span(relay.age_seconds)));
                self.line(&format!("  to {}", shown(&relay.destinations.join(", "), MAX_TEXT_CHARS)));
                self.line(&format!("  holds {}", holds(relay)));
            }
            return;
        }
        let rows = relays.iter().map(|relay| {
            vec![
                shown(&relay.worker, MAX_NAME_CHARS),
                shown(&relay.version, 20),
                span(relay.age_seconds),
                life(relay).to_owned(),
                shown(&relay.destinations.join(", "), MAX_TEXT_CHARS),
                holds(relay),
            ]
        });
        self.table(vec!["RELAY", "VERSION", "SINCE", "IT IS", "DESTINATIONS", "HOLDS"], rows.collect(), 2..3);
    }
}

fn state(destination: &DestinationStatus) -> String {
    let word = match destination.state {
        State::Up => "up",
        State::Down => "down",
        State::Misconfigured => "misconfigured",
        State::Paused => "paused",
        State::NotConfigured => "not configured",
        State::NoRelay => "no relay",
    };
    match destination.state_seconds {
        Some(seconds) => format!("{word} for {}", span(seconds)),
        None => word.to_owned(),
    }
}

fn life(relay: &RelayStatus) -> &'static str {
    match (relay.alive, relay.hung, relay.once, relay.routes) {
        (Some(false), ..) => "gone",
        (_, true, ..) => "hangs",
        (None, ..) => "registered",
        (_, _, true, _) => "--once",
        (.., true) => "at work",
        (.., false) => "superseded",
    }
}

fn holds(relay: &RelayStatus) -> String {
    match (relay.batches, relay.partitions_held) {
        (Some(0), _) => "nothing".to_owned(),
        (Some(batches), Some(partitions)) => {
            let s = if batches == 1 { "" } else { "es" };
            format!("{batches} batch{s}, {partitions} partitions")
        }
        _ => "unknown".to_owned(),
    }
}

fn unrouted(unrouted: &Unrouted) -> String {
    let oldest = unrouted.oldest_due_seconds.map(|seconds| format!(", the oldest due for {}", span(seconds)));
    let rows = unrouted.estimated_rows.filter(|_| unrouted.pending.more);
    let rows = rows.map(|rows| format!(" (the outbox has about {} rows)", thousands(rows)));
    format!(
        "not yet claimed: {} pending{}{}; {} delayed",
        count(unrouted.pending),
        oldest.unwrap_or_default(),
        rows.unwrap_or_default(),
        count(unrouted.delayed)
    )
}

fn oldest(destination: &DestinationStatus) -> String {
    destination.oldest_due_seconds.map_or_else(|| "-".to_owned(), span)
}

/// A count that ended at its limit says so.
fn count(count: Count) -> String {
    if count.more { format!(">{}", thousands(count.count.max(MOST_COUNTED))) } else { thousands(count.count) }
}

fn rate(destination: &DestinationStatus) -> String {
    match destination.published_per_second {
        rate if rate <= 0.0 => "0".to_owned(),
        rate if rate < 10.0 => format!("{rate:.1}"),
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of events")]
        rate => thousands(rate.round() as u64),
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time of two units at most.
fn span(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.max(0.0)).map_or(u64::MAX, |span| span.as_secs());
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// One bar a minute, of which the highest is full. A minute without events has a blank.
fn sparkline(minutes: &[u64]) -> String {
    let most = minutes.iter().copied().max().unwrap_or_default();
    let bar = |&count: &u64| match count {
        0 => ' ',
        count => {
            let place = (u128::from(count) * BARS.len() as u128).div_ceil(u128::from(most)).saturating_sub(1);
            usize::try_from(place).ok().and_then(|place| BARS.get(place)).copied().unwrap_or('█')
        }
    };
    let line: String = minutes.iter().map(bar).collect();
    if most == 0 { "·".repeat(MINUTES) } else { line.replace(' ', "·") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_is_as_high_as_its_highest_minute() {
        assert_eq!(sparkline(&[0, 1, 50, 100]), "·▁▄█");
        assert_eq!(sparkline(&[u64::MAX, u64::MAX / 2]), "█▄");
        assert_eq!(sparkline(&[0; MINUTES]).chars().count(), MINUTES);
    }

    #[test]
    fn times_and_counts_are_short() {
        let spans = [0.4, 59.9, 61.0, 3_725.0, 90_000.0, -1.0, f64::INFINITY].map(span);
        assert_eq!(spans[..6], ["0s", "59s", "1m01s", "1h02m", "1d01h", "0s"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(count(Count { count: 1000, more: true }), ">1,000");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let mut status = Status { at: "2026-01-01 00:00:00Z".to_owned(), ..Status::default() };
        for name in ["a", &"long".repeat(30)] {
            let mut destination = DestinationStatus::new(name);
            destination.state = State::Down;
            destination.state_seconds = Some(100.0);
            destination.reason = Some("refused ".repeat(30) + &"x".repeat(100));
            status.destinations.push(destination);
        }
        status.blocked_keys.push(BlockedKey {
            destination: "a".to_owned(),
            aggregate_type: Some("order".to_owned()),
            aggregate_id: Some("4\n2".to_owned()),
            outbox_id: 7,
            event_type: "order.created".to_owned(),
            attempts: 2,
            blocked_seconds: Some(3.0),
            next_attempt_seconds: None,
            error: "bad".to_owned(),
            behind: Count { count: 3, more: false },
        });
        status.relays.push(RelayStatus {
            worker: "host:1".to_owned(),
            version: "0.1.0".to_owned(),
            age_seconds: 7.0,
            alive: Some(true),
            once: false,
            hung: false,
            routes: true,
            destinations: vec!["a".to_owned(); 40],
            partitions_held: Some(3),
            batches: Some(1),
        });
        for width in [40, 79, 80, 100, 200] {
            let text = text(&status, width, true);
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(width), "{width}:\n{text}");
            assert!(width >= NARROW || text.contains("\n  due 0"), "{text}");
            assert!(text.contains("down for 1m40s") && text.contains("4\\n2"), "{text}");
        }
    }
}
