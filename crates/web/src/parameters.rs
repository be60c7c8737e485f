//! Parameters of a path, a query or a header.

use std::borrow::Cow;

use poem::Request;
use url::form_urlencoded;
use uuid::{Uuid, fmt::Hyphenated};

use crate::problem::{FieldError, Problem};

/// The value of a text; or the rule that it breaks, without the text.
pub type Parsed<T> = Result<T, Cow<'static, str>>;

/// Reads parameters one by one, in the order in which errors are listed, and collects everything that is wrong.
#[derive(Debug)]
pub struct Parameters<'a> {
    request: &'a Request,
    /// What is wrong so far.
    pub errors: Vec<FieldError>,
}

impl<'a> Parameters<'a> {
    /// Those of this request.
    pub fn of(request: &'a Request) -> Self {
        Self { request, errors: Vec::new() }
    }

    /// One of the path. What is not UTF-8 is read as an empty text, which no rule allows.
    pub fn path<T>(&mut self, name: &str, rule: impl FnOnce(&str) -> Parsed<T>) -> Option<T> {
        let text = self.request.raw_path_param(name).unwrap_or_default();
        self.keep("path", name, rule(text).map(Some))
    }

    /// One of the query, which may be absent.
    pub fn query<T>(&mut self, name: &str, rule: impl FnOnce(&str) -> Parsed<T>) -> Option<T> {
        let sent: Vec<_> = self.pairs().filter(|(other, _)| other == name).collect();
        let read = match &sent[..] {
            [] => Ok(None),
            [(_, text)] => rule(text).map(Some),
            _ => Err("is given more than once".into()),
        };
        self.keep("query", name, read)
    }

    /// A header, which may be absent.
    pub fn header<T>(&mut self, name: &str, rule: impl FnOnce(&str) -> Parsed<T>) -> Option<T> {
        let read = match texts(self.request, name).as_deref() {
            None => Err("must be ASCII".into()),
            Some([]) => Ok(None),
            Some([text]) => rule(text).map(Some),
            Some(_) => Err("is given more than once".into()),
        };
        self.keep("header", name, read)
    }

    /// A header that is a list, which may be absent, or come in several lines (RFC 9110, 5.3).
    pub fn header_list<T>(&mut self, name: &str, rule: impl FnOnce(&str) -> Parsed<T>) -> Option<T> {
        let read = match texts(self.request, name) {
            None => Err("must be ASCII".into()),
            Some(texts) if texts.is_empty() => Ok(None),
            Some(texts) => rule(&texts.join(", ")).map(Some),
        };
        self.keep("header", name, read)
    }

    /// Whether the query has a parameter of this name, right or wrong.
    pub fn has_query(&self, name: &str) -> bool {
        self.pairs().any(|(other, _)| other == name)
    }

    /// Refuses other parameters of the query: to ignore one would be to do something else than was asked for.
    pub fn only_query(&mut self, known: &[&str]) {
        if self.pairs().any(|(name, _)| !known.contains(&&*name)) {
            let detail = match known {
                [] => "must be empty".to_owned(),
                _ => format!("takes `{}` and nothing else", known.join("` and `")),
            };
            self.errors.push(FieldError { pointer: "query".into(), detail: detail.into() });
        }
    }

    /// What `build` makes of the parameters, or 422 with everything that is wrong.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, Problem> {
        let whole = if self.errors.is_empty() { build() } else { None };
        whole.ok_or_else(|| Problem::invalid(self.errors))
    }

    fn pairs(&self) -> form_urlencoded::Parse<'a> {
        form_urlencoded::parse(self.request.uri().query().unwrap_or_default().as_bytes())
    }

    fn keep<T>(&mut self, place: &str, name: &str, read: Parsed<Option<T>>) -> Option<T> {
        read.unwrap_or_else(|detail| {
            self.errors.push(FieldError { pointer: format!("{place}: {name}").into(), detail });
            None
        })
    }
}

/// The lines of a header. None: one of them is not ASCII.
pub(crate) fn texts<'a>(request: &'a Request, name: &str) -> Option<Vec<&'a str>> {
    request.headers().get_all(name).iter().map(|value| value.to_str().ok()).collect()
}

/// A UUID in the only spelling that responses have.
pub fn hyphenated(text: &str) -> Parsed<Uuid> {
    let id = Some(text).filter(|text| text.len() == Hyphenated::LENGTH).and_then(|text| text.parse().ok());
    id.ok_or("must be a UUID with hyphens".into())
}
