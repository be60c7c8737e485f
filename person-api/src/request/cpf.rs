//! The check of a new person's cpf.

use std::borrow::Cow;

use events::Cpf;

/// How strictly a new person's cpf is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CpfCheck {
    /// Any positive integer of at most 11 digits.
    #[default]
    Off,
    /// Only a cpf with correct check digits.
    Strict,
}

impl CpfCheck {
    pub(super) fn check(self, cpf: Cpf) -> Result<Cpf, Cow<'static, str>> {
        if self == Self::Strict && !is_right(cpf) {
            return Err("must end in the right check digits".into());
        }
        Ok(cpf)
    }
}

/// The last two of the 11 digits follow from those before them, weighted 10, 9, … 2 and 11, 10, … 2, modulo
/// 11. Eleven equal digits follow the rule, and no person has them.
fn is_right(cpf: Cpf) -> bool {
    let digits: Vec<i64> = (0..11).rev().map(|digit| cpf.get() / 10_i64.pow(digit) % 10).collect();
    let check = |before: &[i64]| {
        let weighted: i64 = before.iter().rev().zip(2..).map(|(digit, weight)| digit * weight).sum();
        weighted * 10 % 11 % 10
    };
    let equal = digits.iter().all(|digit| *digit == digits[0]);
    !equal && check(&digits[..9]) == digits[9] && check(&digits[..10]) == digits[10]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_digits() {
        let right = |digits: &str| is_right(digits.parse().unwrap());
        for digits in ["52998224725", "11144477735", "12345678909", "00000000191", "191"] {
            assert!(right(digits), "{digits}");
        }
        for digits in ["11111", "52998224724", "52998224715", "11111111111", "99999999999", "1"] {
            assert!(!right(digits), "{digits}");
        }
    }
}
