//! Settings that are misspelt or in the wrong place, and the errors.

use crate::binary::finished;
use crate::harness::{count, sql};
use crate::servers::{Server, database};

const NOWHERE: (&str, &str) = ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");
const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");
const PASSWORD: &str = "cAnary-pAssword";

/// Creates a file with this text.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn f94_a_password_that_stands_where_it_does_not_belong_is_not_shown() {
    let url = format!("redis://:{PASSWORD}@cache:6379/0");
    for name in [
        "REDIS_HOST",
        "REDIS_PORT",
        "REDIS_DB",
        "REDIS_URL_FILE",
        "REDIS_PASSWORD_FILE",
        "DATABASE_URL_FILE",
        "RELAY_CONFIG",
        "RELAY_LANES",
        "RELAY_REDIS_MODE",
        "RELAY_LOG_RETENTION",
        "RELAY_LOG_FORMAT",
        "EVENT_SYSTEM_ENABLED",
        "RELAY_LANE",
    ] {
        let variables = [STDOUT, ("REDIS_HOST", "cache"), NOWHERE, (name, url.as_str())];
        let variables = if name == "DATABASE_URL_FILE" { [STDOUT, STDOUT, STDOUT, (name, &url)] } else { variables };
        for args in [&["--once"][..], &["check"], &["check", "--json"]] {
            let ended = finished(args, &variables);
            assert_eq!(ended.code, Some(2), "{name}: {ended:?}");
            assert!(!format!("{ended:?}").contains(PASSWORD), "{name}: {ended:?}");
        }
    }
    for host in [
        format!(":{PASSWORD}@cache"),
        format!("u:{PASSWORD}@cache:6379"),
        format!("{PASSWORD}@cache"),
        format!("//:{PASSWORD}@cache"),
    ] {
        let refused = finished(&["--once"], &[NOWHERE, ("REDIS_HOST", &host)]).exited(2);
        assert!(refused.complaint().starts_with("REDIS_HOST: the host cannot be used"), "{}", refused.stderr);
        assert!(!refused.stderr.contains(PASSWORD), "{}", refused.stderr);
        let text = format!("[destinations.a]\ntype = \"redis-stream\"\nhost = \"{host}\"");
        let refused =
            finished(&["--once"], &[NOWHERE, ("RELAY_CONFIG", file(&text).path().to_str().unwrap())]).exited(2);
        assert!(!refused.stderr.contains(PASSWORD), "{}", refused.stderr);
    }
    // A host that cannot contain a password is shown.
    finished(&["--once"], &[NOWHERE, ("REDIS_HOST", "cache/0")])
        .exited(2)
        .says(&["the host \"cache/0\" cannot be used"]);
    for text in [
        format!("[destinations.a]\ntype = \"{url}\""),
        format!("[destinations.a]\ntype = \"redis-stream\"\nhost = \"h\"\nport = \"{PASSWORD}\""),
        format!("[destinations.a]\ntype = \"redis-stream\"\nhost = [\"{PASSWORD}\"]"),
        format!("redis_port = \"{url}\""),
    ] {
        let refused =
            finished(&["--once"], &[NOWHERE, ("RELAY_CONFIG", file(&text).path().to_str().unwrap())]).exited(2);
        assert!(!refused.stderr.contains(PASSWORD), "{}", refused.stderr);
    }
    for args in [&["--once", &url][..], &[&url], &["--lanes", &url], &[&format!("--lanez={url}")]] {
        let refused = finished(args, &[NOWHERE, STDOUT]).exited(2);
        assert!(!refused.stderr.contains(PASSWORD), "{args:?}: {}", refused.stderr);
    }
}

