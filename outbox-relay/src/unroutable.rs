//! What to do with an event that came back because no queue takes it: a rule per type pattern.

use std::str::FromStr;

/// What happens to an event that no queue takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// It is set aside and tried again with backoff, and the relay goes on.
    #[default]
    Park,
    /// The relay waits, with backoff, until a queue takes it.
    Hold,
    /// It is counted as dropped, never as published, and the relay goes on.
    Drop,
}

/// Rules by type pattern, of which the first that matches wins, and what happens to the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<(String, Action)>,
    rest: Action,
}

impl Policy {
    /// What to do with an event of this type.
    pub fn action(&self, type_: &str) -> Action {
        self.rules
            .iter()
            .find(|(pattern, _)| matches(pattern, type_))
            .map_or(self.rest, |(_, action)| *action)
    }
}

/// As RabbitMQ's topic exchange matches: words between dots, `*` is one word, `#` any number of words.
pub(crate) fn matches(pattern: &str, type_: &str) -> bool {
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
    "{0:?} is no rule; it should look like `park`, `hold`, `score.*=drop`, or several with commas between (dropping needs a pattern; `#` is every type)"
)]
pub struct InvalidPolicy(String);

impl FromStr for Policy {
    type Err = InvalidPolicy;

    /// Rules in order, with commas between: `person.#=hold,score.*=drop`. A bare `park` or `hold`, once,
    /// is for what no rule names.
    fn from_str(text: &str) -> Result<Self, InvalidPolicy> {
        let mut rules = Vec::new();
        let mut rest = None;
        for rule in text.split(',').map(str::trim) {
            let invalid = || InvalidPolicy(rule.to_owned());
            let (pattern, action) = match rule.split_once('=') {
                Some((pattern, action)) if !pattern.trim().is_empty() => {
                    (Some(pattern.trim()), action.trim())
                }
                Some(_) => return Err(invalid()),
                None => (None, rule),
            };
            let action = match action {
                "park" => Action::Park,
                "hold" => Action::Hold,
                "drop" => Action::Drop,
                _ => return Err(invalid()),
            };
            match pattern {
                Some(pattern) => rules.push((pattern.to_owned(), action)),
                None if action == Action::Drop || rest.replace(action).is_some() => return Err(invalid()),
                None => {}
            }
        }
        Ok(Self { rules, rest: rest.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_matches_wins() {
        let policy: Policy = "score.new=hold, score.*=drop, audit.#=park, hold".parse().unwrap();
        for (type_, action) in [
            ("score.new", Action::Hold),
            ("score.changed", Action::Drop),
            ("score", Action::Hold),
            ("score.a.b", Action::Hold),
            ("audit", Action::Park),
            ("audit.a.b", Action::Park),
            ("person.new", Action::Hold),
        ] {
            assert_eq!(policy.action(type_), action, "{type_}");
        }
        assert_eq!("score.*=drop".parse::<Policy>().unwrap().action("person.new"), Action::Park);
        assert_eq!("hold,#=drop".parse::<Policy>().unwrap().action("person.new"), Action::Drop);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in
            ["", "wait", "score.*", "=drop", "score.*=", "drop", "hold,drop", "hold,park", "a=hold,,b=drop"]
        {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
    }
}
