//! Reads URLs with several hosts, `scheme://[user:password@]host[:port],.../path?query`, which no URL library reads.

/// The parts of a URL with several hosts. Nothing is percent-decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hosts<'a> {
    /// What stands before `://`.
    pub(crate) scheme: &'a str,
    /// `user:password`. Either of them may be missing.
    pub(crate) user: Option<&'a str>,
    /// `host` or `host:port`; IPv6 addresses in brackets.
    pub(crate) hosts: Vec<&'a str>,
    /// What follows the `/` after the hosts.
    pub(crate) path: &'a str,
    /// What follows the `?`.
    pub(crate) query: &'a str,
}

impl<'a> Hosts<'a> {
    /// Takes `url` apart. `None`: it is no such URL, or a character of its password should have been percent-encoded, so that
    /// what looks like a host may be a part of the password.
    pub(crate) fn parse(url: &'a str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        let hosts: Vec<_> = hosts.split(',').collect();
        let sound = is_scheme(scheme) && hosts.iter().all(|host| is_host(host));
        (sound && !path.contains('@') && !query.contains('@')).then_some(Self { scheme, user, hosts, path, query })
    }
}

/// Whether an `@` comes after the end of the host. If so, what looks like the host may be a part of a password that has a `/`,
/// `\`, `?` or `#`.
pub(crate) fn is_cut(url: &str) -> bool {
    // Only a `://` after a scheme begins the host. Without it the whole text counts: a lenient parser also takes fewer slashes.
    let rest = url.split_once("://").filter(|(scheme, _)| is_scheme(scheme.trim_start())).map_or(url, |(_, rest)| rest);
    rest.find(['/', '\\', '?', '#']).is_some_and(|end| rest[end..].contains('@'))
}

fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// Whether the text is a host name or an IPv4 address, and nothing else.
pub(crate) fn is_host_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-._".contains(c))
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) if address.chars().all(|c| c.is_ascii_hexdigit() || ":.%".contains(c)) => (address, rest),
        Some(_) => return false,
        None => {
            let (name, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            if !is_host_name(name) {
                return false;
            }
            (name, port)
        }
    };
    !name.is_empty() && (port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart() {
        let url = "redis-sentinel://app:a,b%40c@one:26379,two,[::1]:7/3?master=main";
        assert_eq!(
            Hosts::parse(url),
            Some(Hosts {
                scheme: "redis-sentinel",
                user: Some("app:a,b%40c"),
                hosts: vec!["one:26379", "two", "[::1]:7"],
                path: "3",
                query: "master=main",
            })
        );
        assert_eq!(Hosts::parse("a://b").map(|url| url.hosts), Some(vec!["b"]));
    }

    #[test]
    fn what_may_be_a_part_of_a_password_is_no_host() {
        for url in [
            "x://u:pa/ss@h:1",
            "x://u:12/ss@h:1",
            "x://u:12?ss@h",
            "x://h:1,",
            "x://",
            "h:1,h:2",
            "x://h:99999",
            "x://[::1:7",
        ] {
            assert_eq!(Hosts::parse(url), None, "{url}");
        }
    }
}
