//! Classifies errors of Redis.

use redis::{ErrorKind, RedisError};

use crate::event::{Fault, PublishError};

/// The code of an unknown outcome: the connection was lost before the answer.
pub(super) const CONNECTION_LOST: &str = "connection_lost";

/// Returns the error of an error text of the server, with or without the `-` of the protocol.
pub(super) fn server_error(text: &str, one_key: bool) -> PublishError {
    let text = text.strip_prefix('-').unwrap_or(text);
    // The answer to an unknown command quotes its arguments, which are the event.
    let text = text.split(", with args beginning with").next().unwrap_or(text);
    let (code, message) = text.split_once(' ').unwrap_or((text, ""));
    let fault = classify(code, message, one_key);
    let error = |message: &str| PublishError {
        of_destination: concerns_no_event(code, message),
        ..PublishError::new(fault, code, message)
    };
    if code == "MOVED" {
        return error(&format!("{message}; of a cluster the URL begins with redis-cluster://"));
    }
    error(message)
}

/// Whether the connection is refused regardless of the event: it is not authenticated, or it lacks the right to run a command
/// that all events need. A missing right for a key or a channel concerns the events that go there.
fn concerns_no_event(code: &str, message: &str) -> bool {
    match code {
        "NOAUTH" | "WRONGPASS" => true,
        "NOPERM" => message.contains("to run the"),
        "ERR" => {
            message.starts_with("AUTH ")
                || message.starts_with("The user executing the script can't run")
                || message.starts_with("ACL failure in script") && message.contains("to run the")
        }
        _ => false,
    }
}

/// Classifies an error of the server. An error that is not known here pauses the destination.
fn classify(code: &str, message: &str, one_key: bool) -> Fault {
    match code {
        "NOAUTH" | "WRONGPASS" | "NOPERM" | "CROSSSLOT" => Fault::Misconfigured,
        "ERR"
            if [
                "unknown command",
                "Unknown Redis command called from script",
                "Unknown command called from script",   // the same in Valkey
                "The user executing the script can't ", // NOPERM, in Redis up to 7.0
                "ACL failure in script",                // NOPERM, in Valkey
                "invalid DB index",
                "AUTH ",
                "DB index is out of range",
                "This instance has cluster support disabled",
            ]
            .iter()
            .any(|start| message.starts_with(start)) =>
        {
            Fault::Misconfigured
        }
        // If each event names its key, a key of the wrong type concerns only the events that name it.
        "WRONGTYPE" if !one_key => Fault::Event,
        "WRONGTYPE" => Fault::Misconfigured,
        // LOADING, READONLY, OOM, MISCONF, CLUSTERDOWN, MASTERDOWN, NOREPLICAS, TRYAGAIN, BUSY, MOVED, ASK, too many clients, ...
        _ => Fault::Destination,
    }
}

/// Returns the error of a failed connect. No event was sent.
pub(super) fn connect_error(error: RedisError) -> PublishError {
    match error.kind() {
        ErrorKind::AuthenticationFailed => PublishError::new(Fault::Misconfigured, "WRONGPASS", error.to_string()),
        ErrorKind::InvalidClientConfig => PublishError::new(Fault::Misconfigured, "redis_address", error.to_string()),
        _ => match error.code() {
            Some(code) => server_error(&format!("{code} {}", error.detail().unwrap_or_default()), true),
            None => PublishError::new(Fault::Destination, "connect", error.to_string()),
        },
    }
    .of_destination()
}

/// Returns the error of a call: the server's own error, or a lost connection, after which the outcome is unknown.
pub(super) fn call_error(error: RedisError) -> PublishError {
    let detail = error.detail().unwrap_or_default();
    match error.code() {
        // Redis answers this just before it closes the connection.
        Some("ERR") if detail.starts_with("Protocol error") => {
            PublishError::new(Fault::Unknown, CONNECTION_LOST, detail)
        }
        Some(code) => server_error(&format!("{code} {detail}"), true),
        None => PublishError::new(Fault::Unknown, CONNECTION_LOST, error.to_string()),
    }
}

