//! The body of a request: JSON.

use std::marker::PhantomData;

use poem::{Body as Stream, Request, RequestBody, http::header};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    registry::{MetaMediaType, MetaRequest, Registry},
};
use service::{
    documentation::schema::{self, Described},
    front::read_body,
    problem::Problem,
};

use crate::problems::{UNSUPPORTED_CODING, UNSUPPORTED_MEDIA_TYPE};

/// What may be sent as a body.
pub(crate) trait Sendable: Described {
    /// What the request may say that it is.
    const MEDIA_TYPES: &'static [&'static str] = &["application/json"];
}

/// A body that says that it is JSON, described by `T` and not parsed yet.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) Vec<u8>, PhantomData<fn() -> T>);

impl<'a, T: Sendable> ApiExtractor<'a> for Body<T> {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];
    type ParamType = ();
    type ParamRawType = ();

    fn register(registry: &mut Registry) {
        schema::register::<T>(registry);
    }

    fn request_meta() -> Option<MetaRequest> {
        let media_type =
            |content_type: &&'static str| MetaMediaType { content_type, schema: schema::of::<T>() };
        let content = T::MEDIA_TYPES.iter().map(media_type).collect();
        Some(MetaRequest { description: None, content, required: true })
    }

    async fn from_request(
        request: &'a Request,
        body: &mut RequestBody,
        _: ExtractParamOptions<()>,
    ) -> poem::Result<Self> {
        let body = body.take().unwrap_or_else(|_| Stream::empty());
        Ok(Self(read(request, body, T::MEDIA_TYPES).await?, PhantomData))
    }
}

async fn read(request: &Request, body: Stream, media_types: &[&str]) -> Result<Vec<u8>, Problem> {
    let media_type = request.content_type().and_then(|value| value.split(';').next()).unwrap_or_default();
    if !media_types.iter().any(|known| media_type.trim().eq_ignore_ascii_case(known)) {
        return Err(UNSUPPORTED_MEDIA_TYPE.saying(format!(
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
