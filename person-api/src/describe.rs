//! How bodies and their fields are described. The rules themselves are in [`request`](crate::request); the
//! examples are the files of `payloads/`.

use std::marker::PhantomData;

use poem_openapi::{Tags, registry::MetaSchema};
use service::documentation::schema::{
    self, Described, Field, about, closed_object, formatted, integer, list, object, one_of, text,
};

use crate::{
    kind::ItemKind,
    request::{INVISIBLE, LINE_ENDS, Sendable},
    store::ITEMS_MAX,
};

/// The operations, grouped.
#[derive(Debug, Tags)]
pub(crate) enum Tag {
    /// Whose items are counted.
    Persons,
    /// What a person earns. Of the score, each adds a fiftieth of its value.
    Incomes,
    /// What a person owns. Of the score, each adds a twentieth of its value.
    Assets,
    /// What a person owes. Of the score, each takes a twentieth of its value.
    Debts,
}

/// What a version is.
pub(crate) const VERSION: &str =
    "The person's version: it counts the person's changes, items included, without holes.";

/// A cpf in an answer.
fn cpf() -> MetaSchema {
    MetaSchema { maximum: Some(99_999_999_999.0), ..integer(1.0, "Taxpayer's number.") }
}

/// A cpf as digits.
pub(crate) fn cpf_digits(text: MetaSchema) -> MetaSchema {
    MetaSchema { pattern: Some("^0*[1-9][0-9]*$".to_owned()), max_length: Some(11), ..text }
}

/// A cpf in a body.
pub(crate) fn sent_cpf() -> MetaSchema {
    let digits = cpf_digits(MetaSchema::new("string"));
    MetaSchema {
        any_of: vec![schema::inline(cpf()), schema::inline(digits)],
        description: Some(
            "Taxpayer's number: a positive integer of at most 11 digits, as a number or as a text of digits.",
        ),
        ..MetaSchema::ANY
    }
}

/// A line of text with something to see in it.
fn line(max: usize, description: &'static str) -> MetaSchema {
    let escaped = |chars: &[char]| chars.iter().fold(String::new(), |all, c| all + &escape(*c));
    let breaks = format!(r"\u0000-\u001f\u007f-\u009f{}", escaped(&LINE_ENDS));
    let pattern = format!(r"^[^{breaks}]*[^\s{breaks}{}][^{breaks}]*$", escaped(&INVISIBLE));
    MetaSchema { pattern: Some(pattern), min_length: Some(1), max_length: Some(max), ..text(description) }
}

/// A character as a pattern writes it.
fn escape(c: char) -> String {
    format!(r"\u{:04x}", u32::from(c))
}

fn nullable(schema: MetaSchema) -> MetaSchema {
    MetaSchema { nullable: true, ..schema }
}

/// An amount in an answer. Without the most that it may be, which is no double: who reads it as one would find
/// the largest too large.
fn stored_value() -> MetaSchema {
    MetaSchema { maximum: None, exclusive_maximum: None, ..value() }
}

fn value() -> MetaSchema {
    MetaSchema {
        minimum: Some(0.0),
        maximum: Some(1e15),
        exclusive_maximum: Some(true),
        ..about(
            "An exact decimal: at most 15 digits before the point and 4 after it, not negative. `1000`, `1000.00` and \
             `1e3` are the same.",
            MetaSchema::new("number"),
        )
    }
}

fn name() -> MetaSchema {
    line(
        200,
        "Full name: not blank, at most 200 characters (code points), no control characters or line breaks.",
    )
}

fn address() -> MetaSchema {
    nullable(line(
        500,
        "Postal address, null when unknown: not blank, at most 500 characters, no control characters or line breaks.",
    ))
}

fn type_() -> MetaSchema {
    line(100, "What sort: not blank, at most 100 characters, no control characters or line breaks.")
}

/// A date or an instant.
fn sent_date_of_birth() -> MetaSchema {
    MetaSchema {
        any_of: vec![
            schema::inline(formatted("date", "Its midnight UTC: `2019-06-15`.")),
            schema::inline(formatted("date-time", "An instant: `2019-06-15T19:23:55-03:00`.")),
        ],
        description: Some(
            "A date or a date-time of RFC 3339, within the years 1 to 9999 UTC. Kept to the microsecond.",
        ),
        ..MetaSchema::ANY
    }
}

fn status() -> MetaSchema {
    one_of(
        &["active", "inactive"],
        "An inactive person takes no new items; what is there may be changed and deleted.",
    )
}

fn created_at() -> MetaSchema {
    formatted("date-time", "When it was stored.")
}

/// The person of all examples.
const PERSON_ID: &str = "019928b5-6a3c-7d41-9c35-2f6c1d1e8a07";

fn example(schema: MetaSchema, payload: &str) -> MetaSchema {
    MetaSchema { example: serde_json::from_str(payload).ok(), ..schema }
}

/// The body of `POST /person`.
pub(crate) struct NewPersonBody;

impl Described for NewPersonBody {
    const NAME: &'static str = "NewPerson";

    fn schema() -> MetaSchema {
        let schema = closed_object([
            ("cpf", true, sent_cpf()),
            ("name", true, name()),
            ("address", false, address()),
            ("date_of_birth", true, sent_date_of_birth()),
        ]);
        example(schema, include_str!("../../payloads/new_person.json"))
    }
}

impl Sendable for NewPersonBody {}

/// The body of `PATCH /person/{cpf}`.
pub(crate) struct PatchBody;

impl Described for PatchBody {
    const NAME: &'static str = "PersonPatch";

