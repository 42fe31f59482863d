//! Hides secrets in settings before they are shown in errors, in logs and by `relay check`.

use std::borrow::Cow;

use url::Url;

use crate::hosts::{Hosts, is_cut};

/// Returns a setting's value as it may be shown. If a part of it may be a password, the value is treated as a secret.
pub(crate) fn setting(value: &str) -> Cow<'_, str> {
    if may_hold_password(value) { Cow::Owned(hide(value)) } else { Cow::Borrowed(value) }
}

/// Whether a value that should not be secret may hold a password by mistake: it has the shape `...:password@...`, or contains
/// a word such as `password` and a `=`.
pub(crate) fn may_hold_password(value: &str) -> bool {
    let named = ["password", "passwd", "secret"].iter().any(|word| value.to_ascii_lowercase().contains(word));
    named && value.contains('=') || value.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
}

/// Returns a secret as it may be shown: a URL without its password and parameters, `***` for anything else.
pub fn hide(value: &str) -> String {
    match Url::parse(value) {
        // A user without a password may be a token. The check uses the text, because parsing removes parts of a path such as
        // `/@/../`.
        Ok(url) if url.has_host() && !is_cut(value) => {
            let host = url.host_str().unwrap_or_default();
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            // If a name contains an `@`, it is unclear where the name ends.
            let name = Some(url.username()).filter(|name| !name.is_empty() && !name.contains("%40"));
            let named = name.is_some() && url.password().is_some_and(|password| !password.is_empty());
            let user = if named { format!("{}:***@", url.username()) } else { String::new() };
            format!("{}://{user}{host}{port}{}", url.scheme(), url.path())
        }
        _ => match Hosts::parse(value) {
            Some(Hosts { scheme, user, hosts, path, .. }) => {
                let name = user.map(|user| user.split_once(':').map_or("", |(name, _)| name)).unwrap_or_default();
                let user = if name.is_empty() || name.contains('@') { String::new() } else { format!("{name}:***@") };
                let slash = if path.is_empty() { "" } else { "/" };
                format!("{scheme}://{user}{}{slash}{path}", hosts.join(","))
            }
            None => "***".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_url_shows_where_it_leads_and_nothing_secret() {
        assert_eq!(
            hide("postgres://app:s3cret@db.example:5433/shop?sslkey=x"),
            "postgres://app:***@db.example:5433/shop"
        );
        assert_eq!(hide("redis://:s3cret@cache/0"), "redis://cache/0");
        assert_eq!(
            hide("redis-sentinel://app:s3,c@ret@a:1,b:2,[::1]:3/0?master=m&sentinel_password=s3cret"),
            "redis-sentinel://app:***@a:1,b:2,[::1]:3/0"
        );
        assert_eq!(hide("redis-cluster://:s3cret@a:1,b"), "redis-cluster://a:1,b");
        assert_eq!(hide("redis-cluster://s3cret@a:1,b:2"), "redis-cluster://a:1,b:2");
        assert_eq!(hide("redis-cluster://app:s3/cret@a:1,b:2"), "***");
        assert_eq!(hide("redis://s3cret@cache/0"), "redis://cache/0");
        assert_eq!(hide("redis-cluster://app:/s3cret/@a/../b"), "***");
        assert_eq!(hide("redis://s3cret:@cache/0"), "redis://cache/0");
        assert_eq!(hide("postgres://app:12/s3cret@db/shop"), "***");
        assert_eq!(hide("file:/\\a/b://c%2Fs3cret@"), "***");
        assert_eq!(hide("postgres://app:12@s3cret#34@db/shop"), "postgres://app:***@db/shop");
        assert_eq!(hide("rediss-sentinel://s3cret@host%3a:***@a:507/0"), "rediss-sentinel://a:507/0");
        assert_eq!(hide("redis-cluster://s3cret@host%3a:***@a:1,b:2"), "redis-cluster://a:1,b:2");
        assert_eq!(hide("s3cret"), "***");
        assert_eq!(hide("host=db password=s3cret"), "***");
    }

    #[test]
    fn a_value_that_may_hold_a_password_is_not_shown() {
        for value in [":pw@host", "redis://:pw@host", "user:pw@host:1", "host=h password=pw", "tcp://u:p@w@h"] {
            assert!(may_hold_password(value), "{value}");
            assert!(!setting(value).contains("pw"), "{value}");
        }
        for value in ["cache.example", "tcp://10.0.0.1:6379", "shop@example", "[::1]", "orders:{event_type}"] {
            assert_eq!(setting(value), value);
        }
    }
}
