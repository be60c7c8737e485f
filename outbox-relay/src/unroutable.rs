//! What to do with an event that came back because no queue takes it: a rule per type pattern.

use std::{fmt, str::FromStr};

/// What happens to an event that no queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The relay waits, with backoff, until a queue takes it.
    Hold,
    /// It is counted as dropped, never as published, and the relay goes on.
    Drop,
}

/// Rules by type pattern, the first that matches wins, and a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<(String, Action)>,
    default: Action,
}

impl Default for Policy {
    fn default() -> Self {
        Self { rules: Vec::new(), default: Action::Hold }
    }
}

impl Policy {
    /// What to do with an event of this type.
    pub fn action(&self, type_: &str) -> Action {
        self.rules
            .iter()
            .find(|(pattern, _)| matches(pattern, type_))
            .map_or(self.default, |(_, action)| *action)
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
#[error("{0:?} is no rule; it should look like `hold`, `score.*=drop`, or several with commas between")]
pub struct InvalidPolicy(String);

impl FromStr for Policy {
    type Err = InvalidPolicy;

    /// `hold,score.*=drop`: rules in order, and at most one action without a pattern, the default.
    fn from_str(text: &str) -> Result<Self, InvalidPolicy> {
        let mut policy = Self::default();
        let mut default = None;
        for rule in text.split(',').map(str::trim) {
            let (pattern, action) = rule
                .split_once('=')
                .map_or((None, rule), |(pattern, action)| (Some(pattern.trim()), action.trim()));
            let invalid = || InvalidPolicy(rule.to_owned());
            let action = match action {
                "hold" => Action::Hold,
                "drop" => Action::Drop,
                _ => return Err(invalid()),
            };
            match pattern {
                Some("") => return Err(invalid()),
                Some(pattern) => policy.rules.push((pattern.to_owned(), action)),
                None if default.replace(action).is_some() => return Err(invalid()),
                None => policy.default = action,
            }
        }
        Ok(policy)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hold => "hold",
            Self::Drop => "drop",
        })
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
        assert_eq!("drop".parse::<Policy>().unwrap().action("person.new"), Action::Drop);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "park", "score.*", "=drop", "score.*=", "hold,drop", "a=hold,,b=drop"] {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
    }
}
