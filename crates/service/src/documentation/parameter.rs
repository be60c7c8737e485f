//! Parameters of a path, a query or a header.

use std::borrow::Cow;

use poem::{Request, RequestBody, Result};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    registry::{MetaParamIn, MetaSchema, MetaSchemaRef},
};
use url::form_urlencoded;
use uuid::{Uuid, fmt::Hyphenated};

use super::schema;
use crate::problem::{FieldError, Problem};

/// A parameter: where it stands, what it may be, and how it is described. Its name is that of the handler's
/// argument.
pub trait Parameter: Sized + Send + Sync {
    /// Where it stands.
    const IN: MetaParamIn;
    /// Whether it has to be given. In a path it always is.
    const REQUIRED: bool = matches!(Self::IN, MetaParamIn::Path);

    /// Whether it is a list, which may be sent in several lines (RFC 9110, 5.3).
    const LIST: bool = false;

    /// Reads it. The error is the rule, never the value.
    fn parse(text: &str) -> Result<Self, Cow<'static, str>>;
    /// What it looks like.
    fn schema() -> MetaSchema;
}

/// A parameter as it was sent: read, absent, or wrong. It does not refuse the request by itself, so that the
/// handler can name it together with whatever else is wrong.
#[derive(Debug)]
pub struct Sent<P>(Result<Option<P>, FieldError>);

impl<P> Sent<P> {
    /// Whether it was sent at all, right or wrong.
    pub fn given(&self) -> bool {
        !matches!(self.0, Ok(None))
    }

    /// What was sent, if anything was; or the one thing that is wrong.
    pub fn one(self) -> Result<Option<P>, Problem> {
        self.0.map_err(|error| Problem::invalid(vec![error]))
    }

    /// What was sent; what is wrong is added to `errors`.
    pub fn read(self, errors: &mut Vec<FieldError>) -> Option<P> {
        self.0.unwrap_or_else(|error| {
            errors.push(error);
            None
        })
    }
}

impl<'a, P: Parameter> ApiExtractor<'a> for Sent<P> {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::Parameter];
    const PARAM_IS_REQUIRED: bool = P::REQUIRED;
    type ParamType = ();
    type ParamRawType = ();

    fn param_in() -> Option<MetaParamIn> {
        Some(P::IN)
    }

    fn param_schema_ref() -> Option<MetaSchemaRef> {
        Some(schema::inline(P::schema()))
    }

    async fn from_request(
        request: &'a Request,
        _body: &mut RequestBody,
        options: ExtractParamOptions<()>,
    ) -> Result<Self> {
        let (place, sent) = sent(request, P::IN, options.name);
        let read = match &sent[..] {
            [] if P::REQUIRED => Err("is required".into()),
            [] => Ok(None),
            [Some(text)] => P::parse(text).map(Some),
            several if several.contains(&None) => Err("must be ASCII".into()),
            several if P::LIST => {
                P::parse(&several.iter().flatten().map(AsRef::as_ref).collect::<Vec<&str>>().join(", "))
                    .map(Some)
            }
            _ => Err("is given more than once".into()),
        };
        let pointer = format!("{place}: {}", options.name);
        Ok(Self(read.map_err(|detail| FieldError { pointer: pointer.into(), detail })))
    }
}

/// Where it stands, in words, and all that was sent under its name; what is no text is none.
fn sent<'a>(
    request: &'a Request,
    place: MetaParamIn,
    name: &str,
) -> (&'static str, Vec<Option<Cow<'a, str>>>) {
    match place {
        // What is no UTF-8 breaks the rule of any, as nothing does.
        MetaParamIn::Path => ("path", vec![Some(request.raw_path_param(name).unwrap_or_default().into())]),
        MetaParamIn::Query => {
            let query = request.uri().query().unwrap_or_default().as_bytes();
            let pairs = form_urlencoded::parse(query).filter(|(other, _)| other == name);
            ("query", pairs.map(|(_, text)| Some(text)).collect())
        }
        _ => {
            let values = request.headers().get_all(name).into_iter();
            ("header", values.map(|value| value.to_str().ok().map(Cow::from)).collect())
        }
    }
}

/// A UUID in the only spelling that anybody is given.
pub fn hyphenated(text: &str) -> Result<Uuid, Cow<'static, str>> {
    let id = Some(text).filter(|text| text.len() == Hyphenated::LENGTH).and_then(|text| text.parse().ok());
    id.ok_or("must be a UUID with hyphens".into())
}

/// Refuses parameters of the query that are not known: to ignore one that asks for more would answer a
/// question that nobody asked.
pub fn only_query(request: &Request, known: &[&str], errors: &mut Vec<FieldError>) {
    let query = request.uri().query().unwrap_or_default().as_bytes();
    if form_urlencoded::parse(query).any(|(name, _)| !known.contains(&&*name)) {
        let detail = match known {
            [] => "must be empty".to_owned(),
            _ => format!("takes `{}` and nothing else", known.join("` and `")),
        };
        errors.push(FieldError { pointer: "query".into(), detail: detail.into() });
    }
}
