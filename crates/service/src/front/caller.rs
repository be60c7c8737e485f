//! Who asks.

use std::{fmt, sync::Arc};

use poem::Request;

/// The name of the key that a request presented. Handlers find it among the request's extensions, with
/// `Data<&Caller>` or [`Caller::of`]; what belongs to one caller is no other's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller(Arc<str>);

impl Caller {
    /// The caller whose key has this name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Who presented none.
    pub fn anonymous() -> Self {
        Self::new("anonymous")
    }

    /// The caller of a request.
    pub fn of(request: &Request) -> Self {
        request.data::<Self>().cloned().unwrap_or_else(Self::anonymous)
    }

    /// The key's name, or `anonymous`. Not a secret.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
