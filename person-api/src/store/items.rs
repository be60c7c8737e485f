//! Incomes, assets and debts: the same statements for each of the three tables.

use std::sync::LazyLock;

use events::{Cpf, ItemKind};
use uuid::Uuid;

use super::{
    connection::Store,
    creation::Creation,
    error::StoreError,
    idempotency,
    outcome::{AddOutcome, ChangeOutcome, ItemPage, Refusal, Representation, Written},
};
use crate::model::{IdempotentRequest, NewItem, PageRequest, Precondition};

/// The statements of one kind of items, from `sql/item/`. The files are written for incomes, so that one can read them and
/// paste them into psql. For another kind, its name replaces the word `income`.
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
    fn new(kind: ItemKind) -> Self {
        let of_kind = |sql: &str| {
            let lines = sql.lines().filter(|line| kind != ItemKind::Debt || !line.ends_with(NOT_OF_A_DEBT));
            lines.collect::<Vec<_>>().join("\n").replace(ItemKind::Income.as_str(), kind.as_str())
        };
        Self {
            add: of_kind(include_str!("sql/item/add.sql")),
            change: of_kind(include_str!("sql/item/change.sql")),
            delete: of_kind(include_str!("sql/item/delete.sql")),
            list: of_kind(include_str!("sql/item/list.sql")),
            read: of_kind(include_str!("sql/item/read.sql")),
        }
    }

    /// Built when the first request needs them.
    pub(super) fn of(kind: ItemKind) -> &'static Self {
        static INCOME: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(ItemKind::Income));
        static ASSET: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(ItemKind::Asset));
        static DEBT: LazyLock<ItemSql> = LazyLock::new(|| ItemSql::new(ItemKind::Debt));
        match kind {
            ItemKind::Income => &INCOME,
            ItemKind::Asset => &ASSET,
            ItemKind::Debt => &DEBT,
        }
    }
}

/// Whether the person is active; whether `If-Match` holds; the item; the person; the version that contains the item.
type Inserted = Option<(bool, bool, Option<Uuid>, Uuid, Option<i64>, i32)>;
/// The person and their version; the item; whether `If-Match` holds; the version after the change.
type Outcome = Option<(Uuid, i64, Option<Uuid>, bool, Option<i64>, i32)>;

impl Store {
    /// Stores an item of a person under the path `collection`, or finds the response that an earlier request with the same
    /// idempotency key got.
    pub(crate) async fn add_item(
        &self,
        kind: ItemKind,
        cpf: Cpf,
        precondition: Precondition,
        item: NewItem,
        collection: String,
        idempotent: Option<IdempotentRequest>,
    ) -> Result<AddOutcome, StoreError> {
        if let Some(earlier) = self.find_stored(idempotent.as_ref()).await? {
            return Ok(earlier);
        }
        let mut conn = self.acquire_for(cpf).await?;
        let insert = sqlx::query_as(ItemSql::of(kind).add.as_str()).bind(cpf.get()).bind(item.value);
        let (ids, versions) = precondition.columns();
        let mut insert =
            idempotency::bind(idempotent.as_ref(), insert, collection + "/{id}").bind(ids).bind(versions);
        let event = Creation::begin(match kind {
            ItemKind::Income => "income.new",
            ItemKind::Asset => "asset.new",
            ItemKind::Debt => "debt.new",
        });
        insert = insert.bind(event.headers());
        if let Some(type_) = item.type_ {
            insert = insert.bind(type_);
        }
        let row: Inserted = event.within(conn.fetch_optional("INSERT", kind.as_str(), insert)).await?;
        event.end(matches!(row, Some((.., Some(_), _))));
        let refused = match row {
            Some((_, _, Some(id), person_id, Some(version), _)) => {
                return Ok(AddOutcome::Added(Written { id, person_id, version }));
            }
            None => Refusal::UnknownPerson,
            Some((false, ..)) => Refusal::Inactive,
            // Or it is the state that this request itself left, when it came before.
            Some((_, false, ..)) => Refusal::OtherState,
            // Another request took the key meanwhile: its response is stored.
            Some(_) => Refusal::KeyReused,
        };
        idempotency::find_or(idempotent.as_ref(), &mut conn, Ok(AddOutcome::Refused(refused))).await
    }

