//! What differs between the live model and the shadow.

use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// The rows that differ in one way, with a few persons as examples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub(super) struct DifferenceClass {
    what: String,
    count: i64,
    persons: Vec<Uuid>,
}

/// All differences, by kind, in one snapshot. While consumers run, events that one model has applied and the other has not
/// count too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    kinds: Vec<DifferenceClass>,
}

impl Difference {
    /// A line for each kind.
    pub(super) fn text(&self) -> String {
        if self.kinds.is_empty() {
            return "the two models are equal\n".to_owned();
        }
        let lines = self.kinds.iter().map(|DifferenceClass { what, count, persons }| {
            let named: Vec<String> = persons.iter().map(Uuid::to_string).collect();
            format!("  {what}: {count}, of {}\n", named.join(", "))
        });
        "differences, with up to five persons each:\n".to_owned() + &lines.collect::<String>()
    }
}

/// Compares both models as a whole, in one snapshot.
pub(super) async fn difference(conn: &mut PgConnection) -> sqlx::Result<Difference> {
    let kinds = sqlx::query_as(
        "WITH differing AS (
             SELECT coalesce(l.id, s.id) AS person,
                    CASE WHEN s.id IS NULL THEN 'persons in the live model alone'
                         WHEN l.id IS NULL THEN 'persons in the shadow alone'
                         WHEN l.cpf <> s.cpf THEN 'persons with another cpf'
                         WHEN l.total <> s.total THEN 'persons with another total'
                         ELSE 'persons with another time of creation' END AS what
             FROM score.person l FULL JOIN score_shadow.person s ON l.id = s.id
             WHERE (l.id, l.cpf, l.total, l.created_at) IS DISTINCT FROM (s.id, s.cpf, s.total, s.created_at)
             UNION ALL
             SELECT coalesce(l.person_id, s.person_id),
                    CASE WHEN s.id IS NULL THEN 'entries in the live model alone'
                         WHEN l.id IS NULL THEN 'entries in the shadow alone'
                         ELSE 'entries with another content' END
             FROM score.entry l FULL JOIN score_shadow.entry s ON l.id = s.id
             WHERE (l.id, l.person_id, l.type, l.value, l.score, l.created_at)
                   IS DISTINCT FROM (s.id, s.person_id, s.type, s.value, s.score, s.created_at)
         )
         SELECT what, count(*) AS count, (array_agg(DISTINCT person))[1:5] AS persons
         FROM differing GROUP BY what ORDER BY what DESC",
    )
    .fetch_all(conn)
    .await?;
    Ok(Difference { kinds })
}
