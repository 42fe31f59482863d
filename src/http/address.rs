//! The setting that says where the HTTP server listens.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// The port of the default.
const PORT: u16 = 9464;

/// Where the HTTP server listens, if anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpAddress {
    /// There is no server.
    Off,
    /// It listens here. Port 0 lets the system choose one.
    On(SocketAddr),
}

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("off") {
            return Ok(Self::Off);
        }
        let text = match text.split_once("localhost:") {
            Some(("", port)) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
            _ => text.to_owned(),
        };
        text.parse().map(Self::On).map_err(|_| {
            format!(
                "it is an address and a port, such as 127.0.0.1:{PORT}, [::1]:{PORT} or, for every network of this machine, \
                 0.0.0.0:{PORT}; or off"
            )
        })
    }
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On(address) => address.fmt(f),
        }
    }
}

/// Returns whether a request with this `Host` header may be answered by a server that listens on loopback only. A web page on
/// the internet can let its own name point to 127.0.0.1, and so make a browser of this machine ask the relay in its name.
pub(crate) fn is_loopback_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_anything_else_is_refused_with_examples() {
        for (text, read) in [
            ("off", "off"),
            ("OFF", "off"),
            ("127.0.0.1:9464", "127.0.0.1:9464"),
            ("localhost:80", "127.0.0.1:80"),
            ("[::1]:0", "[::1]:0"),
            ("0.0.0.0:9464", "0.0.0.0:9464"),
        ] {
            assert_eq!(text.parse::<HttpAddress>().map(|address| address.to_string()).as_deref(), Ok(read));
        }
        for wrong in
            ["", "9464", ":9464", "example.com:9464", "127.0.0.1", "http://127.0.0.1:9464", "127.0.0.1:66000", "on"]
        {
            let error = wrong.parse::<HttpAddress>().expect_err(wrong);
            assert!(error.contains("0.0.0.0:9464") && error.contains("off"), "{error}");
        }
    }

    #[test]
    fn only_names_of_this_machine_are_loopback_hosts() {
        for host in ["localhost", "LOCALHOST:9464", "127.0.0.1", "127.0.0.1:9464", "127.8.8.8:1", "[::1]", "[::1]:9464"]
        {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9464",
            "localhost.evil.example",
            "10.0.0.1:9464",
            "127.0.0.1.nip.io",
            "[::2]:1",
        ] {
            assert!(!is_loopback_host(host), "{host}");
        }
    }
}
