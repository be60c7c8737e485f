//! The setting: which queues should get which types.

use std::{collections::BTreeSet, str::FromStr};

use serde::Deserialize;

/// What it looks like.
const EXAMPLE: &str = r#"in the file:

    [[expect]]
    queue = "mail"
    types = ["order.*"]

In a variable or behind the flag: [{"queue": "mail", "types": ["order.*"]}]"#;
/// Each is looked for on its own, and has metrics of its own.
const MAX_QUEUES: usize = 100;
/// So many patterns a queue.
const MAX_TYPES: usize = 100;
/// As AMQP has it for names and routing keys.
const MAX_BYTES: usize = 255;

/// A queue, and what it should get.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// Its name.
    pub queue: String,
    /// Types of events, as patterns of a topic binding.
    pub types: Vec<String>,
}

/// All of an outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectations(pub Vec<Expectation>);

impl FromStr for Expectations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |problem: String| format!("{problem}. It should look like this {EXAMPLE}");
        let list: Vec<Expectation> = serde_json::from_str(text).map_err(|error| {
            // Behind it stands the place, which the file has not.
            let said = error.to_string();
            wrong(said.split(" at line ").next().unwrap_or_default().to_owned())
        })?;
        if list.len() > MAX_QUEUES {
            return Err(wrong(format!("there are {}, and at most {MAX_QUEUES} are possible", list.len())));
        }
        let mut queues = BTreeSet::new();
        for Expectation { queue, types } in &list {
            let name = escape::line(queue);
            if queue.is_empty() {
                return Err(wrong("a queue has no name".to_owned()));
            }
            if queue.len() > MAX_BYTES {
                return Err(wrong(format!("the name of a queue is longer than {MAX_BYTES} bytes")));
            }
            if !queues.insert(queue) {
                return Err(wrong(format!("the queue {name} is there twice; name all of its types once")));
            }
            if types.is_empty() {
                return Err(wrong(format!(
                    "the queue {name} has no types; for every event: types = [\"#\"]"
                )));
            }
            if types.len() > MAX_TYPES {
                return Err(wrong(format!("the queue {name} has more than {MAX_TYPES} types")));
            }
            if types.iter().any(String::is_empty) {
                return Err(wrong(format!("the queue {name} has an empty pattern")));
            }
            if types.iter().any(|type_| type_.len() > MAX_BYTES) {
                return Err(wrong(format!("the queue {name} has a pattern longer than {MAX_BYTES} bytes")));
            }
        }
        Ok(Self(list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_looked_for_is_named_with_an_example() {
        let long = "q".repeat(256);
        for (text, problem) in [
            ("mail".to_owned(), "expected value"),
            (r#"[{"queue": "mail"}]"#.to_owned(), "missing field `types`"),
            (r#"[{"queue": "mail", "type": ["order.*"]}]"#.to_owned(), "unknown field `type`"),
            (r#"[{"queue": "mail", "types": "order.*"}]"#.to_owned(), "invalid type: string"),
            (r#"[{"queue": "", "types": ["order.*"]}]"#.to_owned(), "a queue has no name"),
            (r#"[{"queue": "mail", "types": []}]"#.to_owned(), "mail has no types"),
            (r#"[{"queue": "mail", "types": ["a", ""]}]"#.to_owned(), "mail has an empty pattern"),
            (
                format!(r#"[{{"queue": "{long}", "types": ["a"]}}]"#),
                "name of a queue is longer than 255 bytes",
            ),
            (format!(r#"[{{"queue": "mail", "types": ["{long}"]}}]"#), "mail has a pattern longer than 255"),
            (
                r#"[{"queue": "mail", "types": ["a"]}, {"queue": "mail", "types": ["b"]}]"#.to_owned(),
                "mail is there twice",
            ),
        ] {
            let error = text.parse::<Expectations>().unwrap_err();
            assert!(error.contains(problem) && error.contains("[[expect]]"), "{text}: {error}");
        }
        let mail = r#"[{"queue": "mail", "types": ["order.*", "shop.new"]}]"#;
        assert_eq!(mail.parse::<Expectations>().unwrap().0[0].types, ["order.*", "shop.new"]);
    }
}