    /// Replaces an item.
    pub(crate) async fn change_item(
        &self,
        kind: ItemKind,
        (cpf, id): (Cpf, Uuid),
        precondition: Precondition,
        item: NewItem,
    ) -> Result<Result<ChangeOutcome, Refusal>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = precondition.columns();
        let mut change = sqlx::query_as(ItemSql::of(kind).change.as_str())
            .bind(cpf.get())
            .bind(id)
            .bind(ids)
            .bind(versions)
            .bind(item.value);
        let event = Creation::begin(match kind {
            ItemKind::Income => "income.changed",
            ItemKind::Asset => "asset.changed",
            ItemKind::Debt => "debt.changed",
        });
        change = change.bind(event.headers());
        if let Some(type_) = item.type_ {
            change = change.bind(type_);
        }
        let outcome: Outcome = event.within(conn.fetch_optional("UPDATE", kind.as_str(), change)).await?;
        event.end(matches!(outcome, Some((.., Some(_), _))));
        Ok(changed(outcome))
    }

    /// Deletes an item.
    pub(crate) async fn delete_item(
        &self,
        kind: ItemKind,
        (cpf, id): (Cpf, Uuid),
        precondition: Precondition,
    ) -> Result<Result<ChangeOutcome, Refusal>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = precondition.columns();
        let event = Creation::begin(match kind {
            ItemKind::Income => "income.deleted",
            ItemKind::Asset => "asset.deleted",
            ItemKind::Debt => "debt.deleted",
        });
        let delete = sqlx::query_as(ItemSql::of(kind).delete.as_str())
            .bind(cpf.get())
            .bind(id)
            .bind(ids)
            .bind(versions)
            .bind(event.headers());
        let outcome: Outcome = event.within(conn.fetch_optional("DELETE", kind.as_str(), delete)).await?;
        event.end(matches!(outcome, Some((.., Some(_), _))));
        Ok(changed(outcome))
    }

    /// Reads a page of a person's items; `None` when there is no such person.
    pub(crate) async fn items(
        &self,
        kind: ItemKind,
        cpf: Cpf,
        page: PageRequest,
    ) -> Result<Option<ItemPage>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(ItemSql::of(kind).list.as_str())
            .bind(cpf.get())
            .bind(page.after.unwrap_or_default())
            .bind(page.limit);
        conn.fetch_optional("SELECT", kind.as_str(), select).await.map_err(StoreError::of_a_read)
    }

    /// Reads an item of a person.
    pub(crate) async fn item(
        &self,
        kind: ItemKind,
        cpf: Cpf,
        id: Uuid,
    ) -> Result<Result<Representation, Refusal>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(ItemSql::of(kind).read.as_str()).bind(cpf.get()).bind(id);
        let row: Option<(Uuid, i64, Option<String>)> =
            conn.fetch_optional("SELECT", kind.as_str(), select).await.map_err(StoreError::of_a_read)?;
        Ok(match row {
            None => Err(Refusal::UnknownPerson),
            Some((_, _, None)) => Err(Refusal::UnknownItem),
            Some((id, version, Some(body))) => Ok(Representation { id, version, body }),
        })
    }
}

fn changed(outcome: Outcome) -> Result<ChangeOutcome, Refusal> {
    match outcome {
        None => Err(Refusal::UnknownPerson),
        Some((_, _, None, _, _, _)) => Err(Refusal::UnknownItem),
        Some((_, _, _, false, _, _)) => Err(Refusal::OtherState),
        Some((person, version, Some(id), true, changed, _)) => {
            Ok(ChangeOutcome::of(id, person, version, changed))
        }
    }
}
