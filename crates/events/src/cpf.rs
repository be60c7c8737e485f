use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A Brazilian taxpayer's number: a positive integer of at most 11 digits. Its check digits are not
/// looked at. Personal data: it has no `Display`, and `Debug` hides it, so that no log shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct Cpf(i64);

/// What a cpf has to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cpf is a positive integer of at most 11 digits")]
pub struct InvalidCpf;

impl Cpf {
    /// The number, for a database or a URL. Never for a log.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Cpf {
    type Error = InvalidCpf;

    fn try_from(number: i64) -> Result<Self, InvalidCpf> {
        if (1..=99_999_999_999).contains(&number) { Ok(Self(number)) } else { Err(InvalidCpf) }
    }
}

/// Takes 1 to 11 ASCII digits, leading zeros included, and nothing else: no sign, no point, no space.
impl FromStr for Cpf {
    type Err = InvalidCpf;

    fn from_str(digits: &str) -> Result<Self, InvalidCpf> {
        if digits.len() > 11 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidCpf);
        }
        digits.parse::<i64>().map_err(|_| InvalidCpf)?.try_into()
    }
}

impl From<Cpf> for i64 {
    fn from(cpf: Cpf) -> Self {
        cpf.0
    }
}

impl fmt::Debug for Cpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cpf(…)")
    }
}