/// Whether the connection must be replaced after this error: it leads to the wrong server or is closed, or its user, password or
/// rights are outdated.
pub(super) fn wants_new_connection(error: &PublishError) -> bool {
    error.fault == Fault::Unknown
        || matches!(
            error.code.as_str(),
            "READONLY" | "NOAUTH" | "WRONGPASS" | "NOPERM" | "MASTERDOWN" | "CLUSTERDOWN" | "MOVED" | "ASK"
        )
}

/// Whether a call of the script may have been refused because of one of its keys. In a cluster all keys of a call are in one
/// slot, so a slot that moves concerns all of them.
pub(super) fn concerns_a_key(error: &PublishError, clustered: bool) -> bool {
    match error.code.as_str() {
        "NOPERM" => true,
        "CROSSSLOT" | "MOVED" | "ASK" => !clustered,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_class() {
        let table = [
            ("LOADING Redis is loading the dataset in memory", Fault::Destination),
            ("READONLY You can't write against a read only replica.", Fault::Destination),
            ("OOM command not allowed when used memory > 'maxmemory'.", Fault::Destination),
            ("-OOM command not allowed when used memory > 'maxmemory'.", Fault::Destination),
            ("MISCONF Redis is configured to save RDB snapshots", Fault::Destination),
            ("CLUSTERDOWN The cluster is down", Fault::Destination),
            ("MASTERDOWN Link with MASTER is down", Fault::Destination),
            ("NOREPLICAS Not enough good replicas to write.", Fault::Destination),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Fault::Destination),
            ("BUSY Redis is busy running a script.", Fault::Destination),
            ("ERR max number of clients reached", Fault::Destination),
            ("SOMETHING nobody has seen", Fault::Destination),
            ("NOAUTH Authentication required.", Fault::Misconfigured),
            ("WRONGPASS invalid username-password pair or user is disabled.", Fault::Misconfigured),
            ("NOPERM this user has no permissions to run the 'xadd' command", Fault::Misconfigured),
            ("CROSSSLOT Keys in request don't hash to the same slot", Fault::Misconfigured),
            ("ERR The user executing the script can't run this command or subcommand", Fault::Misconfigured),
            (
                "ERR ACL failure in script: User relay has no permissions to run the 'xadd' command",
                Fault::Misconfigured,
            ),
            ("ERR unknown command 'XADD', with args beginning with: 'events' 'secret'", Fault::Misconfigured),
            ("ERR Unknown Redis command called from script", Fault::Misconfigured),
            ("ERR Unknown command called from script script: 6ab3, on @user_script:12.", Fault::Misconfigured),
            ("ERR DB index is out of range", Fault::Misconfigured),
            ("ERR This instance has cluster support disabled", Fault::Misconfigured),
            ("ERR AUTH <password> called without any password configured", Fault::Misconfigured),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Fault::Misconfigured),
        ];
        for (text, fault) in table {
            assert_eq!(server_error(text, true).fault, fault, "{text}");
        }
        assert_eq!(server_error("WRONGTYPE Operation", false).fault, Fault::Event);
    }

    #[test]
    fn a_right_that_is_missing_for_a_key_concerns_its_events_and_any_other_no_event() {
        let of_destination = [
            "NOAUTH Authentication required.",
            "WRONGPASS invalid username-password pair or user is disabled.",
            "NOPERM User relay has no permissions to run the 'evalsha' command",
            "NOPERM this user has no permissions to run the 'xadd' command or its subcommand",
            "ERR The user executing the script can't run this command or subcommand",
            "ERR ACL failure in script: User relay has no permissions to run the 'xadd' command",
        ];
        let of_events = [
            "NOPERM No permissions to access a key",
            "NOPERM this user has no permissions to access one of the keys used as arguments",
            "ERR The user executing the script can't access at least one of the keys mentioned in the command arguments",
            "WRONGTYPE Operation against a key holding the wrong kind of value",
            "OOM command not allowed when used memory > 'maxmemory'.",
        ];
        assert!(of_destination.iter().all(|text| server_error(text, true).of_destination));
        assert!(!of_events.iter().any(|text| server_error(text, true).of_destination));
    }

    #[test]
    fn an_unknown_command_is_not_quoted_with_its_arguments() {
        let error = server_error("ERR unknown command 'XADD', with args beginning with: 'events' 'secret'", true);
        assert_eq!(error.to_string(), "ERR: unknown command 'XADD'");
    }
}
