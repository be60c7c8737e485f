//! The score of an item.

use events::ItemKind;
use rust_decimal::{Decimal, prelude::ToPrimitive};

/// A value is below this and not negative: `numeric(19,4)`, as in the contract.
const LIMIT: Decimal = Decimal::from_parts(0xa4c6_8000, 0x0003_8d7e, 0, false, 0);

/// The score of an item: an asset a twentieth of its value, an income a fiftieth, a debt a twentieth
/// taken away; rounded down before the sign. None when the contract does not allow the value.
pub fn of(kind: ItemKind, value: Decimal) -> Option<i64> {
    if value.is_sign_negative() && !value.is_zero() || value >= LIMIT || value.normalize().scale() > 4 {
        return None;
    }
    // 15 digits and 4 decimals divided by 20 or 50 have at most 6 decimals: nothing is rounded but here.
    let part = |of: i64| (value / Decimal::from(of)).floor().to_i64();
    match kind {
        ItemKind::Asset => part(20),
        ItemKind::Income => part(50),
        ItemKind::Debt => part(20).map(|score| -score),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_worth_what_the_contract_says() {
        let table = [
            (ItemKind::Asset, "100000", Some(5_000)),
            (ItemKind::Income, "1000", Some(20)),
            (ItemKind::Debt, "1000", Some(-50)),
            (ItemKind::Asset, "0", Some(0)),
            (ItemKind::Asset, "19.9999", Some(0)),
            (ItemKind::Income, "49.9999", Some(0)),
            (ItemKind::Debt, "19.9999", Some(0)),
            (ItemKind::Debt, "20", Some(-1)),
            (ItemKind::Debt, "39.9999", Some(-1)),
            (ItemKind::Asset, "999999999999999.9999", Some(49_999_999_999_999)),
            (ItemKind::Income, "999999999999999.9999", Some(19_999_999_999_999)),
            (ItemKind::Debt, "999999999999999.9999", Some(-49_999_999_999_999)),
            (ItemKind::Asset, "1.50000000", Some(0)),
            (ItemKind::Asset, "1000000000000000", None),
            (ItemKind::Asset, "0.00001", None),
            (ItemKind::Asset, "-1", None),
        ];
        for (kind, value, score) in table {
            assert_eq!(of(kind, value.parse().unwrap()), score, "{kind} {value}");
        }
    }
}
