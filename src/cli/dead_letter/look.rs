//! `relay dead-letter list` and `relay dead-letter show`.

use std::process::ExitCode;

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{ListArgs, ShowArgs};
use crate::cli::run::explained;
use crate::cli::table::{ago, pairs, table};
use crate::cli::{database, runtime, tell};
use crate::config::settings::Settings;
use crate::event::Key;
use crate::outbox::mend::{DeadLetter, Group, State, WholeDeadLetter};
use crate::text::shown;

/// The longest payload that is printed for people, in characters; JSON has all of it.
const MAX_PAYLOAD_CHARS: usize = 1 << 20;

pub(super) fn list(settings: &Settings, args: &ListArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let text = runtime(1)?.block_on(async {
        let mut mend = database.operate().mend().await.map_err(explained)?;
        let mut filter = args.filter.filter(&mut *mend).await?;
        // Whoever names an id means that dead letter, whatever became of it.
        filter.state = args.state.or(if filter.ids.is_empty() { Some(State::Open) } else { None });
        let now = mend.now().await.map_err(explained)?;
        if args.summary {
            let groups = mend.groups(&filter).await.map_err(explained)?;
            return Ok(if args.json { line(&json!({ "groups": groups })) } else { summary(now, &groups) });
        }
        let limit = args.limit.get();
        let mut letters = mend.dead_letters(&filter, i64::from(limit) + 1).await.map_err(explained)?;
        let more = u32::try_from(letters.len()).is_ok_and(|count| count > limit);
        letters.truncate(usize::try_from(limit)?);
        if args.json {
            let letters: Vec<Value> = letters.iter().map(with_state).collect();
            return Ok(line(&json!({ "dead_letters": letters, "more": more })));
        }
        let mut text = listed(now, &letters);
        if more {
            text.push_str(&format!("and more: --limit shows them, --summary counts them (shown: {limit})\n"));
        }
        anyhow::Ok(text)
    })?;
    tell(&text)
}

fn line(document: &Value) -> String {
    format!("{document}\n")
}

fn with_state(letter: &DeadLetter) -> Value {
    let mut value = json!(letter);
    value["state"] = json!(letter.state());
    value
}

fn listed(now: OffsetDateTime, letters: &[DeadLetter]) -> String {
    if letters.is_empty() {
        return "no dead letters\n".to_owned();
    }
    let row = |letter: &DeadLetter| {
        vec![
            letter.id.to_string(),
            ago(now, &letter.failed_at),
            destination(&letter.destination),
            letter.event_type.clone(),
            key(letter),
            redriven(letter),
            became(now, letter),
            error(&letter.error_code, &letter.error),
        ]
    };
    let names = ["ID", "FAILED", "DESTINATION", "TYPE", "KEY", "BEFORE", "STATE", "ERROR"];
    table(&names, &letters.iter().map(row).collect::<Vec<_>>())
}

/// Dead letters that failed alike, and how many they are.
pub(super) fn summary(now: OffsetDateTime, groups: &[Group]) -> String {
    if groups.is_empty() {
        return "no dead letters\n".to_owned();
    }
    let row = |group: &Group| {
        vec![
            group.count.to_string(),
            destination(&group.destination),
            group.types.to_string(),
            ago(now, &group.first_failed_at),
            ago(now, &group.last_failed_at),
            error(&group.error_code, &group.error),
        ]
    };
    let names = ["COUNT", "DESTINATION", "TYPES", "FIRST", "LAST", "ERROR"];
    table(&names, &groups.iter().map(row).collect::<Vec<_>>())
}

fn destination(name: &str) -> String {
    if name.is_empty() { "(none)".to_owned() } else { name.to_owned() }
}

fn key(letter: &DeadLetter) -> String {
    let aggregate_type = letter.aggregate_type.as_deref().unwrap_or_default();
    let key = letter.aggregate_id.as_deref().map(|aggregate_id| Key { aggregate_type, aggregate_id });
    key.map(|key| key.to_string()).unwrap_or_default()
}

fn redriven(letter: &DeadLetter) -> String {
    match letter.redrives {
        0 => String::new(),
        1 => "redriven once".to_owned(),
        times => format!("redriven {times} times"),
    }
}

