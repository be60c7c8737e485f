//! Persons.

use events::{Cpf, Status};
use uuid::Uuid;

use super::{
    connection::Store,
    creation::Creation,
    error::StoreError,
    idempotency,
    outcome::{AddOutcome, ChangeOutcome, Refusal, Representation, Written},
};
use crate::model::{ITEMS_MAX, IdempotentRequest, NewPerson, PersonPatch, Precondition};

pub(super) const ADD: &str = include_str!("sql/person/add.sql");
pub(super) const CHANGE: &str = include_str!("sql/person/change.sql");
pub(super) const READ: &str = include_str!("sql/person/read.sql");

/// The state that a person is in.
pub(super) const STATE: &str = "SELECT id, version FROM person.person WHERE cpf = $1";

impl Store {
    /// Stores a person, unless the cpf exists; or finds the response that an earlier request with the same idempotency key
    /// got.
    pub async fn add_person(
        &self,
        new: NewPerson,
        idempotent: Option<IdempotentRequest>,
    ) -> Result<AddOutcome, StoreError> {
        if let Some(earlier) = self.find_stored(idempotent.as_ref()).await? {
            return Ok(earlier);
        }
        let mut conn = self.acquire_for(new.cpf).await?;
        let insert =
            sqlx::query_as(ADD).bind(new.cpf.get()).bind(new.name).bind(new.address).bind(new.date_of_birth);
        let event = Creation::begin("person.new");
        let insert = idempotency::bind(idempotent.as_ref(), insert, format!("/person/{}", new.cpf.get()))
            .bind(event.headers());
        let added: Result<Option<(Uuid, i64, i32)>, _> =
            event.within(conn.fetch_optional("INSERT", "person", insert)).await;
        event.end(matches!(added, Ok(Some(_))));
        match added {
            Ok(Some((id, version, _))) => Ok(AddOutcome::Added(Written { id, person_id: id, version })),
            Ok(None) => {
                idempotency::find_or(
                    idempotent.as_ref(),
                    &mut conn,
                    Ok(AddOutcome::Refused(Refusal::CpfExists)),
                )
                .await
            }
            // Perhaps another request took the key meanwhile.
            Err(failed @ StoreError::Failed(_)) => {
                idempotency::find_or(idempotent.as_ref(), &mut conn, Err(failed)).await
            }
            Err(error) => Err(error),
        }
    }

    /// Changes a person.
    pub async fn change_person(
        &self,
        cpf: Cpf,
        precondition: Precondition,
        patch: PersonPatch,
    ) -> Result<Result<ChangeOutcome, Refusal>, StoreError> {
        let mut conn = self.acquire_for(cpf).await?;
        let (ids, versions) = precondition.columns();
        let change = sqlx::query_as(CHANGE)
            .bind(cpf.get())
            .bind(ids)
            .bind(versions)
            .bind(patch.name)
            .bind(patch.address.is_some())
            .bind(patch.address.flatten())
            .bind(patch.date_of_birth)
            .bind(patch.status.map(Status::as_str));
        let event = Creation::begin("person.changed");
        let change = change.bind(event.headers());
        let row: Option<(Uuid, i64, bool, Option<i64>, i32)> =
            event.within(conn.fetch_optional("UPDATE", "person", change)).await?;
        event.end(matches!(row, Some((.., Some(_), _))));
        Ok(match row {
            None => Err(Refusal::UnknownPerson),
            Some((_, _, false, _, _)) => Err(Refusal::OtherState),
            Some((id, version, true, changed, _)) => Ok(ChangeOutcome::of(id, id, version, changed)),
        })
    }

    /// The person's id and version; `None` when there is no such person.
    pub async fn state(&self, cpf: Cpf) -> Result<Option<(Uuid, i64)>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(STATE).bind(cpf.get());
        conn.fetch_optional("SELECT", "person", select).await.map_err(StoreError::of_a_read)
    }

    /// Reads a person with their items; `None` when there is no such person.
    pub async fn person(&self, cpf: Cpf) -> Result<Option<Representation>, StoreError> {
        let mut conn = self.acquire().await?;
        let select = sqlx::query_as(READ).bind(cpf.get()).bind(ITEMS_MAX);
        conn.fetch_optional("SELECT", "person", select).await.map_err(StoreError::of_a_read)
    }
}
