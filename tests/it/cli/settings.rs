//! Settings that are refused, and the errors.

use super::{NOWHERE, STDOUT, file};
use crate::binary::{Finished, finished};

/// Runs a command that must be refused before relay connects to anything.
fn refused(variables: &[(&str, &str)]) -> Finished {
    let refused = finished(&["--once"], variables).exited(2);
    assert_eq!(refused.stdout, "");
    refused
}

#[test]
fn an_unknown_variable_is_named_and_the_likely_one_suggested() {
    for (unknown, meant) in [
        ("RELAY_LANE", "RELAY_LANES"),
        ("RELAY_REDIS_MAXLENGTH", "RELAY_REDIS_MAXLEN"),
        ("RELAY_GOST_BARRIER", "RELAY_GHOST_BARRIER"),
    ] {
        let refused = refused(&[NOWHERE, STDOUT, (unknown, "3")]);
        assert_eq!(refused.complaint(), format!("unknown variable {unknown}; did you mean {meant}?"));
    }
    let far_from_any = refused(&[NOWHERE, STDOUT, ("RELAY_QUANTUM_FLUX_CAPACITOR", "1")]);
    assert_eq!(far_from_any.complaint(), "unknown variable RELAY_QUANTUM_FLUX_CAPACITOR");
}

#[test]
fn a_value_out_of_range_is_refused_by_the_name_under_which_it_was_given() {
    for (variable, value, option) in [
        ("EVENT_OUTBOX_BATCH_SIZE", "0", "--batch-size"),
        ("EVENT_OUTBOX_BATCH_SIZE", "ten", "--batch-size"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "-1", "--polling-interval"),
        ("RELAY_LANES", "65", "--lanes"),
        ("EVENT_DEFAULT_TIMEOUT", "0", "--publish-timeout"),
        ("EVENT_EXPONENTIAL_BACKOFF", "perhaps", "--retry-exponential"),
        ("RELAY_LOG_RETENTION", "7", "--log-retention"),
        ("RELAY_REDIS_MODE", "queue", "--redis-mode"),
        ("RELAY_UNROUTED", "forget", "--unrouted"),
        ("REDIS_PORT", "66000", "--redis-port"),
        ("REDIS_DB", "-1", "--redis-db"),
    ] {
        refused(&[NOWHERE, STDOUT, (variable, value)]).says(&[option, variable, value]);
    }
    refused(&[NOWHERE, STDOUT, ("RELAY_LOG", "loud=very")]).says(&["RELAY_LOG"]);
    let by_option = finished(&["--once", "--lanes", "65"], &[NOWHERE, STDOUT]).exited(2).says(&["--lanes", "65"]);
    assert!(!by_option.stderr.contains("RELAY_LANES"), "{}", by_option.stderr);
}

/// Variables, and the parts of the error.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);

#[test]
fn what_contradicts_or_lacks_something_is_named() {
    let redis = ("REDIS_URL", "redis://127.0.0.1:1");
    let cases: [Case; 11] = [
        (&[STDOUT], &["DATABASE_URL is not set"]),
        (&[NOWHERE], &["no destination", "REDIS_URL", "AWS_EVENTBRIDGE_BUS_NAME", "RELAY_STDOUT"]),
        (&[NOWHERE, redis, ("REDIS_HOST", "cache")], &["both REDIS_URL and REDIS_HOST"]),
        (&[NOWHERE, redis, ("REDIS_PASSWORD", "x")], &["REDIS_PASSWORD", "REDIS_URL"]),
        (&[NOWHERE, redis, ("REDIS_USERNAME", "x")], &["REDIS_USERNAME", "REDIS_URL"]),
        (&[NOWHERE, redis, ("REDIS_URL_FILE", "/x")], &["both REDIS_URL and REDIS_URL_FILE"]),
        (
            &[NOWHERE, ("REDIS_HOST", "h"), ("REDIS_PASSWORD", "x"), ("REDIS_PASSWORD_FILE", "/x")],
            &["both REDIS_PASSWORD and REDIS_PASSWORD_FILE"],
        ),
        (&[NOWHERE, STDOUT, ("DATABASE_URL_FILE", "/x")], &["both DATABASE_URL and DATABASE_URL_FILE"]),
        (&[("DATABASE_URL", "mysql://h/d"), STDOUT], &["DATABASE_URL", "postgres://", "sqlite:"]),
        (&[("DATABASE_URL", "shop.db"), STDOUT], &["DATABASE_URL", "sqlite:"]),
        (&[NOWHERE, ("REDIS_URL", "http://cache:6379")], &["REDIS_URL"]),
    ];
    for (variables, parts) in cases {
        let refused = refused(variables);
        refused.complaint();
        refused.says(parts);
    }
}

