//! What can go wrong, by type; and for each operation, which of it.

use std::time::Duration;

use poem::http::StatusCode;
use service::{
    documentation::{Failure, Problems},
    problem::{
        INCOMPLETE_BODY, INVALID_FIELDS, Kind, OVERLOADED, Problem, SLOW_BODY, TOO_LARGE, UNAVAILABLE,
    },
};

use crate::store::{Refused, StoreError};

/// When another try makes sense, while the database is away.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A kind that another try does not help by itself.
const fn kind(status: StatusCode, code: &'static str, title: &'static str, detail: &'static str) -> Kind {
    Kind { status, code, title, detail, retry_after: None }
}

/// 404: nobody has this cpf.
const UNKNOWN_PERSON: Kind = kind(
    StatusCode::NOT_FOUND,
    "unknown-person",
    "Unknown person",
    "Nobody has this cpf: there never was such a person, or they were deleted.",
);

/// 409: somebody has this cpf already.
const CPF_EXISTS: Kind = kind(
    StatusCode::CONFLICT,
    "cpf-exists",
    "The cpf exists",
    "There is a person with this cpf already. Nothing was stored.",
);

/// 404: there is none with this id, or it is somebody else's.
const UNKNOWN_ITEM: Kind = kind(
    StatusCode::NOT_FOUND,
    "unknown-item",
    "Unknown item",
    "The person has no item of this kind with this id.",
);

/// 409: no new items.
const PERSON_INACTIVE: Kind = kind(
    StatusCode::CONFLICT,
    "person-inactive",
    "The person is inactive",
    "An inactive person takes no new items. Nothing was stored. PATCH the person's `status` first.",
);

/// 412: somebody was faster, or it is another life of the cpf.
const OTHER_STATE: Kind = kind(
    StatusCode::PRECONDITION_FAILED,
    "other-state",
    "Another state",
    "The person is not, or not any more, in the state that `If-Match` names. Nothing was changed. Read it again, \
     and decide then.",
);

/// 422: a mistake of the client, as the draft on the key says.
const KEY_REUSED: Kind = kind(
    StatusCode::UNPROCESSABLE_ENTITY,
    "key-reused",
    "The key was used before",
    "This `Idempotency-Key` was used for another body. Nothing was stored. Take a new key for a new record.",
);

/// 503: nobody knows whether a write was stored.
const OUTCOME_UNKNOWN: Kind = Kind {
    retry_after: Some(RETRY_AFTER),
    ..kind(
        StatusCode::SERVICE_UNAVAILABLE,
        "outcome-unknown",
        "Outcome unknown",
        "The database stopped answering during the request: it was stored, or it was not. Look before you send it \
         again. A `POST` that had an `Idempotency-Key` can just be sent again.",
    )
};

/// 400: no JSON.
pub(crate) const MALFORMED_JSON: Kind = kind(
    StatusCode::BAD_REQUEST,
    "malformed-json",
    "Malformed JSON",
    "The request's body could not be read. Nothing was done.",
);
/// 415
pub(crate) const UNSUPPORTED_MEDIA_TYPE: Kind = kind(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported-media-type",
    "Unsupported Media Type",
    "Nothing was done. Send the body with a `Content-Type` that the operation takes.",
);
/// 415: a body that would have to be unpacked first.
pub(crate) const UNSUPPORTED_CODING: Kind = kind(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported-coding",
    "Unsupported Content-Encoding",
    "Nothing was done. Send the body as it is, without a `Content-Encoding`.",
);

/// Of every request with a body.
const BODY: &[&Kind] = &[
    &MALFORMED_JSON,
    &INCOMPLETE_BODY,
    &SLOW_BODY,
    &TOO_LARGE,
    &UNSUPPORTED_MEDIA_TYPE,
    &UNSUPPORTED_CODING,
    &INVALID_FIELDS,
];
/// Of every write.
const WRITE: &[&Kind] = &[&UNAVAILABLE, &OVERLOADED, &OUTCOME_UNKNOWN];
/// Of every read.
const READ: &[&Kind] = &[&INVALID_FIELDS, &UNAVAILABLE, &OVERLOADED];

/// The operations, for what can go wrong with each.
macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident: $kinds:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub(crate) enum $name {}
            impl Problems for $name {
                const KINDS: &'static [&'static [&'static Kind]] = &$kinds;
            }
        )*
    };
}

operations! {
    /// `POST /person`
    AddPerson: [BODY, WRITE, &[&CPF_EXISTS, &KEY_REUSED]];
    /// `PATCH /person/{cpf}`
    ChangePerson: [BODY, WRITE, &[&UNKNOWN_PERSON, &OTHER_STATE]];
    /// `DELETE /person/{cpf}`
    DeletePerson: [WRITE, &[&INVALID_FIELDS, &UNKNOWN_PERSON, &OTHER_STATE]];
    /// `GET /person/{cpf}`, and the lists of items
    ReadPerson: [READ, &[&UNKNOWN_PERSON]];
    /// `POST` of an item
    AddItem: [BODY, WRITE, &[&UNKNOWN_PERSON, &PERSON_INACTIVE, &OTHER_STATE, &KEY_REUSED]];
    /// `PUT` of an item
    ChangeItem: [BODY, WRITE, &[&UNKNOWN_PERSON, &UNKNOWN_ITEM, &OTHER_STATE]];
    /// `DELETE` of an item
    DeleteItem: [WRITE, &[&INVALID_FIELDS, &UNKNOWN_PERSON, &UNKNOWN_ITEM, &OTHER_STATE]];
    /// `GET` of an item
    ReadItem: [READ, &[&UNKNOWN_PERSON, &UNKNOWN_ITEM]];
}

/// What the database decided.
impl<P> From<Refused> for Failure<P> {
    fn from(refused: Refused) -> Self {
        let kind = match refused {
            Refused::UnknownPerson => &UNKNOWN_PERSON,
            Refused::UnknownItem => &UNKNOWN_ITEM,
            Refused::CpfExists => &CPF_EXISTS,
            Refused::Inactive => &PERSON_INACTIVE,
            Refused::OtherState => &OTHER_STATE,
            Refused::KeyReused => &KEY_REUSED,
        };
        kind.into()
    }
}

/// The database's failures. Logged here, once; the client learns only what it can act on.
impl<P> From<StoreError> for Failure<P> {
    fn from(error: StoreError) -> Self {
        let problem = match error {
            StoreError::Overloaded => OVERLOADED.problem(),
            StoreError::Unavailable(_) => {
                tracing::warn!(%error, "a request was not served");
                Problem::unavailable(RETRY_AFTER)
            }
            StoreError::Unknown(_) => {
                tracing::warn!(%error, "a request was not served");
                OUTCOME_UNKNOWN.problem()
            }
            StoreError::Failed(_) => {
                tracing::error!(%error, "a request failed");
                Problem::internal()
            }
        };
        problem.into()
    }
}
