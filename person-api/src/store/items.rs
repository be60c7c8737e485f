//! Incomes, assets and debts: the same statements for each of the three tables.

use std::sync::LazyLock;

use events::{Cpf, Kind};
use uuid::Uuid;

use super::{
    Change, Found, Refused, States, Store, StoreError, Written, bounded,
    idempotency::{Added, Keyed},
};
use crate::request::{Item, Page};

/// The statements of one kind of items, from `sql/item/`. They are written for incomes, so that each file is SQL to read
/// and to paste into psql; for another kind its name takes the place of the word.
#[derive(Debug)]
pub(super) struct ItemSql {
    pub(super) add: String,
    pub(super) change: String,
    pub(super) delete: String,
    pub(super) list: String,
    pub(super) read: String,
}

/// A line that ends so is left out for debts, which have no type.
const NOT_OF_A_DEBT: &str = "-- not of a debt";

impl ItemSql {
    fn new(kind: Kind) -> Self {
        let of_kind = |sql: &str| {
            let lines = sql.lines().filter(|line| kind != Kind::Debt || !line.ends_with(NOT_OF_A_DEBT));
            lines.collect::<Vec<_>>().join("\n").replace(Kind::Income.as_str(), kind.as_str())
        };
        Self {
            add: of_kind(include_str!("sql/item/add.sql")),
            change: of_kind(include_str!("sql/item/change.sql")),
            delete: of_kind(include_str!("sql/item/delete.sql")),
            list: of_kind(include_str!("sql/item/list.sql")),
            read: of_kind(include_str!("sql/item/read.sql")),
        }
    }

    /// Made when the first request needs it.
    pub(super) fn of(kind: Kind) -> &'static Self {
        static INCOME: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(Kind::Income));
        static ASSET: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(Kind::Asset));
        static DEBT: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(Kind::Debt));
        match kind {
            Kind::Income => &INCOME,
            Kind::Asset => &ASSET,
            Kind::Debt => &DEBT,
        }
    }
}

/// A page of items.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct Listed {
    /// The person's id.
    pub(crate) id: Uuid,
    /// The person's version that this is.
    pub(crate) version: i64,
    /// Whether there are more behind it.
    pub(crate) more: bool,
    /// The last item's id, when there are more.
    pub(crate) last: Option<String>,
    /// The items as compact JSON.
    pub(crate) body: String,
}

/// Whether the person is active; whether it is a state that was meant; the item, whose, and the version that contains it.
type Inserted = Option<(bool, bool, Option<Uuid>, Uuid, Option<i64>, i32)>;
/// The person and their version; the item; whether it is a state that was meant; the version after.
type Outcome = Option<(Uuid, i64, Option<Uuid>, bool, Option<i64>, i32)>;

impl Store {
    /// Stores an item of a person, or finds the answer that was kept under the key.
    pub(crate) async fn add_item(
        &self,
        kind: Kind,
        (cpf, states): (Cpf, States),
        new: Item,
        place: String,
        keyed: Option<Keyed>,
    ) -> Result<Added, StoreError> {
        if let Some(kept) = self.kept(keyed.as_ref()).await? {
            return Ok(kept);
        }
        let mut conn = self.acquire_for(cpf).await?;
        let insert = sqlx::query_as(ItemSql::of(kind).add.as_str()).bind(cpf.get()).bind(new.value);
        let (ids, versions) = states.columns();
        let mut insert = Keyed::bind(keyed.as_ref(), insert, place + "/{id}").bind(ids).bind(versions);
        if let Some(type_) = new.type_ {
            insert = insert.bind(type_);
        }
        let row: Inserted = bounded(insert.fetch_optional(&mut *conn)).await?;
        let refused = match row {
            Some((_, _, Some(id), person_id, Some(version), _)) => {
                return Ok(Added::Stored(Written { id, person_id, version }));
            }
            None => Refused::UnknownPerson,
            Some((false, ..)) => Refused::Inactive,
            // Or it is the state that this request itself has left, when it came before.
            Some((_, false, ..)) => Refused::OtherState,
            // Its key was taken meanwhile: the answer is there.
            Some(_) => Refused::KeyReused,
        };
        Keyed::find_or(keyed.as_ref(), &mut conn, Ok(Added::Refused(refused))).await
    }

    /// Replaces an item.
    pub(crate) async fn change_item(
        &self,
        kind: Kind,
        (cpf, id): (Cpf, Uuid),
        states: States,
        item: Item,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let mut change = sqlx::query_as(ItemSql::of(kind).change.as_str())
            .bind(cpf.get())
            .bind(id)
            .bind(ids)
            .bind(versions)
            .bind(item.value);
        if let Some(type_) = item.type_ {
            change = change.bind(type_);
        }
        let outcome: Outcome = bounded(change.fetch_optional(&mut *conn)).await?;
        Ok(changed(outcome))
    }

    /// Deletes an item.
    pub(crate) async fn delete_item(
        &self,
        kind: Kind,
        (cpf, id): (Cpf, Uuid),
        states: States,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let delete = sqlx::query_as(ItemSql::of(kind).delete.as_str())
            .bind(cpf.get())
            .bind(id)
            .bind(ids)
            .bind(versions);
        let outcome: Outcome = bounded(delete.fetch_optional(&mut *conn)).await?;
        Ok(changed(outcome))
    }

    /// Reads a page of a person's items; `None` when there is no such person.
    pub(crate) async fn items(&self, kind: Kind, cpf: Cpf, page: Page) -> Result<Option<Listed>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(ItemSql::of(kind).list.as_str())
            .bind(cpf.get())
            .bind(page.after.unwrap_or_default())
            .bind(page.limit);
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }

    /// Reads an item of a person.
    pub(crate) async fn item(
        &self,
        kind: Kind,
        cpf: Cpf,
        id: Uuid,
    ) -> Result<Result<Found, Refused>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(ItemSql::of(kind).read.as_str()).bind(cpf.get()).bind(id);
        let row: Option<(Uuid, i64, Option<String>)> =
            bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)?;
        Ok(match row {
            None => Err(Refused::UnknownPerson),
            Some((_, _, None)) => Err(Refused::UnknownItem),
            Some((id, version, Some(body))) => Ok(Found { id, version, body }),
        })
    }
}

fn changed(outcome: Outcome) -> Result<Change, Refused> {
    match outcome {
        None => Err(Refused::UnknownPerson),
        Some((_, _, None, _, _, _)) => Err(Refused::UnknownItem),
        Some((_, _, _, false, _, _)) => Err(Refused::OtherState),
        Some((person, version, Some(id), true, changed, _)) => Ok(Change::of(id, person, version, changed)),
    }
}