#[test]
fn what_is_wrong_in_the_file_is_named() {
    let redis = "[destinations.r]\ntype = \"redis-stream\"\nurl = \"redis://127.0.0.1:1\"\n";
    let stdout = "[destinations.out]\ntype = \"stdout\"\n";
    let cases: [(&str, &[&str]); 20] = [
        ("batch_size = ", &["line 1"]),
        ("batch_size = 5\nbatch_size = 6", &["line 2", "duplicate key"]),
        ("\nbatch_sise = 5", &["line 2: unknown setting batch_sise; did you mean batch_size?"]),
        ("batch_size = 0", &["--batch-size", "0", "it stands in line 1 of "]),
        ("[destination.a]\ntype = \"stdout\"", &["line 1: unknown table [destination]", "[destinations.NAME]"]),
        ("log = \"info\"\n[[route]]\ndestinations = []", &["line 2: unknown table [route]", "[[routes]]"]),
        (
            "[destinations.f]\ntype = \"file\"\npath = \"/x\"\nformat = \"json\"",
            &["line 4: destinations.f.format: unknown variant", "`payload`"],
        ),
        ("[destinations.a]\npath = \"/x\"", &["line 1: destinations.a: missing field `type`", "redis-stream"]),
        (
            "[destinations.a]\ntype = \"file\"\npath = \"/tmp/x\"\n[destinations.b]\ntype = \"file\"\npath = \"/tmp/./x\"",
            &["two destinations use the file /tmp/x", "destinations.a", "destinations.b"],
        ),
        ("log = \"loud\"\nstdout = true", &["RELAY_LOG", "\"loud\" is no level", "TARGET=LEVEL"]),
        ("lanes = [1]", &["\"lanes\""]),
        ("[destinations.x]\ntype = \"kafka\"", &["kafka"]),
        (&format!("{redis}steam = \"s\""), &["steam"]),
        (&format!("{redis}host = \"h\""), &["destinations.r", "exactly one of url, url_file and host"]),
        (&format!("{redis}channel = \"c\""), &["destinations.r", "`channel`", "`stream`"]),
        (&format!("{redis}stream = \"{{tenant}}\""), &["destinations.r.stream", "unknown placeholder {tenant}"]),
        (&format!("{redis}stream = \"a{{b\""), &["destinations.r.stream", "without its partner"]),
        (
            &format!("{stdout}[[routes]]\nevent_type = \"order.*\"\ndestinations = [\"warehouse\"]"),
            &["routes", "\"warehouse\"", "there are out"],
        ),
        (&format!("{stdout}[[routes]]\nevent = \"x\"\ndestinations = []"), &["`event`"]),
        ("stdout = true\n[destinations.stdout]\ntype = \"stdout\"\n", &["two destinations \"stdout\""]),
    ];
    for (text, parts) in cases {
        let file = file(text);
        let path = file.path().to_str().unwrap();
        refused(&[NOWHERE, ("RELAY_CONFIG", path)]).says(parts);
        // As an option, which overrides the variable.
        for args in [&["--once", "--config", path][..], &["--once", &format!("--config={path}")]] {
            finished(args, &[NOWHERE, ("RELAY_CONFIG", "/nowhere")]).exited(2).says(parts);
        }
    }
    refused(&[NOWHERE, STDOUT, ("RELAY_CONFIG", "/nowhere/relay.toml")]).says(&["/nowhere/relay.toml", "No such file"]);
}

#[test]
fn an_unknown_placeholder_in_a_variable_is_named_with_the_known_ones() {
    for (variable, mode) in [("RELAY_REDIS_STREAM", "stream"), ("RELAY_REDIS_CHANNEL", "pubsub")] {
        let redis = ("REDIS_URL", "redis://127.0.0.1:1");
        let refused = refused(&[NOWHERE, redis, ("RELAY_REDIS_MODE", mode), (variable, "events:{tenant}")]);
        let reason = "unknown placeholder {tenant}; there are {event_type}, {aggregate_type} and {source}";
        assert_eq!(refused.complaint(), format!("{variable}: {reason}"));
    }
}

#[test]
fn a_secret_file_that_cannot_be_read_is_named() {
    refused(&[("DATABASE_URL_FILE", "/nowhere/url"), STDOUT]).says(&["DATABASE_URL", "/nowhere/url", "No such file"]);
    refused(&[NOWHERE, ("REDIS_URL_FILE", "/nowhere/url")]).says(&["REDIS_URL", "/nowhere/url", "No such file"]);
}

#[test]
fn a_port_that_kubernetes_set_for_a_service_is_explained() {
    let link = [NOWHERE, ("REDIS_HOST", "cache"), ("REDIS_PORT", "tcp://10.0.0.9:6379")];
    refused(&link).says(&["REDIS_PORT", "set by Kubernetes", "enableServiceLinks: false"]);
    // Kubernetes would not set this variable, so it is reported like any typing error.
    refused(&[NOWHERE, STDOUT, ("RELAY_PORT", "9464")]).says(&["unknown variable RELAY_PORT"]);
}

#[test]
fn switched_off_it_says_so_and_needs_nothing_else() {
    for args in [&["--once"][..], &["run"], &[]] {
        let off = finished(args, &[("EVENT_SYSTEM_ENABLED", "false")]).exited(0);
        assert_eq!(off.stdout, "");
        off.says(&["EVENT_SYSTEM_ENABLED is false: nothing is published"]);
    }
}
