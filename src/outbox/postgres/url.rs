//! Finds parameters of DATABASE_URL that are meant for other programs, and that would be ignored here without a word.

use crate::hosts::{Hosts, is_cut};

/// The parameters that the driver takes.
const TAKEN: [&str; 20] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    // These are not for the driver: the relay does what they ask for anyhow.
    "target_session_attrs",
    "channel_binding",
];

/// Parameters that change nothing that matters to the relay, which has its own timeouts, keepalive and encoding.
const HARMLESS: [&str; 12] = [
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "fallback_application_name",
    "client_encoding",
    "gssencmode",
    "sslcompression",
    "sslsni",
    "load_balance_hosts",
];

/// Fails if a part of the URL would be ignored. The reason has the cure, and no value.
pub(super) fn require_all_taken(url: &str, pooled: bool) -> Result<(), String> {
    // If a character of the password should have been encoded and is not, the rest of the password looks like a parameter.
    if is_cut(url) {
        return Ok(());
    }
    if Hosts::parse(url).is_some_and(|url| url.hosts.len() > 1) {
        return Err("it names several hosts, and the relay connects to one: name a host that leads to the primary, such as a DNS \
                    name or a proxy that follows it"
            .to_owned());
    }
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let mut reasons: Vec<String> = Vec::new();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=').or(Some((pair, "")))) {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_-[].".contains(c);
        if name.is_empty() {
            continue;
        }
        if name.len() > 40 || !name.chars().all(is_name) {
            reasons.push("a parameter after the ? has no name that the relay knows: take it away".to_owned());
        } else if let Some(cure) = cure(name, value, pooled) {
            reasons.push(format!("{name} {cure}"));
        }
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons.join("; ")) }
}

/// Returns what to do about a parameter that the relay would ignore.
fn cure(name: &str, value: &str, pooled: bool) -> Option<&'static str> {
    Some(match name {
        "target_session_attrs" if !["any", "read-write", "primary"].contains(&value) => {
            "asks for a server that cannot be written to: take it away, and name the primary"
        }
        "channel_binding" if value == "require" => {
            "cannot be required by this driver: take it away, and say sslmode=verify-full with sslrootcert"
        }
        "host" | "hostaddr" | "port" if value.contains(',') || value.contains("%2C") => {
            "names several hosts, and the relay connects to one: name a host that leads to the primary"
        }
        _ if TAKEN.contains(&name) || HARMLESS.contains(&name) || name.starts_with("options[") => return None,
        "schema" | "currentSchema" | "search_path" | "searchpath" => {
            "is another program's way to name the schema: say options=-csearch_path%3Dmy_schema"
        }
        "pgbouncer" if value != "true" || pooled => return None,
        "pgbouncer" | "prepareThreshold" | "prepare_threshold" | "statement_cache_size" | "prepared_statements" => {
            "is another program's way to say that a pooler is in between: take it away, and set RELAY_DATABASE_POOLED=true if so"
        }
        "connection_limit" | "pool_timeout" | "pool_size" | "max_connections" | "pool" | "socket_timeout" | "max" => {
            "is for the pool of another program: take it away; RELAY_LANES says how many connections the relay opens"
        }
        "statement_timeout" | "lock_timeout" | "idle_in_transaction_session_timeout" => {
            "would be ignored: set it for the role (alter role ... set), or take it away"
        }
        "ssl" | "sslaccept" | "sslidentity" | "sslpassword" | "sslverify" | "sslfactory" | "tls" => {
            "is another program's way to set up TLS: say sslmode, sslrootcert, sslcert and sslkey"
        }
        _ => "is not known to the relay: take it away",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(parameters: &str) -> String {
        require_all_taken(&format!("postgres://u:p@h:5432/d?{parameters}"), false).err().unwrap_or_default()
    }

    #[test]
    fn what_is_taken_or_harmless_passes() {
        for parameters in [
            "",
            "sslmode=verify-full&sslrootcert=/etc/ca.pem",
            "options=-csearch_path%3Dshop",
            "options[search_path]=shop",
            "host=/var/run/postgresql",
            "target_session_attrs=read-write&connect_timeout=10",
            "channel_binding=prefer",
            "pgbouncer=false",
        ] {
            assert_eq!(reason(parameters), "", "{parameters}");
        }
        assert_eq!(require_all_taken("postgres://h/d?pgbouncer=true", true), Ok(()));
    }

    #[test]
    fn what_would_be_ignored_is_named_with_its_cure_and_without_its_value() {
        for (parameters, name, cure) in [
            ("schema=shop", "schema", "options=-csearch_path%3D"),
            ("currentSchema=shop", "currentSchema", "options=-csearch_path%3D"),
            ("pgbouncer=true", "pgbouncer", "RELAY_DATABASE_POOLED=true"),
            ("connection_limit=5", "connection_limit", "RELAY_LANES"),
            ("pool_timeout=5", "pool_timeout", "RELAY_LANES"),
            ("sslaccept=strict", "sslaccept", "sslmode"),
            ("sslpassword=hidden", "sslpassword", "sslkey"),
            ("channel_binding=require", "channel_binding", "sslmode=verify-full"),
            ("target_session_attrs=standby", "target_session_attrs", "primary"),
            ("host=a,b", "host", "several hosts"),
            ("whatever=hidden", "whatever", "take it away"),
        ] {
            let reason = reason(parameters);
            assert!(reason.contains(name) && reason.contains(cure) && !reason.contains("hidden"), "{reason}");
        }
        let both = reason("schema=a&pool_timeout=3");
        assert!(both.contains("csearch_path") && both.contains("RELAY_LANES"), "{both}");
        assert!(!reason("p%40ss=1").contains("p%40ss"));
    }

    #[test]
    fn several_hosts_are_refused() {
        for url in ["postgres://u:p@a,b/d", "postgres://u:p@a:5432,b:5433/d?sslmode=require"] {
            assert!(require_all_taken(url, false).is_err_and(|reason| reason.contains("several hosts")), "{url}");
        }
    }
}
