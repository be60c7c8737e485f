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
use poem_openapi::{
    OpenApi, OpenApiService,
    registry::{MetaApi, MetaHeader, Registry},
};

use self::answer::text_header;
pub use self::{
    answer::{Answer, Answers, CACHED, Failure, Held, Problems},
    parameter::{Parameter, Sent, hyphenated, only_query},
};
use crate::{front::Shared, problem::Problem};

/// Everything that the page needs is in it. A browser is told so, too: it must not look elsewhere, and may
/// send requests to this service alone.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                           img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                           frame-ancestors 'none'";

/// The routes of an API, with its documentation beside them.
pub fn routes(api: impl OpenApi + Clone, title: &str, description: &str) -> Route {
    let named = Named(api.clone());
    let service = OpenApiService::new(named, title, env!("CARGO_PKG_VERSION")).description(description);
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

/// An API, described with what each of its operations has alike: a name, and headers of its answers.
struct Named<A>(A);

impl<A: OpenApi> OpenApi for Named<A> {
    fn meta() -> Vec<MetaApi> {
        let mut apis = A::meta();
        let paths = apis.iter_mut().flat_map(|api| &mut api.paths);
        for (path, operation) in paths.flat_map(|path| path.operations.iter_mut().map(|o| (&path.path, o))) {
            // poem-openapi wants a text that lives for ever. They are few, and made once.
            operation.operation_id = Some(operation_id(&operation.method, path).leak());
            for response in &mut operation.responses.responses {
                add_header(&mut response.headers, REQUEST_ID);
                add_header(&mut response.headers, NO_STORE);
            }
        }
        apis
    }

    fn register(registry: &mut Registry) {
        A::register(registry);
    }

    fn add_routes(self, routes: &mut HashMap<String, HashMap<Method, BoxEndpoint<'static>>>) {
        self.0.add_routes(routes);
    }
}

/// The name by which generated clients call an operation: `getPersonByCpfIncomeById`.
fn operation_id(method: &Method, path: &str) -> String {
    let mut id = method.as_str().to_lowercase();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let name = part.trim_matches(['{', '}']);
        let by = if name.len() < part.len() { "By" } else { "" };
        let (first, rest) = name.split_at(1);
        id += by;
        id += &first.to_uppercase();
        id += rest;
    }
    id
}

/// What every answer says of itself.
const REQUEST_ID: (&str, &str) = ("X-Request-Id", "Names the request in the service's log.");
const NO_STORE: (&str, &str) = ("Cache-Control", "`no-store`.");

/// Adds a header, unless it is described already.
fn add_header(headers: &mut Vec<MetaHeader>, (name, description): (&str, &str)) {
    if headers.iter().all(|header| header.name != name) {
        headers.push(text_header(name, description));
    }
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
            .header(header::CACHE_CONTROL, "max-age=300")
            .extension(Shared)
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
pub(crate) fn only(
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
