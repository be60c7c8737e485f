//! Persons.

use chrono::{DateTime, Utc};
use events::{Cpf, Status};
use uuid::Uuid;

use super::{
    Change, Found, ITEMS_MAX, Refused, States, Store, StoreError, Written, bounded,
    idempotency::{Added, Keyed},
};
use crate::request::NewPerson;

pub(super) const ADD: &str = include_str!("sql/person/add.sql");
pub(super) const CHANGE: &str = include_str!("sql/person/change.sql");
pub(super) const READ: &str = include_str!("sql/person/read.sql");

/// Which state a person is in.
pub(super) const STATE: &str = "SELECT id, version FROM person.person WHERE cpf = $1";

/// What a merge patch changes: what is none stays.
#[derive(Clone, Debug, Default)]
pub struct PersonPatch {
    /// As in [`NewPerson`].
    pub name: Option<String>,
    /// As in [`NewPerson`]; `Some(None)` clears it.
    pub address: Option<Option<String>>,
    /// As in [`NewPerson`].
    pub date_of_birth: Option<DateTime<Utc>>,
    /// Whether new items are taken.
    pub status: Option<Status>,
}

impl Store {
    /// Stores a person, unless the cpf exists; or finds the answer that was kept under the key.
    pub async fn add_person(&self, new: NewPerson, keyed: Option<Keyed>) -> Result<Added, StoreError> {
        if let Some(kept) = self.kept(keyed.as_ref()).await? {
            return Ok(kept);
        }
        let mut conn = self.acquire_for(new.cpf).await?;
        let insert =
            sqlx::query_as(ADD).bind(new.cpf.get()).bind(new.name).bind(new.address).bind(new.date_of_birth);
        let insert = Keyed::bind(keyed.as_ref(), insert, format!("/person/{}", new.cpf.get()));
        let added: Result<Option<(Uuid, i64, i32)>, _> = bounded(insert.fetch_optional(&mut *conn)).await;
        match added {
            Ok(Some((id, version, _))) => Ok(Added::Stored(Written { id, person_id: id, version })),
            Ok(None) => {
                Keyed::find_or(keyed.as_ref(), &mut conn, Ok(Added::Refused(Refused::CpfExists))).await
            }
            // Perhaps somebody took the key meanwhile.
            Err(failed @ StoreError::Failed(_)) => {
                Keyed::find_or(keyed.as_ref(), &mut conn, Err(failed)).await
            }
            Err(error) => Err(error),
        }
    }

    /// Changes a person.
    pub async fn change_person(
        &self,
        cpf: Cpf,
        states: States,
        patch: PersonPatch,
    ) -> Result<Result<Change, Refused>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = states.columns();
        let change = sqlx::query_as(CHANGE)
            .bind(cpf.get())
            .bind(ids)
            .bind(versions)
            .bind(patch.name)
            .bind(patch.address.is_some())
            .bind(patch.address.flatten())
            .bind(patch.date_of_birth)
            .bind(patch.status.map(Status::as_str));
        let row: Option<(Uuid, i64, bool, Option<i64>, i32)> =
            bounded(change.fetch_optional(&mut *conn)).await?;
        Ok(match row {
            None => Err(Refused::UnknownPerson),
            Some((_, _, false, _, _)) => Err(Refused::OtherState),
            Some((id, version, true, changed, _)) => Ok(Change::of(id, id, version, changed)),
        })
    }

    /// The person's id and version; `None` when there is no such person.
    pub async fn state(&self, cpf: Cpf) -> Result<Option<(Uuid, i64)>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(STATE).bind(cpf.get());
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }

    /// Reads a person with their items; `None` when there is no such person.
    pub async fn person(&self, cpf: Cpf) -> Result<Option<Found>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(READ).bind(cpf.get()).bind(ITEMS_MAX);
        bounded(select.fetch_optional(&mut *conn)).await.map_err(StoreError::of_a_read)
    }
}

impl Change {
    pub(super) fn of(id: Uuid, person_id: Uuid, version: i64, changed: Option<i64>) -> Self {
        match changed {
            Some(version) => Self::Changed(Written { id, person_id, version }),
            None => Self::Unchanged(Written { id, person_id, version }),
        }
    }
}
