//! The kinds of items. Each is a record type of its own, with paths, tables and events of its own name; what
//! is done with them is the same, and is written once for all.

use events::Kind;

use crate::{
    describe::Tag,
    store::{self, ItemSql},
};

/// An income, an asset or a debt, as a type.
pub(crate) trait ItemKind: Send + Sync + 'static {
    /// As a value.
    const KIND: Kind;
    /// One of it.
    const ONE: &'static str;
    /// Where a person's items are.
    const PATH: &'static str;
    /// Its name in the documentation.
    const NAME: &'static str;
    /// The name of its body when it is sent.
    const NEW_NAME: &'static str;
    /// A debt has no type.
    const HAS_TYPE: bool = true;
    /// Its name in the documentation when there are several.
    const LIST_NAME: &'static str;
    /// A body when it is new.
    const EXAMPLE: &'static str;
    /// The id that it gets.
    const EXAMPLE_ID: &'static str;
    /// Where its operations stand in the documentation.
    const TAG: Tag;
    /// Its statements.
    const SQL: &'static ItemSql;
}

/// What a person earns.
#[derive(Clone, Debug)]
pub(crate) struct Income;
/// What a person owns.
#[derive(Clone, Debug)]
pub(crate) struct Asset;
/// What a person owes.
#[derive(Clone, Debug)]
pub(crate) struct Debt;

impl ItemKind for Income {
    const KIND: Kind = Kind::Income;
    const ONE: &'static str = "an income";
    const PATH: &'static str = "/person/{cpf}/income";
    const NAME: &'static str = "Income";
    const NEW_NAME: &'static str = "NewIncome";
    const LIST_NAME: &'static str = "Incomes";
    const EXAMPLE: &'static str = include_str!("../../payloads/new_income.json");
    const EXAMPLE_ID: &'static str = "019928b5-6d10-7f2a-8b1c-5e0a9d3c4f11";
    const TAG: Tag = Tag::Incomes;
    const SQL: &'static ItemSql = &store::INCOME;
}

impl ItemKind for Asset {
    const KIND: Kind = Kind::Asset;
    const ONE: &'static str = "an asset";
    const PATH: &'static str = "/person/{cpf}/asset";
    const NAME: &'static str = "Asset";
    const NEW_NAME: &'static str = "NewAsset";
    const LIST_NAME: &'static str = "Assets";
    const EXAMPLE: &'static str = include_str!("../../payloads/new_asset.json");
    const EXAMPLE_ID: &'static str = "019928b5-70e4-7a05-9d77-1b2f6c8e0a93";
    const TAG: Tag = Tag::Assets;
    const SQL: &'static ItemSql = &store::ASSET;
}

impl ItemKind for Debt {
    const KIND: Kind = Kind::Debt;
    const ONE: &'static str = "a debt";
    const PATH: &'static str = "/person/{cpf}/debt";
    const NAME: &'static str = "Debt";
    const NEW_NAME: &'static str = "NewDebt";
    const LIST_NAME: &'static str = "Debts";
    const HAS_TYPE: bool = false;
    const EXAMPLE: &'static str = include_str!("../../payloads/new_debt.json");
    const EXAMPLE_ID: &'static str = "019928b5-74c8-7c1e-a3f0-8d4b5e6f7a02";
    const TAG: Tag = Tag::Debts;
    const SQL: &'static ItemSql = &store::DEBT;
}
