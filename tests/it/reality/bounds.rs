//! The limits of texts and of header names, as the database enforces them.

use outbox_relay::event::{MAX_HEADERS_BYTES, MAX_TEXT_BYTES};
use outbox_relay::outbox::postgres::migrate::migrate;
use outbox_relay::secret::Secret;
use outbox_relay::{EmitError, NewEvent, NewEventError};
use sqlx::{Connection, PgConnection};

use crate::binary::drain;
use crate::harness::{Setup, column, count, refused, sql};
use crate::scripted::ScriptedSink;
use crate::servers::database;
use crate::stores::{Client, Postgres, Sqlite, Store};

const TEXTS: [&str; 5] = ["source", "aggregate_type", "aggregate_id", "correlation_id", "causation_id"];

/// A text of so many bytes that hardly compresses. Its characters have two bytes.
fn text_of(bytes: usize) -> String {
    let mut numbers = fastrand::Rng::with_seed(7);
    let mut text: String = (0..bytes / 2).map(|_| numbers.char('\u{80}'..='\u{7ff}')).collect();
    text.extend((text.len() < bytes).then_some('x'));
    assert_eq!(text.len(), bytes);
    text
}

/// Headers whose printed JSON has so many bytes.
fn headers_of(bytes: usize) -> String {
    let frame = r#"{"tenant": ""}"#.len();
    format!(r#"{{"tenant": "{}"}}"#, text_of(bytes - frame))
}

async fn at_a_bound_an_event_is_taken_and_one_byte_over_it_is_refused_by_name<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let bounds: Vec<(&str, String, String, String)> = TEXTS
        .iter()
        .map(|&name| {
            let rule = format!("{name}_has_at_most_16384_bytes");
            (name, text_of(MAX_TEXT_BYTES), text_of(MAX_TEXT_BYTES + 1), rule)
        })
        .chain([(
            "headers",
            headers_of(MAX_HEADERS_BYTES),
            headers_of(MAX_HEADERS_BYTES + 1),
            "headers_have_at_most_262144_bytes".to_owned(),
        )])
        .collect();
    for (column, fits, over, rule) in &bounds {
        let insert = |value: &str| format!("insert into event_outbox (event_type, {column}) values ('a', '{value}')");
        let words = refused(&mut connection, insert(over)).await;
        assert!(words.contains(rule), "{column}: {words}");
        sql(&mut connection, insert(fits)).await;
        let update = format!("update event_outbox set {column} = '{over}' where {column} = '{fits}'");
        let words = refused(&mut connection, update).await;
        assert!(words.contains(rule), "an update of {column}: {words}");
    }
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.accepted().len(), bounds.len());
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

async fn the_library_refuses_what_the_database_would<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let event = || NewEvent::from_json("a", "{}");
    let long = text_of(MAX_TEXT_BYTES + 1);
    let too_long = [
        event().source(&long),
        event().key(&long, "1"),
        event().key("order", &long),
        event().correlation_id(&long),
        event().causation_id(&long),
        event().header("tenant", text_of(MAX_HEADERS_BYTES)),
    ];
    for event in too_long {
        let refused = connection.emit(event).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::TooLong { .. })), "{refused}");
    }
    let fits = text_of(MAX_TEXT_BYTES);
    let fits = event().source(&fits).key(&fits, &fits).correlation_id(&fits).causation_id(&fits);
    connection.emit(fits.header("tenant", text_of(MAX_HEADERS_BYTES - 14))).await.unwrap();
}

