//! The address of a Redis: one server, a cluster, or the server that the Sentinels name as master.

use std::fmt;

use redis::sentinel::SentinelNodeConnectionInfo;
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, TlsMode};

use crate::event::{Fault, PublishError};
use crate::hosts::{Hosts, is_cut, is_host_name};
use crate::secret::Secret;

const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// The address of a Redis. Secrets in files are read again at each connection.
#[derive(Debug, Clone)]
pub enum RedisAddress {
    /// A URL. It begins with `redis://`, `rediss://` (TLS) or `redis+unix://` for one server, with `redis-cluster://` and some
    /// nodes for a cluster, or with `redis-sentinel://`, the Sentinels and `?master=NAME`. The last two with TLS are
    /// `rediss-cluster://` and `rediss-sentinel://`.
    Url(Secret),
    /// The parts of the address of one server.
    Parts {
        /// The host name or IP address.
        host: String,
        /// The TCP port.
        port: u16,
        /// The number of the database.
        database: i64,
        /// The ACL user. `None`: `default`.
        username: Option<String>,
        /// The user's password.
        password: Option<Secret>,
    },
}

/// An address with its secrets. `Display` shows none of them.
pub(super) enum Target {
    /// One server.
    Single(ConnectionInfo),
    /// Some nodes of a cluster; the others are found through them.
    Cluster(Vec<ConnectionInfo>),
    /// The master of this name.
    Sentinel { sentinels: Vec<ConnectionInfo>, master: String, node: SentinelNodeConnectionInfo, database: i64 },
}

impl RedisAddress {
    /// Checks that the address can be read and is well-formed. Nothing is connected.
    ///
    /// # Errors
    /// The address cannot be read or used. The message says why.
    pub fn validate(&self) -> Result<(), PublishError> {
        self.target().map(drop)
    }

    /// Reads the address and its secrets.
    pub(super) fn target(&self) -> Result<Target, PublishError> {
        let read = |secret: &Secret| secret.read().map_err(|error| unusable(&error.to_string()));
        match self {
            Self::Url(url) => {
                let url = read(url)?;
                let (scheme, rest) = url.split_once("://").unwrap_or_default();
                let is_path = rest.starts_with('/') && !rest.split('?').next().unwrap_or_default().contains('@');
                match scheme.trim_start().to_ascii_lowercase().as_str() {
                    // The library would take the password as a part of the path.
                    "unix" | "redis+unix" | "valkey+unix" if !is_path => Err(unusable(
                        "the URL cannot be used: a socket's is redis+unix:///path/of/socket?db=0&user=name&pass=password",
                    )),
                    "redis-cluster" | "rediss-cluster" => cluster(&several(&url)?),
                    "redis-sentinel" | "rediss-sentinel" => sentinel(&several(&url)?),
                    // The library would take the text between two `@` of the password as the host.
                    "redis" | "rediss" | "valkey" | "valkeys" if is_cut(&url) => Err(unencoded()),
                    "redis" | "rediss" | "valkey" | "valkeys" | "unix" | "redis+unix" | "valkey+unix" => {
                        url.into_connection_info().map(Target::Single).map_err(no_url)
                    }
                    // The library would complete some other schemes, and take a password as the path.
                    _ => Err(no_url("it begins with no known scheme and ://")),
                }
            }
            Self::Parts { host, port, database, username, password } => {
                let mut settings = RedisConnectionInfo::default().set_db(*database);
                if let Some(username) = username {
                    settings = settings.set_username(username);
                }
                if let Some(password) = password {
                    settings = settings.set_password(read(password)?);
                }
                if !is_host(host) {
                    // A host with one of these may be a URL or hold a password.
                    let shown = if host.contains(['@', ':']) { String::new() } else { format!(" {host:?}") };
                    return Err(unusable(&format!(
                        "the host{shown} cannot be used: it is a name or an address alone, as in cache.example; a URL is set as \
                         REDIS_URL, or as url in a file"
                    )));
                }
                let info = (host.clone(), *port).into_connection_info().map_err(no_url)?;
                Ok(Target::Single(info.set_redis_settings(settings)))
            }
        }
    }
}

