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

/// The state that a tag names, if it names one. An error when it is no tag.
fn state(tag: &str) -> Result<Option<(Uuid, i64)>, &'static str> {
    let quoted = |tag: &str| Some(tag.strip_prefix('"')?.strip_suffix('"')?.to_owned());
    if tag.strip_prefix("W/").is_some_and(|weak| quoted(weak).is_some()) {
        return Ok(None);
    }
    match quoted(tag) {
        Some(tag) => Ok(ours(&tag)),
        None => ours(tag).map(Some).ok_or(RULE),
    }
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
        let tags = text.split(',').map(str::trim).filter(|tag| !tag.is_empty());
        let states = tags.map(state).collect::<Result<Vec<_>, _>>()?;
        if states.is_empty() {
            return Err(RULE.into());
        }
        Ok(Self(States(Some(states.into_iter().flatten().collect()))))
    }

    fn schema() -> MetaSchema {
        text(
            "The `ETag` of the state that the change is for, in its quotation marks, or several, or `*` for any. It \
             is the person's, which changes with any of their items. If the person is in another state, or it is \
             another life of the cpf, the answer is 412 and nothing is changed.",
        )
    }
}