/// What became of it, if anything did.
fn became(now: OffsetDateTime, letter: &DeadLetter) -> String {
    match (&letter.redriven_at, &letter.discarded_at) {
        (Some(at), _) => format!("redriven {}", ago(now, at)),
        (None, Some(at)) => format!("discarded {}", ago(now, at)),
        (None, None) => String::new(),
    }
}

fn error(code: &str, message: &str) -> String {
    if message.is_empty() { code.to_owned() } else { format!("{code}: {message}") }
}

pub(super) fn show(settings: &Settings, args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let (now, whole) = runtime(1)?.block_on(async {
        let mut mend = database.operate().mend().await.map_err(explained)?;
        let now = mend.now().await.map_err(explained)?;
        anyhow::Ok((now, mend.dead_letter(args.id).await.map_err(explained)?))
    })?;
    let whole = whole.ok_or_else(|| anyhow::anyhow!("there is no dead letter {}", args.id))?;
    tell(&if args.json { line(&document(&whole, args.payload)) } else { shown_whole(now, &whole, args.payload) })
}

fn document(whole: &WholeDeadLetter, with_content: bool) -> Value {
    let WholeDeadLetter { letter, content, others } = whole;
    let mut document = with_state(letter);
    document["source"] = json!(content.source);
    document["correlation_id"] = json!(content.correlation_id);
    document["causation_id"] = json!(content.causation_id);
    document["schema_version"] = json!(content.schema_version);
    document["priority"] = json!(content.priority);
    document["payload_bytes"] = json!(content.payload.len());
    document["header_names"] = json!(header_names(&content.headers));
    if with_content {
        let parsed = |text: &str| serde_json::from_str(text).unwrap_or_else(|_| json!(text));
        document["payload"] = parsed(&content.payload);
        document["headers"] = parsed(&content.headers);
    }
    document["others"] = others.iter().map(with_state).collect();
    document
}

fn header_names(headers: &str) -> Vec<String> {
    let headers: serde_json::Map<String, Value> = serde_json::from_str(headers).unwrap_or_default();
    headers.keys().cloned().collect()
}

fn shown_whole(now: OffsetDateTime, whole: &WholeDeadLetter, with_content: bool) -> String {
    let WholeDeadLetter { letter, content, others } = whole;
    let at = |time: &str| format!("{time} ({})", ago(now, time));
    let by = |time: &Option<String>, who: &Option<String>| match time {
        Some(time) => format!("{} by {}", at(time), who.as_deref().unwrap_or("somebody")),
        None => String::new(),
    };
    let optional = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut text = pairs(&[
        ("dead letter", letter.id.to_string()),
        ("state", letter.state().name().to_owned()),
        ("destination", destination(&letter.destination)),
        ("error", error(&letter.error_code, &letter.error)),
        ("attempts", letter.attempts.to_string()),
        ("first failed", at(&letter.first_failed_at)),
        ("failed", at(&letter.failed_at)),
        ("redriven", by(&letter.redriven_at, &letter.redriven_by)),
        ("redriven to", optional(&letter.redriven_to)),
        ("discarded", by(&letter.discarded_at, &letter.discarded_by)),
        ("reason", optional(&letter.discard_reason)),
        ("event", letter.event_id.clone()),
        ("sequence", letter.outbox_id.to_string()),
        ("type", letter.event_type.clone()),
        ("key", key(letter)),
        ("source", content.source.clone()),
        ("emitted", at(&letter.created_at)),
        ("priority", content.priority.to_string()),
        ("schema version", content.schema_version.to_string()),
        ("correlation id", optional(&content.correlation_id)),
        ("causation id", optional(&content.causation_id)),
        ("headers", header_names(&content.headers).join(", ")),
        ("payload", format!("{} bytes{}", content.payload.len(), if with_content { "" } else { " (--payload)" })),
    ]);
    if !others.is_empty() {
        text.push_str("\nthe same event before and after:\n");
        text.push_str(&listed(now, others));
    }
    if with_content {
        text.push_str(&format!(
            "\n{}\n{}\n",
            shown(&content.headers, MAX_PAYLOAD_CHARS),
            shown(&content.payload, MAX_PAYLOAD_CHARS)
        ));
    }
    text
}
