//! A JSON object, field by field, with everything that is wrong with it collected.

use std::{borrow::Cow, fmt::Write};

use poem::Request;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;
use web::{
    parameters::Parameters,
    problem::{FieldError, Problem},
};

use super::rules;
use crate::problems::MALFORMED_JSON;

/// The largest number of errors in a response: a body of nothing but wrong fields must not make it huge.
const ERRORS_MAX: usize = 50;

/// The largest number of characters of an unknown field that an error shows.
const NAME_MAX: usize = 50;

/// The parameters of a request and the fields of its body that are not read yet, and what is wrong with the others.
pub(super) struct Fields<'a> {
    rest: Vec<(Cow<'a, str>, &'a RawValue)>,
    pub(super) parameters: Parameters<'a>,
}

impl<'a> Fields<'a> {
    /// Reads a JSON object. Values stay as they are written, so that no number goes through a float;
    /// they are skipped without recursion, so that depth costs nothing.
    pub(super) fn read(request: &'a Request, body: &'a [u8]) -> Result<Self, Problem> {
        let text = std::str::from_utf8(body).map_err(|_| malformed("It is not UTF-8."))?;
        if text.trim().is_empty() {
            return Err(malformed("It is empty."));
        }
        let value: &RawValue = serde_json::from_str(text).map_err(|error| not_json(&error))?;
        if !value.get().starts_with('{') {
            return Err(Problem::invalid(vec![FieldError {
                pointer: "#".into(),
                detail: "must be an object".into(),
            }]));
        }
        // What can still fail is a name with half a surrogate pair.
        let Object(rest) = serde_json::from_str(value.get()).map_err(|error| not_json(&error))?;
        Ok(Self { rest, parameters: Parameters::of(request) })
    }

    /// Of a request without a body.
    pub(super) fn none(request: &'a Request) -> Self {
        Self { rest: Vec::new(), parameters: Parameters::of(request) }
    }

    /// A field that must be there and follow its rule. `None` means an error, which is collected.
    pub(super) fn required<T>(
        &mut self,
        name: &'static str,
        rule: impl FnOnce(&RawValue) -> Result<T, Cow<'static, str>>,
    ) -> Option<T> {
        match self.take(name)[..] {
            [] => self.reject(field(name, "is required")),
            [raw] => return rule(raw).map_err(|detail| self.reject(field(name, detail))).ok(),
            _ => self.reject(field(name, "is given more than once")),
        }
        None
    }

    /// A field that may be missing, and else must follow its rule.
    pub(super) fn given<T>(
        &mut self,
        name: &'static str,
        rule: impl FnOnce(&RawValue) -> Result<T, Cow<'static, str>>,
    ) -> Option<T> {
        self.rest.iter().any(|(other, _)| other == name).then(|| self.required(name, rule))?
    }

    /// A field that may be missing or null, which mean the same.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        rule: impl FnOnce(&RawValue) -> Result<T, Cow<'static, str>>,
    ) -> Option<T> {
        self.given(name, rules::nullable(rule)).flatten()
    }

    /// Takes every field of this name out of the rest.
    fn take(&mut self, name: &str) -> Vec<&'a RawValue> {
        self.rest.extract_if(.., |(other, _)| other == name).map(|(_, raw)| raw).collect()
    }

    /// Adds an error.
    fn reject(&mut self, error: FieldError) {
        self.parameters.errors.push(error);
    }

    /// What `build` makes of the fields, when nothing was wrong and nothing is left.
    pub(super) fn finish<T>(mut self, build: impl FnOnce() -> Option<T>) -> Result<T, Problem> {
        let errors = &mut self.parameters.errors;
        errors.extend(self.rest.iter().map(|(name, _)| field(name, "is not known here")));
        let more = errors.len().saturating_sub(ERRORS_MAX);
        if more > 0 {
            errors.truncate(ERRORS_MAX);
            self.reject(FieldError { pointer: "#".into(), detail: format!("has {more} more errors").into() });
        }
        self.parameters.finish(build)
    }
}

fn field(name: &str, detail: impl Into<Cow<'static, str>>) -> FieldError {
    FieldError { pointer: pointer(name).into(), detail: detail.into() }
}

/// A JSON pointer as a URI fragment (RFC 6901, section 6): `~` and `/` escaped for the pointer, then
/// whatever a fragment may not contain for the URI. Of a name that is longer than any that is known, the beginning.
fn pointer(name: &str) -> String {
    let name: String = name.chars().take(NAME_MAX).collect();
    let mut pointer = String::from("#/");
    for byte in name.replace('~', "~0").replace('/', "~1").bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte) {
            pointer.push(byte.into());
        } else {
            // Writing to a string cannot fail.
            let _ = write!(pointer, "%{byte:02X}");
        }
    }
    pointer
}

fn not_json(error: &serde_json::Error) -> Problem {
    malformed(format_args!("It is not JSON at line {}, column {}.", error.line(), error.column()))
}

fn malformed(what: impl std::fmt::Display) -> Problem {
    MALFORMED_JSON.with_detail(format!("{} {what}", MALFORMED_JSON.detail))
}

/// An object's members in their order, with duplicates, which a map would swallow.
struct Object<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}
