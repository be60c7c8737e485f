//! `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a request that may safely be sent again.

use std::borrow::Cow;

use poem::Request;
use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::{
    documentation::{Parameter, schema::text},
    front::Caller,
};
use sha2::{Digest, Sha256};

use crate::store::idempotency::Keyed;

/// The longest key.
const MAX: usize = 255;

/// A key, in quotation marks as the draft writes it, or without.
#[derive(Clone, Debug)]
pub(crate) struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The key as it is looked for: of this caller, for this path, with this body.
    pub(crate) fn of(self, request: &Request, route: String, body: &[u8]) -> Keyed {
        let caller = Caller::of(request).name().to_owned();
        Keyed { caller, route, key: self.0, request: Sha256::digest(body).to_vec() }
    }
}

impl Parameter for IdempotencyKey {
    const IN: MetaParamIn = MetaParamIn::Header;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        let key = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        let visible = key.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte));
        if visible && (1..=MAX).contains(&key.len()) {
            Ok(Self(key.to_owned()))
        } else {
            Err("must have 1 to 255 visible ASCII characters, without quotation marks or backslashes".into())
        }
    }

    fn schema() -> MetaSchema {
        const VISIBLE: &str = r"[!#-\[\]-~]{1,255}";
        MetaSchema {
            pattern: Some(format!(r#"^("{VISIBLE}"|{VISIBLE})$"#)),
            ..text(
                "Makes it safe to send the request again: with the same key, path and body, byte for byte, the first \
                 answer comes again and nothing is written. Take a new one for each new record: a UUID, or any 1 to \
                 255 visible ASCII characters without quotation marks and backslashes; in quotation marks or not, \
                 it is the same key. Remembered for 24 hours, or until the person is deleted.",
            )
        }
    }
}
