//! An API that documents itself: `/openapi.json`, and `/docs` for people.
//!
//! An operation is declared once, where it is handled, with `#[OpenApi]` of poem-openapi: its path and
//! method, and in its signature what it takes ([`Sent`], a body) and answers ([`Answer`], [`Failure`]). What
//! is described here is not parsed here: requests are parsed strictly, with everything that is wrong at
//! once, by each program's own rules.

mod answer;
mod parameter;
pub mod schema;

use std::collections::HashMap;

use bytes::Bytes;
use poem::{
    Endpoint, EndpointExt, IntoEndpoint, Response, Route, RouteMethod,
    endpoint::{BoxEndpoint, make_sync},
    error::MethodNotAllowedError,
    http::{HeaderValue, Method, header},
};
use poem_openapi::{OpenApi, OpenApiService};

pub use self::{
    answer::{Answer, Answers, Failure, Problems},
    parameter::{Parameter, Sent, only_query},
};
use crate::problem::Problem;

/// Everything that the page needs is in it. A browser is told so, too: it must not look elsewhere, and may
/// send requests to this service alone.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                           img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                           frame-ancestors 'none'";

/// The routes of an API, with its documentation beside them.
pub fn routes(api: impl OpenApi + Clone, title: &str, description: &str) -> Route {
    let service = OpenApiService::new(api.clone(), title, env!("CARGO_PKG_VERSION")).description(description);
    let described = service.spec();
    let document = secured(&schema::closed(&described));
    let page = service
        .swagger_ui_html()
        .replacen("<html", "<!DOCTYPE html>\n<html lang=\"en\"", 1)
        .replacen("<title>Swagger UI</title>", &format!("<title>{title}</title>"), 1)
        .replacen(&described, &document, 1);
    operations(api)
        .at("/openapi.json", answer_with("application/json", document + "\n"))
        .at("/docs", answer_with("text/html; charset=utf-8", page))
}

/// The document, with the keys that a program may ask for. poem-openapi knows a scheme only together with a
/// handler's argument that checks it, and here they are checked in front of all handlers.
fn secured(document: &str) -> String {
    const SCHEME: &str = r#""securitySchemes": {
      "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key that the operator has given out. Where none are asked for, none has to be sent."
      }
    },
    "schemas": {"#;
    document.replacen("\"schemas\": {", SCHEME, 1).replacen(
        "\"components\": {",
        "\"security\": [{ \"key\": [] }, {}],\n  \"components\": {",
        1,
    )
}

/// Always the same answer. The page has more than a megabyte: all answers share one copy.
fn answer_with(media_type: &'static str, text: String) -> BoxEndpoint<'static, Response> {
    let text = Bytes::from(text);
    let answer = make_sync(move |_| {
        Response::builder()
            .content_type(media_type)
            .header(header::CONTENT_SECURITY_POLICY, PAGE_POLICY)
            .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
            .body(text.clone())
    });
    only("GET, HEAD", RouteMethod::new().get(answer))
}

/// The operations under their paths. poem-openapi numbers the parameters in its paths, and the path is what
/// metrics and logs show: here they keep their names. The documentation knows them.
fn operations<A: OpenApi>(api: A) -> Route {
    let documented =
        A::meta().into_iter().flat_map(|api| api.paths).map(|path| (shape(&path.path), path.path));
    let documented: HashMap<String, String> = documented.collect();
    let mut table = HashMap::new();
    api.add_routes(&mut table);
    table.into_iter().fold(Route::new(), |route, (path, methods)| {
        let named =
            documented.get(&shape(&path)).map_or(path, |named| named.replace('{', ":").replace('}', ""));
        let mut allowed: Vec<&str> = methods.keys().map(Method::as_str).collect();
        if allowed.contains(&"GET") {
            allowed.push("HEAD");
        }
        allowed.sort_unstable();
        let allowed = allowed.join(", ");
        let methods = methods
            .into_iter()
            .fold(RouteMethod::new(), |all, (method, endpoint)| all.method(method, endpoint));
        route.at(named, only(&allowed, methods))
    })
}

/// A path without the names of its parameters.
fn shape(path: &str) -> String {
    path.split('/')
        .map(|part| if part.starts_with([':', '{']) { ":" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

/// Adds `Allow` to the answer to other methods, which poem leaves out.
fn only(
    allowed: &str,
    methods: impl IntoEndpoint<Endpoint: Endpoint<Output = Response> + 'static>,
) -> BoxEndpoint<'static, Response> {
    let allowed = HeaderValue::from_str(allowed).unwrap_or(HeaderValue::from_static(""));
    methods
        .into_endpoint()
        .catch_error(move |error: MethodNotAllowedError| {
            let allowed = allowed.clone();
            async move {
                let mut response = Problem::from_error(error.into());
                response.headers_mut().insert(header::ALLOW, allowed);
                response
            }
        })
        .boxed()
}
