//! Which requests are served.

use poem::Request;

use super::caller::Caller;
use crate::problem::Problem;

/// Decides which requests are served.
pub trait Admission: Clone + Send + Sync + 'static {
    /// The caller of a request; or the problem that is the response to a request that is not served.
    fn caller(&self, request: &Request) -> Result<Caller, Problem>;
}
