//! The identifiers in a rejected message: by them its content is found when an aggregate is erased.

use std::collections::BTreeSet;

/// How long a UUID is, with its hyphens.
const LENGTH: usize = 36;
/// How many identifiers of a message are stored. Its properties alone cannot have as many.
const MOST: usize = 1_000;

/// The id of the aggregate, if there is one, and every UUID in properties and body, in small letters. Also up to where in
/// the body these are all of them.
pub(crate) fn of(aggregate: Option<&str>, properties: &str, body: &[u8]) -> (BTreeSet<String>, usize) {
    let mut found: BTreeSet<String> = properties.as_bytes().windows(LENGTH).filter_map(uuid).collect();
    found.extend(aggregate.map(str::to_owned));
    for (start, window) in body.windows(LENGTH).enumerate() {
        let Some(id) = uuid(window) else { continue };
        if found.len() >= MOST && !found.contains(&id) {
            // Without the last byte it is none.
            return (found, start + LENGTH - 1);
        }
        found.insert(id);
    }
    (found, body.len())
}

fn uuid(bytes: &[u8]) -> Option<String> {
    let hyphens = [8, 13, 18, 23];
    let mut each = bytes.iter().enumerate();
    let is_one = each.all(|(i, b)| if hyphens.contains(&i) { *b == b'-' } else { b.is_ascii_hexdigit() });
    is_one.then(|| String::from_utf8_lossy(bytes).to_ascii_lowercase())
}
