//! The rules of single values. Each takes the JSON as it is written and says, without quoting it, what
//! is wrong.

use std::borrow::Cow;

use chrono::{DateTime, Datelike, NaiveDate, NaiveTime, TimeDelta, Timelike, Utc};
use events::{Cpf, Status};
use rust_decimal::Decimal;
use serde_json::value::RawValue;

use super::characters;

type Parsed<T> = Result<T, Cow<'static, str>>;

/// A JSON string. Half a surrogate pair (`"\ud800"`) is well-formed JSON but no text.
fn string(raw: &RawValue) -> Parsed<String> {
    if !raw.get().starts_with('"') {
        return Err("must be a string".into());
    }
    serde_json::from_str(raw.get()).map_err(|_| "must not contain half a surrogate pair".into())
}

/// A line of text with a visible character, and without control characters: PostgreSQL stores no NUL at all. A character
/// that changes the direction of text would show another text than the stored one.
pub(super) fn text(raw: &RawValue, max: usize) -> Parsed<String> {
    let text = string(raw)?;
    if text.chars().any(characters::is_control_or_line_break) {
        return Err("must not contain control characters or line breaks".into());
    }
    if text.chars().any(characters::changes_direction) {
        return Err("must not contain characters that change the direction of text".into());
    }
    if !text.chars().any(characters::is_visible) {
        return Err("must contain a visible character".into());
    }
    if text.chars().count() > max {
        return Err(format!("must not be longer than {max} characters").into());
    }
    Ok(text)
}

/// Null, or what follows the rule.
pub(super) fn nullable<T>(
    rule: impl FnOnce(&RawValue) -> Parsed<T>,
) -> impl FnOnce(&RawValue) -> Parsed<Option<T>> {
    |raw| if raw.get() == "null" { Ok(None) } else { rule(raw).map(Some) }
}

/// One of two words.
pub(super) fn status(raw: &RawValue) -> Parsed<Status> {
    match string(raw)?.as_str() {
        "active" => Ok(Status::Active),
        "inactive" => Ok(Status::Inactive),
        _ => Err("must be active or inactive".into()),
    }
}

/// A number, or a string of digits.
pub(super) fn cpf(raw: &RawValue) -> Parsed<Cpf> {
    let digits = if raw.get().starts_with('"') { string(raw)? } else { raw.get().to_owned() };
    digits.parse().map_err(|_| "must be a positive integer of at most 11 digits".into())
}

/// A date-time of RFC 3339, or a date, which means its midnight UTC. Cut to the microsecond.
pub(super) fn date_of_birth(raw: &RawValue) -> Parsed<DateTime<Utc>> {
    const FORM: &str = "must be a date (2019-06-15) or a date-time (2019-06-15T19:23:55-03:00) of RFC 3339";
    let text = string(raw)?;
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let time = if shape == "0000-00-00" {
        text.parse::<NaiveDate>().ok().map(|date| date.and_time(NaiveTime::MIN).and_utc())
    } else {
        DateTime::parse_from_rfc3339(&text).ok().map(|time| time.to_utc())
    };
    let mut time = time.ok_or(FORM)?;
    if time.nanosecond() >= 1_000_000_000 {
        // A leap second. There are none but at the end of a UTC day, and PostgreSQL stores the one after it: it
        // has to be looked at as that.
        time = Some(time).filter(|time| (time.hour(), time.minute()) == (23, 59)).ok_or(FORM)?;
        time += TimeDelta::seconds(1);
    }
    // In UTC, as it is stored and published: other years have no spelling in RFC 3339.
    if (1..=9999).contains(&time.year()) {
        Ok(time)
    } else {
        Err("must be within the years 1 to 9999 UTC".into())
    }
}

