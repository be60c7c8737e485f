//! What the path, the query and the headers say.

use std::{borrow::Cow, time::Duration};

use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::{
    config,
    documentation::{
        Parameter, hyphenated,
        schema::{formatted, integer, text},
    },
};
use uuid::Uuid;

use super::PAGE;
use crate::{
    read_model::{Cpf, entries},
    token::Token,
};

/// A cpf, as it stands in a path.
pub(crate) struct PathCpf(pub(crate) Cpf);

impl Parameter for PathCpf {
    const IN: MetaParamIn = MetaParamIn::Path;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        text.parse().map(Self).map_err(|()| "must be a positive integer of at most 11 digits".into())
    }

    fn schema() -> MetaSchema {
        MetaSchema {
            pattern: Some("^0*[1-9][0-9]*$".to_owned()),
            max_length: Some(11),
            example: Some("11111".into()),
            ..text("A positive integer of at most 11 digits.")
        }
    }
}

impl Parameter for Token {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        text.parse()
            .map_err(|()| "must be an ETag of the person service: a person's id, a dot, and a version".into())
    }

    fn schema() -> MetaSchema {
        let id = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}";
        MetaSchema {
            pattern: Some(format!(r#"^({id}\.[1-9][0-9]{{0,17}}|"{id}\.[1-9][0-9]{{0,17}}")$"#)),
            ..text(
                "The `ETag` of a write, or of a read, at the person service, without its quotation marks (or with \
                 them, as `%22`): a person's id, a dot, and a version, \
                 `019928b5-6a3c-7d41-9c35-2f6c1d1e8a07.4`. The answer contains that write, or it is a 503. It is \
                 about the person whose id it has: with somebody else's cpf it makes the answer wait for somebody \
                 else. After the deletion that it names, the answer is a 404, or the score of the cpf's next life.",
            )
        }
    }
}

/// How long a reader waits. None when it is no duration: the rule names the most, which is a setting.
pub(crate) struct Wait(pub(crate) Option<Duration>);

impl Parameter for Wait {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        Ok(Self(config::duration(text).ok()))
    }

    fn schema() -> MetaSchema {
        MetaSchema {
            pattern: Some("^([0-9]{1,4}ms|[0-9]s|10s)$".to_owned()),
            ..text(
                "How long to wait for the write that `after` names, and only together with it: `500ms`, `2s`, at \
                 most `10s` where nothing else is configured; the 422 of a longer one says how long. Without it the \
                 copy is asked once.",
            )
        }
    }
}

/// How many at most.
pub(crate) struct Limit(pub(crate) i32);

impl Parameter for Limit {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        let limit = text.parse().ok().filter(|limit| (1..=entries::MAX).contains(limit));
        limit.map(Self).ok_or_else(|| format!("must be an integer from 1 to {}", entries::MAX).into())
    }

    fn schema() -> MetaSchema {
        MetaSchema {
            maximum: Some(entries::MAX.into()),
            default: Some(PAGE.into()),
            ..integer(1.0, "How many at most.")
        }
    }
}

/// After which entry. (`after` is the state that is read, here as everywhere.)
pub(crate) struct AfterEntry(pub(crate) Uuid);

impl Parameter for AfterEntry {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        hyphenated(text).map(Self)
    }

    fn schema() -> MetaSchema {
        formatted(
            "uuid",
            "Only what came after the entry with this id, whether it is still there or not. `next` has it.",
        )
    }
}
