//! The client that sends a request.

use std::sync::Arc;

use poem::Request;

/// The client that sends a request: the name of its key. Handlers find it with `Data<&Caller>` or [`Caller::of`];
/// what belongs to one caller is no other's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller(Arc<str>);

impl Caller {
    /// The caller whose key has this name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// A caller without a key.
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
