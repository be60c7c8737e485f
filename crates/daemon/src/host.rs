//! Host names that a program accepts from clients that show no key.
//!
//! A web page can make its visitor's browser send requests to this machine under the page's own name (DNS
//! rebinding), and read the responses. Such a request carries that name in `Host`. A key would
//! keep the page out, since it has none.

use std::{fmt, net::IpAddr, str::FromStr};

use hyper::{
    HeaderMap, Uri,
    header::{self, HeaderValue},
    http::uri::Authority,
};

/// A host of the setting `ALLOWED_HOSTS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedHost {
    /// `*`: whatever a client writes.
    Any,
    /// A name in lower case, without a dot at its end.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl FromStr for AllowedHost {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some(address) = address(text) {
            return Ok(Self::Address(address));
        }
        let name = name(text);
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if name.is_empty() || name.len() > 253 || !name.bytes().all(sane) {
            return Err("it should be a host name or an address, without a port; or * for any");
        }
        Ok(Self::Name(name))
    }
}

impl fmt::Display for AllowedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Name(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// An IPv4 address, or an IPv6 address with or without its brackets.
fn address(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// A name as it is compared.
fn name(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

/// Whether a request is for a host that is this machine under its own names, or in `allowed`. `local` is the address
/// that the client connected to.
pub fn is_allowed(uri: &Uri, headers: &HeaderMap, local: Option<IpAddr>, allowed: &[AllowedHost]) -> bool {
    let local = local.map(|address| address.to_canonical());
    // A request line may name a host, too, and then it is the one that counts (RFC 9112, 3.2.2).
    let line = uri.authority().map(Authority::host);
    // No browser leaves the header out, or empty. One that is no authority names no host of this machine.
    let header = headers.get(header::HOST).map(HeaderValue::as_bytes).filter(|host| !host.is_empty());
    let Ok(header) = header.map(Authority::try_from).transpose() else { return false };
    let mut hosts = line.into_iter().chain(header.as_ref().map(Authority::host));
    hosts.all(|host| is_served(host, local, allowed))
}

fn is_served(host: &str, here: Option<IpAddr>, allowed: &[AllowedHost]) -> bool {
    if allowed.contains(&AllowedHost::Any) {
        return true;
    }
    // An address, unlike a name, cannot be pointed at this machine by others.
    if let Some(address) = address(host) {
        return address.is_loopback()
            || Some(address) == here
            || allowed.contains(&AllowedHost::Address(address));
    }
    let name = name(host);
    name == "localhost" || name.ends_with(".localhost") || allowed.contains(&AllowedHost::Name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a request to this machine's address `here` is served.
    fn served(here: &str, host: &str, allowed: &[&str]) -> bool {
        let allowed: Vec<AllowedHost> = allowed.iter().map(|host| host.parse().unwrap()).collect();
        let host: Authority = host.parse().unwrap();
        is_served(host.host(), Some(here.parse().unwrap()), &allowed)
    }

    #[test]
    fn without_keys_only_names_of_this_machine_are_served() {
        for host in [
            "localhost",
            "LocalHost:8000",
            "localhost.",
            "shop.localhost",
            "a.b.localhost:80",
            "127.0.0.1",
            "127.9.8.7:1",
            "[::1]:8000",
            "[::ffff:127.0.0.1]",
        ] {
            assert!(served("127.0.0.1", host, &[]), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.nip.io",
            "10.0.0.1",
            "0.0.0.0:8000",
            "[::2]",
            "127.1",
            "shop",
        ] {
            assert!(!served("127.0.0.1", host, &[]), "{host}");
        }
    }

    #[test]
    fn the_request_line_and_the_header_both_count() {
        let allowed = |line: &str, host: Option<&str>| {
            let headers = host.map(|host| (header::HOST, host.parse().unwrap())).into_iter().collect();
            is_allowed(&line.parse().unwrap(), &headers, None, &[])
        };
        assert!(allowed("/orders", Some("localhost:8000")));
        assert!(allowed("/orders", Some("")));
        assert!(allowed("/orders", None));
        assert!(!allowed("/orders", Some("evil.example")));
        assert!(allowed("http://localhost:8000/orders", Some("localhost")));
        assert!(!allowed("http://evil.example/orders", Some("localhost")));
        assert!(!allowed("http://localhost/orders", Some("evil.example")));
    }

    #[test]
    fn more_hosts_can_be_allowed_by_name_and_by_address() {
        let allowed = ["Shop.Internal.", "10.1.2.3", "fd00::1"];
        for host in ["shop.internal:8000", "SHOP.internal", "10.1.2.3", "[fd00::1]:80", "10.0.0.9:8000"] {
            assert!(served("10.0.0.9", host, &allowed), "{host}");
        }
        for host in ["a.shop.internal", "shop.internal.evil", "10.1.2.4", "[fd00::2]"] {
            assert!(!served("10.0.0.9", host, &allowed), "{host}");
        }
        assert!(served("10.0.0.9", "whatever", &["*"]));
        for text in ["", "a:80", "http://a", "a b", "*.a", "a,b"] {
            assert!(text.parse::<AllowedHost>().is_err(), "{text}");
        }
    }
}
