//! Which methods a path takes.

use poem::{
    Endpoint, EndpointExt, IntoEndpoint, Response,
    endpoint::BoxEndpoint,
    error::MethodNotAllowedError,
    http::{HeaderValue, header},
};

use crate::problem::Problem;

/// Adds `Allow` to the 405 for other methods (RFC 9110, 15.5.6), which poem leaves out. A path that takes GET takes HEAD.
pub fn only(
    allowed: &'static str,
    methods: impl IntoEndpoint<Endpoint: Endpoint<Output = Response> + 'static>,
) -> BoxEndpoint<'static, Response> {
    methods
        .into_endpoint()
        .catch_error(move |error: MethodNotAllowedError| async move {
            let mut response = Problem::from_error(error.into());
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
            response
        })
        .boxed()
}
