use inbox::HandlerError;

/// Why an event cannot be applied, now or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the read model knows this person already")]
    PersonKnown,
    #[error("the read model does not know this person")]
    PersonUnknown,
    #[error("the read model knows this item already")]
    ItemKnown,
    #[error("the read model does not know this item")]
    ItemUnknown,
    #[error("the read model knows this item as another person's")]
    ItemOfAnother,
    #[error("a value is negative or does not fit 15 digits and 4 decimals")]
    Value,
    #[error("the score cannot be written as JSON")]
    Json,
}

impl From<Refusal> for HandlerError {
    fn from(refusal: Refusal) -> Self {
        Self::poison(refusal.to_string())
    }
}
