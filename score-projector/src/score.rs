//! The score of an item.

use events::Kind;
use rust_decimal::{Decimal, prelude::ToPrimitive};

/// A value is below this and not negative: `numeric(19,4)`, as in the contract.
const LIMIT: Decimal = Decimal::from_parts(0xa4c6_8000, 0x0003_8d7e, 0, false, 0);

/// The score of an item: an asset a twentieth of its value, an income a fiftieth, a debt a twentieth
/// taken away; rounded down before the sign. None when the contract does not allow the value.
pub fn of(kind: Kind, value: Decimal) -> Option<i64> {
    if value.is_sign_negative() && !value.is_zero() || value >= LIMIT || value.normalize().scale() > 4 {
        return None;
    }
    // 15 digits and 4 decimals divided by 20 or 50 have at most 6 decimals: nothing is rounded but here.
    let part = |of: i64| (value / Decimal::from(of)).floor().to_i64();
    match kind {
        Kind::Asset => part(20),
        Kind::Income => part(50),
        Kind::Debt => part(20).map(|score| -score),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_worth_what_the_contract_says() {
        let table = [
            (Kind::Asset, "100000", Some(5_000)),
            (Kind::Income, "1000", Some(20)),
            (Kind::Debt, "1000", Some(-50)),
            (Kind::Asset, "0", Some(0)),
            (Kind::Asset, "19.9999", Some(0)),
            (Kind::Income, "49.9999", Some(0)),
            (Kind::Debt, "19.9999", Some(0)),
            (Kind::Debt, "20", Some(-1)),
            (Kind::Debt, "39.9999", Some(-1)),
            (Kind::Asset, "999999999999999.9999", Some(49_999_999_999_999)),
            (Kind::Income, "999999999999999.9999", Some(19_999_999_999_999)),
            (Kind::Debt, "999999999999999.9999", Some(-49_999_999_999_999)),
            (Kind::Asset, "1.50000000", Some(0)),
            (Kind::Asset, "1000000000000000", None),
            (Kind::Asset, "0.00001", None),
            (Kind::Asset, "-1", None),
        ];
        for (kind, value, score) in table {
            assert_eq!(of(kind, value.parse().unwrap()), score, "{kind} {value}");
        }
    }
}
