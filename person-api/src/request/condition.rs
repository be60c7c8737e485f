//! `If-Match`: a change that is for one state alone.

use std::borrow::Cow;

use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::documentation::{Parameter, schema::text};
use uuid::Uuid;

use crate::store::States;

/// The states that a change is for.
#[derive(Clone, Debug, Default)]
pub(crate) struct IfMatch(States);

const RULE: &str = "must be * or ETags, each in quotation marks";

/// The next tag of a list, without its quotation marks, whether it is a strong one, and the rest of the list. One
/// of ours is taken without quotation marks, too.
fn next(list: &str) -> Option<(&str, bool, &str)> {
    let (strong, tag) = list.strip_prefix("W/").map_or((true, list), |tag| (false, tag));
    let (tag, rest) = if let Some(quoted) = tag.strip_prefix('"') {
        quoted.split_once('"')?
    } else {
        let (tag, rest) = list.split_at(list.find(',').unwrap_or(list.len()));
        ours(tag.trim_end()).map(|_| (tag.trim_end(), rest))?
    };
    let rest = rest.trim_start();
    (rest.is_empty() || rest.starts_with(',')).then_some((tag, strong, rest))
}

/// The state, if it is a tag of ours, without its quotation marks.
fn ours(tag: &str) -> Option<(Uuid, i64)> {
    let (person, version) = tag.split_once('.')?;
    Some((person.parse().ok()?, version.parse().ok()?))
}

impl IfMatch {
    /// Any state, where nothing was sent.
    pub(crate) fn states(sent: Option<Self>) -> States {
        sent.map_or_else(States::default, |sent| sent.0)
    }
}

impl Parameter for IfMatch {
    const IN: MetaParamIn = MetaParamIn::Header;
    const LIST: bool = true;

    /// An `ETag` that is none of ours names no state, so nothing matches it; a weak one neither (RFC 9110,
    /// 13.1.1). One of ours is taken without its quotation marks, too.
    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        if text.trim() == "*" {
            return Ok(Self::default());
        }
        let (mut states, mut tags) = (Vec::new(), 0);
        let mut list = text;
        loop {
            // A list may have empty elements (RFC 9110, 5.6.1).
            list = list.trim_start_matches([',', ' ', '\t']);
            if list.is_empty() {
                break;
            }
            let (tag, strong, rest) = next(list).ok_or(RULE)?;
            states.extend(ours(tag).filter(|_| strong));
            tags += 1;
            list = rest;
        }
        if tags == 0 {
            return Err(RULE.into());
        }
        Ok(Self(States(Some(states))))
    }

    fn schema() -> MetaSchema {
        const TAG: &str = r#"(W/)?"[!#-~]*""#;
        let sent = text(
            "The `ETag` of the state that the change is for, in its quotation marks, or several, or `*` for any. One \
             of this service may come without them. It is the person's, which changes with any of their items. If the person is in another state, or it is \
             another life of the cpf, the answer is 412 and nothing is changed.",
        );
        MetaSchema { pattern: Some(format!(r"^(\*|{TAG}( *, *{TAG})*)$")), ..sent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198c0de-0000-7000-8000-000000000001";

    #[test]
    fn a_list_of_tags_names_the_states_that_are_ours() {
        let state = |version| (ID.parse::<Uuid>().unwrap(), version);
        let named = |text: &str| match IfMatch::parse(text) {
            Ok(IfMatch(States(states))) => states.map_or_else(|| "any".to_owned(), |s| format!("{s:?}")),
            Err(rule) => rule.into_owned(),
        };
        let of = |versions: &[i64]| format!("{:?}", versions.iter().map(|v| state(*v)).collect::<Vec<_>>());
        assert_eq!(named(" * "), "any");
        for (text, versions) in [
            (format!("\"{ID}.4\""), &[4][..]),
            (format!("{ID}.4"), &[4]),
            (format!("{ID}.4 ,\"{ID}.5\""), &[4, 5]),
            (format!(", \"a,b\" ,,\t\"{ID}.5\","), &[5]),
            (format!("W/\"{ID}.4\", \"{ID}.5\""), &[5]),
            ("\"\"".to_owned(), &[]),
            (format!("\"{ID}.x\", \"*\""), &[]),
        ] {
            assert_eq!(named(&text), of(versions), "{text}");
        }
        for text in ["", " , ", "a", "\"a", "\"a\"b", "\"a\" \"b\"", "*, \"a\"", "W/a", &format!("W/{ID}.4")]
        {
            assert_eq!(named(text), RULE, "{text}");
        }
    }
}