#[tokio::test]
async fn f94_an_aws_endpoint_with_a_password_is_not_shown() {
    let database = database().await;
    for endpoint in [
        format!("http://u:{PASSWORD}@127.0.0.1:1"),
        format!("http://u:{PASSWORD}@127.0.0.1:port"),
        format!("u:{PASSWORD}@127.0.0.1"),
        format!("http://u:{PASSWORD}@[::1"),
    ] {
        let variables = [
            ("DATABASE_URL", database.url()),
            ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
            ("AWS_ENDPOINT_URL", &endpoint),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "key"),
            ("RELAY_LOG", "trace"),
        ];
        for args in [&["check"][..], &["--once"]] {
            let ended = finished(args, &variables).exited(2);
            assert!(ended.complaint().starts_with("AWS_ENDPOINT_URL: "), "{ended:?}");
            assert!(!format!("{ended:?}").contains(PASSWORD), "{endpoint}: {ended:?}");
        }
        let text = format!("[destinations.bus]\ntype = \"eventbridge\"\nbus = \"b\"\nendpoint_url = \"{endpoint}\"");
        let refused =
            finished(&["--once"], &[NOWHERE, ("RELAY_CONFIG", file(&text).path().to_str().unwrap())]).exited(2);
        assert!(refused.complaint().starts_with("destinations.bus.endpoint_url: "), "{refused:?}");
        assert!(!refused.stderr.contains(PASSWORD), "{refused:?}");
    }
}

#[test]
fn f96_all_unknown_variables_of_ours_are_named_at_once() {
    let refused =
        finished(&["--once"], &[NOWHERE, STDOUT, ("RELAY_LANE", "3"), ("RELAY_STDOUTT", "true"), ("RELAY_X", "")]);
    let refused = refused.exited(2);
    assert_eq!(
        refused.complaint(),
        "unknown variable RELAY_LANE; did you mean RELAY_LANES?; unknown variable RELAY_STDOUTT; did you mean RELAY_STDOUT?; \
         unknown variable RELAY_X"
    );
}

#[test]
fn f96_a_variable_that_may_be_a_neighbours_is_a_warning_with_the_nearest_name() {
    let variables = [
        ("EVENT_SYSTEM_ENABLED", "false"),
        ("REDIS_PASS", "x"),
        ("REDIS_PASWORD", "x"),
        ("EVENT_BATCH_SIZE", "5"),
        ("EVENT_MAX_RETRIES", "5"),
        ("DATABASE_URI", "x"),
        ("AWS_EVENTBRIDGE_BUS", "x"),
        ("EVENT_HORIZON", "x"),
        ("REDIS_SERVICE_HOST", "10.0.0.1"),
        ("REDIS_PORT_6379_TCP", "tcp://10.0.0.1:6379"),
    ];
    let warned = finished(&["--once"], &variables).exited(0);
    for part in [
        "unknown variable REDIS_PASS; did you mean REDIS_PASSWORD",
        "unknown variable REDIS_PASWORD; did you mean REDIS_PASSWORD?",
        "unknown variable EVENT_BATCH_SIZE; did you mean EVENT_OUTBOX_BATCH_SIZE?",
        "unknown variable EVENT_MAX_RETRIES; did you mean EVENT_DEFAULT_MAX_RETRIES?",
        "unknown variable DATABASE_URI; did you mean DATABASE_URL?",
        "unknown variable AWS_EVENTBRIDGE_BUS; did you mean AWS_EVENTBRIDGE_BUS_NAME?",
        "unknown variable EVENT_HORIZON\"",
    ] {
        assert!(warned.stderr.contains(part), "{part} is missing in:\n{}", warned.stderr);
    }
    assert_eq!(warned.stderr.matches("unknown variable").count(), 7, "{}", warned.stderr);
}

#[test]
fn f96_immediate_processing_may_be_off_and_nothing_else() {
    let off = ("EVENT_SYSTEM_ENABLED", "false");
    finished(&["--once"], &[off, ("EVENT_IMMEDIATE_PROCESSING", "false")]).exited(0);
    let refused = finished(&["--once"], &[off, ("EVENT_IMMEDIATE_PROCESSING", "true")]).exited(2);
    refused.says(&["EVENT_IMMEDIATE_PROCESSING", "events always go through the outbox"]);
}