    fn schema() -> MetaSchema {
        let schema = closed_object([
            ("name", false, name()),
            ("address", false, address()),
            ("date_of_birth", false, sent_date_of_birth()),
            ("status", false, status()),
        ]);
        example(schema, r#"{"address": "Rua das Flores, 1", "status": "active"}"#)
    }
}

impl Sendable for PatchBody {
    const MEDIA_TYPES: &'static [&'static str] = &["application/merge-patch+json", "application/json"];
}

/// The body of an item that is sent.
pub(crate) struct NewItemBody<K>(PhantomData<K>);

impl<K: ItemKind> Sendable for NewItemBody<K> {}

impl<K: ItemKind> Described for NewItemBody<K> {
    const NAME: &'static str = K::NEW_NAME;

    fn schema() -> MetaSchema {
        let type_ = K::HAS_TYPE.then(|| ("type", true, type_()));
        example(closed_object(type_.into_iter().chain([("value", true, value())])), K::EXAMPLE)
    }
}

/// An item in an answer.
pub(crate) struct ItemBody<K>(PhantomData<K>);

impl<K: ItemKind> Described for ItemBody<K> {
    const NAME: &'static str = K::NAME;

    fn schema() -> MetaSchema {
        let type_ = K::HAS_TYPE.then(|| ("type", true, type_()));
        let fields = [("id", true, formatted("uuid", "The item's id."))]
            .into_iter()
            .chain(type_)
            .chain([("value", true, stored_value()), ("created_at", true, created_at())]);
        example(object(fields), &Self::example())
    }
}

impl<K: ItemKind> ItemBody<K> {
    /// As the payload that creates it comes out.
    fn example() -> String {
        let (sent, id) = (K::EXAMPLE.trim().trim_start_matches('{'), K::EXAMPLE_ID);
        format!(r#"{{"id": "{id}", "created_at": "2026-02-01T11:59:57.250631+00:00", {sent}"#)
    }
}

/// A page of items.
pub(crate) struct ListBody<K>(PhantomData<K>);

impl<K: ItemKind> Described for ListBody<K> {
    const NAME: &'static str = K::LIST_NAME;

    fn schema() -> MetaSchema {
        let items = list(schema::inline(ItemBody::<K>::schema()));
        let place = K::PATH.replace("{cpf}", "11111");
        let next = format!("{place}?limit=1&after={}", K::EXAMPLE_ID);
        let page = format!(r#"{{"items": [{}], "next": "{next}"}}"#, ItemBody::<K>::example());
        let schema = object([
            ("items", true, about("In the order in which they came.", items)),
            ("next", true, nullable(text("Where the next page is; null on the last one."))),
        ]);
        example(schema, &page)
    }
}

/// What a write says of itself.
fn written(messages: &[&'static str]) -> MetaSchema {
    let schema = object([
        ("message", true, one_of(messages, "What was done.")),
        ("id", true, formatted("uuid", "The record's id: the person's, or the item's.")),
        ("version", true, integer(1.0, VERSION)),
    ]);
    let said = messages.first().copied().unwrap_or_default();
    let version = if said == "created" { 1 } else { 4 };
    example(schema, &format!(r#"{{"message": "{said}", "id": "{PERSON_ID}", "version": {version}}}"#))
}

/// What was created.
pub(crate) struct CreatedBody;

impl Described for CreatedBody {
    const NAME: &'static str = "Created";

    fn schema() -> MetaSchema {
        written(&["created"])
    }
}

/// What was changed, or was so already.
pub(crate) struct ChangedBody;

impl Described for ChangedBody {
    const NAME: &'static str = "Changed";

    fn schema() -> MetaSchema {
        written(&["changed", "unchanged"])
    }
}

/// What was deleted.
pub(crate) struct DeletedBody;

impl Described for DeletedBody {
    const NAME: &'static str = "Deleted";

    fn schema() -> MetaSchema {
        written(&["deleted"])
    }
}

/// A person in an answer.
pub(crate) struct PersonBody;

impl Described for PersonBody {
    const NAME: &'static str = "Person";

    fn schema() -> MetaSchema {
        use crate::kind::{Asset, Debt, Income};
        fn items<K: ItemKind>(name: &'static str) -> Field {
            const FIRST: &str = "The first of them, in the order in which they came.";
            let items = list(schema::inline(ItemBody::<K>::schema()));
            (name, true, MetaSchema { max_items: usize::try_from(ITEMS_MAX).ok(), ..about(FIRST, items) })
        }
        let truncated = about(
            "Lists that are longer than what is shown here.",
            list(schema::inline(one_of(&["incomes", "assets", "debts"], "A list's name."))),
        );
        let person = include_str!("../../payloads/new_person.json").trim().trim_start_matches('{');
        let (income, asset, debt) =
            (ItemBody::<Income>::example(), ItemBody::<Asset>::example(), ItemBody::<Debt>::example());
        // Stored in UTC.
        let person = person.replace("2019-06-15T19:23:55-03:00", "2019-06-15T22:23:55+00:00");
        let whole = format!(
            r#"{{"id": "{PERSON_ID}", "created_at": "2026-02-01T11:59:56.104200+00:00", "status": "active",
                "version": 4, "incomes": [{income}], "assets": [{asset}], "debts": [{debt}], "truncated": [], {person}"#
        );
        let schema = object([
            (
                "id",
                true,
                formatted(
                    "uuid",
                    "Names this life of the cpf: one that is deleted and created again has another.",
                ),
            ),
            ("cpf", true, cpf()),
            ("name", true, name()),
            ("address", true, address()),
            ("date_of_birth", true, formatted("date-time", "Midnight UTC when only the day was given.")),
            ("created_at", true, created_at()),
            ("status", true, status()),
            ("version", true, integer(1.0, VERSION)),
            items::<Income>("incomes"),
            items::<Asset>("assets"),
            items::<Debt>("debts"),
            ("truncated", true, truncated),
        ]);
        example(schema, &whole)
    }
}
