//! What differs between the live model and the shadow.

use serde::Serialize;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::compare::Comparison;

/// The rows that differ in one way, with a few persons as examples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(super) struct DifferenceClass {
    what: String,
    count: i64,
    persons: Vec<Uuid>,
}

/// All differences of persons of whom both models have the same version, by kind. At different versions, the models may
/// differ and be right.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    kinds: Vec<DifferenceClass>,
    /// Persons that one model has at a later version than the other one.
    #[serde(skip)]
    pub(super) apart: i64,
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

/// The versions of a person in both consumers, of sources in their newest incarnation, and the rows of those persons that
/// are at the same one. All in one snapshot.
const KINDS: &str = "
WITH version AS MATERIALIZED (
    SELECT d.id,
           (SELECT max(a.version) FROM inbox.aggregate a
            WHERE a.aggregate_id = d.id::text AND a.consumer = $1 AND a.aggregate_type = $3 AND a.version > 0
              AND a.source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $1))) AS live,
           (SELECT max(a.version) FROM inbox.aggregate a
            WHERE a.aggregate_id = d.id::text AND a.consumer = $2 AND a.aggregate_type = $3 AND a.version > 0
              AND a.source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $2))) AS shadow
    FROM pg_temp.differing d),
same AS MATERIALIZED (SELECT id FROM version WHERE live IS NOT DISTINCT FROM shadow),
kind AS (
    SELECT d.id AS person,
           CASE WHEN s.id IS NULL THEN 'persons in the live model alone'
                WHEN l.id IS NULL THEN 'persons in the shadow alone'
                WHEN l.cpf <> s.cpf THEN 'persons with another cpf'
                WHEN l.total <> s.total THEN 'persons with another total'
                ELSE 'persons with another time of creation' END AS what
    FROM same d LEFT JOIN score.person l ON l.id = d.id LEFT JOIN score_shadow.person s ON s.id = d.id
    WHERE (l.id, l.cpf, l.total, l.created_at) IS DISTINCT FROM (s.id, s.cpf, s.total, s.created_at)
    UNION ALL
    SELECT coalesce(l.person_id, s.person_id),
           CASE WHEN s.id IS NULL THEN 'entries in the live model alone'
                WHEN l.id IS NULL THEN 'entries in the shadow alone'
                ELSE 'entries with another content' END
    FROM (SELECT e.* FROM same d JOIN score.entry e ON e.person_id = d.id) l
         FULL JOIN (SELECT e.* FROM same d JOIN score_shadow.entry e ON e.person_id = d.id) s ON l.id = s.id
    WHERE (l.id, l.person_id, l.type, l.value, l.score, l.created_at)
          IS DISTINCT FROM (s.id, s.person_id, s.type, s.value, s.score, s.created_at))
SELECT (SELECT count(*) FROM version WHERE live IS DISTINCT FROM shadow),
       (SELECT coalesce(json_agg(k ORDER BY k.what DESC), '[]')
        FROM (SELECT what, count(*) AS count, (array_agg(DISTINCT person))[1:5] AS persons
              FROM kind GROUP BY what) k)";

/// What differs of the persons that a comparison has remembered.
pub(super) async fn difference(
    conn: &mut PgConnection,
    comparison: &Comparison<'_>,
) -> sqlx::Result<Difference> {
    let (apart, Json(kinds)): (i64, Json<Vec<DifferenceClass>>) = sqlx::query_as(KINDS)
        .bind(comparison.live)
        .bind(comparison.shadow)
        .bind(events::AGGREGATE_PERSON)
        .fetch_one(conn)
        .await?;
    Ok(Difference { kinds, apart })
}
