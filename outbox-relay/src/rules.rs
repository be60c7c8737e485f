//! What to do with an event that is not taken: a rule per type pattern.

use std::{fmt, str::FromStr};

use lapin::types::ShortString;

/// What a rule may say.
pub trait Action: Copy + Default + PartialEq + fmt::Debug + 'static {
    /// Each, by its name.
    const NAMES: &'static [(&'static str, Self)];
    /// Only for a pattern, never for the rest.
    const NEEDS_PATTERN: Option<Self>;
    /// What a rule looks like.
    const EXAMPLE: &'static str;
}

/// What happens to an event that no queue takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unroutable {
    /// It is set aside and tried again with backoff, and later events of its aggregate go on.
    #[default]
    Park,
    /// It waits, and later events of its aggregate behind it, until a queue takes it.
    Hold,
    /// It is counted as dropped, never as published, and later events go on.
    Drop,
}

impl Action for Unroutable {
    const NAMES: &'static [(&'static str, Self)] =
        &[("park", Self::Park), ("hold", Self::Hold), ("drop", Self::Drop)];
    const NEEDS_PATTERN: Option<Self> = Some(Self::Drop);
    const EXAMPLE: &'static str = "`park`, `hold`, `order.*=drop`, or several with commas between (dropping needs a \
                                   pattern; `#` is every type)";
}

/// What happens to an event that a queue refuses, because it is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nacked {
    /// It waits, and later events of its aggregate behind it, until every queue takes it.
    #[default]
    Hold,
    /// After a time it is set aside, and later events of its aggregate go on: the full queue misses it until then.
    Pass,
}

impl Action for Nacked {
    const NAMES: &'static [(&'static str, Self)] = &[("hold", Self::Hold), ("pass", Self::Pass)];
    const NEEDS_PATTERN: Option<Self> = None;
    const EXAMPLE: &'static str = "`hold`, `pass`, `audit.*=pass`, or several with commas between";
}

/// Rules by type pattern, of which the first that matches wins, and what happens to the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules<A> {
    rules: Vec<(String, A)>,
    rest: A,
}

impl<A: Action> Rules<A> {
    /// What to do with an event of this type.
    pub fn of(&self, type_: &str) -> A {
        self.rules
            .iter()
            .find(|(pattern, _)| matches(pattern, type_))
            .map_or(self.rest, |(_, action)| *action)
    }
}

/// All rules, and the exchange that messages name.
#[derive(Clone, Debug)]
pub struct Policies {
    /// For what no queue takes.
    pub unroutable: Rules<Unroutable>,
    /// For what a queue refuses.
    pub nacked: Rules<Nacked>,
    /// Where events go.
    pub exchange: ShortString,
}

impl Policies {
    /// Says that no queue takes events of this type, and what to do.
    pub(crate) fn no_queue(&self, type_: &str) -> String {
        let why =
            format!("no queue takes events of type {type_}: bind a queue to the exchange {}", self.exchange);
        if self.unroutable.of(type_) == Unroutable::Hold {
            format!(
                "{why}, or let them go with --unroutable {}",
                escape::shell_word(&format!("{type_}=drop"))
            )
        } else {
            why
        }
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

/// The same as a regular expression of PostgreSQL, for the type with a dot behind it.
pub(crate) fn regex(pattern: &str) -> String {
    let words = pattern.split('.').map(|word| match word {
        "*" => r"[^.]*\.".to_owned(),
        "#" => r"([^.]*\.)*".to_owned(),
        word => {
            let literal = word.chars().flat_map(|c| {
                let special = c.is_ascii_punctuation() && c != '_';
                special.then_some('\\').into_iter().chain([c])
            });
            literal.chain(r"\.".chars()).collect()
        }
    });
    format!("^{}$", words.collect::<String>())
}

/// The setting cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule:?} is no rule; it should look like {example}")]
pub struct InvalidRules {
    rule: String,
    example: &'static str,
}

impl<A: Action> FromStr for Rules<A> {
    type Err = InvalidRules;

    /// Rules in order, with commas between: `shop.#=hold,order.*=drop`. A bare action, once, is for what no rule
    /// names.
    fn from_str(text: &str) -> Result<Self, InvalidRules> {
        let mut rules = Vec::new();
        let mut rest = None;
        for rule in text.split(',').map(str::trim) {
            let invalid = || InvalidRules { rule: rule.to_owned(), example: A::EXAMPLE };
            let (pattern, name) = match rule.split_once('=') {
                Some((pattern, name)) if !pattern.trim().is_empty() => (Some(pattern.trim()), name.trim()),
                Some(_) => return Err(invalid()),
                None => (None, rule),
            };
            let named = A::NAMES.iter().find(|(known, _)| *known == name);
            let (_, action) = named.copied().ok_or_else(invalid)?;
            match pattern {
                Some(pattern) => rules.push((pattern.to_owned(), action)),
                None if A::NEEDS_PATTERN == Some(action) || rest.replace(action).is_some() => {
                    return Err(invalid());
                }
                None => {}
            }
        }
        Ok(Self { rules, rest: rest.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Policy = Rules<Unroutable>;

    #[test]
    fn the_first_rule_that_matches_wins() {
        let policy: Policy = "order.new=hold, order.*=drop, audit.#=park, hold".parse().unwrap();
        for (type_, action) in [
            ("order.new", Unroutable::Hold),
            ("order.changed", Unroutable::Drop),
            ("order", Unroutable::Hold),
            ("order.a.b", Unroutable::Hold),
            ("audit", Unroutable::Park),
            ("audit.a.b", Unroutable::Park),
            ("shop.new", Unroutable::Hold),
        ] {
            assert_eq!(policy.of(type_), action, "{type_}");
        }
        assert_eq!("order.*=drop".parse::<Policy>().unwrap().of("shop.new"), Unroutable::Park);
        assert_eq!("hold,#=drop".parse::<Policy>().unwrap().of("shop.new"), Unroutable::Drop);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in
            ["", "wait", "order.*", "=drop", "order.*=", "drop", "hold,drop", "hold,park", "a=hold,,b=drop"]
        {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
    }
}
