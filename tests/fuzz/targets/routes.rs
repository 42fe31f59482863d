//! Globs, routes and templates: for any configuration and event they give the result of a simple implementation of their rules.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use outbox_relay::event::{Event, RowKey};
use outbox_relay::route::{Destinations, Route, Router};
use outbox_relay::sink::template::Template;
use wildmatch::WildMatch;

fn text(bytes: &mut Unstructured<'_>) -> Result<String> {
    Ok(bytes.arbitrary::<&str>()?.chars().take(48).collect())
}

fn event(bytes: &mut Unstructured<'_>) -> Result<Event> {
    Ok(Event {
        row: RowKey { locator: 0, partition: 1, id: 1, destination: String::new() },
        event_id: uuid::Uuid::from_u128(7),
        event_type: text(bytes)?,
        source: text(bytes)?,
        aggregate_type: bytes.arbitrary::<bool>()?.then(|| text(bytes)).transpose()?,
        aggregate_id: None,
        payload: b"{}".to_vec(),
        headers: vec![(text(bytes)?, text(bytes)?)],
        correlation_id: None,
        causation_id: None,
        schema_version: 1,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
        attempts: 0,
    })
}

/// Whether a glob matches, by its definition.
fn matches(glob: &[char], text: &[char]) -> bool {
    // `ends[n]`: the glob so far matches the first n characters.
    let mut ends = vec![false; text.len() + 1];
    ends[0] = true;
    for rule in glob {
        let mut next = vec![false; text.len() + 1];
        for at in 0..=text.len() {
            next[at] = match rule {
                '*' => ends[at] || at > 0 && next[at - 1],
                '?' => at > 0 && ends[at - 1],
                _ => at > 0 && ends[at - 1] && text[at - 1] == *rule,
            };
        }
        ends = next;
    }
    ends[text.len()]
}

fuzz_target!(|data: &[u8]| {
    run(&mut Unstructured::new(data)).ok();
});

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let event = event(bytes)?;
    let template = text(bytes)?;
    if let Ok(parsed) = template.parse::<Template>() {
        let source = if event.source.is_empty() { "default" } else { &event.source };
        let name = parsed.render(&event, "default");
        if parsed.fixed().is_some() {
            assert_eq!(name, template.replace("{{", "{").replace("}}", "}"));
        }
        // Only templates with one placeholder, because a value that looks like a placeholder is not replaced.
        if template.matches('{').count() == 1 && template.matches('}').count() == 1 {
            let expected = template
                .split('{')
                .enumerate()
                .map(|(n, part)| match part.split_once('}').filter(|_| n > 0) {
                    Some(("event_type", rest)) => format!("{}{rest}", event.event_type),
                    Some(("aggregate_type", rest)) => {
                        format!("{}{rest}", event.aggregate_type.as_deref().unwrap_or_default())
                    }
                    Some(("source", rest)) => format!("{source}{rest}"),
                    Some((other, _)) => panic!("the placeholder {other:?} was accepted"),
                    None => part.to_owned(),
                })
                .collect::<String>();
            assert_eq!(name, expected);
        }
    }

    let (mut routes, mut expected, mut taken) = (Vec::new(), Vec::new(), false);
    for _ in 0..bytes.int_in_range(1..=3)? {
        let glob = bytes.arbitrary::<bool>()?.then(|| text(bytes)).transpose()?;
        let source = bytes.arbitrary::<bool>()?.then(|| text(bytes)).transpose()?;
        let header = bytes.arbitrary::<bool>()?.then(|| Ok((text(bytes)?, text(bytes)?))).transpose()?;
        let destinations: Vec<usize> = (0..3).filter(|_| bytes.arbitrary().unwrap_or_default()).collect();
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        let takes = glob.as_ref().is_none_or(|glob| matches(&chars(glob), &chars(&event.event_type)))
            && source.as_ref().is_none_or(|source| *source == event.source)
            && header.as_ref().is_none_or(|header| event.headers.contains(header));
        if takes {
            taken = true;
            expected.extend(&destinations);
        }
        routes.push(Route {
            event_type: glob.as_deref().map(WildMatch::new),
            source,
            headers: BTreeMap::from_iter(header),
            destinations,
        });
    }
    expected.sort_unstable();
    expected.dedup();
    let answer = Router::new(routes, 3).route(&event);
    match (taken, expected.is_empty()) {
        (_, false) => assert_eq!(answer, Destinations::To(expected)),
        (true, true) => assert_eq!(answer, Destinations::Nowhere),
        (false, true) => assert_eq!(answer, Destinations::Unrouted),
    }
    Ok(())
}
