//! Statistics of several rounds, and how numbers are written.

use std::time::Duration;

use serde::Serialize;

/// Median, least and most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even number the lower of the two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of these values. Without any, all three are NaN.
    pub fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
        Self {
            median: at(sorted.len().saturating_sub(1) / 2),
            min: at(0),
            max: at(sorted.len().saturating_sub(1)),
        }
    }
}

/// The value that this many thousandths of the values do not exceed.
pub(crate) fn quantile(values: &[f64], thousandths: usize) -> f64 {
    let sorted = sorted(values);
    let at = (sorted.len() * thousandths).div_ceil(1000).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// A count in a time, as a rate per second.
pub(crate) fn rate(count: i64, took: Duration) -> f64 {
    float(count) / took.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "counts of a bench are far below 2^52")]
pub(crate) fn float(count: i64) -> f64 {
    count as f64
}

/// A number for people: three figures, and thousands apart.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let mut grouped = String::new();
            for (n, digit) in digits.chars().enumerate() {
                if n > 0 && (digits.len() - n) % 3 == 0 {
                    grouped.push(',');
                }
                grouped.push(digit);
            }
            grouped
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values_and_numbers_are_short() {
        let quantiles = [500, 990].map(|thousandths| number(quantile(&[4.0, 1.0, 3.0, 2.0], thousandths)));
        assert_eq!(quantiles, ["2.00", "4.00"]);
        let shown = [8412.3, 1_234_567.0, 123.4, 12.34, 0.956].map(number);
        assert_eq!(shown, ["8,412", "1,234,567", "123", "12.3", "0.96"]);
    }
}
