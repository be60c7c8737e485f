//! What to do with an event that came back because no queue takes it: a rule per type pattern.

use std::str::FromStr;

/// What happens to an event that no queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The relay waits, with backoff, until a queue takes it.
    Hold,
    /// It is counted as dropped, never as published, and the relay goes on.
    Drop,
}

/// Rules by type pattern, of which the first that matches wins. What none matches is held: when
/// everything comes back, more likely nobody listens yet than nobody wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<(String, Action)>);

impl Policy {
    /// What to do with an event of this type.
    pub fn action(&self, type_: &str) -> Action {
        self.0.iter().find(|(pattern, _)| matches(pattern, type_)).map_or(Action::Hold, |(_, action)| *action)
    }
}

/// As RabbitMQ's topic exchange matches: words between dots, `*` is one word, `#` any number of words.
fn matches(pattern: &str, type_: &str) -> bool {
    fn words(pattern: &[&str], type_: &[&str]) -> bool {
        match (pattern, type_) {
            ([], []) => true,
            (["#", rest @ ..], _) => (0..=type_.len()).any(|n| words(rest, &type_[n..])),
            (["*", pattern @ ..], [_, type_ @ ..]) => words(pattern, type_),
            ([p, pattern @ ..], [t, type_ @ ..]) if p == t => words(pattern, type_),
            _ => false,
        }
    }
    words(&pattern.split('.').collect::<Vec<_>>(), &type_.split('.').collect::<Vec<_>>())
}

/// The setting cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no rule; it should look like `hold`, `score.*=drop`, or several with commas between (dropping needs a pattern; `#` is every type)"
)]
pub struct InvalidPolicy(String);

impl FromStr for Policy {
    type Err = InvalidPolicy;

    /// Rules in order, with commas between: `person.#=hold,score.*=drop`. A bare `hold` says what holds
    /// anyway.
    fn from_str(text: &str) -> Result<Self, InvalidPolicy> {
        let mut rules = Vec::new();
        for rule in text.split(',').map(str::trim) {
            match rule.split_once('=').map(|(pattern, action)| (pattern.trim(), action.trim())) {
                Some((pattern, "hold")) if !pattern.is_empty() => {
                    rules.push((pattern.to_owned(), Action::Hold));
                }
                Some((pattern, "drop")) if !pattern.is_empty() => {
                    rules.push((pattern.to_owned(), Action::Drop));
                }
                None if rule == "hold" => {}
                _ => return Err(InvalidPolicy(rule.to_owned())),
            }
        }
        Ok(Self(rules))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_matches_wins() {
        let policy: Policy = "score.new=hold, score.*=drop, audit.#=drop".parse().unwrap();
        for (type_, action) in [
            ("score.new", Action::Hold),
            ("score.changed", Action::Drop),
            ("score", Action::Hold),
            ("score.a.b", Action::Hold),
            ("audit", Action::Drop),
            ("audit.a.b", Action::Drop),
            ("person.new", Action::Hold),
        ] {
            assert_eq!(policy.action(type_), action, "{type_}");
        }
        assert_eq!("hold,#=drop".parse::<Policy>().unwrap().action("person.new"), Action::Drop);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "park", "score.*", "=drop", "score.*=", "drop", "hold,drop", "a=hold,,b=drop"] {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
    }
}