async fn f99_a_header_is_known_by_its_name_trimmed_and_in_any_case<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let insert = |headers: &str| format!("insert into event_outbox (event_type, headers) values ('a', '{headers}')");
    for reserved in outbox_relay::event::RESERVED_HEADERS {
        let capital = reserved.to_uppercase();
        let spaced =
            [format!("{reserved} "), format!(" {capital}"), format!("{capital}\\t"), format!("\\n{reserved}\\u0001")];
        for name in std::iter::once(capital).chain(spaced) {
            let words = refused(&mut connection, insert(&format!(r#"{{"a": "b", "{name}": "x", "z": "y"}}"#))).await;
            assert!(words.contains("headers_take_no_reserved_name"), "{name}: {words}");
        }
    }
    for empty in ["", " ", "\\t \\r\\n"] {
        let words = refused(&mut connection, insert(&format!(r#"{{"a": "b", "{empty}": "x"}}"#))).await;
        assert!(words.contains("header_names_are_not_empty"), "{empty:?}: {words}");
    }
    sql(&mut connection, insert("{}")).await;
    let words = refused(&mut connection, r#"update event_outbox set headers = '{"Time ": "x"}'"#).await;
    assert!(words.contains("headers_take_no_reserved_name"), "{words}");
    // These names only resemble reserved names, and values may contain anything.
    let taken = r#"{"x-amzn-trace-id": "Root=1", "traceparent": "00-ab-cd-01", "tracestate": "a=b", "X-Tenant": "acme",
                    "_id": "1", "id2": "2", "my id": "3", "database": "4", "a": "id", "b": "{\"id\": \"x\"}", "c": ""}"#;
    sql(&mut connection, format!("update event_outbox set headers = '{taken}'")).await;
    sql(&mut connection, insert(taken)).await;
}

/// Characters that only Unicode counts as space or control characters.
const SPACES: [char; 9] =
    ['\u{80}', '\u{85}', '\u{a0}', '\u{1680}', '\u{2003}', '\u{2028}', '\u{202f}', '\u{205f}', '\u{3000}'];

async fn header_names_with_spaces_of_unicode_are_refused(connection: &mut impl Client) {
    let insert = |name: &str| {
        format!("insert into event_outbox (event_type, headers) values ('a', '{{\"a\": \"b\", \"{name}\": \"x\"}}')")
    };
    for space in SPACES {
        for name in [format!("id{space}"), format!("{space}Type"), format!("{space} data\\t{space}")] {
            let words = refused(connection, insert(&name)).await;
            assert!(words.contains("headers_take_no_reserved_name"), "{name:?}: {words}");
        }
        let words = refused(connection, insert(&format!("{space}{space}"))).await;
        assert!(words.contains("header_names_are_not_empty"), "{space:?}: {words}");
        sql(connection, insert(&format!("my{space}id"))).await;
    }
    for like in ["größe", "id名", "éid", "\u{200b}id", "€"] {
        sql(connection, insert(like)).await;
    }
}

#[tokio::test]
async fn f99_what_is_space_around_a_name_depends_on_no_locale() {
    let (database, file) = (database().await, Sqlite::new().await);
    header_names_with_spaces_of_unicode_are_refused(&mut file.connect().await).await;
    header_names_with_spaces_of_unicode_are_refused(&mut database.connect().await).await;
    let (base, name) = database.url().rsplit_once('/').unwrap();
    let name = format!("{}_c", name.split('?').next().unwrap());
    let create = format!("create database {name} template template0 encoding 'UTF8' lc_collate 'C' lc_ctype 'C'");
    sql(&mut database.connect().await, create).await;
    let url = format!("{base}/{name}");
    migrate(&Secret::inline(&url)).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    header_names_with_spaces_of_unicode_are_refused(&mut connection).await;
    // The relay treats none of the accepted names as reserved.
    assert_eq!(count(&mut connection, "event_outbox").await, 14);
    assert_eq!(drain(&url).len(), 14);
    connection.close().await.unwrap();
    sql(&mut database.connect().await, format!("drop database {name}")).await;
}

async fn a_row_older_than_a_rule_moves_and_is_asked_only_for_what_changes<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let (long, headers) = (text_of(MAX_TEXT_BYTES + 1), r#"{"ID": "x"}"#);
    let values = format!("('a', '{long}', '{long}', '{headers}')");
    let insert = format!("insert into event_outbox (event_type, source, aggregate_id, headers) values {values}");
    S::unruled(&mut connection, &insert).await;
    for change in [
        "status = 'scheduled'",
        "status = 'pending'",
        "destination = 'a'",
        "attempts = 1",
        "last_error = 'x'",
        "correlation_id = 'fits'",
        "source = source",
    ] {
        sql(&mut connection, format!("update event_outbox set {change}")).await;
    }
    let words = refused(&mut connection, format!("update event_outbox set aggregate_id = '{long}x'")).await;
    assert!(words.contains("aggregate_id_has_at_most_16384_bytes"), "{words}");
    sql(&mut connection, "update event_outbox set source = 'shop', aggregate_id = '1', headers = '{}'").await;
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["a"]);
}

async fn f99_an_old_row_whose_header_has_a_reserved_name_is_dead_lettered_alone<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for name in ["ID", "data ", ""] {
        let insert = "insert into event_outbox (event_type, aggregate_id, headers) values ";
        S::unruled(&mut connection, &format!(r#"{insert} ('sick', '1', '{{"{name}": "x"}}')"#)).await;
        sql(&mut connection, format!(r#"{insert} ('healthy', '1', '{{"tenant": "acme"}}')"#)).await;
    }
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["healthy"; 3]);
    let codes = column(&mut connection, "select error_code from event_dead_letter order by id").await;
    assert_eq!(codes, ["header_name_reserved", "header_name_reserved", "header_name_empty"]);
}

macro_rules! on_both_stores {
    ($($test:ident)*) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test::<super::Postgres>().await; })*
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test::<super::Sqlite>().await; })*
        }
    };
}

on_both_stores! {
    at_a_bound_an_event_is_taken_and_one_byte_over_it_is_refused_by_name
    the_library_refuses_what_the_database_would
    f99_a_header_is_known_by_its_name_trimmed_and_in_any_case
    a_row_older_than_a_rule_moves_and_is_asked_only_for_what_changes
    f99_an_old_row_whose_header_has_a_reserved_name_is_dead_lettered_alone
}
