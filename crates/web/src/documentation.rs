//! The document of an API: an `openapi.yaml` that people write and read. It is served as JSON at `/openapi.json`, and as
//! a page at `/docs` that needs nothing from elsewhere.

use bytes::Bytes;
use poem::{Response, Route, endpoint::make_sync, get, http::header};
use serde::{Serialize, Serializer, ser::Error};
use yaml_rust2::{Yaml, YamlLoader};

use crate::methods::only;

/// The page. A script in it renders the document, which takes the place of `{{document}}`.
const PAGE: &str = include_str!("documentation/page.html");

/// The browser loads nothing from elsewhere, and sends requests to this service alone.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                           connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// Adds `/openapi.json` and `/docs` to the routes of an API.
pub fn add_to(routes: Route, title: &str, yaml: &str) -> Route {
    let document = json(yaml);
    // In JSON this sign stands in strings alone. It must not end the script in which the page has the document.
    let embedded = document.replace('<', "\\u003c");
    let page = PAGE.replace("{{title}}", title).replacen("{{document}}", &embedded, 1);
    [("/openapi.json", "application/json", document + "\n"), ("/docs", "text/html; charset=utf-8", page)]
        .into_iter()
        .fold(routes, |routes, (path, media_type, text)| {
            let text = Bytes::from(text);
            let respond = make_sync(move |_| {
                Response::builder()
                    .content_type(media_type)
                    .header(header::CONTENT_SECURITY_POLICY, PAGE_POLICY)
                    .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
                    .header(header::CACHE_CONTROL, "max-age=300")
                    .body(text.clone())
            });
            routes.at(path, only("GET, HEAD", get(respond)))
        })
}

/// The document as JSON, with its fields in the order in which they are written.
///
/// # Panics
/// When it is not YAML that JSON can write.
#[expect(
    clippy::expect_used,
    reason = "the document is a part of the program; a test that reads it fails first"
)]
pub fn json(yaml: &str) -> String {
    let documents = YamlLoader::load_from_str(yaml).expect("the document is YAML");
    let document = documents.first().expect("the document is not empty");
    serde_json::to_string_pretty(&Json(document)).expect("the document has the values that JSON has")
}

/// YAML as JSON.
struct Json<'a>(&'a Yaml);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Yaml::String(text) => s.serialize_str(text),
            Yaml::Integer(number) => s.serialize_i64(*number),
            Yaml::Real(number) => number.parse::<f64>().map_err(S::Error::custom)?.serialize(s),
            Yaml::Boolean(value) => s.serialize_bool(*value),
            Yaml::Array(items) => s.collect_seq(items.iter().map(Json)),
            Yaml::Hash(fields) => s.collect_map(fields.iter().map(|(name, value)| (Json(name), Json(value)))),
            Yaml::Null => s.serialize_unit(),
            Yaml::Alias(_) | Yaml::BadValue => Err(S::Error::custom("an alias that names nothing")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_becomes_json_in_the_order_in_which_it_is_written() {
        let yaml = "b: &line '^\\u0000$'\na: [1, 0.5, true, null, '1', *line]\n200: {}\n";
        let json = serde_json::from_str::<Box<serde_json::value::RawValue>>(&json(yaml)).unwrap();
        let compact: String = json.get().chars().filter(|c| !c.is_whitespace()).collect();
        assert_eq!(compact, r#"{"b":"^\\u0000$","a":[1,0.5,true,null,"1","^\\u0000$"],"200":{}}"#);
    }
}
