//! What a message that is no event names, so that it is found when that is to be erased.

use std::collections::BTreeSet;

use lapin::types::AMQPValue;

use crate::Envelope;

/// How long a UUID is, with its hyphens.
const LENGTH: usize = 36;

/// The aggregate in the headers, as far as there is one, and every UUID in properties and body, in small
/// letters.
pub(crate) fn names(envelope: &Envelope) -> BTreeSet<String> {
    let headers = envelope.properties.headers().as_ref();
    let aggregate = match headers.and_then(|headers| headers.inner().get("aggregate_id")) {
        Some(AMQPValue::LongString(id)) => std::str::from_utf8(id.as_bytes()).ok(),
        Some(AMQPValue::ShortString(id)) => Some(id.as_str()),
        _ => None,
    };
    // NUL cannot be stored, and no aggregate's id has one.
    let aggregate = aggregate.filter(|id| !id.contains('\0')).map(str::to_owned);
    let properties = envelope.properties_json().to_string();
    let uuids = [properties.as_bytes(), &envelope.body].into_iter().flat_map(|bytes| bytes.windows(LENGTH));
    uuids.filter_map(uuid).chain(aggregate).collect()
}

fn uuid(bytes: &[u8]) -> Option<String> {
    let hyphens = [8, 13, 18, 23];
    let mut each = bytes.iter().enumerate();
    let is_one = each.all(|(i, b)| if hyphens.contains(&i) { *b == b'-' } else { b.is_ascii_hexdigit() });
    is_one.then(|| String::from_utf8_lossy(bytes).to_ascii_lowercase())
}
