//! The body of a request: JSON.

use poem::{Body, Request, http::header};
use web::{front::read_body, problem::Problem};

use crate::problems::{UNSUPPORTED_CODING, UNSUPPORTED_MEDIA_TYPE};

/// What a body says that it is.
pub(crate) const JSON: &[&str] = &["application/json"];
/// What a merge patch says that it is.
pub(crate) const MERGE_PATCH: &[&str] = &["application/merge-patch+json", "application/json"];

/// Reads a body that says that it is of one of these types. It is not parsed yet.
pub(crate) async fn body(request: &Request, body: Body, media_types: &[&str]) -> Result<Vec<u8>, Problem> {
    let media_type = request.content_type().and_then(|value| value.split(';').next()).unwrap_or_default();
    if !media_types.iter().any(|known| media_type.trim().eq_ignore_ascii_case(known)) {
        return Err(UNSUPPORTED_MEDIA_TYPE.with_detail(format!(
            "Nothing was done. Send the body as `Content-Type: {}`.",
            media_types.join("` or `Content-Type: ")
        )));
    }
    let coded = request.headers().get_all(header::CONTENT_ENCODING).iter();
    if coded.into_iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(UNSUPPORTED_CODING.problem());
    }
    read_body(request, body).await.map(Vec::from)
}
