//! Wrong clocks: time is the database's; a relay's own clock decides nothing about events.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Line, load, stop, until_empty};
use crate::binary::Running;
use crate::harness::{column, count, sql};
use crate::stream;
use crate::support::unique;

/// The library that gives a program a wrong time.
fn libfaketime() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").unwrap().map(|folder| folder.unwrap().path());
    let mut found = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).filter(|file| file.exists());
    found.next().expect("libfaketime is not installed: run `make test`, or `tests/setup` once")
}

/// A relay whose clock is off by the offset in the file, which may change at any moment.
fn with_clock(line: &Line, offset: &Path, more: &[(&str, &str)]) -> Running {
    let library = libfaketime();
    let mut settings = vec![
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("FAKETIME_TIMESTAMP_FILE", offset.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        // As when a real clock is set, the monotonic clock stays right.
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    settings.extend(more);
    line.start(&settings)
}

fn offset(by: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), by).unwrap();
    file
}

#[tokio::test]
async fn f09_clocks_an_hour_off_and_clocks_that_jump_change_nothing_about_events() {
    let line = Line { stream: format!("{}:{{event_type}}", unique("clock")), ..Line::new().await };
    let of_type = |name: &str| line.stream.replace("{event_type}", name);
    let mut connection = line.connect().await;
    let mut redis = stream::connect(&line.redis_url);
    redis::cmd("SET").arg(of_type("poison")).arg("no stream").exec(&mut redis).unwrap();
    let (ahead, behind) = (offset("+3600"), offset("-3600"));
    // Checks that the library works and is not ignored.
    let mut date = Command::new("date");
    date.arg("+%s").env("LD_PRELOAD", libfaketime()).env("FAKETIME_TIMESTAMP_FILE", ahead.path());
    let told: i64 = String::from_utf8(date.output().unwrap().stdout).unwrap().trim().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!((told - now.cast_signed() - 3600).abs() < 60, "{told} is not an hour ahead of {now}");

    let settings = [
        ("EVENT_OUTBOX_BATCH_SIZE", "20"),
        ("EVENT_DEFAULT_MAX_RETRIES", "2"),
        ("EVENT_DEFAULT_BACKOFF_MS", "500"),
        ("EVENT_EXPONENTIAL_BACKOFF", "false"),
        ("EVENT_BACKOFF_JITTER", "false"),
    ];
    let relays = [
        with_clock(&line, ahead.path(), &settings),
        with_clock(&line, behind.path(), &settings),
        line.start(&settings),
    ];
    let mut numbers = 0;
    for round in 0..6 {
        load(&mut connection, 500, 20).await;
        let insert = format!(
            "select emit_event('delayed', delay => interval '700 ms'), emit_event('poison', aggregate_id => 'p{round}')
             from generate_series(1, 3)"
        );
        sql(&mut connection, insert).await;
        numbers += 506;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await; // the interval between two changes
        let (one, other) = if round % 2 == 0 { ("-3600", "+3600") } else { ("+3600", "-3600") };
        std::fs::write(ahead.path(), one).unwrap();
        std::fs::write(behind.path(), other).unwrap();
    }
    until_empty(&mut connection).await;
    for relay in relays {
        assert!(!relay.log().contains("panic"), "{}", relay.log());
        stop(relay);
    }
    let arrived = stream::entries(&mut redis, &of_type("a"));
    let arrived = arrived.iter().map(|entry| (entry.fields["subject"].clone(), entry.sequence()));
    assert_eq!(super::assert_first_in_order(arrived), (3000, 0));
    assert_eq!(stream::length(&mut redis, &of_type("delayed")), 18);
    let log = "select concat_ws(' ', event_type, status, attempt, count(*)) from event_processing_log
               group by event_type, status, attempt order by 1";
    let expected = [
        "a published 1 3000",
        "delayed published 1 18",
        "poison dead_lettered 3 18",
        "poison failed 1 18",
        "poison failed 2 18",
    ];
    assert_eq!(column(&mut connection, log).await, expected);
    assert_eq!(count(&mut connection, "event_processing_log").await, numbers + 36);
    // An attempt is due 500 ms after the failure was recorded. The log row is written last in a settle, and a settle can take
    // long on a busy machine, so half of the time must have passed.
    let early = "event_processing_log p join event_processing_log q using (outbox_id)
                 where p.attempt = q.attempt - 1 and q.processed_at < p.processed_at + interval '250 ms'";
    assert_eq!(count(&mut connection, early).await, 0, "some attempts came too early");
    let off = "event_processing_log where abs(extract(epoch from processed_at - now())) > 600";
    assert_eq!(count(&mut connection, off).await, 0, "some times come from a relay's clock");
}
