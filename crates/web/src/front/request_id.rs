//! The id of a request, for its client and the log; and the trace that it belongs to.

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

/// The trace that the client says the request belongs to (W3C Trace Context).
pub(super) fn trace(headers: &HeaderMap) -> Option<String> {
    let parent = headers.get("traceparent")?.to_str().ok()?;
    let mut parts = parent.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let sane = hex(version, 2) && hex(trace, 32) && hex(span, 16) && hex(flags, 2);
    let new = version != "00" || parts.next().is_none();
    // Chance makes hardly any of digits alone, and it could be a person's number.
    let number = trace.bytes().all(|b| b.is_ascii_digit()) || version == "ff";
    (sane && new && !number).then(|| trace.to_owned())
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

    #[test]
    fn a_trace_is_known_by_its_id() {
        let trace = |parent: &str| super::trace(&headers("traceparent", &[parent.as_bytes()]));
        let id = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(trace(&format!("00-{id}-b7ad6b7169203331-01")).unwrap(), id);
        assert_eq!(trace(&format!("01-{id}-b7ad6b7169203331-01-later")).unwrap(), id);
        for parent in [
            "",
            "00-12345678909",
            &format!("00-{id}-b7ad6b7169203331-01-more"),
            &format!("ff-{id}-b7ad6b7169203331-01"),
            &format!("00-{}-b7ad6b7169203331-01", id.to_uppercase()),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-00000000000000000000052998224725-b7ad6b7169203331-01",
        ] {
            assert_eq!(trace(parent), None, "{parent}");
        }
    }
}