fn is_host(text: &str) -> bool {
    is_host_name(text) || text.parse::<std::net::Ipv6Addr>().is_ok()
}

fn unusable(reason: &str) -> PublishError {
    PublishError::new(Fault::Misconfigured, "redis_address", reason)
}

fn no_url(error: impl fmt::Display) -> PublishError {
    unusable(&format!(
        "the URL cannot be used: {error}; it is redis://user:password@host:port/database, or begins with rediss:// for TLS, \
         redis-cluster:// or redis-sentinel://"
    ))
}

fn several(url: &str) -> Result<Hosts<'_>, PublishError> {
    Hosts::parse(url).ok_or_else(unencoded)
}

fn unencoded() -> PublishError {
    unusable(
        "the URL cannot be used: it must be scheme://[user:password@]host:port,host:port,..., with @ / ? # : in a \
         password written as %40 %2F %3F %23 %3A",
    )
}

/// Makes a URL of each host. The client library then reads and decodes them.
fn each(
    url: &Hosts<'_>,
    user: Option<&str>,
    default_port: u16,
    database: &str,
) -> Result<Vec<ConnectionInfo>, PublishError> {
    let scheme = if url.scheme.starts_with("rediss") { "rediss" } else { "redis" };
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let one = |host: &&str| {
        let port = if has_port(host) { String::new() } else { format!(":{default_port}") };
        let url = format!("{scheme}://{user}{host}{port}/{database}");
        url.into_connection_info().map_err(no_url)
    };
    url.hosts.iter().map(one).collect()
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(']').map_or(host, |(_, rest)| rest).contains(':')
}

fn cluster(url: &Hosts<'_>) -> Result<Target, PublishError> {
    if !matches!(url.path, "" | "0") {
        return Err(unusable("the URL cannot be used: a cluster has database 0 only"));
    }
    if !url.query.is_empty() {
        return Err(unusable("the URL cannot be used: redis-cluster:// takes no parameters"));
    }
    each(url, url.user, REDIS_PORT, "").map(Target::Cluster)
}

fn sentinel(url: &Hosts<'_>) -> Result<Target, PublishError> {
    let (mut master, mut username, mut password) = (None, None, None);
    for (name, value) in url::form_urlencoded::parse(url.query.as_bytes()) {
        match name.as_ref() {
            "master" if !value.is_empty() => master = Some(value.into_owned()),
            "sentinel_username" => username = Some(value.into_owned()),
            "sentinel_password" => password = Some(value.into_owned()),
            _ => {
                return Err(unusable(
                    "the URL cannot be used: the parameters of redis-sentinel:// are master, sentinel_username and \
                     sentinel_password",
                ));
            }
        }
    }
    let Some(master) = master else {
        return Err(unusable(
            "the URL cannot be used: redis-sentinel:// needs ?master=NAME, the name the Sentinels know",
        ));
    };
    // The user and the database of the URL are those of the master.
    let info = each(url, url.user, SENTINEL_PORT, url.path)?;
    let settings = info[0].redis_settings().clone();
    let database = settings.db();
    let mut node = SentinelNodeConnectionInfo::default().set_redis_connection_info(settings);
    if url.scheme.starts_with("rediss") {
        node = node.set_tls_mode(TlsMode::Secure);
    }
    let mut own = RedisConnectionInfo::default();
    if let Some(username) = username {
        own = own.set_username(username);
    }
    if let Some(password) = password {
        own = own.set_password(password);
    }
    let sentinels = info.into_iter().map(|info| info.set_redis_settings(own.clone())).collect();
    Ok(Target::Sentinel { sentinels, master, node, database })
}

