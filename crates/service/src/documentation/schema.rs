//! What bodies look like, in the words of OpenAPI 3.0.

use poem_openapi::registry::{MetaSchema, MetaSchemaRef, Registry};

use crate::problem::Problem;

/// A body with a place of its own in the documentation.
pub trait Described {
    /// Its name there.
    const NAME: &'static str;
    /// What it looks like.
    fn schema() -> MetaSchema;
}

/// A field of an object: name, whether it is always there, and what it looks like.
pub type Field = (&'static str, bool, MetaSchema);

/// An object with these fields; others may come later.
pub fn object(fields: impl IntoIterator<Item = Field>) -> MetaSchema {
    let mut schema = MetaSchema::new("object");
    fields.into_iter().for_each(|field| add(&mut schema, field));
    schema
}

/// Adds a field to an object.
pub(super) fn add(object: &mut MetaSchema, (name, required, field): Field) {
    if required {
        object.required.push(name);
    }
    object.properties.push((name, inline(field)));
}

/// The title of what nothing may be. poem-openapi cannot say that an object takes no other fields.
const NOTHING: &str = "nothing";

/// An object with these fields and no others.
pub fn closed_object(fields: impl IntoIterator<Item = Field>) -> MetaSchema {
    let nothing = MetaSchema { title: Some(NOTHING.to_owned()), ..MetaSchema::ANY };
    MetaSchema { additional_properties: Some(Box::new(inline(nothing))), ..object(fields) }
}

/// The document, with what [`closed_object`] means in OpenAPI's own words.
pub(super) fn closed(document: &str) -> String {
    let mark = format!("\"title\": \"{NOTHING}\"");
    let mut parts = document.split("\"additionalProperties\": {");
    let mut closed = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (object, rest) = match part.split_once('}') {
            Some((inner, rest)) if inner.trim() == mark => ("false", rest),
            _ => ("{", part),
        };
        closed += "\"additionalProperties\": ";
        closed += object;
        closed += rest;
    }
    closed
}

/// A list.
pub fn list(of: MetaSchemaRef) -> MetaSchema {
    MetaSchema { items: Some(Box::new(of)), ..MetaSchema::new("array") }
}

/// A schema on the spot, without a place of its own.
pub fn inline(schema: MetaSchema) -> MetaSchemaRef {
    MetaSchemaRef::Inline(Box::new(schema))
}

/// The same with a description.
pub fn about(description: &'static str, schema: MetaSchema) -> MetaSchema {
    MetaSchema { description: Some(description), ..schema }
}

/// A text of this format (`uuid`, `date-time`, …).
pub fn formatted(format: &'static str, description: &'static str) -> MetaSchema {
    about(description, MetaSchema::new_with_format("string", format))
}

/// A text.
pub fn text(description: &'static str) -> MetaSchema {
    about(description, MetaSchema::new("string"))
}

/// A text that is one of these.
pub fn one_of(texts: &[&'static str], description: &'static str) -> MetaSchema {
    MetaSchema { enum_items: texts.iter().map(|text| (*text).into()).collect(), ..self::text(description) }
}

/// An integer of 64 bits, from `minimum` on.
pub fn integer(minimum: f64, description: &'static str) -> MetaSchema {
    MetaSchema {
        minimum: Some(minimum),
        description: Some(description),
        ..MetaSchema::new_with_format("integer", "int64")
    }
}

/// The place of a described body.
pub fn of<T: Described>() -> MetaSchemaRef {
    MetaSchemaRef::Reference(T::NAME.to_owned())
}

/// Puts a described body in its place.
pub fn register<T: Described>(registry: &mut Registry) {
    registry.create_schema::<T, _>(T::NAME.to_owned(), |_| T::schema());
}

impl Described for Problem {
    const NAME: &'static str = "Problem";

    fn schema() -> MetaSchema {
        let error = object([
            (
                "pointer",
                true,
                text(
                    "Where: a JSON pointer into the body (`#/value`), or `path: cpf`, `query: limit`, `header: If-Match`; \
                     `query` alone: a parameter that is not known.",
                ),
            ),
            ("detail", true, text("The rule that it breaks.")),
        ]);
        let fields = object([
            ("type", true, formatted("uri-reference", "Tells programs what happened. Stable.")),
            ("title", true, text("Tells people what happened.")),
            ("status", true, about("The status code, as in the response.", MetaSchema::new("integer"))),
            ("detail", true, text("What happened this time, and what to do next.")),
            (
                "errors",
                false,
                about("Everything that is wrong with the request, not just the first.", list(inline(error))),
            ),
        ]);
        about("An error (RFC 9457).", fields)
    }
}
