//! What the path and the query say: whose, which, and how many.

use std::borrow::Cow;

use events::Cpf;
use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::documentation::{
    Parameter, hyphenated,
    schema::{formatted, integer, text},
};
use uuid::Uuid;

use super::PAGE;
use crate::{describe::cpf_digits, store::ITEMS_MAX};

/// A cpf, as it stands in a path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathCpf(pub(crate) Cpf);

impl Parameter for PathCpf {
    const IN: MetaParamIn = MetaParamIn::Path;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        text.parse().map(Self).map_err(|_| "must be a positive integer of at most 11 digits".into())
    }

    fn schema() -> MetaSchema {
        let digits = cpf_digits(text("A positive integer of at most 11 digits."));
        MetaSchema { example: Some("11111".into()), ..digits }
    }
}

/// An item's id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ItemId(pub(crate) Uuid);

impl Parameter for ItemId {
    const IN: MetaParamIn = MetaParamIn::Path;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        hyphenated(text).map(Self)
    }

    fn schema() -> MetaSchema {
        formatted("uuid", "The item's id, as `Location` and lists say it.")
    }
}

/// How many at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit(pub(crate) i32);

impl Parameter for Limit {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        let limit = text.parse().ok().filter(|limit| (1..=ITEMS_MAX).contains(limit));
        limit.map(Self).ok_or_else(|| format!("must be an integer from 1 to {ITEMS_MAX}").into())
    }

    fn schema() -> MetaSchema {
        MetaSchema {
            maximum: Some(ITEMS_MAX.into()),
            default: Some(PAGE.into()),
            ..integer(1.0, "How many at most.")
        }
    }
}

/// After which item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct After(pub(crate) Uuid);

impl Parameter for After {
    const IN: MetaParamIn = MetaParamIn::Query;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        hyphenated(text).map(Self)
    }

    fn schema() -> MetaSchema {
        formatted(
            "uuid",
            "Only what came after the item with this id, whether it is still there or not. `next` has it.",
        )
    }
}