impl Target {
    /// Describes whether the connection is encrypted.
    pub(super) fn encryption(&self) -> &'static str {
        let address = match self {
            Self::Single(info) => Some(info.addr()),
            Self::Cluster(nodes) => nodes.first().map(ConnectionInfo::addr),
            Self::Sentinel { sentinels, .. } => sentinels.first().map(ConnectionInfo::addr),
        };
        match address {
            Some(ConnectionAddr::TcpTls { .. }) => "encrypted (TLS)",
            Some(ConnectionAddr::Unix(_)) => "over a local socket",
            _ => "not encrypted",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |nodes: &[ConnectionInfo]| nodes.iter().map(|info| info.addr().to_string()).collect::<Vec<_>>().join(", ");
        match self {
            Self::Single(info) => write!(f, "{}, database {}", info.addr(), info.redis_settings().db()),
            Self::Cluster(nodes) => write!(f, "cluster of {}", list(nodes)),
            Self::Sentinel { sentinels, master, database, .. } => {
                write!(f, "master {master:?} of the Sentinels {}, database {database}", list(sentinels))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Result<Target, PublishError> {
        RedisAddress::Url(Secret::inline(url)).target()
    }

    fn told(url: &str) -> String {
        match target(url) {
            Ok(target) => target.to_string(),
            Err(error) => panic!("{url}: {error}"),
        }
    }

    #[test]
    fn every_kind_of_address_is_told_without_secrets() {
        assert_eq!(told("redis+unix:///run/redis.sock?db=2&pass=s3cret"), "/run/redis.sock, database 2");
        assert_eq!(told("redis://u:s3cret@cache:7000/2"), "cache:7000, database 2");
        assert_eq!(told("redis-cluster://u:s3cret@a:7000,b,[::1]:7"), "cluster of a:7000, b:6379, ::1:7");
        assert_eq!(
            told("redis-sentinel://u:s3cret@a,b:7/3?master=main&sentinel_password=s3cret"),
            r#"master "main" of the Sentinels a:26379, b:7, database 3"#
        );
    }

    #[test]
    fn credentials_are_decoded_and_go_where_they_belong() {
        let Ok(Target::Cluster(nodes)) = target("rediss-cluster://app:p%40ss@a,b/0") else { panic!("no cluster") };
        for node in &nodes {
            assert!(matches!(node.addr(), redis::ConnectionAddr::TcpTls { insecure: false, .. }));
            assert_eq!(
                (node.redis_settings().username(), node.redis_settings().password()),
                (Some("app"), Some("p@ss"))
            );
        }
        let url = "redis-sentinel://app:one@a,b/3?master=m&sentinel_username=watch&sentinel_password=t%26wo";
        let Ok(Target::Sentinel { sentinels, database, .. }) = target(url) else { panic!("no Sentinels") };
        assert_eq!(database, 3);
        for sentinel in &sentinels {
            let settings = sentinel.redis_settings();
            assert_eq!((settings.username(), settings.password(), settings.db()), (Some("watch"), Some("t&wo"), 0));
        }
    }

    #[test]
    fn a_wrong_url_is_explained_without_its_secrets() {
        for (url, words) in [
            ("redis-cluster://u:s3cret@a:1,b:2/1", "database 0 only"),
            ("redis-cluster://u:s3cret@a:1?x=s3cret", "takes no parameters"),
            ("redis-cluster://u:s3cret/x@a:1,b:2", "%2F"),
            ("redis-cluster://u:s3cret@a:b", "host:port"),
            ("redis-sentinel://u:s3cret@a:1,b:2/0", "?master=NAME"),
            ("redis-sentinel://u:s3cret@a:1/0?master=", "the parameters of"),
            ("redis-sentinel://a:1/0?master=m&pasword=s3cret", "the parameters of"),
            ("redis-sentinel://u:s3cret@a:1/zero?master=m", "cannot be used"),
            ("redis://u:s3cret/x@cache", "%2F"),
            ("redis://u:pass@s3cret?x@cache", "%2F"),
            ("redis+unix://:@/s3cret/x@run/redis.sock", "&pass=password"),
            ("http://u:s3cret@a", "cannot be used"),
            ("s3cret", "cannot be used"),
            ("unix:/:s3cret@", "no known scheme"),
            ("unix:///:s3cret@", "&pass=password"),
        ] {
            let Err(error) = target(url) else { panic!("{url} was taken") };
            assert_eq!(error.fault, Fault::Misconfigured);
            assert!(error.message.contains(words) && !error.message.contains("s3cret"), "{url}: {error}");
        }
    }
}
