//! `If-Match`: a change that is for one state alone.

use std::borrow::Cow;

use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::documentation::{Parameter, schema::text};
use uuid::Uuid;

use crate::store::States;

/// The states that a change is for.
#[derive(Clone, Debug)]
pub(crate) struct IfMatch(States);

impl IfMatch {
    /// Any state, where nothing was sent.
    pub(crate) fn states(sent: Option<Self>) -> States {
        sent.map_or_else(States::default, |sent| sent.0)
    }
}

impl Parameter for IfMatch {
    const IN: MetaParamIn = MetaParamIn::Header;

    /// What is no `ETag` of ours names no state, so nothing matches it. A weak one neither (RFC 9110, 13.1.1).
    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        let state = |tag: &str| -> Option<(Uuid, i64)> {
            let tag = tag.trim();
            let tag = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or(tag);
            let (person, version) = tag.split_once('.')?;
            Some((person.parse().ok()?, version.parse().ok()?))
        };
        let states = (text.trim() != "*").then(|| text.split(',').filter_map(state).collect());
        Ok(Self(States(states)))
    }

    fn schema() -> MetaSchema {
        text(
            "The `ETag` of the state that the change is for: of the person, which changes with any of their items. \
             Is the person in another state, or another life of the cpf, the answer is 412 and nothing is changed.",
        )
    }
}
