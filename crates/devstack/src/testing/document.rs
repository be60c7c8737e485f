//! Every response that any test gets is one that the API's document names.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::{
    Method, StatusCode,
    header::{CONTENT_TYPE, HeaderMap},
};
use serde_json::Value;

/// What every program has besides what it documents.
const OTHERS: [&str; 5] = ["/docs", "/openapi.json", "/live", "/ready", "/metrics"];
/// The headers that matter to a client.
const HEADERS: [&str; 4] = ["ETag", "Location", "Retry-After", "Cache-Control"];

/// What `/openapi.json` says.
#[derive(Debug)]
pub struct Document(Value);

impl Document {
    /// Of the document as text.
    pub fn new(json: &[u8]) -> Self {
        Self(serde_json::from_slice(json).expect("the document is JSON"))
    }

    /// Its paths as routes have them (`/person/:cpf`), each with its methods as `Allow` lists them. A path that takes GET
    /// takes HEAD.
    pub fn operations(&self) -> BTreeMap<String, String> {
        let paths = self.0["paths"].as_object().expect("the document has paths");
        let of = |(path, item): (&String, &Value)| {
            let fields = item.as_object().expect("a path is an object").keys();
            let operations = fields.filter(|name| *name != "parameters");
            let mut methods: BTreeSet<_> = operations.map(|method| method.to_uppercase()).collect();
            if methods.contains("GET") {
                methods.insert("HEAD".to_owned());
            }
            let methods: Vec<_> = methods.into_iter().collect();
            (path.replace('{', ":").replace('}', ""), methods.join(", "))
        };
        paths.iter().map(of).collect()
    }

    /// What a reference leads to, or the value itself.
    fn resolved<'a>(&'a self, value: &'a Value) -> &'a Value {
        let Some(reference) = value["$ref"].as_str() else { return value };
        self.0.pointer(reference.trim_start_matches('#')).expect("a reference leads to something")
    }

    /// What it says of this operation; none of paths and methods that are none.
    fn operation(&self, method: &Method, path: &str) -> Option<&Value> {
        let method = if method == Method::HEAD { Method::GET } else { method.clone() };
        let alike = |documented: &str| {
            let (documented, path) = (documented.split('/'), path.split('/'));
            documented.clone().count() == path.clone().count()
                && documented.zip(path).all(|(d, p)| d.starts_with('{') || d == p)
        };
        let (_, path) = self.0["paths"].as_object()?.iter().find(|(documented, _)| alike(documented))?;
        path.get(method.as_str().to_lowercase())
    }

    /// Fails when the answer is of a status, a media type or a problem type that is not documented, or has a
    /// header that matters and is not. The path is without its query.
    pub fn check(&self, method: &Method, path: &str, status: StatusCode, headers: &HeaderMap, body: &[u8]) {
        let Some(operation) = self.operation(method, path) else {
            let none = [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED].contains(&status);
            assert!(none || OTHERS.contains(&path), "{method} {path}: {status}");
            return;
        };
        let what = format!("{method} {path}: {status}");
        let documented = self.resolved(&operation["responses"][status.as_str()]);
        assert!(documented.is_object(), "{what} is not documented");
        for header in HEADERS.into_iter().filter(|header| headers.contains_key(*header)) {
            assert!(documented["headers"][header].is_object(), "{what}: {header} is not documented");
        }
        let Some(media_type) = headers.get(CONTENT_TYPE) else {
            assert!(documented["content"].is_null(), "{what} is documented with a body");
            return;
        };
        let content = &documented["content"][media_type.to_str().expect("a media type is ASCII")];
        assert!(content.is_object(), "{what}: the media type is not documented");
        if status.as_u16() >= 400 && method != Method::HEAD {
            let body: Value = serde_json::from_slice(body).expect("a problem is JSON");
            let type_ = body["type"].as_str().expect("a problem has a type");
            // The schema is the place of one type, or of several.
            let place = format!("/problem.{}\"", type_.trim_start_matches("/problems/"));
            assert!(content.to_string().contains(&place), "{what}: {type_} is not documented");
        }
    }
}
