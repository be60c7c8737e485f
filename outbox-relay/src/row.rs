//! A row of the outbox, decoded for itself. A database can hold what no type of ours can, and what no message can
//! carry: then that row has a fault, with a reason, and the rows around it are read as ever.

use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Serialize, Serializer};
use serde_json::Value;
use sqlx::{
    Decode, FromRow, Postgres, Row as _, Type, ValueRef,
    error::BoxDynError,
    postgres::{PgRow, PgTypeInfo, PgValueFormat, PgValueRef},
    types::Json,
};
use uuid::Uuid;

use crate::event::Event;

/// A row's columns are read in this order: position, id, aggregate type and id, version, type, body as text, headers,
/// time, the id of the event before it.
#[derive(Clone, Debug)]
pub enum Row {
    /// An event.
    Event(Event),
    /// A row that is none.
    Unreadable(Unreadable),
}

/// A row that cannot be read as an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it is.
    pub position: i64,
    /// Why, without anything of its contents.
    pub reason: String,
}

impl Row {
    /// Where it is.
    pub fn position(&self) -> i64 {
        match self {
            Self::Event(event) => event.position,
            Self::Unreadable(row) => row.position,
        }
    }

    /// About how many bytes of memory it holds.
    pub fn size(&self) -> usize {
        match self {
            Self::Event(event) => event.size(),
            Self::Unreadable(row) => row.reason.len() + 64,
        }
    }

    /// The event, or why there is none.
    pub fn event(self) -> Result<Event, Unreadable> {
        match self {
            Self::Event(event) => Ok(event),
            Self::Unreadable(row) => Err(row),
        }
    }
}

/// Separates rows that can be read from those that cannot.
pub fn split(rows: impl IntoIterator<Item = Row>) -> (Vec<Event>, Vec<Unreadable>) {
    let (mut events, mut unreadable) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            Row::Event(event) => events.push(event),
            Row::Unreadable(row) => unreadable.push(row),
        }
    }
    (events, unreadable)
}

/// What is wrong: with this row alone, or with every row of the statement.
enum Fault {
    Row(String),
    Statement(sqlx::Error),
}

impl<'r> FromRow<'r, PgRow> for Row {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        match event(row) {
            Ok(event) => Ok(Self::Event(event)),
            Err(Fault::Row(reason)) => Ok(Self::Unreadable(Unreadable { position: row.try_get(0)?, reason })),
            Err(Fault::Statement(error)) => Err(error),
        }
    }
}

fn event(row: &PgRow) -> Result<Event, Fault> {
    let made: Made = given(row, 8, "created_at")?;
    Ok(Event {
        position: given(row, 0, "position")?,
        id: given(row, 1, "id")?,
        aggregate_type: given(row, 2, "aggregate_type")?,
        aggregate_id: given(row, 3, "aggregate_id")?,
        version: given(row, 4, "version")?,
        type_: given(row, 5, "type")?,
        payload: given::<String>(row, 6, "body")?.into_boxed_str(),
        headers: headers(row, 7)?,
        created_at: made
            .time()
            .ok_or_else(|| Fault::Row(format!("its created_at is {made}, which no message can carry")))?,
        previous_id: column(row, 9, "previous_id")?.filter(|id: &Uuid| !id.is_nil()),
    })
}

fn headers(row: &PgRow, index: usize) -> Result<Option<serde_json::Map<String, Value>>, Fault> {
    match column(row, index, "headers")? {
        None => Ok(None),
        Some(Json(Value::Object(headers))) => Ok(Some(headers)),
        Some(Json(_)) => Err(Fault::Row("its headers are no JSON object".to_owned())),
    }
}

fn given<'r, T: Decode<'r, Postgres> + Type<Postgres>>(
    row: &'r PgRow,
    index: usize,
    name: &str,
) -> Result<T, Fault> {
    column(row, index, name)?.ok_or_else(|| Fault::Row(format!("its {name} is missing")))
}

/// None where it is null.
fn column<'r, T: Decode<'r, Postgres> + Type<Postgres>>(
    row: &'r PgRow,
    index: usize,
    name: &str,
) -> Result<Option<T>, Fault> {
    let value = row.try_get_raw(index).map_err(Fault::Statement)?;
    if value.is_null() {
        return Ok(None);
    }
    if !T::compatible(&value.type_info()) {
        // Somebody changed the table: that is no fault of this row.
        let source = format!("the column has the type {}", value.type_info()).into();
        return Err(Fault::Statement(sqlx::Error::ColumnDecode { index: name.to_owned(), source }));
    }
    // Errors of JSON's syntax, which its depth counts for, and of UTF-8 say where, and quote nothing.
    T::decode(value).map(Some).map_err(|error| Fault::Row(format!("its {name} cannot be read: {error}")))
}

/// When an event was made, as its writer says it: any value of `timestamptz`, also those that no calendar here
/// reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// Since the year 2000, as PostgreSQL counts.
    microseconds: i64,
}

impl Made {
    /// The time; none where it is infinite, or where its year has too many digits.
    pub fn time(self) -> Option<DateTime<Utc>> {
        const YEAR_2000: DateTime<Utc> = match DateTime::from_timestamp(946_684_800, 0) {
            Some(time) => time,
            None => DateTime::UNIX_EPOCH,
        };
        YEAR_2000.checked_add_signed(TimeDelta::microseconds(self.microseconds))
    }
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.microseconds, self.time()) {
            (i64::MAX, _) => f.write_str("infinity"),
            (i64::MIN, _) => f.write_str("-infinity"),
            (_, Some(time)) => write!(f, "{}", time.format("%Y-%m-%d %H:%M:%S UTC")),
            (_, None) => f.write_str("beyond the year 262142"),
        }
    }
}

impl Serialize for Made {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.time() {
            Some(time) => time.serialize(serializer),
            None => serializer.collect_str(self),
        }
    }
}

impl Type<Postgres> for Made {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for Made {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        if value.format() != PgValueFormat::Binary {
            return Err("a time is read as the server sends it, in binary".into());
        }
        let bytes = <[u8; 8]>::try_from(value.as_bytes()?)?;
        Ok(Self { microseconds: i64::from_be_bytes(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(microseconds: i64) -> (String, String) {
        let made = Made { microseconds };
        (made.to_string(), serde_json::to_string(&made).unwrap_or_default())
    }

    /// The ends of PostgreSQL's range, and beyond.
    #[test]
    fn every_time_of_the_database_has_words() {
        let words = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(made(0), words("2000-01-01 00:00:00 UTC", "\"2000-01-01T00:00:00Z\""));
        assert_eq!(made(i64::MAX), words("infinity", "\"infinity\""));
        assert_eq!(made(i64::MIN), words("-infinity", "\"-infinity\""));
        // 4714-11-24 BC and the last microsecond of 294276.
        assert_eq!(made(-211_813_488_000_000_000).0, "-4713-11-24 00:00:00 UTC");
        assert_eq!(made(9_223_371_331_199_999_999).0, "beyond the year 262142");
    }
}
