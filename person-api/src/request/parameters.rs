//! Beside the body: the parameters of the path and the query, and the headers.

use events::Cpf;
use poem::Request;
use sha2::{Digest, Sha256};
use uuid::Uuid;
use web::{
    front::Caller,
    parameters::{Parsed, hyphenated},
    tag::Tags,
};

use super::fields::Fields;
use crate::model::{ITEMS_MAX, IdempotentRequest, Precondition};

impl Fields<'_> {
    /// The person.
    pub(super) fn cpf(&mut self) -> Option<Cpf> {
        let rule = "must be a positive integer of at most 11 digits";
        self.parameters.path("cpf", |text| text.parse().map_err(|_| rule.into()))
    }

    /// The item.
    pub(super) fn id(&mut self) -> Option<Uuid> {
        self.parameters.path("id", hyphenated)
    }

    /// How many items at most.
    pub(super) fn limit(&mut self) -> Option<i32> {
        self.parameters.query("limit", |text| {
            let limit = text.parse().ok().filter(|limit| (1..=ITEMS_MAX).contains(limit));
            limit.ok_or_else(|| format!("must be an integer from 1 to {ITEMS_MAX}").into())
        })
    }

    /// After which item.
    pub(super) fn after(&mut self) -> Option<Uuid> {
        self.parameters.query("after", hyphenated)
    }

    /// `If-Match`: the states in which a write may happen; any without the header. An `ETag` that is none of ours names
    /// no state, so nothing matches it.
    pub(super) fn precondition(&mut self) -> Precondition {
        let precondition = self.parameters.header_list("If-Match", |text| {
            match Tags::parse(text).ok_or("must be * or ETags, each in quotation marks")? {
                Tags::Any => Ok(Precondition::default()),
                Tags::Of(tags) => {
                    Ok(Precondition(Some(tags.iter().map(|tag| (tag.id, tag.version)).collect())))
                }
            }
        });
        precondition.unwrap_or_default()
    }

    /// `Idempotency-Key`.
    pub(super) fn idempotency_key(&mut self) -> Option<KeyHeader> {
        self.parameters.header("Idempotency-Key", KeyHeader::parse)
    }
}

/// `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a request with it may safely be sent again. In
/// quotation marks, as the draft writes it, or without.
#[derive(Clone, Debug)]
pub(crate) struct KeyHeader(String);

impl KeyHeader {
    /// The largest number of characters.
    const MAX: usize = 255;

    fn parse(text: &str) -> Parsed<Self> {
        let key = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        let visible = key.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte));
        if visible && (1..=Self::MAX).contains(&key.len()) {
            Ok(Self(key.to_owned()))
        } else {
            Err("must have 1 to 255 visible ASCII characters, without quotation marks or backslashes".into())
        }
    }

    /// With what the key belongs to: this caller, this path and this body.
    pub(crate) fn of(self, request: &Request, route: String, body: &[u8]) -> IdempotentRequest {
        let caller = Caller::of(request).name().to_owned();
        IdempotentRequest { caller, route, key: self.0, digest: Sha256::digest(body).to_vec() }
    }
}