/// An exact decimal, from a JSON number in any notation: `1000`, `1000.0000` and `1e3` are the same. A
/// string is refused, so that there is one spelling.
pub(super) fn value(raw: &RawValue) -> Parsed<Decimal> {
    const DIGITS: &str = "must have at most 15 digits before the point and 4 after it";
    let text = raw.get();
    if !text.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return Err("must be a number".into());
    }
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (negative, mantissa) = match mantissa.strip_prefix('-') {
        Some(mantissa) => (true, mantissa),
        None => (false, mantissa),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_start_matches('0');
    let significant_len = significant.trim_end_matches('0').len();
    if significant_len == 0 {
        return Ok(Decimal::ZERO);
    }
    if negative {
        return Err("must not be negative".into());
    }
    // The digits are a fraction 0.d1d2d3… times ten to the power of `point`. An exponent that does not
    // fit is a number out of range either way.
    let leading_zeros = digits.len() - significant.len();
    let point = exponent
        .parse::<i32>()
        .ok()
        .zip(i32::try_from(whole.len()).ok())
        .zip(i32::try_from(leading_zeros).ok())
        .and_then(|((exponent, whole), zeros)| exponent.checked_add(whole)?.checked_sub(zeros))
        .ok_or(DIGITS)?;
    let significant_count = i32::try_from(significant_len).map_err(|_| DIGITS)?;
    if point > 15 || significant_count.saturating_sub(point) > 4 {
        return Err(DIGITS.into());
    }
    // At most 19 digits when written with exactly 4 places, so the integer below cannot overflow.
    let mut integer: i128 = significant[..significant_len].parse().map_err(|_| DIGITS)?;
    for _ in significant_count..point + 4 {
        integer *= 10;
    }
    Decimal::try_from_i128_with_scale(integer, 4).map_err(|_| DIGITS.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value_of(json: &str) -> String {
        let raw: &RawValue = serde_json::from_str(json).unwrap();
        match value(raw) {
            Ok(value) => value.to_string(),
            Err(error) => error.into_owned(),
        }
    }

    #[test]
    fn values_are_exact_in_every_notation() {
        let cases = [
            "0",
            "-0",
            "-0.0e7",
            "0e999999999999",
            "1000",
            "1000.0",
            "1000.00000000",
            "1e3",
            "1E+3",
            "0.1e4",
            "10000000000000000000e-17",
            "0.0001",
            "1e-4",
            "0.00001",
            "1e-5",
            "123456789012345.6789",
            "999999999999999.9999",
            "999999999999999.99990",
            "999999999999999.99991",
            "1000000000000000",
            "1e15",
            "1e14",
            "123456789012345678901234567890",
            "1e2147483647",
            "1e2147483648",
            "1e-99999999999",
            "0.0000000000000000000000000001e28",
            "-1",
            "-0.0001",
            "-1e99999999999",
            "\"1\"",
            "null",
            "true",
            "[1]",
        ];
        let table: Vec<String> = cases.iter().map(|json| format!("{json} -> {}", value_of(json))).collect();
        insta::assert_snapshot!(table.join("\n"));
    }

    #[test]
    fn texts_are_as_long_as_they_have_characters() {
        let of = |count| format!("\"{}\"", "é".repeat(count));
        let text_of = |json: &str| text(serde_json::from_str(json).unwrap(), 100);
        assert_eq!(text_of(&of(100)).unwrap(), "é".repeat(100));
        assert_eq!(text_of(&of(101)).unwrap_err(), "must not be longer than 100 characters");
    }

    #[test]
    fn dates_are_instants_that_rfc_3339_can_write() {
        let cases = [
            "2019-06-15T19:23:55-03:00",
            "2019-06-15T22:23:55Z",
            "2019-06-15t22:23:55.123456789z",
            "2019-06-15",
            "2020-02-29",
            "2019-02-29",
            "2016-12-31T23:59:60Z",
            "2016-12-31T20:59:60.5-03:00",
            "2016-12-31T12:00:60Z",
            "9999-12-31T23:59:60Z",
            "0001-01-01",
            "0001-01-01T00:00:00+00:01",
            "0000-12-31",
            "9999-12-31T23:59:59Z",
            "9999-12-31T23:59:59-00:01",
            "10000-01-01",
            "+2019-06-15",
            "2019-6-15",
            "20190615",
            "15/06/2019",
            "2019-06-15T19:23:55",
            "2019-06-15 19:23:55Z",
            "2019-06-15T25:00:00Z",
            " 2019-06-15",
            "",
        ];
        let table: Vec<String> = cases
            .iter()
            .map(|text| {
                let json = serde_json::to_string(text).unwrap();
                match date_of_birth(serde_json::from_str(&json).unwrap()) {
                    Ok(time) => format!("{text:?} -> {time:?}"),
                    Err(error) => format!("{text:?} -> {error}"),
                }
            })
            .collect();
        insta::assert_snapshot!(table.join("\n"));
    }
}
