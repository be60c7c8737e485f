//! What the path says: whose, and which.

use std::borrow::Cow;

use events::Cpf;
use poem_openapi::registry::{MetaParamIn, MetaSchema};
use service::documentation::{Parameter, schema::text};

/// A cpf, as it stands in a path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathCpf(pub(crate) Cpf);

impl Parameter for PathCpf {
    const IN: MetaParamIn = MetaParamIn::Path;

    fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        text.parse().map(Self).map_err(|_| "must be a positive integer of at most 11 digits".into())
    }

    fn schema() -> MetaSchema {
        MetaSchema {
            pattern: Some("^[0-9]{1,11}$".to_owned()),
            example: Some("11111".into()),
            ..text("A positive integer of at most 11 digits.")
        }
    }
}
