//! Ids and times change with every run. What is hidden is first seen to be well-formed; anything else
//! stays visible, and the snapshot fails.

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// Names ids in the order in which they appear; the same id keeps its name.
#[derive(Default)]
pub(crate) struct Redactions(Vec<Uuid>);

impl Redactions {
    /// `[id 1]` for a UUIDv7, `[now]` for a UTC time of the last five minutes.
    pub(crate) fn apply(&mut self, text: &str) -> String {
        let mut shown = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let (hidden, length) = if let Some(id) = id(rest) {
                (format!("[id {}]", self.number(id)), 36)
            } else if let Some(length) = time(rest) {
                ("[now]".to_owned(), length)
            } else {
                (c.to_string(), c.len_utf8())
            };
            shown += &hidden;
            rest = &rest[length..];
        }
        shown
    }

    fn number(&mut self, id: Uuid) -> usize {
        let known = self.0.iter().position(|known| *known == id);
        known.unwrap_or_else(|| {
            self.0.push(id);
            self.0.len() - 1
        }) + 1
    }
}

fn id(text: &str) -> Option<Uuid> {
    let id: Uuid = text.get(..36)?.parse().ok()?;
    (id.get_version_num() == 7 && id.get_variant() == uuid::Variant::RFC4122).then_some(id)
}

fn time(text: &str) -> Option<usize> {
    let length = text.find("+00:00")? + "+00:00".len();
    let time = DateTime::parse_from_rfc3339(text.get(..length).filter(|_| length <= 32)?).ok()?;
    let age = Utc::now() - time.to_utc();
    (-5..300).contains(&age.num_seconds()).then_some(length)
}
