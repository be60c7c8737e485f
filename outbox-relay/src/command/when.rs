//! Times as an operator writes them.

use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, TimeDelta, Utc};

/// A time: RFC 3339; the same without `T` and with `UTC`, as the commands show it; a date or a date with a time of day,
/// in UTC; `now`, `today` and `yesterday`; or a duration for so long ago, such as `24h`.
pub(super) fn time(text: &str) -> Result<DateTime<Utc>, String> {
    time_at(text, Utc::now())
}

fn time_at(text: &str, now: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    let midnight = |date: NaiveDate| date.and_time(NaiveTime::MIN).and_utc();
    let today = now.date_naive();
    match text {
        "now" => return Ok(now),
        "today" => return Ok(midnight(today)),
        "yesterday" => return Ok(midnight(today.pred_opt().unwrap_or(today))),
        _ => {}
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    if let Ok(date) = text.parse() {
        return Ok(midnight(date));
    }
    let local = text.trim_end_matches(" UTC");
    for form in ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"] {
        if let Ok(time) = NaiveDateTime::parse_from_str(local, form) {
            return Ok(time.and_utc());
        }
    }
    let ago = daemon::config::duration(text).ok().and_then(|ago| TimeDelta::from_std(ago).ok());
    ago.and_then(|ago| now.checked_sub_signed(ago)).ok_or_else(|| {
        "it should be a time such as 2026-11-27T14:30:00Z, a date (2026-11-27, in UTC), today, yesterday, or how \
         long ago it was (90m, 24h, 7d)"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_what_people_write() {
        let now: DateTime<Utc> = "2026-11-28T13:14:15.5Z".parse().unwrap();
        for (text, time) in [
            ("2026-11-27T14:30:00Z", "2026-11-27T14:30:00Z"),
            ("2026-11-27T14:30:00+02:00", "2026-11-27T12:30:00Z"),
            ("2026-11-27 14:30:00 UTC", "2026-11-27T14:30:00Z"),
            ("2026-11-27 14:30", "2026-11-27T14:30:00Z"),
            ("2026-11-27", "2026-11-27T00:00:00Z"),
            ("today", "2026-11-28T00:00:00Z"),
            ("yesterday", "2026-11-27T00:00:00Z"),
            ("now", "2026-11-28T13:14:15.5Z"),
            ("24h", "2026-11-27T13:14:15.5Z"),
            ("7d", "2026-11-21T13:14:15.5Z"),
        ] {
            assert_eq!(time_at(text, now), Ok(time.parse().unwrap()), "{text}");
        }
        for wrong in
            ["", "tomorrow", "27.11.2026", "2026-13-01", "24", "h", "9999999999999d", "18446744073709551615s"]
        {
            assert!(time_at(wrong, now).unwrap_err().contains("2026-11-27"), "{wrong}");
        }
    }
}
