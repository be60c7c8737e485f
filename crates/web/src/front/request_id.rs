//! The id of a request, for its client and the log.

use poem::http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

/// The header that carries it, both ways.
pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that a client may choose.
const MAX: usize = 128;

/// The client's own id, if it is sane; a new one otherwise. One without a letter could be a person's number.
pub(super) fn of(headers: &HeaderMap) -> HeaderValue {
    let mut sent = headers.get_all(X_REQUEST_ID).iter();
    if let (Some(id), None) = (sent.next(), sent.next())
        && (1..=MAX).contains(&id.len())
        && id.as_bytes().iter().all(u8::is_ascii_graphic)
        && id.as_bytes().iter().any(u8::is_ascii_alphabetic)
    {
        return id.clone();
    }
    let mut text = Uuid::encode_buffer();
    let id = HeaderValue::from_str(Uuid::now_v7().hyphenated().encode_lower(&mut text));
    id.unwrap_or(HeaderValue::from_static("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, values: &[&[u8]]) -> HeaderMap {
        values.iter().map(|value| (name.parse().unwrap(), HeaderValue::from_bytes(value).unwrap())).collect()
    }

    #[test]
    fn a_sane_id_is_kept() {
        let kept = |values: &[&[u8]]| values.contains(&of(&headers("x-request-id", values)).as_bytes());
        let longest = "a".repeat(MAX);
        for id in ["x", "7b3f", "2026-11-24T21:00:00Z/{1}", longest.as_str()] {
            assert!(kept(&[id.as_bytes()]), "{id}");
        }
        let longer = "a".repeat(MAX + 1);
        for id in ["", "a b", "é", "\ta", "12345678909", "123.456.789-09", longer.as_str()] {
            assert!(!kept(&[id.as_bytes()]), "{id}");
        }
        assert!(!kept(&[b"\xff"]) && !kept(&[b"one", b"two"]));
        let made = of(&HeaderMap::new());
        assert_eq!(made.to_str().unwrap().parse::<Uuid>().unwrap().get_version_num(), 7);
        assert_ne!(made, of(&HeaderMap::new()));
    }
}
