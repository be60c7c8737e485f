//! Every answer that any test gets is one that the documentation names.

use poem::{Response, http::Method};
use serde_json::Value;

/// What `/openapi.json` says.
pub(crate) struct Document(Value);

impl Document {
    pub(crate) fn new(json: &[u8]) -> Self {
        Self(serde_json::from_slice(json).unwrap())
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
    /// header that matters and is not.
    pub(crate) fn check(&self, method: &Method, path: &str, response: &Response, body: &[u8]) {
        let Some(operation) = self.operation(method, path) else {
            // A path or method that is none, or the documentation itself.
            let status = response.status().as_u16();
            assert!(
                [404, 405].contains(&status) || !path.starts_with("/person"),
                "{method} {path}: {status}"
            );
            return;
        };
        let what = format!("{method} {path}: {}", response.status());
        let documented = &operation["responses"][response.status().as_str()];
        assert!(documented.is_object(), "{what} is not documented");
        for header in ["ETag", "Location", "Retry-After"] {
            let given = response.headers().contains_key(header);
            assert!(
                !given || documented["headers"][header].is_object(),
                "{what}: {header} is not documented"
            );
        }
        let content = &documented["content"][response.content_type().unwrap()];
        assert!(content.is_object(), "{what}: the media type is not documented");
        if response.status().as_u16() >= 400 && method != Method::HEAD {
            let body: Value = serde_json::from_slice(body).unwrap();
            // The schema is the place of one type, or of several.
            let place =
                format!("/problem.{}", body["type"].as_str().unwrap().strip_prefix("/problems/").unwrap());
            assert!(
                content.to_string().contains(&format!("{place}\"")),
                "{what}: {} is not documented",
                body["type"]
            );
        }
    }
}