#[tokio::test]
async fn f95_what_the_driver_says_is_told_in_words() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "drop table event_outbox cascade").await;
    let refused = finished(&["emit", "a"], &[("DATABASE_URL", database.url())]).exited(1);
    let complaint = refused.complaint();
    assert!(complaint.contains("does not exist") && !complaint.contains("at line"), "{complaint}");
    assert_eq!(complaint.matches("does not exist").count(), 1, "{complaint}");
}

#[tokio::test]
async fn f95_the_rights_that_the_guide_names_suffice_and_check_sees_each_that_is_missing() {
    let database = database().await;
    let mut connection = database.connect().await;
    let server = Server::start("redis", &[]);
    let mut admin = crate::stream::connect(server.url());
    let page = include_str!("../../../src/guide/destinations/redis.md");
    let line = page.lines().find(|line| line.starts_with("ACL SETUSER relay ")).unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    let mut acl = |words: &[&str]| {
        let mut command = redis::cmd("ACL");
        command.arg(words).exec(&mut admin).unwrap();
    };
    acl(&words[1..]);
    let url = format!("redis://relay:secret@127.0.0.1:{}", server.port());
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", url.as_str())];
    sql(&mut connection, "select emit_event('a')").await;
    let checked = finished(&["check"], &variables).exited(0).stdout;
    assert!(checked.contains("database 0, not encrypted, stream \"events\""), "{checked}");
    finished(&["--once"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    for right in words.iter().filter_map(|word| word.strip_prefix('+')) {
        acl(&["SETUSER", "relay", &format!("-{right}")]);
        let checked = finished(&["check"], &variables).exited(1).stdout;
        assert!(checked.contains("\nFAIL  destination redis: NOPERM"), "{right}: {checked}");
        acl(&["SETUSER", "relay", &format!("+{right}")]);
    }
    for keys in ["~events", "~{events}:relay:*"] {
        acl(&["SETUSER", "relay", "resetkeys", keys]);
        let checked = finished(&["check"], &variables).exited(1).stdout;
        assert!(checked.contains("\nFAIL  destination redis: NOPERM"), "{keys}: {checked}");
    }
    // A channel, with the right to ask about permissions.
    acl(&["SETUSER", "relay", "resetkeys", "~relay:*", "+publish", "+acl|whoami", "+acl|dryrun", "+info"]);
    let pubsub = [variables[0], variables[1], ("RELAY_REDIS_MODE", "pubsub"), ("RELAY_REDIS_CHANNEL", "c")];
    let checked = finished(&["check"], &pubsub).exited(1).stdout;
    assert!(checked.contains("\nFAIL  destination redis: NOPERM"), "{checked}");
    acl(&["SETUSER", "relay", "&c"]);
    finished(&["check"], &pubsub).exited(0);
    redis::cmd("CONFIG").arg(&["SET", "maxmemory-policy", "allkeys-lru"]).exec(&mut admin).unwrap();
    let checked = finished(&["check"], &pubsub).exited(0).stdout;
    assert!(checked.contains("maxmemory-policy allkeys-lru"), "{checked}");
}

#[tokio::test]
async fn f95_what_aws_lacks_is_said_in_two_sentences() {
    let database = database().await;
    let base = [
        ("DATABASE_URL", database.url()),
        ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("HOME", "/nonexistent"),
    ];
    let said = |more: &[(&str, &str)]| {
        let checked = finished(&["check"], &[&base[..], more].concat()).exited(1).stdout;
        checked.lines().find(|line| line.starts_with("FAIL")).unwrap().to_owned()
    };
    let no_credentials = said(&[("AWS_REGION", "eu-west-1")]);
    assert!(no_credentials.contains("there are no AWS credentials: ") && no_credentials.contains("AWS_PROFILE"));
    let no_region = said(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]);
    assert!(no_region.ends_with("there is no AWS region: set AWS_REGION"), "{no_region}");
    assert!(no_credentials.len() < 300 && no_region.len() < 300, "{no_credentials}\n{no_region}");
}
